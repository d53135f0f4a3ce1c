"""Four steps of training on one process or on several: steps_on_ranks.py BASE ENGINE METHOD OUT.json (see test_adapters_on_ranks).

ENGINE: one, ddp, zero2 or zero3. METHOD: LoRA flags as JSON, and "rows", token ids. Each step has two packed rows; with two
ranks each takes one. In step 2 a row has no supervised token. Writes the losses and, whole, what trained.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from tiny import packed, random_samples

import qwen_model
from finetune.flags.definitions import LoraArguments
from finetune.lora import adapters
from finetune.model.loading import load_weights

STEPS, RATE = 4, 1e-2


def rows_of_step(step: int, ids: list[int]) -> list[dict]:
    """Two packed rows in which the trained tokens occur, as input and as labels."""
    rows = []
    for part in range(2):
        samples, labels = random_samples(2, seed=2 * step + part)
        samples[0][1:3] = labels[0][1:3] = ids[:2]
        if (step, part) == (2, 1):
            labels = [[-100] * len(sample) for sample in samples]
        rows.append(packed(samples, labels))
    return rows


def config(stage: int, ranks: int) -> dict:
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": ranks,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # its default would clip
    }


def load(base: str, engine: str, method: dict, ranks: int):
    """(what is called, what steps, whose parameters are read)"""
    from transformers.integrations import HfDeepSpeedConfig

    settings, ids = dict(method), method["rows"]
    del settings["rows"]
    keep = HfDeepSpeedConfig(config(3, ranks)) if engine == "zero3" else None
    qwen_model.register()
    model = load_weights(Path(base), torch.float32, half_on_cuda=False)
    torch.manual_seed(0)
    usual = {"use_lora": True, "lora_r": 2, "lora_dropout": 0.0, "train_embeddings": "chat_rows"}
    lora = LoraArguments(**(usual | settings))
    if lora.use_lora:
        model = adapters.add(model, lora, ids if lora.train_embeddings == "chat_rows" else [])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    model.train()
    if engine.startswith("zero"):
        import deepspeed

        stage = int(engine[-1])
        engine_model = deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage, ranks))[0]
        return engine_model, engine_model, model, keep
    if engine == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model), optimizer, model, keep
    return model, optimizer, model, keep


def whole(parameter, engine: str):
    """A parameter's values, also where they lie in shards."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]) if engine == "zero3" else contextlib.nullcontext():
        return parameter.detach().clone()


def main(base: str, engine: str, method: dict, out: str) -> None:
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
    if engine.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    model, optimizer, inner, _keep = load(base, engine, method, ranks)
    losses = []
    for step in range(STEPS):
        every = rows_of_step(step, method["rows"])
        denominator = sum(row["shift_labels"].numel() for row in every) / ranks
        total = torch.zeros(())
        for row in every[rank::ranks]:
            loss = model(**row, num_items_in_batch=denominator).loss
            optimizer.backward(loss) if engine.startswith("zero") else loss.backward()
            total += loss.detach()
        missing = [name for name, p in inner.named_parameters() if p.requires_grad and p.grad is None]
        assert engine.startswith("zero") or not missing, missing
        optimizer.step()
        if not engine.startswith("zero"):
            optimizer.zero_grad()
        if ranks > 1:
            torch.distributed.all_reduce(total)
        losses.append(total.item() / ranks)
    trained = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    values = {name: whole(parameter, engine).double().sum().item() for name, parameter in trained.items()}
    if rank == 0:
        Path(out).write_text(json.dumps({"losses": losses, "values": values}))
    if ranks > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4])
