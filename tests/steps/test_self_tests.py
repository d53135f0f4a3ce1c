"""The first seconds find a model that sees what comes later, or what lies beside a sample in its row."""

import pytest
import torch
from tiny import tiny_model
from trainers import losses, make_trainer

from finetune.errors import Failed
from finetune.steps import self_tests
from qwen_model import modeling_qwen


def trainer_with(folder, skipped=(), model=None, **settings):
    trainer = make_trainer(folder, model=model, max_steps=1, **settings)
    trainer.add_callback(self_tests.SelfTests(trainer, torch.float32, skipped))
    return trainer


def test_a_good_model_passes_and_trains_as_without(tmp_path, capsys):
    tested, plain = trainer_with(tmp_path), make_trainer(tmp_path, max_steps=1)
    tested.train(), plain.train()
    assert losses(tested) == losses(plain)
    assert "note: self-tests passed (" in capsys.readouterr().err


def test_they_take_few_tokens(tmp_path, monkeypatch):
    """On two CPU cores a model of 231M weights (24 layers of 512) takes some 5 ms for a token: 600 are 3 s of ten minutes."""
    trainer, tokens = make_trainer(tmp_path, max_steps=1), []
    ids = torch.arange(2000).numpy() % 160
    monkeypatch.setattr(trainer, "samples", [(ids, ids)] * 20)
    usual = trainer.loss_of

    def counted(model, row, denominator):
        tokens.append(row["input_ids"].numel())
        return usual(model, row, denominator)

    trainer.loss_of, trainer.model_wrapped = counted, trainer.model
    tests = self_tests.SelfTests(trainer, torch.float32)
    for test in tests.tests.values():
        test(self_tests.samples_of(trainer), tests.loss)
    assert len(tests.tests) == 2 <= len(tokens) <= 6 and 200 <= sum(tokens) <= 600


def looking_ahead(hidden):
    """Each position gets something of the one behind it."""
    return hidden + 0.5 * torch.roll(hidden, -1, 1)


def looking_around(hidden):
    """Each position gets something of all that stand before it in the row, of other samples too."""
    count = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[None, :, None]
    return hidden + 0.5 * hidden.cumsum(1) / count


@pytest.mark.parametrize("leak, found, other", [(looking_ahead, "causality", "packing"), (looking_around, "packing", "causality")])
def test_a_leak_is_found(tmp_path, monkeypatch, leak, found, other):
    usual = modeling_qwen.QWenBlock.forward

    def forward(self, hidden, *args, **kwargs):
        return usual(self, leak(hidden), *args, **kwargs)

    monkeypatch.setattr(modeling_qwen.QWenBlock, "forward", forward)
    with pytest.raises(Failed, match=f"self-test {found}: .* --skip_self_tests {found} starts without this test"):
        trainer_with(tmp_path, [other], tiny_model()).train()
    trainer_with(tmp_path, list(self_tests.TESTS), tiny_model()).train()


def test_dropout_goes_on_as_if_nothing_had_been_drawn(tmp_path):
    model = tiny_model(attn_dropout_prob=0.0, emb_dropout_prob=0.3)
    torch.manual_seed(7)
    tested = trainer_with(tmp_path, model=model)
    tested.train()
    torch.manual_seed(7)
    plain = make_trainer(tmp_path, model=tiny_model(attn_dropout_prob=0.0, emb_dropout_prob=0.3), max_steps=1)
    plain.train()
    assert losses(tested) == losses(plain)
