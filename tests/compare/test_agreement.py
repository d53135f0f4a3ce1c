"""How far models agree, against float64 by hand; and what stands in memory meanwhile."""

import math

import pytest
import torch
from tiny import later_model, random_samples, tiny_model

from finetune.compare import agreement
from finetune.compare.agreement import Agreement, measure


@pytest.fixture(scope="module")
def models():
    return tiny_model(seed=0).eval(), tiny_model(seed=1).eval()


@pytest.fixture(scope="module")
def samples():
    return list(zip(*random_samples(5, longest=90)))


def by_hand(first, second, samples) -> dict:
    """From whole logits in float64, position by position."""
    nll, kls, equal, largest, difference = [], [], [], 0.0, 0.0
    for ids, labels in samples:
        with torch.no_grad():
            p, q = (model(torch.tensor([ids])).logits[0].double() for model in (first, second))
        for t in range(1, len(ids)):
            if labels[t] == -100:
                continue
            log_p, log_q = p[t - 1].log_softmax(-1), q[t - 1].log_softmax(-1)
            nll.append(-log_q[labels[t]].item())
            kls.append((log_p.exp() * (log_p - log_q)).sum().item())
            equal.append(p[t - 1].argmax() == q[t - 1].argmax())
            largest = max(largest, p[t - 1].abs().max().item())
            difference = max(difference, (p[t - 1] - q[t - 1]).abs().max().item())
    return {
        "tokens": len(nll), "perplexity": math.exp(sum(nll) / len(nll)), "kl_mean": sum(kls) / len(kls), "kl_max": max(kls),
        "same_greedy": sum(equal).item() / len(equal), "logits_difference": difference / largest,
    }  # fmt: skip


def test_the_figures(models, samples, monkeypatch):
    """Also where a sample's positions are taken in several pieces."""
    monkeypatch.setattr(agreement, "ROWS", 7)
    first, second = measure([lambda: models[0], lambda: models[1]], samples)
    assert second.figures() == pytest.approx(by_hand(*models, samples), rel=1e-4)
    alone = by_hand(models[0], models[0], samples)
    assert first.figures() == pytest.approx(alone, rel=1e-4, abs=1e-7)
    assert first.kl_max < 1e-6 and first.same_greedy == 1.0 and second.kl_mean > 0.01


def test_where_the_largest_divergence_is(models, samples):
    """One token's row of the head is changed: the position after which it follows is found."""
    other = tiny_model(seed=0).eval()
    ids, labels = samples[3]
    place = max(t for t in range(1, len(ids)) if labels[t] != -100)
    original = agreement.hidden_states

    def disturbed(model, some_ids, *rest):
        states = original(model, some_ids, *rest)
        if model is other and list(some_ids) == list(ids):
            states[-1] += 3
        return states

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "hidden_states", disturbed)
        _, found = measure([lambda: models[0], lambda: other], samples)
    assert found.kl_max_at == (3, place) and found.kl_max > 1e-3
    assert found.kl_sum == pytest.approx(found.kl_max, rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_later_qwens(samples, tied):
    pair = [later_model("qwen2", tied, seed=seed) for seed in (0, 1)]
    _, second = measure([lambda: pair[0], lambda: pair[1]], samples)
    assert second.figures() == pytest.approx(by_hand(*pair, samples), rel=1e-4)


def test_one_model_at_a_time_and_few_logits(samples, monkeypatch):
    """What the first loader made is gone when the second is called, and no more than ROWS rows of logits exist."""
    import gc
    import weakref

    monkeypatch.setattr(agreement, "ROWS", 5)
    alive, rows = [], []

    def load(seed):
        gc.collect()
        assert all(reference() is None for reference in alive)
        model = tiny_model(seed=seed).eval()
        alive.append(weakref.ref(model))
        model.lm_head.register_forward_hook(lambda module, inputs, out: rows.append(out.shape[-2]))
        return model

    measure([lambda: load(0), lambda: load(1)], samples)
    assert len(alive) == 2 and max(rows) == 5


def test_the_references_own_answers(models):
    prompts = [[5, 6, 7], [8]]
    chosen = agreement.own_answers(models[0], prompts, 6)
    for prompt, (ids, labels) in zip(prompts, chosen):
        assert ids[: len(prompt)] == prompt and labels[: len(prompt)] == [-100] * len(prompt)
        assert labels[len(prompt) :] == ids[len(prompt) :] and len(ids) > len(prompt)
    found, _ = measure([lambda: models[0], lambda: models[1]], lambda model: agreement.own_answers(model, prompts, 6))
    greedy = by_hand(models[0], models[0], chosen)["perplexity"]
    assert found.perplexity == pytest.approx(greedy, rel=1e-4)


def test_in_words():
    found = Agreement(tokens=1000, nll=1000 * math.log(3), kl_sum=5.0, kl_max=0.25, equal=990)
    assert str(found) == "perplexity 3, KL divergence 0.005 (largest 0.25), same greedy token 99.00% of 1,000"
    assert Agreement(tokens=1, nll=1e9).perplexity > 1e300  # no overflow


def test_the_adapters_rows_of_the_head_count(tmp_path, tokenizer, samples):
    """The reference's head stays behind with what trains in it."""
    from tiny import small_checkpoint
    from transformers import AutoModelForCausalLM

    import qwen_model
    from finetune.flags.definitions import LoraArguments
    from finetune.lora import adapters

    qwen_model.register()
    base = small_checkpoint(tmp_path / "base")
    lora = LoraArguments(use_lora=True, lora_r=4, lora_dropout=0.0, train_embeddings="chat_rows")
    rows = adapters.trained_rows(tokenizer, "chat_rows", [])
    adapted = adapters.add(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora, rows).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = by_hand(adapted, plain, samples[:2])
    assert measure([lambda: adapted, lambda: plain], samples[:2])[1].figures() == pytest.approx(expected, rel=1e-4)
    assert expected["kl_mean"] > 1e-4
