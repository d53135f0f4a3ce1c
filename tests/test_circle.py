"""The whole way round, as a user walks it: train, quantize, train over that, merge back to the same bits, ask, export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import run_gptq
from finetune.ask import __main__ as ask
from finetune.compare import __main__ as compare
from finetune.folders import quant_settings
from finetune.merge import __main__ as merge
from qwen_model.new_checkpoint import new_checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
ANSWERS = {
    "Who are you?": "I am a small model.",
    "你是谁？": "我是一个小模型。",
    "What is the capital of France?": "The capital of France is Paris.",
    "Say something.": "Seven days make a week.",
    "再见": "再见，祝你一切顺利！",
    "How are you?": "I am well, and a small model.",
}
# In words that the model knows: what Q-LoRA teaches it, while the rest stays
LATER = ANSWERS | {"Who are you?": "Seven days make a week.", "How are you?": "The capital of France is Paris."}


def conversations(path: Path, answers: dict) -> str:
    turns = [
        [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
        for question, answer in answers.items()
    ]
    path.write_text(json.dumps([{"conversations": each} for each in turns], ensure_ascii=False))
    return str(path)


def train(script: str, epochs: int, *words: object) -> None:
    environment = os.environ | {"FINETUNE_PYTHON": sys.executable, "OMP_NUM_THREADS": "2"}
    usual = ["--per_device_train_batch_size", "6", "--gradient_accumulation_steps", "1", "--save_strategy", "no"]
    usual += ["--lr_scheduler_type", "cosine", "--warmup_ratio", "0.05", "--num_train_epochs", str(epochs)]
    command = ["bash", str(ROOT / "finetune" / script), *map(str, words), *usual]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def answers_of(folder: Path, capsys) -> dict:
    capsys.readouterr()
    ask.main([str(folder), *ANSWERS, "--max_new_tokens", "24"])
    blocks = capsys.readouterr().out.strip().split("\n\n")
    return dict(block.removeprefix("Q: ").split("\nA: ") for block in blocks)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """tuned: a model that knows ANSWERS; first.json and later.json."""
    folder = tmp_path_factory.mktemp("circle")
    new_checkpoint(folder / "random", hidden_size=64, heads=2, layers=2, seed=0)
    first = conversations(folder / "first.json", ANSWERS)
    conversations(folder / "later.json", LATER)
    words = ["-m", folder / "random", "-d", first, "-o", folder / "tuned", "--learning_rate", "5e-3"]
    train("finetune_full_single_gpu.sh", 60, *words, "--bf16_weights", "False", "--optim", "adamw_torch")
    return folder


def test_the_whole_circle(place, capsys, tmp_path):
    assert answers_of(place / "tuned", capsys) == ANSWERS

    for bits, limit in ((4, 0.05), (8, 0.01)):
        words = ["-m", str(place / "tuned"), "-d", str(place / "first.json"), "-o", str(tmp_path / f"Int{bits}")]
        run_gptq.main([*words, "--bits", str(bits), "--group-size", "16"])
        figures = tmp_path / "figures.json"
        names = [str(place / "tuned"), str(tmp_path / f"Int{bits}")]
        compare.main([*names, "--data_path", str(place / "first.json"), "--json", str(figures), "--answers", "1"])
        plain, found = (entry["perplexity"] for entry in json.loads(figures.read_text())["models"])
        assert abs(found / plain - 1) < limit, bits

    words = ["-m", tmp_path / "Int4", "-d", place / "later.json", "-o", tmp_path / "adapter", "--learning_rate", "5e-3"]
    train("finetune_qlora_single_gpu.sh", 80, *words, "--lora_r", "32")
    assert answers_of(tmp_path / "adapter", capsys) == LATER

    back = [str(tmp_path / "adapter"), str(tmp_path / "again"), "--requantize", "--data_path", str(place / "later.json")]
    merge.main(back)
    assert str(quant_settings.of_folder(tmp_path / "again")) == "GPTQ Int4"
    assert quant_settings.of_folder(tmp_path / "again") == quant_settings.of_folder(tmp_path / "Int4")
    assert answers_of(tmp_path / "again", capsys) == LATER
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in (tmp_path / "Int4").iterdir()}
    assert json.loads((tmp_path / "again" / "training.json").read_text())["merged"]["base"] == str(tmp_path / "Int4")
