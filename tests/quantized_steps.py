"""Four steps of LoRA over quantized weights, by hand; as a program, under torchrun: each rank takes every other sample.

torchrun --nproc_per_node 2 tests/quantized_steps.py OUT.json ENGINE:QUANT:FOLDER ...   (ENGINE ddp or zero2, QUANT none or nf4)
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from tiny import packed, random_samples

from finetune import model as models
from finetune.args import LoraArguments

STEPS = 4


def load(folder: Path, tokenizer, quant: str = "none", **lora):
    """The LoRA model in float32, as finetune.py makes it; B is not zero, so that every gradient counts."""
    usual = {"use_lora": True, "q_lora": True, "lora_r": 4, "lora_dropout": 0.0, "train_embeddings": "none"}
    wish = LoraArguments(quant=quant, **(usual | lora))
    training = SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False, deepspeed=None, bf16_weights=False)
    torch.manual_seed(0)
    loaded = models.load_model(folder, tokenizer, wish, training)
    fill(loaded)
    return loaded


def fill(model) -> None:
    """The same adapter weights in every model with layers of these names and sizes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def optimizer(model):
    # not Adam: it would hide gradients of a wrong scale
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)


def row(step: int, rank: int, ranks: int) -> dict:
    """A rank's packed row, with the step's supervised tokens over the number of ranks: gradients are averaged later."""
    samples, labels = random_samples(4, 1000, seed=step)
    count = sum(label != -100 for sample in labels for label in sample[1:])
    return packed(samples[rank::ranks], labels[rank::ranks]) | {"num_items_in_batch": count / ranks}


def losses(model, backward, step, rank: int = 0, ranks: int = 1) -> list[float]:
    """The loss of each step, all ranks together. backward(loss), step(): the engine's."""
    found = []
    model.train()
    for number in range(STEPS):
        loss = model(**row(number, rank, ranks)).loss
        backward(loss)
        step()
        total = loss.detach() / ranks
        if ranks > 1:
            torch.distributed.all_reduce(total)
        found.append(total.item())
    return found


def one_process(model) -> list[float]:
    """As one process computes them."""
    adam = optimizer(model)

    def step():
        adam.step()
        adam.zero_grad()

    return losses(model, torch.Tensor.backward, step)


def ddp(model, rank: int, ranks: int) -> list[float]:
    wrapped, adam = torch.nn.parallel.DistributedDataParallel(model), optimizer(model)

    def step():
        adam.step()
        adam.zero_grad()

    return losses(wrapped, torch.Tensor.backward, step, rank, ranks)


def zero2(model, rank: int, ranks: int) -> list[float]:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # its default in 0.19 is 1.0
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)
    return losses(engine, engine.backward, engine.step, rank, ranks)


def main(out: str, *jobs: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {}
    for job in jobs:
        engine, quant, folder = job.split(":")
        model = load(Path(folder), models.load_tokenizer(Path(folder)), quant)
        found[job] = {"ddp": ddp, "zero2": zero2}[engine](model, rank, ranks)
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
