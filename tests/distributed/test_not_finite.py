"""Numbers that are none, on two ranks: each engine stops on both, in one line, and what was saved before stays as it was."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import warm
from safetensors.torch import load_file, save_file
from tiny import tiny_later_qwen

from finetune.writing import durable

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
TORCHRUN = ROOT / "finetune" / "distributed" / "torchrun.py"
ENGINES = {
    "DDP": [],
    "ZeRO-2": ["--deepspeed", str(ROOT / "finetune" / "ds_config_zero2.json")],
    "ZeRO-3": ["--deepspeed", str(ROOT / "finetune" / "ds_config_zero3.json")],
    "FSDP2": ["--fsdp", "True"],
}
RARE, ODD = "\N{SECTION SIGN}", 3  # a character that stands in one sample, and its number; it is one of step 2
CAUSES = {  # base; flags; what the line says of the loss and the samples
    "a learning rate without measure": ("base", ["--learning_rate", "1e6"], r"\(its loss: [0-9.e+]+\).* samples: \S* 2, 3, 5, 6, 9, 11 "),
    "one rank's sample": ("brittle", ["--use_lora", "--lora_dropout", "0"], rf"\(its loss: nan, of rank [01]\).* samples: \S* ({ODD}, \d+, \d+|\d+, {ODD}, \d+) "),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("not-finite")
    tiny_later_qwen(folder / "base")
    make_brittle(tiny_later_qwen(folder / "brittle"))
    talks = [[{"from": "user", "value": f"a {i}"}, {"from": "assistant", "value": f"{2 * i}. " * (i % 4 + 1)}] for i in range(12)]
    talks[ODD - 1][0]["value"] += RARE
    (folder / "talks.json").write_text(json.dumps([{"conversations": turns} for turns in talks]))
    return folder


def make_brittle(folder: Path) -> None:
    """A model whose weights are finite, and whose numbers are, but for texts with the rare character.

    The first channel is 0 for all tokens but that one; the first norm makes it 1e30 times larger, and a query times a key is infinite.
    """
    from transformers import AutoTokenizer

    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 0] = 0
    embedding[AutoTokenizer.from_pretrained(folder)(RARE)["input_ids"][-1], 0] = 1
    tensors["model.layers.0.input_layernorm.weight"][0] = 1e30
    for name in ("q_proj", "k_proj"):
        tensors[f"model.layers.0.self_attn.{name}.weight"][:, 0] = 1
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("engine", ENGINES)
def test_both_ranks_stop_in_one_line(place, engine, cause):
    """With --save_total_limit 1: the checkpoint of step 1 is the last good one."""
    model, flags, told = CAUSES[cause]
    out = place / f"{cause}, {engine}".replace(" ", "_")
    words = ["-m", place / model, "-d", place / "talks.json", "-o", out, "--num_train_epochs", "3", "--save_steps", "1"]
    words += ["--per_device_train_batch_size", 3, "--lr_scheduler_type", "constant", "--save_total_limit", "1", "--use_cpu", "True"]
    words += ["--model_max_length", "256", "--logging_steps", "1", *flags, *ENGINES[engine]]
    command = [warm.python(), TORCHRUN, "--nproc_per_node", 2, ROOT / "finetune.py", *words]
    own = {"FINETUNE_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 120}
    done = subprocess.run([str(word) for word in command], env=os.environ | own, **pipes)

    assert done.returncode == 1, done.stdout
    assert done.stdout.count("error:") == 1 and "Traceback" not in done.stdout, done.stdout
    [line] = [line for line in re.split("[\r\n]", done.stdout) if line.startswith("error: ")]  # not behind a progress bar
    begin = rf"error: step 2: the norm of its gradient is (nan|inf) {told}- lower --learning_rate "
    assert re.match(begin, line) and f"the last good checkpoint is {out / 'checkpoint-1'} " in line, line

    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"] and not list(out.glob(".unfinished*"))
    assert not durable.verify(out / "checkpoint-1")
    saved = [load_file(path) for path in (out / "checkpoint-1").glob("*model.safetensors")]
    assert len(saved) == 1 and all(torch.isfinite(tensor).all() for tensor in saved[0].values())
    assert not list(out.glob("*.safetensors")) and not (out / "config.json").exists()
    for file in (out / "training_log.jsonl", out / "checkpoint-1" / "trainer_state.json"):
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(text, parse_constant=lambda word: pytest.fail(f"{file}: {word}"))
