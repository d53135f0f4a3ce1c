"""Some blocks computed again: those and no others, with the same gradients."""

from types import SimpleNamespace

import torch
from tiny import packed, random_samples, tiny_model

from finetune.steps.activation_checkpointing import FirstBlocks


def test_the_first_blocks_are_computed_again_and_gradients_stay():
    row = packed(*random_samples(3))
    gradients, runs = [], []
    for count in (0, 1, 2):
        model = tiny_model().train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        FirstBlocks(count).on_train_begin(SimpleNamespace(), None, None, model=model)
        passes = [0, 0]
        for number, block in enumerate(model.transformer.h):
            block.attn.register_forward_hook(lambda *_, number=number: passes.__setitem__(number, passes[number] + 1))
        model(**row).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        runs.append(passes)
    assert runs == [[1, 1], [2, 1], [2, 2]]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients))
