"""Three steps on the fake device, for each of some cases: python tests/fake_cuda/steps.py LIBRARY '[{"size": "7B", ...}, ...]'

A process of its own, since what device.install() does to torch cannot be undone; it forks for each case. Prints what was recorded, a
line of JSON for each. Keys of a case:

family    qwen (the bundled model), qwen2, qwen3
size      of benchmarks/cells.py; layers: where not all of them
flags     of finetune.py
length, samples, tokens     of a sample, of a step, of a pass (tokens may be "auto")
stored    plain or gptq
gpu       [major, minor], the compute capability
varlen    false: as if this torch had no variable-length attention
"""

import ctypes
import importlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[2] / "benchmarks"), str(HERE.parent)]
USUAL = {
    "family": "qwen", "size": "7B", "layers": None, "length": 2048, "samples": 8, "tokens": 8192, "stored": "plain", "gpu": [9, 0],
    "varlen": True,
}  # fmt: skip
EVERY = "--max_steps 3 --save_strategy no --disable_tqdm True --logging_steps 100 --report_to none"
# they look for a GPU as they are imported, and must find none: what they do with one goes behind torch's back
BEFORE = ("transformers.trainer", "peft", "accelerate", "bitsandbytes", "qwen_model")
GROUP = 128  # of GPTQ


def main(library: str, cases: list[dict]) -> None:
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # before torch, which keeps the first hooks of CUDA that it finds
    for package in BEFORE:
        importlib.import_module(package)
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            if (child := os.fork()) == 0:
                leave_result(Path(folder), USUAL | case)
            os.waitpid(child, 0)
            result = Path(folder, "result")
            print(result.read_text() if result.exists() else json.dumps({"failed": case}), flush=True)


def leave_result(folder: Path, case: dict) -> None:
    """In the fork, which ends here."""
    code = 1
    try:
        os.dup2(2, 1)  # what the run prints is not the result
        (folder / "result").write_text(json.dumps(record(folder, case)))
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def record(folder: Path, case: dict) -> dict:
    from device import install
    from recorder import Recorder

    if case["stored"] == "gptq":
        importlib.import_module("gptqmodel")
    recorder = Recorder()
    mode = install(tuple(case["gpu"]), recorder.wait)
    recorder.watch_tensors()
    recorder.watch_kernels()
    trust_the_kernels(case)
    with mode, recorder:
        return run(folder, case, recorder)


def trust_the_kernels(case: dict) -> None:
    """What a trial run or a look at the installed package would tell on a real GPU."""
    from device import efficient_attention

    from qwen_model import attention, on_triton

    on_triton.failure = lambda device: ""
    attention.scaled_dot_product_attention = efficient_attention
    if not case["varlen"]:
        attention.torch_has_varlen = lambda: False


def run(folder: Path, case: dict, recorder) -> dict:
    """As finetune.py does, but that weights come from nowhere, and samples from filled.py."""
    from filled import Filled

    from finetune.flags import args as arguments
    from finetune.memory import memory_plan
    from finetune.memory.memory_model import Sizes
    from finetune.model import loading
    from finetune.steps import activation_checkpointing, preparation, report
    from finetune.steps.trainer import PlannedTrainer

    config = write_base(folder / "base", case)
    words = [*case["flags"].split(), *EVERY.split(), "-m", folder / "base", "-o", folder / "out", "--max_tokens_per_pass", case["tokens"]]
    words += ["--per_device_train_batch_size", case["samples"], "--gradient_accumulation_steps", 1]
    args = arguments.parse([str(word) for word in words])
    assert not args.findings, args.findings
    samples = Filled(case["length"], 3 * case["samples"], config.vocab_size)
    memory = preparation.plan_memory(args, folder / "base", samples, memory_plan.free_bytes(args))
    plan, _ = preparation.make_plans(args, samples, None)
    memory = memory_plan.with_passes_of(args, folder / "base", memory, plan.largest_passes())
    tokenizer = loading.load_tokenizer(folder / "base") if case["family"] == "qwen" else SimpleNamespace(added_tokens_decoder={})
    loading.load_weights = lambda *words, **named: weights(config, case, *words, **named)
    model = loading.load_model(folder / "base", tokenizer, args.lora, args.training)
    after_loading = recorder.live
    trainer = PlannedTrainer(model, args.training, samples=samples, plan=plan, tokenizer=tokenizer)
    activation_checkpointing.install(trainer, args.training.recomputed_blocks, memory)
    trainer.add_callback(phases(recorder))
    trainer.train()
    told = {"attention": report.attention(model, args.training), "kernels": report.kernels(model, args.training.device)}
    sizes = Sizes.of(json.loads((folder / "base" / "config.json").read_text()))
    counts = {"matrices": sizes.blocks, "head": sizes.vocabulary * sizes.hidden}
    counts["adapters"] = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    counts["first"] = (sizes.matrices()[0][0] + args.lora.lora_r * (3 if sizes.plain else 1)) * sizes.hidden  # what reads the embeddings
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    counts |= {"live": after_loading, "computed": vars(memory) | {"peak": memory.peak}, "passes": len(plan.step(0, 0).passes[0]), "layers": config.num_hidden_layers}
    return recorder.as_json() | told | counts | {"frozen with gradient": frozen}


