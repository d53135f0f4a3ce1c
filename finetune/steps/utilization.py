"""Model FLOP utilization (Chowdhery et al., PaLM, 2022, appendix B): the work that a step needs, over what the device can do.

The work is that of the matrices: 2 FLOP a weight and token forward, 2 for the input's gradient, 2 for a weight's own where it trains.
The head counts for the tokens that are learned, since no other is projected. Attention itself, norms and whatever is computed again
do not count. What the device can do is measured: large products of the run's own type.
"""

import time

import torch

from ..distributed.engines import size_of
from ..quantized import quantized_model

SIDES = {"cuda": 8192, "cpu": 1024}  # rows and columns of the products that are timed
TIMES = 5


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of the best of some square products. Waits for the device; for before the first step."""
    side = SIDES["cpu" if device.type == "cpu" else "cuda"]
    with torch.no_grad():
        one, other = (torch.ones((side, side), dtype=dtype, device=device) for _ in range(2))
        seconds = min(timed(torch.mm, one, other) for _ in range(TIMES))
    return 2 * side**3 / seconds


def timed(call, one, *others) -> float:
    begin = time.perf_counter()
    call(one, *others)
    if one.is_cuda:
        torch.cuda.synchronize(one.device)
    return time.perf_counter() - begin


class Work:
    """The FLOP of a step, by the weights of a model: those of the blocks, and those of the head."""

    def __init__(self, model):
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        apart = {id(p) for module in (embedding, head) for p in module.parameters()}  # they may be the same
        self.blocks = per_token([p for p in model.parameters() if id(p) not in apart]) + 4 * quantized_model.packed_away(model)
        self.head = per_token(list(head.parameters()))

    def of(self, tokens: int, supervised: int) -> float:
        """The FLOP of so many tokens, of which so many are learned."""
        return self.blocks * tokens + self.head * supervised


def per_token(parameters: list) -> int:
    """FLOP of a token that goes through all of them, forward and backward."""
    return 4 * sum(map(size_of, parameters)) + 2 * sum(size_of(p) for p in parameters if p.requires_grad)
