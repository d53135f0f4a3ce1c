"""Which tensors count as finite: by their elements, not by a sum that may overflow."""

import math

import pytest
import torch

from finetune.folders import finite

KINDS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_numbers_whose_sum_overflows_are_finite(dtype):
    large = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert finite.is_finite(large) and finite.is_finite(-large)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_no_number_is_found(dtype, value):
    tensor = torch.ones(5, 7, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        tensor[3, 5] = value
    assert not finite.is_finite(tensor) and not finite.is_finite(tensor[3, 5])
    pairs = [("whole", torch.ones(3)), ("broken", tensor), ("broken too", tensor)]
    assert finite.first_not_finite(pairs) == "broken" and finite.first_not_finite(pairs[:1]) is None


def test_infinities_of_both_signs_do_not_cancel():
    assert not finite.is_finite(torch.tensor([math.inf, -math.inf]))


@pytest.mark.parametrize("tensor", [
    torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.bool), torch.empty(0), torch.empty(3, device="meta"),
    torch.ones(3).to(torch.float8_e4m3fn),
], ids=["whole numbers", "bool", "empty", "meta", "one byte"])  # fmt: skip
def test_what_cannot_be_looked_at_counts_as_finite(tensor):
    assert finite.is_finite(tensor)
