"""python -m finetune.refresh: the code in a folder, and nothing but the code."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from tiny import small_checkpoint, tiny_later_qwen

from finetune import refresh
from finetune.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "tests" / "saved_folder.py"
# what the code of a folder did that was saved before transformers 5.24
OLD = "class QWenLMHeadModel:\n    def forward(self, past_key_values=None, **kwargs): ...\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model folder as a run saves it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    subprocess.run([warm.python(), PROGRAM, "make", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """The proof takes seconds; two tests are about it."""
    if "by_itself" not in request.node.name and "not_put_there" not in request.node.name:
        monkeypatch.setattr(refresh, "prove", lambda *_: None)


@pytest.fixture
def old(saved, tmp_path):
    """The same with code of other days, published files beside it, and a weight file that is a link, as in a hub's cache."""
    folder = tmp_path / "old model"
    folder.mkdir()
    for path in saved.iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        elif path.name not in ("compat.py", "versions.py"):
            (folder / path.name).write_bytes(path.read_bytes())
    blob = tmp_path / "blob"
    blob.write_text(OLD)
    (folder / "modeling_qwen.py").unlink()
    (folder / "modeling_qwen.py").symlink_to(blob)
    (folder / "cpp_kernels.py").write_text("import nothing_of_the_kind\n")
    return folder


def digests(folder: Path) -> dict:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_the_code_and_nothing_else(saved, old, capsys):
    before = digests(old)
    changed = refresh.refresh(old)
    assert changed == ["compat.py", "modeling_qwen.py", "versions.py"]
    after = digests(old)
    assert {name for name in after if after[name] != before.get(name)} == set(changed)
    assert {name: after[name] for name in digests(saved)} == digests(saved)
    assert (old.parent / "blob").read_text() == OLD, "what a link led to is somebody else's"
    shown = capsys.readouterr().err
    assert "the weights are as they were" in shown and "left: cpp_kernels.py" in shown
    assert refresh.refresh(old) == [] and "this toolkit's already" in capsys.readouterr().err


@pytest.mark.slow
def test_the_refreshed_folder_answers_by_itself(saved, old, tmp_path):
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, PROGRAM, "answer"]
    first = subprocess.run([*command, old], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert first.returncode != 0
    program = [sys.executable, "-m", "finetune.refresh", old]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr.count("\n") == 2, done.stderr
    answers = [
        subprocess.run([*command, folder], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for folder in (saved, old)
    ]
    assert answers[0] == answers[1] and "int8 cache" in answers[0]


def test_settings_that_name_no_code_or_a_hubs(old):
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((old / name).read_text())
        settings["auto_map"] = {"AutoConfig": "Qwen/Qwen-7B-Chat--configuration_qwen.QWenConfig", "AutoModel": "x.Y"}
        (old / name).write_text(json.dumps(settings))
    assert {"config.json", "tokenizer_config.json"} <= set(refresh.refresh(old))
    settings = json.loads((old / "tokenizer_config.json").read_text()) | {"auto_map": None}
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    assert refresh.refresh(old) == ["tokenizer_config.json"]
    assert json.loads((old / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        "AutoModel": "x.Y",
    }


@pytest.fixture
def adapter(saved, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("tokenizer_config.json", "qwen.tiktoken"):
        (folder / name).write_bytes((saved / name).read_bytes())
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_an_adapter_has_the_tokenizers_code_alone(adapter):
    assert refresh.refresh(adapter) == ["compat.py", "tokenization_qwen.py", "versions.py"]
    (adapter / "qwen.tiktoken").unlink()
    with pytest.raises(UserError, match="an adapter without first-generation Qwen's tokenizer carries no code"):
        refresh.refresh(adapter)


def test_dry_run_changes_nothing(old, capsys):
    before = digests(old)
    assert refresh.refresh(old, dry_run=True) and digests(old) == before
    assert "would be replaced or added: compat.py" in capsys.readouterr().err


def interrupted(folder: Path, monkeypatch, at: int) -> None:
    """A refresh that is killed before its renaming number `at`."""
    calls, move = [], os.replace

    def dies(source, target):
        if len(calls) == at:
            raise KeyboardInterrupt
        calls.append(target)
        move(source, target)

    monkeypatch.setattr(refresh.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        refresh.refresh(folder)
    monkeypatch.setattr(refresh.os, "replace", move)


@pytest.mark.parametrize("at", range(5))
def test_interrupted_it_does_not_load_and_is_done_again(old, monkeypatch, capsys, at):
    """Killed between any two files: no config.json, so nobody opens a mixture; the same command goes on."""
    before = digests(old)
    interrupted(old, monkeypatch, at)
    assert (old / "config.json").is_file() == (at == 0)
    left = digests(old)
    refresh.refresh(old, dry_run=True)
    assert digests(old) == left and "would be replaced" in capsys.readouterr().err
    with monkeypatch.context() as killed_again:

        def dies(*_):
            raise KeyboardInterrupt

        killed_again.setattr(refresh, "prove", dies)
        with pytest.raises(KeyboardInterrupt):
            refresh.refresh(old)
    assert (old / "config.json").is_file() == (at == 0)
    refresh.refresh(old)
    after = digests(old)
    assert after["config.json"] == before["config.json"] and not list(old.glob(".*")) and not list(old.glob("*.refreshing"))
    assert refresh.refresh(old) == []


def test_an_adapters_refresh_is_gone_on_with_too(adapter, monkeypatch):
    interrupted(adapter, monkeypatch, 1)
    assert not (adapter / "tokenizer_config.json").is_file()
    assert refresh.refresh(adapter) == ["compat.py", "tokenization_qwen.py", "versions.py"]
    assert (adapter / "tokenizer_config.json").is_file() and refresh.refresh(adapter) == []


def test_two_at_once(old, capsys):
    with refresh.only_one(old), pytest.raises(UserError, match="another refresh is changing it now"):
        refresh.refresh(old)
    assert refresh.refresh(old)


def test_somebody_elses_files_stay(tmp_path):
    folder = tmp_path / "llama"
    folder.mkdir()
    for name in (".notes.new", "tokenizer_config.json.refreshing"):
        (folder / name).write_text("mine")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    before = digests(folder)
    for dry_run in (True, False):
        with pytest.raises(UserError, match="not a first-generation Qwen"):
            refresh.refresh(folder, dry_run)
    assert digests(folder) == before


@pytest.mark.slow
def test_code_that_does_not_open_the_folder_is_not_put_there(old):
    settings = json.loads((old / "config.json").read_text()) | {"kv_channels": 7}
    (old / "config.json").write_text(json.dumps(settings))
    before = digests(old)
    with pytest.raises(UserError, match="does not open it .*kv_channels 7.* - nothing was changed"):
        refresh.refresh(old)
    assert digests(old) == before


def test_what_has_no_such_code(tmp_path, capsys):
    later = tiny_later_qwen(tmp_path / "later")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    for folder, what in ((later, "part of transformers"), ("nowhere", "no such folder"), ("empty", "neither"), ("other", "llama")):
        with pytest.raises(UserError, match=what):
            refresh.refresh(tmp_path / folder)
    with pytest.raises(SystemExit) as stopped:
        refresh.main([str(tmp_path / "nowhere"), str(tmp_path / "other")])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("error: ") == 2  # all of them together


def test_a_base_checkpoint_with_no_code_gets_some(tmp_path):
    base = small_checkpoint(tmp_path / "base")
    assert {"modeling_qwen.py", "compat.py", "chatml.py", "tokenization_qwen.py"} <= set(refresh.refresh(base))
