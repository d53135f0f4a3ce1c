"""The table of methods, weights and engines: complete, and every refusal names a way out."""

import itertools

import pytest
from command_lines import found, only, read, write_config

from finetune.flags import methods


def cells():
    return itertools.product(methods.METHODS, methods.WEIGHTS, methods.ENGINES)


def test_each_cell_works_or_has_a_line():
    """The figures of the README's table: one look tells when a rule forbids more than it meant to."""
    works = {cell for cell in cells() if not list(methods.refused([cell[0]], *cell[1:]))}
    plain = {(method, engine) for method, weights, engine in works if weights == methods.PLAIN}
    assert {method for method, engine in plain if engine == methods.ONE} == set(methods.METHODS)
    assert len(plain) == 11 * 6 - 5 - 1  # but for weights in bf16 under five engines, and tied rows under FSDP2
    over_gptq = {(method, engine) for method, weights, engine in works if weights == methods.GPTQ}
    whole = (methods.ONE, methods.DDP, methods.ZERO1, methods.ZERO2)
    kinds = (methods.LORA, methods.ROWS, methods.EMBEDDINGS, methods.TIED_ROWS, methods.RSLORA, methods.LORA_PLUS)
    assert over_gptq == set(itertools.product(kinds, whole))
    over_nf4 = {(method, engine) for method, weights, engine in works if weights == methods.NF4}
    assert over_nf4 == over_gptq | set(itertools.product((methods.DORA, methods.BIASES), whole))


def test_every_refusal_says_what_to_do():
    lines = {line for cell in cells() for line in methods.refused([cell[0]], *cell[1:])}
    assert lines == {rule.line for rule in methods.RULES}  # no rule without a cell
    for line in lines:
        why, remedy = line.split(" - ")
        assert why and any(word in remedy for word in ("use ", "add ", "give ", "leave out", "train in")), line


GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}}


@pytest.mark.parametrize(
    "flags,expected",
    [
        ("--q_lora --use_dora", "LoRA, DoRA over GPTQ weights on one process: DoRA needs the weights' norms"),
        ("--q_lora --init_lora_weights pissa --lora_dropout 0", "LoRA, PiSSA over GPTQ weights on one process: PiSSA"),
        ("--q_lora --lora_bias all", "LoRA, LoRA + biases over GPTQ weights on one process: the biases of GPTQ layers"),
        (
            "--q_lora --deepspeed ds_config_zero3.json",
            "LoRA over GPTQ weights on ZeRO-3: ZeRO-3 cannot shard GPTQ weights",
        ),
    ],
)
def test_over_a_quantized_folder(world, flags, expected):
    write_config(world.model, **GPTQ)
    lines = found(world, "--train_embeddings", "none", *flags.split())
    assert [line for line in lines if line.startswith(expected)], lines


@pytest.mark.parametrize(
    "flags,expected",
    [
        ("--q_lora --quant nf4 --deepspeed ds_config_zero3.json", "NF4 weights cannot be sharded"),
        ("--q_lora --quant nf4 --use_dora --fsdp True", "NF4 weights cannot be sharded"),
        (
            "--use_lora --train_tokens <|extra_0|> --fsdp True",
            "accelerate cannot shard a matrix that is embedding and head",
        ),
    ],
)
def test_over_plain_weights(world, flags, expected):
    if expected.startswith("accelerate"):
        write_config(world.model, tie_word_embeddings=True)
    line = only(world, "--train_embeddings", "none", *flags.split())
    assert line.split(": ", 1)[1].startswith(expected), line


@pytest.mark.parametrize(
    "flags,expected",
    [
        ("--use_rslora --loraplus_lr_ratio 4", [methods.RSLORA, methods.LORA_PLUS]),
        ("--train_tokens <|extra_0|>", [methods.ROWS]),
        ("", []),
    ],
)
def test_what_a_run_combines(world, flags, expected):
    asked = read(world, "--use_lora", *flags.split())
    assert methods.of_run(asked, embeddings="none") == [methods.LORA, *expected]


def test_what_works_is_not_refused(world):
    assert found(world, "--use_lora", "--loraplus_lr_ratio", "4", "--use_rslora", "--fsdp", "True") == []
    assert found(world, "--q_lora", "--quant", "nf4", "--use_dora", "--deepspeed", "ds_config_zero2.json") == []
    assert found(world, "--use_lora", "--train_embeddings", "chat_rows", "--deepspeed", "ds_config_zero3.json") == []
