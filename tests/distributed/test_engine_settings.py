"""--deepspeed and --fsdp before anything starts: the file, what a flag sets too, and how transformers gets it."""

import json
import os
from types import SimpleNamespace

import pytest
from command_lines import found, make_world, only, read

from finetune.distributed import engines
from finetune.errors import UserError

ZERO2 = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
PUBLISHED = {  # the shape of the published files: everything that a flag sets is "auto"
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1e9},
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto", "steps_per_print": 100,
}  # fmt: skip


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


@pytest.fixture
def config(tmp_path):
    """config({...}) -> the path of such a file."""

    def write(content, text=None):
        path = tmp_path / "my config.json"
        path.write_text(json.dumps(content) if text is None else text)
        return str(path)

    return write


def deepspeed(world, *flags) -> dict:
    """What DeepSpeed would read."""
    return read(world, *flags).training.deepspeed


def test_the_flags_complete_the_file(world, config):
    made = deepspeed(world, "--deepspeed", config(ZERO2), "--bf16", "--max_grad_norm", "0.5")
    assert made["zero_optimization"]["stage"] == 2 and made["zero_optimization"]["overlap_comm"] is True
    assert (made["bf16"]["enabled"], made["fp16"]["enabled"], made["gradient_clipping"]) == (True, False, 0.5)
    assert made["data_types"] == {"grad_accum_dtype": "fp32"}  # the passes of a step add up in float32
    batch = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    assert [made[key] for key in batch] == [1, 1, 1]  # a step is one item, whatever passes the plan makes of it


def test_a_run_is_watched_by_the_norm_of_its_gradients(world, config):
    line = only(world, "--deepspeed", config({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}))
    assert "zero_optimization.compute_grad_norm is false there" in line and line.endswith(" - leave it out of the file")


def test_a_file_of_autos_works_as_published(world, config):
    args = read(world, "--deepspeed", config(PUBLISHED), "--learning_rate", "3e-4")
    assert args.training.engine == engines.ZERO3
    made = args.training.deepspeed
    assert "optimizer" not in made and made["fp16"] == {"loss_scale": 0, "initial_scale_power": 16, "enabled": False}
    assert made["steps_per_print"] > 1e9  # it would print between our lines


@pytest.mark.parametrize(
    "content,key,theirs,flag,ours",
    [
        ({"gradient_clipping": 0.3}, "gradient_clipping", "0.3", "--max_grad_norm", "1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled", "true", "--bf16", "false"),
        ({"fp16": {"enabled": True}}, "fp16.enabled", "true", "--fp16", "false"),
        ({"train_batch_size": 64}, "train_batch_size", "64", "batch x accumulation x ranks", "8"),
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps",
            "4",
            "--gradient_accumulation_steps",
            "1",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            "optimizer.params.lr",
            "0.001",
            "--learning_rate",
            "5e-05",
        ),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type", '"Lamb"', "--optim", '"adamw_torch_fused"'),
        (
            {"scheduler": {"type": "WarmupLR", "params": {}}},
            "scheduler.type",
            '"WarmupLR"',
            "--lr_scheduler_type",
            '"linear"',
        ),
    ],
)
def test_what_file_and_flag_say_differently(world, config, content, key, theirs, flag, ours):
    path = config(ZERO2 | content)
    line = only(world, "--deepspeed", path)
    what = "the whole block" if "." in key else "the key"
    assert line == (
        f"--deepspeed {path}: {key} is {theirs} there, and {flag} is {ours} - leave {what} out of the file, the flag sets it"
    )


def test_what_both_say_alike_is_no_error(world, config):
    same = {"gradient_clipping": 1, "optimizer": {"type": "AdamW", "params": {"lr": "5e-5", "betas": [0.9, 0.999]}}}
    same["scheduler"] = {"type": "WarmupDecayLR"}
    made = deepspeed(world, "--deepspeed", config(ZERO2 | same))
    assert "scheduler" not in made and "optimizer" not in made  # the flags' own make the curve


@pytest.mark.parametrize(
    "text,expected", [("{", "is not JSON"), ("[1]", "holds a list, not an object"), (None, "no such file in")]
)
def test_files_that_cannot_be(world, config, tmp_path, text, expected):
    path = config(None, text) if text else str(tmp_path / "none.json")
    line = only(world, "--deepspeed", path)
    assert line.startswith(f"--deepspeed {path}: {expected}") and "ds_config_zero2.json" in line.replace("*", "zero2")


def test_two_engines(world, config):
    line = only(world, "--deepspeed", config(ZERO2), "--fsdp", "True")
    assert line == "--deepspeed and --fsdp: two engines for one run - leave out one"


