"""Where a run is logged and pushed to is there, or one line says what is missing."""

import types

import huggingface_hub
import pytest
from command_lines import found, only
from transformers.integrations import integration_utils

from finetune.flags import services


def test_reporters_are_those_of_transformers():
    assert {*services.REPORTERS} == {*integration_utils.INTEGRATION_TO_CALLBACK}


def test_a_reporter_that_is_not_installed(world, monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    assert only(world, "--report_to", "comet_ml") == (
        "--report_to comet_ml: unknown or not installed - pip install comet-ml; here are tensorboard, none, all"
    )
    assert "known are azure_ml, " in only(world, "--report_to", "tensorboart")
    assert found(world, "--report_to", "tensorboard") == []


@pytest.mark.parametrize("word", services.ALONE)
def test_words_that_stand_alone(world, word):
    assert only(world, "--report_to", "tensorboard", word).startswith(f"--report_to tensorboard {word}: {word} stands alone - ")


def test_wandb_without_a_key(world, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["wandb"])
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert only(world, "--report_to", "wandb").startswith("--report_to wandb: no key to log in with - wandb login, or ")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert found(world, "--report_to", "wandb") == []
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert found(world, "--report_to", "wandb") == []


def pushing(world, *flags: str) -> list[str]:
    return found(world, "--push_to_hub", *flags)


def test_pushing_without_connection_or_token(world, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert pushing(world) == [
        "--push_to_hub: HF_HUB_OFFLINE is set, so there is no connection to the hub - unset it, or leave this flag out"
    ]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert pushing(world)[0].startswith("--push_to_hub: no token - hf auth login, HF_TOKEN in the environment, ")


def test_pushing_with_a_token(world, monkeypatch):
    asked = []

    def whoami(token):
        asked.append(token)
        if token == "wrong-one":
            raise OSError("401 for wrong-one")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "whoami", whoami)
    assert pushing(world, "--hub_token", "right-one") == [] and asked == ["right-one"]
    (line,) = pushing(world, "--hub_token", "wrong-one")
    assert line.startswith("--push_to_hub: the hub cannot be reached, or does not know the token (OSError: 401 for ...) - ")
    assert "wrong-one" not in line
    monkeypatch.setenv("RANK", "1")  # the first rank asks for all
    assert list(services.pushing(types.SimpleNamespace(training=types.SimpleNamespace(push_to_hub=True)))) == []
