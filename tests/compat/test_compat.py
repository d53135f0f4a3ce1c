"""What is used of other packages beyond their public API is there, and does what we take it to do."""

import importlib
import inspect
import logging
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune import quiet
from finetune.compat import on_accelerate, on_deepspeed, on_gptqmodel, on_peft, on_torch, on_transformers, patches


class Owner:
    value = 1


def test_what_is_gone_is_not_replaced_in_silence():
    with patches.replaced(Owner, "value", 2):
        assert Owner.value == 2
    assert Owner.value == 1
    with pytest.raises(RuntimeError, match="Owner.gone is gone: another version of its package than requirements.txt"):
        patches.replace(Owner, "gone", 2)


def test_an_entry_that_is_gone_is_not_made():
    entries = {"there": 1}
    patches.put(entries, "there", 2)
    with pytest.raises(RuntimeError, match="no entry gone any more"):
        patches.put(entries, "gone", 2)
    assert entries == {"there": 2}


def test_ddp_leaves_out_what_it_is_told_to():
    model = nn.Linear(2, 2)
    on_torch.ignore_in_ddp(model, ["weight"])
    assert model._ddp_params_and_buffers_to_ignore == ["weight"]  # which DistributedDataParallel reads


def test_hooks_are_seen():
    layer = nn.Linear(2, 2)
    assert not on_torch.has_forward_hooks(layer)
    handle = layer.register_forward_pre_hook(lambda *_: None)
    assert on_torch.has_forward_hooks(layer)
    handle.remove()
    handle = layer.register_forward_hook(lambda *_: None)
    assert on_torch.has_forward_hooks(layer)
    handle.remove()
    layer.forward = layer.forward
    assert on_torch.has_forward_hooks(layer)


def test_views_are_told_apart():
    whole = torch.zeros(4, 2)
    assert on_torch.is_view(whole[1:]) and not on_torch.is_view(whole)


OF_ELASTIC = {
    "agent.server.api": ("RunResult", "WorkerSpec", "WorkerState"),
    "agent.server.local_elastic_agent": ("LocalElasticAgent",),
    "multiprocessing": ("DefaultLogsSpecs", "SignalException"),
    "rendezvous.api": (
        "RendezvousClosedError", "RendezvousConnectionError", "RendezvousInfo", "RendezvousStoreInfo", "RendezvousTimeoutError",
    ),
    "rendezvous.c10d_rendezvous_backend": ("C10dRendezvousBackend",),
    "rendezvous.dynamic_rendezvous": ("DynamicRendezvousHandler", "RendezvousTimeout"),
}  # fmt: skip


@pytest.mark.parametrize("module, name", [(module, name) for module, names in OF_ELASTIC.items() for name in names])
def test_a_class_of_torchs_agent_that_is_gone_is_missed(monkeypatch, module, name):
    module = importlib.import_module(f"torch.distributed.elastic.{module}")
    assert getattr(on_torch.elastic(), name) is getattr(module, name)
    monkeypatch.delattr(module, name)
    with pytest.raises(ImportError, match=name):
        on_torch.elastic()


@pytest.mark.parametrize("name", ["_initialize_workers", "_monitor_workers", "_exit_barrier"])
def test_a_method_of_torchs_agent_that_is_overridden_is_called_by_it(monkeypatch, name):
    agent = on_torch.elastic().LocalElasticAgent
    assert f"self.{name}(" in "".join(map(inspect.getsource, agent.__mro__[:-1]))
    for kind in agent.__mro__:
        if name in vars(kind):
            monkeypatch.delattr(kind, name)
    with pytest.raises(RuntimeError, match=f"LocalElasticAgent.{name} is gone"):
        on_torch.elastic()


@pytest.mark.parametrize("name", ["_remaining_restarts", "_pcontext", "_worker_group"])
def test_torchs_agent_keeps_what_ours_reads(name):
    agent = on_torch.elastic().LocalElasticAgent
    assert re.search(rf"self\.{name}(: .*)? = ", "".join(map(inspect.getsource, agent.__mro__[:-1])))


def test_torchs_processes_can_be_asked():
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    assert "self.subprocess_handlers: " in inspect.getsource(SubprocessContext)
    assert "self.proc: " in inspect.getsource(SubprocessHandler)


def test_accelerates_state():
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    try:
        on_accelerate.forget_state()
        assert PartialState(cpu=True).distributed_type == DistributedType.NO
        on_accelerate.pretend_multi_gpu()
        assert PartialState(cpu=True).distributed_type == DistributedType.MULTI_GPU
    finally:
        on_accelerate.forget_state()
    assert PartialState._shared_state == {}


def test_deepspeeds_engine_is_told_of_the_last_pass():
    from accelerate.state import GradientState

    class Accelerator:
        gradient_state = GradientState()

    on_accelerate.set_last_pass(Accelerator, False)
    assert not Accelerator.gradient_state.sync_gradients
    on_accelerate.set_last_pass(Accelerator, True)
    assert Accelerator.gradient_state.sync_gradients


def test_transformers_asks_where_checkpoints_go(tmp_path):
    from transformers import Trainer

    assert "self._get_output_dir(trial" in inspect.getsource(Trainer._save_checkpoint)
    trainer = Trainer.__new__(Trainer)
    with on_transformers.checkpoints_into(trainer, tmp_path):
        assert trainer._get_output_dir(None) == str(tmp_path)
    assert "_get_output_dir" not in vars(trainer)