def phases(recorder):
    """A callback that gives each part of a step its name."""
    from transformers import TrainerCallback

    class Phases(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            recorder.phase = f"step {state.global_step + 1}"

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            recorder.phase = f"optimizer {state.global_step + 1}"

        def on_step_end(self, args, state, control, **kwargs):
            recorder.phase = f"behind {state.global_step}"

    return Phases()


# ---- the base


def write_base(folder: Path, case: dict):
    """The folder of a base model without its weights, and its configuration."""
    import checkpoints

    from qwen_model.new_checkpoint import GENERATION, TOKENIZER
    from qwen_model.vocabulary import find_vocabulary

    folder.mkdir()
    config = checkpoints.config_of(case["size"]) if case["family"] == "qwen" else later(case)
    config.num_hidden_layers = case["layers"] or config.num_hidden_layers
    settings = json.loads(config.to_json_string())
    if case["stored"] == "gptq":
        settings["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    shutil.copyfile(find_vocabulary(), folder / "qwen.tiktoken")
    return config


def later(case: dict):
    """A later Qwen of the same depth and width; four queries share a key."""
    from cells import SIZES
    from transformers import Qwen2Config, Qwen3Config

    layers, hidden, intermediate, vocabulary = SIZES[case["size"]]
    heads = hidden // 128
    kind = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[case["family"]]
    return kind(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 4,
        head_dim=128, intermediate_size=intermediate // 2, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip


def weights(config, case: dict, folder, dtype, fast=False, quantization=None, device=None):
    """The model on the device, in place of loading.load_weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.model import later_qwen
    from qwen_model import QWenLMHeadModel

    attention = {} if fast and case["family"] == "qwen" else {"attn_implementation": "sdpa"}
    with torch.device("cuda"):
        if case["family"] != "qwen":
            return later_qwen.prepare(AutoModelForCausalLM.from_config(config, dtype=dtype, **attention), fast)
        model = QWenLMHeadModel._from_config(config, dtype=dtype, **attention)
    return pack(model, dtype) if case["stored"] == "gptq" else model


def pack(model, dtype):
    """The blocks' linear layers as quantized_model.load() makes them of an Int4 folder."""
    import torch
    from torch import nn

    from finetune.quantized.gptq_layers import FrozenLinear

    for name, layer in [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear and ".h." in name]:
        new, (out, inner) = FrozenLinear.__new__(FrozenLinear), layer.weight.shape
        nn.Module.__init__(new)
        vars(new).update(in_features=inner, out_features=out, bits=4, pass_dtype=dtype, group_size=GROUP)
        parts = {
            "qweight": ((inner // 8, out), torch.int32), "qzeros": ((inner // GROUP, out // 8), torch.int32),
            "scales": ((inner // GROUP, out), torch.float16), "g_idx": ((inner,), torch.int32),
        }  # fmt: skip
        for part, (shape, kind) in parts.items():
            new.register_buffer(part, torch.empty(shape, dtype=kind, device="cuda"))
        new.register_buffer("bias", None if layer.bias is None else torch.empty(out, dtype=torch.float16, device="cuda"))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
    return model


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
