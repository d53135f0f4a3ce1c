"""Four steps of LoRA over quantized weights, by hand."""

from pathlib import Path
from types import SimpleNamespace

import torch
from tiny import packed, random_samples

from finetune.flags.definitions import LoraArguments
from finetune.model import loading as models

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


def one_process(model) -> list[float]:
    """The losses of four steps."""
    adam, found = optimizer(model), []
    model.train()
    for number in range(STEPS):
        loss = model(**row(number, 0, 1)).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        found.append(loss.item())
    return found
