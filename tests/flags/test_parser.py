"""Our parser makes of dataclasses what transformers' makes of them; and their flags are read in its source as they are."""

import argparse
import dataclasses

import pytest
from transformers import HfArgumentParser

from finetune.compat import on_transformers
from finetune.flags.definitions import DataArguments, LoraArguments, ModelArguments, TrainingFlags
from finetune.flags.parser import Parser
from finetune.flags.training_args import TrainingArguments

KINDS = (ModelArguments, DataArguments, LoraArguments, TrainingArguments)
SHAPE = ("option_strings", "dest", "nargs", "const", "required")


def of(action: argparse.Action, names) -> dict:
    return {name: getattr(action, name) for name in names}


def read(kind, text: str):
    """What a flag's type makes of a word, or the kind of its complaint."""
    try:
        return text if kind is None else kind(text)
    except Exception as error:
        return type(error), str(error)


def test_flags_are_those_of_transformers_parser():
    ours, theirs = Parser(KINDS)._actions, HfArgumentParser(KINDS, add_help=False)._actions
    for own, other in zip(ours, theirs, strict=True):
        names = (*SHAPE, "default", "help", "metavar", "choices")
        assert of(own, names) == of(other, names)
        for text in ("1", "yes", "NO", "1e-3", "steps", "word", '{"a": 1}'):
            assert read(own.type, text) == read(other.type, text), (own.dest, text)


@pytest.fixture(scope="module")
def from_source():
    return on_transformers.training_flags(TrainingFlags)


def test_the_source_has_all_flags(from_source):
    """As many words each; a class of transformers among the types is text there."""
    found, wanted = Parser((from_source,))._actions, Parser((TrainingArguments,))._actions
    assert [of(action, SHAPE) for action in found] == [of(action, SHAPE) for action in wanted]
    unlike = {own.dest for own, other in zip(found, wanted) if own.type is not other.type and own.dest != "liger_kernel_config"}
    assert unlike == {"logging_strategy", "hub_strategy", "parallelism_config", "debug"}


def test_the_source_has_their_defaults(from_source):
    usual = {f.name: f for f in dataclasses.fields(TrainingArguments) if f.init}
    for found in dataclasses.fields(from_source):
        wanted = usual.pop(found.name)
        assert (found.default, found.default_factory is list) == (wanted.default, wanted.default_factory is list) or (
            found.default_factory is not dataclasses.MISSING and found.default_factory() == wanted.default_factory()
        ), found.name
    assert not usual


@pytest.mark.parametrize("readable", [True, False])
def test_model_types_are_those_of_transformers(monkeypatch, readable):
    """Where its sources are others, the import tells."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if not readable:
        monkeypatch.setattr(on_transformers, "source", lambda file: None)
    for kind in ("llama", "gpt-sw3", "mlcd", list(CONFIG_MAPPING_NAMES)[-1]):
        assert on_transformers.knows_model_type(kind)
    assert not on_transformers.knows_model_type("quen")


def test_of_another_source_no_flag_is_read(monkeypatch):
    monkeypatch.setattr(on_transformers, "source", lambda file: None)
    assert on_transformers.training_flags(TrainingFlags) is None
