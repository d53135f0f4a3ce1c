"""Every file of a base and of an adapter, damaged in every way: what reads the folder ends in lines with exit code 2, or does its work.

The quick part asks (finetune.ask) over the files that are read first; the rest, merging and exporting are slow. Everything happens in this process.
"""

import contextlib
import io
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import small_checkpoint, tiny_later_qwen

from finetune.ask import __main__ as ask
from finetune.export import __main__ as export
from finetune.folders import fingerprints
from finetune.merge import __main__ as merge
from finetune.model import loading
from finetune.steps import saving

LAYERS = {"qwen": ["c_attn", "w1"], "qwen2": ["q_proj", "up_proj"]}
HARMLESS = ("README.md", ".py")  # nobody here reads these


def make(place: Path, kind: str) -> tuple[Path, Path]:
    """(a base, an adapter on it with its record)"""
    base = small_checkpoint(place / "base") if kind == "qwen" else tiny_later_qwen(place / "base", kind)
    tokenizer, model = loading.load_tokenizer(base), loading.load_weights(base, torch.float32, False)
    settings = LoraConfig(r=4, target_modules=LAYERS[kind], init_lora_weights=False, task_type="CAUSAL_LM")
    lora = get_peft_model(model, settings).eval()
    loading.set_chat_settings(lora, tokenizer)
    record = {"base": {"name": str(base), "fingerprint": fingerprints.of_model(base)}, "method": {}, "data": {"system": None}}
    saving.save_final(lora, tokenizer, place / "adapter", record=record)
    return base, place / "adapter"


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole"), "qwen2")


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def quick_damages(content: bytes) -> dict[str, bytes | None]:
    """{what happened: the content then; None for a file that is gone}"""
    found = {"emptied": b"", "cut": content[: len(content) // 2], "missing": None, "flipped": flipped(content, min(20, len(content) - 1))}
    if content.startswith((b'{\n', b'{"')):  # JSON; a template of half a million letters would be a prompt of as many
        found |= {"nested": b'{"a":' * 100_000, "a list": b"[1]", "not UTF-8": b'{"\xe9": 1}'}
    return found


def all_damages(content: bytes) -> dict[str, bytes | None]:
    """The same, and a bit flipped at 12 more places."""
    places = random.Random(len(content)).sample(range(len(content)), min(12, len(content)))
    return quick_damages(content) | {f"flipped at {place}": flipped(content, place) for place in places}


def outcome(program, arguments: list) -> tuple[int, str]:
    """(exit code, what was said)"""
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            program.main([str(word) for word in arguments])
        except SystemExit as stop:
            code = stop.code
    return code, said.getvalue()


def go_over(folder: Path, damages, program, arguments, only=lambda path: True) -> list[str]:
    """Damages each file in turn; returns the cases that end in anything but lines or success."""
    wrong = []
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.endswith(HARMLESS) and only(path)):
        content = path.read_bytes()
        for what, now in damages(content).items():
            path.unlink() if now is None else path.write_bytes(now)
            code, said = outcome(program, arguments)
            lines = [line for line in said.splitlines() if line.startswith("error: ")]
            if code not in (0, 2) or "Traceback" in said or (code == 2) != bool(lines) or any(len(line) > 700 for line in lines):
                wrong.append(f"{path.name} {what}: {code} {said[-300:]}")
            path.write_bytes(content)
    return wrong


# ---- every file


def test_asking_with_damaged_settings_and_weights(later):
    """The files that are read first, in the ways that end before weights are loaded."""
    base, adapter = later
    names = ("config.json", "adapter_config.json", "model.safetensors", "adapter_model.safetensors", "training.json", "tokenizer.json")

    def damages(content: bytes) -> dict:
        return {what: now for what, now in quick_damages(content).items() if what not in ("missing", "flipped")}

    words = ["hi", "--max_new_tokens", 1]
    assert go_over(adapter, damages, ask, [adapter, *words, "--base", base], lambda path: path.name in names[:5]) == []
    assert go_over(base, damages, ask, [base, *words], lambda path: path.name in names) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_asking_with_every_file(kind, tmp_path):
    base, adapter = make(tmp_path, kind)
    asked = ["hi", "--max_new_tokens", 1]
    assert go_over(base, quick_damages, ask, [base, *asked]) == []
    assert go_over(adapter, quick_damages, ask, [adapter, *asked, "--base", base]) == []


@pytest.mark.slow
def test_asking_with_bits_flipped_all_over(later):
    base, adapter = later
    asked = ["hi", "--max_new_tokens", 1]
    assert go_over(base, all_damages, ask, [base, *asked]) == []
    assert go_over(adapter, all_damages, ask, [adapter, *asked, "--base", base]) == []


@pytest.mark.slow
def test_merging_what_is_damaged(later, tmp_path):
    base, adapter = later

    class Merge:
        @staticmethod
        def main(words):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            merge.main(words)

    def damages(content: bytes) -> dict:
        return {what: now for what, now in quick_damages(content).items() if what in ("cut", "flipped", "missing")}

    for folder in (base, adapter):
        read = [path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja")]
        arguments = [adapter, tmp_path / "out", "--base", base]
        assert go_over(folder, damages, Merge, arguments, lambda path: path.name in read) == []  # noqa: B023


@pytest.mark.slow
def test_exporting_what_is_damaged(tmp_path):
    base = small_checkpoint(tmp_path / "base")

    class Export:
        @staticmethod
        def main(words):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            export.main(words)

    assert go_over(base, quick_damages, Export, [base, tmp_path / "out", "--to", "qwen2"]) == []


# ---- what must not pass


def test_a_changed_byte_of_an_adapter_is_refused_everywhere(later, tmp_path):
    base, adapter = later
    for name in ("adapter_model.safetensors", "adapter_config.json", "generation_config.json"):
        path = adapter / name
        content = path.read_bytes()
        path.write_bytes(content.replace(b": ", b" :", 1) if name.endswith("json") else flipped(content, len(content) - 5))
        for program, words in ((ask, [adapter, "hi", "--base", base]), (merge, [adapter, tmp_path / "out", "--base", base])):
            code, said = outcome(program, words)
            assert code == 2 and f"{adapter}: {name} is not as it was written (another SHA-256 than in training.json) - copy it" in said
        path.write_bytes(content)
    assert outcome(ask, [adapter, "hi", "--base", base, "--max_new_tokens", 1])[0] == 0


def test_an_adapter_of_other_hands_has_no_hashes(later, tmp_path):
    base, adapter = later
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter/training.json").unlink()
    assert outcome(ask, [tmp_path / "adapter", "hi", "--base", base, "--max_new_tokens", 1])[0] == 0
