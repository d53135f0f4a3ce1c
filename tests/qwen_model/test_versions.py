"""transformers changes under us: what it no longer calls, or calls by another name, ends in an error and never in another answer."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import packed, random_samples, tiny_model
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.generation.utils import GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune.errors import run
from qwen_model import compat, versions
from qwen_model.kv_cache import Int8Cache, Int8Layer
from qwen_model.modeling_qwen import CACHE, QWenLMHeadModel, QWenModel

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.randint(1, 159, (1, 12), generator=torch.Generator().manual_seed(0))
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def model():
    return tiny_model().eval()


def one_at_a_time(model, ids=IDS, tokens=8):
    """Greedy decoding without any cache: the whole row again for each token."""
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


# ---- the cache, by both names


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache(model, name):
    whole = model(IDS, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    first = model(IDS[:, :7], **{name: cache})
    second = model(IDS[:, 7:], **{name: cache})
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=0)
    assert second[CACHE] is cache and getattr(second, CACHE) is cache
    assert torch.equal(model.generate(IDS, **{name: DynamicCache(config=model.config)}, **GREEDY), one_at_a_time(model))


def test_two_caches_and_things_that_are_none(model):
    cache = DynamicCache(config=model.config)
    with pytest.raises(TypeError, match="two names of the same"):
        model(IDS, cache=cache, past_key_values=cache)
    for wrong in ([], ((IDS, IDS),), object()):
        with pytest.raises(TypeError, match="must be a transformers Cache"):
            model(IDS, cache=wrong)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 1}])
def test_generation_is_what_it_is_without_a_cache(model, settings):
    expected = one_at_a_time(model)
    assert torch.equal(model.generate(IDS, **settings, **GREEDY), expected)
    embedded = model.get_input_embeddings()(IDS)
    assert torch.equal(model.generate(inputs_embeds=embedded, **settings, **GREEDY), expected[:, IDS.shape[1] :])


def test_the_int8_cache_is_made_where_a_cache_is_asked_for(model):
    model.config.use_cache_quantization = True
    returned = {"return_dict_in_generate": True}
    assert type(model.generate(IDS, **GREEDY, **returned)[CACHE]) is Int8Cache
    assert model.generate(IDS, use_cache=False, **GREEDY, **returned).get(CACHE) is None
    assert type(model(IDS)[CACHE]) is Int8Cache and type(model.train()(IDS, use_cache=True)[CACHE]) is DynamicCache


def test_where_nobody_says_a_cache_is_made_or_not(model):
    """Not in training, and not for what may be several samples in a row."""
    positions, row = torch.arange(12)[None], packed(*random_samples(3))
    assert model(IDS)[CACHE] is not None and model(IDS, position_ids=positions, use_cache=True)[CACHE] is not None
    for absent in (model(IDS, position_ids=positions), model(**row), model.train()(IDS)):
        assert CACHE not in absent
    with pytest.raises(ValueError, match="several samples in a row"):
        model(IDS, position_ids=positions % 5, use_cache=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_static_cache_counts_a_rows_tokens_without_its_padding(model, attention):
    """generate makes its mask (B, 1, T, keys) then. 90 tokens are past the trained length of 64, 30 are not."""
    model.set_attn_implementation(attention)
    ids = torch.randint(1, 159, (2, 90), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :60] = 0
    rows = [model.generate(ids, attention_mask=mask, **more, **GREEDY) for more in ({}, {"cache_implementation": "static"})]
    assert torch.equal(*rows)
    logits = [
        model.generate(ids, attention_mask=mask, **more, **GREEDY, output_logits=True, return_dict_in_generate=True).logits
        for more in ({}, {"cache_implementation": "static"})
    ]
    torch.testing.assert_close(torch.stack(logits[0]), torch.stack(logits[1]), atol=1e-4, rtol=0)


def test_a_model_in_training_mode_generates_with_its_cache(model):
    """Gradient checkpointing forbids a cache only where a backward pass will come."""
    expected = one_at_a_time(model)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(model.generate(IDS, **GREEDY), expected)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(IDS, use_cache=True)
    assert getattr(model(IDS), CACHE) is None


def test_a_cache_under_a_third_name_is_an_error(model):
    """As transformers 5.24 did to code that knew only past_key_values."""

    class Renamed(QWenLMHeadModel):
        def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
            model_kwargs["memory"] = DynamicCache(config=self.config)

    model.__class__ = Renamed
    with pytest.raises(TypeError, match=f"forward does not know memory.*5.17.0 to {versions.NEWEST}"):
        model.generate(IDS, **GREEDY)


def test_a_cache_that_does_not_arrive_is_an_error(model, monkeypatch):
    prepare = GenerationMixin.prepare_inputs_for_generation

    def without_cache(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        return {name: value for name, value in inputs.items() if name != CACHE}

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", without_cache)
    with pytest.raises(RuntimeError, match="the last 1 of 13 tokens, and a cache that holds 0"):
        model.generate(IDS, **GREEDY)


# ---- no keyword is swallowed


def test_an_unknown_keyword_is_an_error_that_says_the_versions(model):
    for called, name in ((model, "pixel_values"), (model.transformer, "token_type_ids"), (model, "is_causal")):
        with pytest.raises(TypeError, match=f"does not know {name}: it is made for transformers 5.17.0 to"):
            called(IDS, **{name: torch.ones(1)})
    model(IDS, token_type_ids=None)  # asks for nothing
    with pytest.raises(TypeError, match="Int8Layer.update does not know"):
        Int8Layer().update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16), sliding_window=4)


def test_a_mask_covers_the_cache_and_the_pass(model):
    for columns in (5, 13):
        with pytest.raises(ValueError, match=f"attention_mask has {columns} columns for 12 tokens .0 of them in the cache"):
            model(IDS, attention_mask=torch.ones(1, columns))
    cache = model(IDS[:, :7])[CACHE]
    with pytest.raises(ValueError, match="5 columns for 12 tokens .7 of them"):
        model(IDS[:, 7:], cache=cache, attention_mask=torch.ones(1, 5))
    static = StaticCache(config=model.config, max_cache_len=32)
    wide = model(IDS, cache=static, attention_mask=torch.ones(1, 12)).logits
    torch.testing.assert_close(wide, model(IDS).logits, atol=1e-5, rtol=0)
    for shape in ((1, 1), (1, 13), (12,), (2, 12)):
        with pytest.raises(ValueError, match="position_ids must be"):
            model(IDS, position_ids=torch.zeros(shape, dtype=torch.long))


def test_attention_of_others_is_handed_its_keywords(model):
    """transformers' AttentionInterface: what is registered there may read more than we know."""
    seen = {}

    def listens(module, query, key, value, attention_mask, instances=None, **kwargs):
        seen.update(instances=instances)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("listens", listens)
    AttentionMaskInterface.register("listens", sdpa_mask)
    expected = model(IDS).logits
    model.set_attn_implementation("listens")
    torch.testing.assert_close(model(IDS, instances="here").logits, expected, atol=1e-5, rtol=0)
    assert seen == {"instances": "here"}


