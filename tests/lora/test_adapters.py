"""What trains beside plain LoRA: set up from the flags, saved in full, and there again when it is loaded."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import small_checkpoint, tiny_qwen2
from transformers import AutoModelForCausalLM

import qwen_model
from finetune.errors import UserError
from finetune.flags.definitions import LoraArguments
from finetune.folders import fingerprints
from finetune.lora import adapters
from finetune.model import loading
from finetune.steps import saving

IDS = torch.tensor([[151644, 8948, 198, 9707, 151645, 151646, 271]])
CHAT = [151644, 151645]
METHODS = {
    "lora": {},
    "rows": {"train_embeddings": "chat_rows", "train_tokens": ["<|extra_0|>"]},
    "all": {"train_embeddings": "all"},
    "bias all": {"lora_bias": "all"},
    "bias lora_only": {"lora_bias": "lora_only", "lora_target_modules": ["c_attn", "c_proj"]},
    "dora": {"use_dora": True, "train_embeddings": "chat_rows"},
    "rslora": {"use_rslora": True, "init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa fast": {"init_lora_weights": "pissa_niter_4", "use_rslora": True, "lora_bias": "all"},
    "pissa dora": {"init_lora_weights": "pissa", "use_dora": True, "train_embeddings": "all"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("base") / "base")


def load(folder):
    qwen_model.register()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def flags(**changes) -> LoraArguments:
    usual = {"use_lora": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "train_embeddings": "none"}
    return LoraArguments(**(usual | changes))


def begin(base, tokenizer, start=None, **changes):
    """A model with adapters that has not trained yet."""
    lora = flags(**changes)
    torch.manual_seed(7)
    rows = adapters.trained_rows(tokenizer, lora.train_embeddings, lora.train_tokens)
    return adapters.add(load(base), lora, rows, start)


def train(adapted, steps=3):
    """Steps of plain descent on everything that trains; what does not get a gradient is a mistake."""
    adapted.train()
    for _ in range(steps):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                parameter.data -= 0.5 * parameter.grad / (parameter.grad.norm() + 1e-9)
        adapted.zero_grad()
    return adapted.eval()


def save(adapted, tokenizer, base, folder):
    loading.set_chat_settings(adapted, tokenizer)
    record = {"base": {"name": str(base), "fingerprint": fingerprints.of_model(base)}}
    saving.save_final(adapted, tokenizer, folder, record=record)
    return folder


def what_trains(adapted) -> dict:
    return {name: parameter.detach() for name, parameter in adapted.named_parameters() if parameter.requires_grad}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def test_what_trained_is_there_again(method, base, tokenizer, tmp_path):
    """In plain peft, in our load_tuned and where training goes on: tensor by tensor, and in the logits."""
    adapted = train(begin(base, tokenizer, **method))
    folder = save(adapted, tokenizer, base, tmp_path / "out")
    plain = PeftModel.from_pretrained(load(base), folder).eval()
    tuned = loading.load_tuned(base, folder, torch.float32)
    again = adapters.add(load(base), flags(lora_weight_path=str(folder))).eval()
    expected = adapted(input_ids=IDS).logits
    with torch.no_grad():
        assert (load(base)(input_ids=IDS).logits - expected).abs().max() > 0.05
    for other in (plain, tuned, again):
        torch.testing.assert_close(other(input_ids=IDS).logits, expected, rtol=0, atol=1e-4)
    theirs, wanted = dict(plain.named_parameters()), what_trains(adapted)
    assert what_trains(again).keys() == wanted.keys() and not what_trains(tuned)
    for name, tensor in what_trains(again).items():
        assert torch.equal(tensor, theirs[name]) and torch.equal(tensor, dict(tuned.named_parameters())[name])
        if "init_lora_weights" not in method or "pissa" not in method["init_lora_weights"]:
            assert torch.equal(tensor, wanted[name]), name


def test_the_flags_decide_what_trains(base, tokenizer):
    def kinds(**changes):
        names = what_trains(begin(base, tokenizer, **changes))
        return {
            word for word in ("lora_A", "lora_B", "magnitude", "bias", "wte", "lm_head") for n in names if word in n
        }

    assert kinds() == {"lora_A", "lora_B"}
    assert kinds(use_dora=True) == {"lora_A", "lora_B", "magnitude"}
    assert kinds(lora_bias="all") == {"lora_A", "lora_B", "bias"}
    assert (
        kinds(train_embeddings="all") == kinds(train_tokens=["<|extra_0|>"]) == {"lora_A", "lora_B", "wte", "lm_head"}
    )
    rows = what_trains(begin(base, tokenizer, **METHODS["rows"]))
    assert [tuple(t.shape) for name, t in rows.items() if "delta" in name] == [(3, 16)] * 2
    whole = what_trains(begin(base, tokenizer, train_embeddings="all"))
    assert sorted(tuple(t.shape) for t in whole.values())[-2:] == [(151936, 16)] * 2


def test_rslora_scales_by_the_root_of_the_rank(base, tokenizer):
    """A rank-4 adapter with alpha 8: 2 as usual, 4 with rsLoRA."""
    outputs = []
    for use_rslora in (False, True):
        adapted = begin(base, tokenizer, use_rslora=use_rslora)
        layer = adapted.base_model.model.transformer.h[0].mlp.w1
        torch.nn.init.constant_(layer.lora_B["default"].weight, 0.1)
        x = torch.ones(1, 16)
        low = layer.lora_A["default"].weight @ x[0]
        outputs.append(((layer(x) - layer.base_layer(x))[0, 0] / (0.1 * low.sum())).item())
    assert outputs == pytest.approx([2.0, 4.0], rel=1e-4)


@pytest.mark.parametrize("embeddings", ["none", "chat_rows", "all"])
def test_the_head_still_takes_labels(base, tokenizer, embeddings):
    """Whatever peft puts around it: the loss comes from the head itself, and logits never stand in memory."""
    adapted = begin(base, tokenizer, train_embeddings=embeddings)
    assert adapted.get_base_model().lm_head.takes_labels
    with adapted.disable_adapter():
        assert adapted.get_base_model().lm_head.takes_labels


# ---- which rows


def test_rows_of_the_chat_format_and_of_own_tokens(tokenizer):
    assert adapters.trained_rows(tokenizer, "chat_rows", []) == CHAT
    assert adapters.trained_rows(tokenizer, "chat_rows", ["<|extra_1|>", "<|im_end|>"]) == [*CHAT, 151647]
    assert adapters.trained_rows(tokenizer, "none", ["<|extra_0|>"]) == [151646]
    assert (
        adapters.trained_rows(tokenizer, "none", []) == adapters.trained_rows(tokenizer, "all", ["<|extra_0|>"]) == []
    )


def test_a_token_that_is_none(tokenizer):
    with pytest.raises(UserError, match=r"--train_tokens <\|mine\|> hello: no special token of this model - give some"):
        adapters.trained_rows(tokenizer, "chat_rows", ["<|mine|>", "<|extra_0|>", "hello"])


# ---- tied embeddings, and other models' names


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embeddings", ["chat_rows", "all"])
def test_later_models(tied, embeddings, tmp_path):
    """Embedding and head under other names, and one matrix where they are tied: in training, on disk and merged."""
    whole = embeddings == "all"
    ids = torch.randint(0, 160, (1, 9), generator=torch.Generator().manual_seed(0))
    ids[0, 4], base = 3, tiny_qwen2(tied)
    base.save_pretrained(tmp_path / "base")
    adapted = adapters.add(base, flags(train_embeddings=embeddings), [] if whole else [3, 151])
    assert adapters.is_tied(adapted.get_base_model()) == tied or not whole
    for _ in range(3):
        adapted(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                parameter.data -= 0.5 * parameter.grad / (parameter.grad.norm() + 1e-9)
        adapted.zero_grad()
    adapted.eval().save_pretrained(tmp_path / "out")
    expected = adapted(input_ids=ids).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = adapters.load(loaded, tmp_path / "out").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, expected)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out").eval()
    torch.testing.assert_close(plain(input_ids=ids).logits, expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5
    )


# ---- PiSSA


def weight(adapted):
    return adapted.base_model.model.transformer.h[1].attn.c_attn


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_pissa_begins_with_the_strongest_directions(base, tokenizer, init):
    adapted = begin(base, tokenizer, init_lora_weights=init)
    layer, whole = weight(adapted), load(base).transformer.h[1].attn.c_attn.weight.detach().double()
    taken = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    best = u[:, :4] * s[:4] @ v[:4]
    if init == "pissa":
        torch.testing.assert_close(taken.double(), best, rtol=0, atol=1e-6)
    assert taken.norm() > 0.9 * best.norm()
    torch.testing.assert_close((layer.base_layer.weight + taken).double(), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(adapted(input_ids=IDS).logits, load(base)(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_pissa_result_is_a_plain_adapter_of_twice_the_rank(base, tokenizer, tmp_path):
    adapted = train(begin(base, tokenizer, init_lora_weights="pissa"))
    folder = save(adapted, tokenizer, base, tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    assert not list(folder.glob("*start*"))
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {8}


@pytest.mark.parametrize("method", ["pissa", "pissa fast", "pissa dora"])
def test_pissa_goes_on_from_a_checkpoint_to_the_same_weights(base, tokenizer, tmp_path, method):
    """With the model begun anew, from the checkpoint's own beginning, and what trained read back as transformers does."""
    changes = METHODS[method]
    adapted = train(begin(base, tokenizer, **changes))
    saving.save_model(adapted, tokenizer, tmp_path / "checkpoint-1")
    torch.manual_seed(99)  # another decomposition, where that is random
    again = begin(base, tokenizer, start=tmp_path / "checkpoint-1", **changes)
    again.load_adapter(tmp_path / "checkpoint-1", "default", is_trainable=True)
    for one, other in zip(adapted.state_dict().items(), again.state_dict().items(), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1]), one[0]
    assert again.peft_config["default"].init_lora_weights == changes["init_lora_weights"]
    for adapters_model, name in ((adapted, "straight"), (again, "parts")):
        save(train(adapters_model), tokenizer, base, tmp_path / name)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_seed_decomposes_alike(base, tokenizer):
    """Without the file of a checkpoint a run still begins anew as it began."""
    one, other = (begin(base, tokenizer, init_lora_weights="pissa_niter_4").state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_pissa_checkpoint_can_be_used_and_trained_on(base, tokenizer, tmp_path):
    adapted = train(begin(base, tokenizer, init_lora_weights="pissa_niter_4"))
    expected = adapted(input_ids=IDS).logits
    saving.save_model(adapted, tokenizer, tmp_path / "checkpoint-1")
    tuned = loading.load_tuned(base, tmp_path / "checkpoint-1", torch.float32)
    torch.testing.assert_close(tuned(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    again = train(adapters.add(load(base), flags(lora_weight_path=str(tmp_path / "checkpoint-1"))))
    folder = save(again, tokenizer, base, tmp_path / "out")
    plain = PeftModel.from_pretrained(load(base), folder).eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, again(input_ids=IDS).logits, rtol=0, atol=1e-4)