def test_deepspeed_has_the_operator_that_is_left_out(monkeypatch):
    deepspeed = pytest.importorskip("deepspeed")
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", dict(deepspeed.ops.__compatible_ops__))
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    on_deepspeed.leave_out_shm_operator()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


@pytest.mark.parametrize("name", on_peft.LINEARS)
def test_pefts_layers_have_their_names(name):
    """The class is told apart by name: one that was renamed would quietly train by peft's own forward."""
    module, _, kind = name.rpartition(".")
    loaded = importlib.import_module(module)
    if not hasattr(loaded, kind):  # those of bitsandbytes exist where the package does
        pytest.importorskip("bitsandbytes")
    made = getattr(loaded, kind)
    assert on_peft.is_lora_linear(made.__new__(made))
    assert not on_peft.is_lora_linear(nn.Linear(1, 1))


def test_peft_asks_for_gptqmodel_where_we_answer():
    from peft.tuners.lora import awq, gptq

    for module in (awq, gptq):
        assert "is_gptqmodel_available()" in inspect.getsource(module)
    with on_peft.unquantized():
        assert "gptqmodel" in sys.modules or not gptq.is_gptqmodel_available()


@pytest.mark.parametrize("module, name", [
    ("peft.tuners.trainable_tokens", "TrainableTokensLayer"), ("peft.utils.other", "TrainableTokensWrapper"),
])  # fmt: skip
def test_a_class_of_pefts_trained_rows_that_is_gone_is_missed(monkeypatch, module, name):
    module = importlib.import_module(module)
    assert getattr(on_peft.token_classes(), name) is getattr(module, name)
    monkeypatch.delattr(module, name)
    with pytest.raises(ImportError, match=name):
        on_peft.token_classes()


def test_pefts_lora_layers_are_found():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), LoraConfig(target_modules=["1"]))
    found = on_peft.lora_layers(adapted)
    assert list(found) == ["base_model.model.1"] and found["base_model.model.1"].lora_A["default"].weight.shape == (8, 2)


def test_what_is_in_shards_for_nobody_stays_as_it_is():
    """The rest needs ZeRO-3: tests/lora/test_adapters_on_ranks.py."""
    weight = torch.zeros(2)
    for weights, changes in ((weight, True), ([weight], False)):
        with on_peft.gathered(weights, changes):
            weight += 1
    assert weight.tolist() == [2, 2]


def test_peft_reads_the_first_values_of_rows_where_we_do():
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    before = TrainableTokensLayer._collect_token_weights
    assert list(inspect.signature(before).parameters) == ["self", "weight", "rows", "embed_dim"]
    with on_peft.first_values_of_rows():
        weight = torch.arange(12.0).reshape(4, 3)
        assert TrainableTokensLayer._collect_token_weights(None, weight, [3, 1], 3).tolist() == weight[[3, 1]].tolist()
    assert TrainableTokensLayer._collect_token_weights is before


def test_gptqmodel_leaves_the_environment_and_the_log(capsys, monkeypatch):
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # which is set for good
    environment, handlers = dict(os.environ), list(logging.getLogger().handlers)
    with on_gptqmodel.contained():
        print("a banner")
        os.environ["HF_HOME"] = "/tmp/elsewhere"
        logging.getLogger().addHandler(logging.NullHandler())
    assert (dict(os.environ), logging.getLogger().handlers) == (environment, handlers)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_gptqmodel_has_what_is_replaced(tmp_path, monkeypatch):
    pytest.importorskip("optimum")
    with on_gptqmodel.contained():
        from gptqmodel.looper import loop_processor
        from gptqmodel.utils import logger
    monkeypatch.setattr(loop_processor, "_PROJECT_LOG_DIR", loop_processor._PROJECT_LOG_DIR)
    monkeypatch.setattr(logger, "_suppress_live_renderables", logger._suppress_live_renderables)
    on_gptqmodel.keep_to(tmp_path)
    assert loop_processor._PROJECT_LOG_DIR == tmp_path and logger._suppress_live_renderables()


@pytest.mark.parametrize("body, whole", [
    ("class T:\n    a: int = 1\n", True), ("class T:\n    a: int = 1\n    if x:\n        b = 2\n", True),
    ("class T(Base):\n    a: int = 1\n", False), ("class T:\n    a: int = 1\n    if x:\n        b: int = 2\n", False), ("", False),
])  # fmt: skip
def test_a_class_that_has_fields_elsewhere_is_not_read_in_part(monkeypatch, body, whole):
    import ast

    monkeypatch.setattr(on_transformers, "source", lambda file: ast.parse(body))
    assert bool(on_transformers.class_body("t.py", "T")) is whole


@pytest.mark.parametrize("name", quiet.ALLOCATOR)
def test_memory_of_a_gpu_is_had_in_segments_that_grow(name):
    """A word of the user's goes before, by either name; torch knows the one that is set."""
    assert quiet.for_allocator({}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert quiet.for_allocator({name: "max_split_size_mb:128"}) == {}
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    assert name.encode() in library.read_bytes()