def test_flash_attention_is_told_of_samples_by_their_positions(model, monkeypatch):
    """transformers' function for it finds them in position_ids; that it is handed them needs no GPU to be seen."""
    seen = []

    def flash(module, query, key, value, attention_mask, position_ids=None, **kwargs):
        seen.append(position_ids)
        return value.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    model.config._attn_implementation_internal = "flash_attention_2"
    positions = torch.arange(12)[None] % 5
    model(IDS, position_ids=positions)
    assert len(seen) == 2 and all(given is positions for given in seen)


def test_what_is_asked_for_comes_or_is_an_error(model):
    plain = model(IDS)
    as_tuple = model(IDS, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], plain.logits)
    model.config.return_dict = False
    assert isinstance(model(IDS), tuple) and torch.equal(model(IDS)[0], plain.logits)
    model.config.return_dict = True
    with pytest.raises(NotImplementedError, match="chat_batch"):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        model(IDS, output_attentions=True)
    model.set_attn_implementation("eager")
    assert model(IDS, output_attentions=True).attentions[1].shape == (1, 2, 12, 12)
    model.config.output_attentions = model.config.output_hidden_states = True
    assert len(model(IDS).attentions) == 2 and len(model(IDS).hidden_states) == 3
    with pytest.raises(ValueError, match="labels and shift_labels"):
        model(IDS, labels=IDS, shift_labels=IDS)