def test_a_missing_package(world, config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert only(world, "--deepspeed", config(ZERO2)) == "--deepspeed: the package is missing - pip install deepspeed"


@pytest.mark.parametrize("spelling,offload", [(["True"], False), (["full_shard auto_wrap offload"], True), ([], False)])
def test_fsdp_in_its_spellings(world, monkeypatch, spelling, offload):
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = read(world, "--fsdp", *spelling)
    assert args.training.engine == engines.FSDP and args.training.fsdp_plugin_args["fsdp_version"] == 2
    assert args.training.fsdp_plugin_args.get("cpu_offload", False) is offload


@pytest.mark.parametrize("word", ["False", "false", "none", ""])
def test_fsdp_can_be_off(world, config, monkeypatch, word):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert read(world, "--fsdp", word).training.engine == engines.DDP
    assert read(world, "--fsdp", word, "--deepspeed", config(ZERO2)).training.engine == engines.ZERO2


@pytest.mark.parametrize("word", ["shard_grad_op", "no_shard", "ful_shard", "full_shard hybrid_shard", "False offload"])
def test_what_fsdp2_does_not_do_here(world, word):
    line, unknown = only(world, "--fsdp", word), word.lower().removeprefix("full_shard ").removesuffix(" offload")
    assert line.startswith(f"--fsdp {word}: {unknown} is nothing that FSDP2 does here - give True, full_shard, ")


@pytest.mark.parametrize(
    "text,why", [(None, "No such file"), ("{", "is not JSON (Expecting"), ("[]", "holds a list, not an object")]
)
def test_fsdp_config_files_that_cannot_be(world, config, tmp_path, text, why):
    path = str(tmp_path / "none.json") if text is None else config(None, text)
    line = only(world, "--fsdp", "True", "--fsdp_config", path)
    assert line.startswith(f"--fsdp_config {path}: {why}")


@pytest.mark.parametrize("zero", [{}, {"zero_optimization": {"stage": 0}}, {"zero_optimization": {"stage": []}}])
def test_a_file_without_a_stage(world, config, zero):
    line = only(world, "--deepspeed", config({"gradient_clipping": 1.0} | zero))
    assert "no zero_optimization.stage of 1, 2 or 3, so nothing is split - use --deepspeed none" in line


@pytest.mark.parametrize(
    "block,named",
    [
        ({"bf16": {"enabled": "auto", "immediate_grad_update": True}}, "bf16.immediate_grad_update is true"),
        ({"optimizer": {"params": {"amsgrad": True, "torch_adam": True}}}, "optimizer.params.amsgrad is true"),
        ({"optimizer": {"type": "AdamW", "legacy_fusion": False}}, "optimizer.legacy_fusion is false"),
        ({"scheduler": {"params": {"warmup_type": "log", "last_batch_iteration": -1}}}, 'params.warmup_type is "log"'),
        ({"scheduler": {"params": {"cos_min_ratio": 0.1, "warmup_min_lr": 0}}}, "params.cos_min_ratio is 0.1"),
    ],
)
def test_what_would_be_dropped_from_a_file_is_named(world, config, block, named):
    line = only(world, "--deepspeed", config(ZERO2 | block))
    assert f"{named} there, and nothing here reads it - leave it out of the file" in line


@pytest.mark.parametrize("block", ["optimizer", "scheduler", "bf16", "fp16", "zero_optimization", "optimizer.params"])
def test_blocks_that_are_no_objects(world, config, block):
    outer, _, inner = block.partition(".")
    line = only(world, "--deepspeed", config(ZERO2 | {outer: {inner: "AdamW"} if inner else "AdamW"}))
    assert f': {block} is "AdamW", not an object - see ' in line


def test_the_schedulers_own_numbers_against_the_flags(world, config):
    params = {"warmup_max_lr": 1e-3, "warmup_num_steps": 100, "total_num_steps": 500, "warmup_min_lr": 1e-6}
    path = config(ZERO2 | {"scheduler": {"type": "WarmupDecayLR", "params": params}})
    flags = ["--learning_rate", "1e-5", "--warmup_ratio", "0.01"]
    said = [line.split(": ", 1)[1].split(" - ")[0] for line in found(world, "--deepspeed", path, *flags)]
    assert said == [
        "scheduler.params.warmup_max_lr is 0.001 there, and --learning_rate is 1e-05",
        "scheduler.params.warmup_min_lr is 1e-06 there, and the beginning of every warm-up is 0",
        "scheduler.params.warmup_num_steps is 100 there, and --warmup_ratio is 0.01",
        "scheduler.params.total_num_steps is 500 there, and --max_steps is -1",
    ]
    flags = ["--learning_rate", "1e-3", "--warmup_steps", "100", "--max_steps", "500"]
    path = config(ZERO2 | {"scheduler": {"type": "WarmupDecayLR", "params": params | {"warmup_min_lr": "auto"}}})
    assert found(world, "--deepspeed", path, *flags) == []


def test_engine_names(monkeypatch):
    assert engines.name_of({}) == engines.ONE
    assert [engines.zero_stage({"zero_optimization": {"stage": stage}}) for stage in (1, 2, 3)] == [
        engines.ZERO1,
        engines.ZERO2,
        engines.ZERO3,
    ]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert engines.name_of({"fsdp": None, "deepspeed": None}) == engines.DDP


def test_nothing_joins_a_process_group_before_it_is_connected(world, monkeypatch):
    """Else ranks would wait inside it for the one that renders the data, until a time-out."""
    import torch

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    args = read(world)
    assert found(world) == [] and not torch.distributed.is_initialized()
    assert (args.training.world_size, args.training.process_index, args.training.engine) == (2, 1, engines.DDP)


@pytest.mark.parametrize("visible, index", [(4, 3), (1, 0)])
def test_each_rank_has_its_gpu(monkeypatch, visible, index):
    """Also where a scheduler shows it one alone. The process group is told which: else NCCL guesses, and says so."""
    import torch

    told = {}
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.update(current=device))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **words: told.update(words, backend=backend))
    monkeypatch.setattr("accelerate.PartialState", lambda **words: None)
    training = SimpleNamespace(use_cpu=False, ddp_backend=None, ddp_timeout=60, deepspeed=None, fsdp=None)
    engines.connect(training)
    device = torch.device("cuda", index)
    assert (told["current"], told["device_id"], told["backend"]) == (device, device, "cuda:nccl,cpu:gloo")
    assert os.environ["LOCAL_RANK"] == str(index)


def test_both_errors_are_listed_together(world, config):
    with pytest.raises(UserError) as caught:
        from finetune.flags import checks

        checks.check_flags(
            read(world, "--deepspeed", config(ZERO2 | {"gradient_clipping": 3}), "--lora_r", "0", "--use_lora")
        )
    assert len(caught.value.findings) == 2
