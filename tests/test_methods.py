"""The table of methods, weights and engines: complete, and every refusal names a way out."""

import itertools

import pytest
from command_lines import make_world, only

from finetune import methods


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def cells():
    return itertools.product(methods.METHODS, methods.WEIGHTS, methods.ENGINES)


def test_each_cell_works_or_has_a_line():
    """The figures of the README's table: one look tells when a rule forbids more than it meant to."""
    works = {cell for cell in cells() if not list(methods.refused([cell[0]], *cell[1:]))}
    plain = {(method, engine) for method, weights, engine in works if weights == methods.PLAIN}
    assert {method for method, engine in plain if engine == methods.ONE} == set(methods.METHODS)
    assert len(plain) == 7 * 6 - 5 - 1  # but for weights in bf16 under five engines, and PiSSA under ZeRO-3
    over_gptq = {(method, engine) for method, weights, engine in works if weights == methods.GPTQ}
    whole = (methods.ONE, methods.DDP, methods.ZERO1, methods.ZERO2)
    assert over_gptq == set(itertools.product((methods.LORA, methods.ROWS, methods.EMBEDDINGS), whole))
    over_nf4 = {(method, engine) for method, weights, engine in works if weights == methods.NF4}
    assert over_nf4 == over_gptq | {(methods.DORA, engine) for engine in whole}


def test_every_refusal_says_what_to_do():
    lines = {line for cell in cells() for line in methods.refused([cell[0]], *cell[1:])}
    assert lines == {rule.line for rule in methods.RULES}  # no rule without a cell
    for line in lines:
        why, remedy = line.split(" - ")
        assert why and any(word in remedy for word in ("use ", "add ", "give ", "leave out", "train in")), line