def test_a_packed_row_takes_no_mask_and_no_cache():
    model, row = tiny_model().eval(), packed(*random_samples(3))
    ones, cache = torch.ones_like(row["input_ids"]), DynamicCache()
    for more in ({"attention_mask": ones}, {"cache": cache}, {"past_key_values": cache}, {"use_cache": True}):
        with pytest.raises(ValueError, match="a packed row"):
            model(**row, **more)
    with pytest.raises(ValueError, match="max_length_q"):
        model(**{name: value for name, value in row.items() if name != "max_length_q"})
    with pytest.raises(ValueError, match="cu_seq_lens_k, max_length_q: belong to a packed row"):
        model(row["input_ids"], max_length_q=3, cu_seq_lens_k=row["cu_seq_lens_k"])
    with pytest.raises(ValueError, match="the batch must be 1"):
        model(row["input_ids"].repeat(2, 1), cu_seq_lens_q=row["cu_seq_lens_q"], max_length_q=row["max_length_q"])
    with pytest.raises(ValueError, match="output_attentions"):
        model(**row, output_attentions=True)


def test_positions_that_begin_anew_begin_a_sample(model):
    """transformers' way to pack without cu_seq_lens: DataCollatorWithFlattening."""
    samples, _ = random_samples(3)
    positions = torch.cat([torch.arange(len(sample)) for sample in samples])[None]
    row = model(torch.tensor([sum(samples, [])]), position_ids=positions).logits
    alone = torch.cat([model(torch.tensor([sample])).logits for sample in samples], dim=1)
    torch.testing.assert_close(row, alone, atol=1e-5, rtol=0)


def test_two_caches_asked_for_at_once(model):
    model.config.use_cache_quantization = True
    with pytest.raises(ValueError, match="two different caches"):
        model.generate(IDS, cache_implementation="static", **GREEDY)
    static = StaticCache(config=model.config, max_cache_len=32)  # one that is brought counts
    model.generate(IDS, **{CACHE: static}, **GREEDY)
    assert int(static.get_seq_length()) == 19


# ---- what we stand in for must be called


def test_a_hook_that_is_gone_is_an_error():
    class Theirs:
        def kept(self, model, *, step): ...

    def kept(self, model, *, step): ...
    def moved(self): ...

    assert compat.overrides(Theirs, "model", "step")(kept) is kept
    with pytest.raises(ImportError, match="Theirs.moved is gone"):
        compat.overrides(Theirs)(moved)
    with pytest.raises(ImportError, match="Theirs.kept takes no trial"):
        compat.overrides(Theirs, "trial")(kept)


def test_an_output_without_a_cache_is_an_error():
    import dataclasses

    @dataclasses.dataclass
    class Output:
        loss: float = 0.0
        memory: int = 0

    with pytest.raises(ImportError, match="Output has no cache, but loss, memory"):
        compat.cache_name(Output)


# ---- versions


@pytest.mark.parametrize("version, old, new", [
    ("4.57.1", True, False), ("5.16.9", True, False), ("5.17.0", False, False), (versions.NEWEST, False, False),
    ("5.17.0.dev0", False, False), ("5.99.0", False, True), ("6.0.0rc1", False, True),
])  # fmt: skip
def test_versions(monkeypatch, version, old, new):
    monkeypatch.setattr(versions, "installed", lambda: version)
    assert (bool(versions.too_old()), bool(versions.not_tested())) == (old, new)
    for line in (versions.too_old(), versions.not_tested()):
        assert not line or version in line and f'pip install "transformers=={versions.NEWEST}"' in line and "\n" not in line


def test_a_program_under_an_old_transformers_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(versions, "installed", lambda: "4.57.1")
    with pytest.raises(SystemExit) as stopped:
        run(lambda: pytest.fail("the job began"))
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "error: first-generation Qwen's code needs transformers 5.17.0 to" in shown


@pytest.mark.parametrize("version, code, said", [("4.57.1", 1, "ImportError: first-gen"), ("5.99.0", 0, "5.99.0 is newer than")])
def test_the_saved_code_says_it_by_itself(tmp_path, version, code, said):
    """The files of a saved folder, in a Python that thinks it has another transformers."""
    from transformers.dynamic_module_utils import get_relative_import_files

    package = tmp_path / "saved"
    package.mkdir()
    file = sys.modules[QWenModel.__module__].__file__
    for path in map(Path, (file, *get_relative_import_files(file))):
        (package / path.name).write_bytes(path.read_bytes())
    assert (package / "compat.py").is_file() and (package / "versions.py").is_file()
    program = f"""
import importlib.metadata as metadata
before = metadata.version
metadata.version = lambda name: {version!r} if name == "transformers" else before(name)
import saved.configuration_qwen, saved.compat
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if said in line]
    assert done.returncode == code and len(lines) == 1, done.stderr


def test_importing_the_model_is_quick_and_silent():
    """No torch before it is needed, and nothing of kernels that other packages could not load."""
    program = "import sys, qwen_model; assert 'torch' not in sys.modules; qwen_model.register(); import peft, torchao"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
