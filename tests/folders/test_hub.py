"""Models that are fetched: from which hub, which files, and what is said when that fails."""

import sys
from types import ModuleType

import huggingface_hub
import pytest
from command_lines import write_adapter

from finetune.errors import UserError
from finetune.folders import adapter_base, hub


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Stands in for both hubs: what they were asked for, as (hub, id, settings)."""
    calls = []

    def download_from(hub):
        def snapshot_download(name, **settings):
            calls.append((hub, name, settings))
            if "missing" in name:
                raise OSError(28, "No space left\non device")
            return str(tmp_path)

        return snapshot_download

    stub = ModuleType("modelscope")
    stub.snapshot_download = download_from("ModelScope")
    monkeypatch.setitem(sys.modules, "modelscope", stub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download_from("Hugging Face"))
    monkeypatch.delenv("USE_MODELSCOPE", raising=False)
    return calls


@pytest.mark.parametrize("switch,source", [(None, "Hugging Face"), ("0", "Hugging Face"), ("1", "ModelScope")])
def test_an_id_is_fetched_without_code(asked, tmp_path, monkeypatch, switch, source):
    if switch:
        monkeypatch.setenv("USE_MODELSCOPE", switch)
    assert hub.find_folder("Qwen/Qwen-7B", cache_dir="here") == tmp_path
    ((where, name, settings),) = asked
    assert (where, name, settings["cache_dir"]) == (source, "Qwen/Qwen-7B", "here")
    assert "*.safetensors" in settings["allow_patterns"]
    assert not any(pattern.endswith((".py", "*")) for pattern in settings["allow_patterns"])


def test_a_folder_is_not_asked_for(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("USE_MODELSCOPE", "1")
    assert hub.find_folder(str(tmp_path)) == tmp_path and asked == []


def test_the_base_of_an_adapter_is_fetched_from_there(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("USE_MODELSCOPE", "1")
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path="Qwen/missing")
    why = r"\(ModelScope: OSError: .*No space left on device\)"
    with pytest.raises(UserError, match=f"its base Qwen/missing was not found {why} - give it with --base"):
        adapter_base.find(adapter)
    assert asked[0][:2] == ("ModelScope", "Qwen/missing")


def test_failures_are_one_line(asked, monkeypatch):
    reason = r"\(OSError: .Errno 28. No space left on device\) - mend that, or give the folder"
    with pytest.raises(UserError, match="could not be fetched from the Hugging Face Hub " + reason):
        hub.find_folder("Qwen/missing")
    monkeypatch.setenv("USE_MODELSCOPE", "1")
    with pytest.raises(UserError, match="could not be fetched from ModelScope " + reason):
        hub.find_folder("Qwen/missing")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(UserError) as error:
        hub.find_folder("Qwen/Qwen-7B")
    assert error.value.findings == [
        "USE_MODELSCOPE=1: the package modelscope is not installed - pip install modelscope"
    ]
