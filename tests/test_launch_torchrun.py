"""The scripts that start several processes, and those beside finetune_lora_single_gpu.sh, as test_launch.py does it."""

# ruff: noqa: F811 - fixtures are imported, and named as parameters
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_launch import ROOT, dry, flags, program, start  # noqa: F401

SCRIPTS = sorted(path.name for path in (ROOT / "finetune").glob("finetune_*.sh"))
SEVERAL = [name for name in SCRIPTS if name.endswith("_ds.sh")]
CONFIGS = sorted((ROOT / "finetune").glob("ds_config_*.json"))
MACHINE = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
ALL = {
    "data_path": "D", "output_dir": "output_qwen", "bf16": "True",
    "num_train_epochs": "5", "weight_decay": "0.1", "adam_beta2": "0.95", "warmup_ratio": "0.01",
    "lr_scheduler_type": "cosine", "logging_steps": "1", "save_strategy": "steps", "save_steps": "1000",
    "save_total_limit": "10", "report_to": "none", "model_max_length": "512",
}  # fmt: skip
FULL = {"model_name_or_path": "Qwen/Qwen-7B", "learning_rate": "1e-5", "per_device_train_batch_size": "1",
        "gradient_accumulation_steps": "16"}  # fmt: skip
LORA = {"model_name_or_path": "Qwen/Qwen-7B", "learning_rate": "3e-4", "per_device_train_batch_size": "2",
        "gradient_accumulation_steps": "8", "use_lora": "True"}  # fmt: skip
Q_LORA = LORA | {"model_name_or_path": "Qwen/Qwen-7B-Chat-Int4", "q_lora": "True"}
ZERO_2, ZERO_3 = ({"deepspeed": str(ROOT / "finetune" / f"ds_config_zero{stage}.json")} for stage in (2, 3))
PUBLISHED = {
    "finetune_ds.sh": FULL | ZERO_3,
    "finetune_full_single_gpu.sh": FULL | {"bf16_weights": "True", "optim": "adamw_torch_8bit"},
    "finetune_lora_ds.sh": LORA | ZERO_2,
    "finetune_lora_single_gpu.sh": LORA,
    "finetune_qlora_ds.sh": Q_LORA | ZERO_2,
    "finetune_qlora_single_gpu.sh": Q_LORA,
}


def path_of(name: str) -> Path:
    return ROOT / "finetune" / name


@pytest.fixture
def plain(monkeypatch):
    """Without what a cluster may have set."""
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GPUS_PER_NODE", "MASTER_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)


pytestmark = pytest.mark.usefixtures("plain")


def launched(words: list[str]) -> dict[str, str]:
    """The flags of torchrun.py."""
    place = words.index(str(ROOT / "finetune" / "distributed" / "torchrun.py"))
    pairs = words[place + 1 : words.index(str(ROOT / "finetune.py"))]
    return dict(zip(pairs[::2], pairs[1::2]))


def errors(done: subprocess.CompletedProcess) -> list[str]:
    """The lines of a start that was refused."""
    assert (done.returncode, done.stdout) == (2, "")
    return [line for line in done.stderr.splitlines() if not line.startswith("note: ")]


def test_there_is_a_script_for_each_method():
    assert SCRIPTS == sorted(PUBLISHED)


@pytest.mark.parametrize("name", SCRIPTS)
def test_published_hyperparameters(dry, name):
    given = flags(dry("-d", "D", script=path_of(name), gpus=1))
    assert given == {f"--{flag}": [value] for flag, value in (ALL | PUBLISHED[name]).items()}


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_trainer_knows_every_flag(dry, name, gpus, tmp_path):
    """The printed words, read by the trainer itself, as a process of a GPU machine or of one without."""
    from finetune.flags import args

    words = dry("-d", "D", "-o", str(tmp_path / "out"), script=path_of(name), gpus=gpus)
    own = words[words.index(str(ROOT / "finetune.py")) + 1 :]
    read = args.parse([*own, "--use_cpu"])
    assert read.findings == []
    assert read.training.learning_rate == float(PUBLISHED[name]["learning_rate"])
    assert read.lora.q_lora == ("qlora" in name)
    assert (read.training.bf16, read.training.fp16) == (gpus > 0, False)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_head_names_memory_and_result(start, name):
    text = start("-h", script=path_of(name)).stdout
    head = text[: text.index("Usage:")]
    assert "LoRA" in head if "lora" in name else head.startswith("Full-parameter")
    assert "The output folder is a" in head
    assert "GB" in head or name == "finetune_lora_single_gpu.sh"
    assert ("NNODES" in text) == ("--max_restarts N" in text) == (name in SEVERAL)


# ---- processes and machines


@pytest.mark.parametrize("gpus, environment, processes, said", [
    (0, {}, "1", "no NVIDIA GPU here: running 1 process on the CPU in float32"),
    (0, {"GPUS_PER_NODE": "2"}, "2", "no NVIDIA GPU here: running 2 processes on the CPU in float32"),
    (8, {}, "8", "running 8 processes, one per GPU"),
    (1, {}, "1", "running 1 process, one per GPU"),
    (8, {"GPUS_PER_NODE": "4"}, "4", "running 4 processes, one per GPU"),
    (8, {"CUDA_VISIBLE_DEVICES": "1,3,5"}, "3", "running 3 processes, one per GPU"),
    (8, {"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"}, "2", "running 2 processes, one per GPU"),
    (8, {"CUDA_VISIBLE_DEVICES": "1,3,5", "GPUS_PER_NODE": "2"}, "2", "running 2 processes, one per GPU"),
    (8, {"CUDA_VISIBLE_DEVICES": ""}, "1", "CUDA_VISIBLE_DEVICES= hides every GPU: running 1 process on the CPU"),
    (0, {"CUDA_VISIBLE_DEVICES": "0,1"}, "1", "CUDA_VISIBLE_DEVICES=0,1 is set, but there is no NVIDIA GPU here"),
])  # fmt: skip
def test_how_many_processes(start, gpus, environment, processes, said):
    done = start("-d", "D", script=path_of("finetune_ds.sh"), gpus=gpus, DRY_RUN="1", **environment)
    words = shlex.split(done.stdout)
    assert launched(words)["--nproc_per_node"] == processes
    assert said in done.stderr
    assert flags(words)["--bf16"] == [str("per GPU" in said)]
    if "CUDA_VISIBLE_DEVICES" in environment:
        assert words[0] == f"CUDA_VISIBLE_DEVICES={environment['CUDA_VISIBLE_DEVICES']}"


def test_on_one_machine_any_free_port_is_used(dry):
    """So that two runs can share it. --master_port 0, the default of torchrun.py, is any free one."""
    assert launched(dry("-d", "D", script=path_of("finetune_ds.sh"), MASTER_ADDR="elsewhere")) == {
        "--nproc_per_node": "1",
        "--max_restarts": "0",
    }


def test_the_published_environment(dry):
    given = launched(dry("-d", "D", "--max_restarts", "3", script=path_of("finetune_lora_ds.sh"), gpus=4, **MACHINE))
    assert given == {
        "--nproc_per_node": "4", "--max_restarts": "3", "--nnodes": "2", "--node_rank": "1",
        "--master_addr": "10.0.0.1", "--master_port": "6001",
    }  # fmt: skip
    more = {"MASTER_PORT": "29500", "MASTER_TIMEOUT": "30", "NODE_RANK": "00", "NNODES": "08"}
    given = launched(dry("-d", "D", script=path_of("finetune_lora_ds.sh"), **MACHINE | more))
    assert (given["--node_rank"], given["--nnodes"]) == ("0", "8")
    assert (given["--master_port"], given["--master_timeout"]) == ("29500", "30")


NODE_0 = "give 0 on the machine of MASTER_ADDR, and 1 to 1 on the others"
MASTER = "give the address of the machine with NODE_RANK=0, as the others reach it"


@pytest.mark.parametrize("environment, line", [
    ({"NNODES": "two"}, "NNODES=two: not possible - give a whole number from 1 to 100000"),
    ({"NNODES": "0"}, "NNODES=0: not possible - give a whole number from 1 to 100000"),
    ({"NNODES": "-1"}, "NNODES=-1: not possible - give a whole number from 1 to 100000"),
    ({"NODE_RANK": "2"}, "NODE_RANK=2: not in 0..1 - number the machines from 0; NNODES=2 is how many there are"),
    ({"NODE_RANK": "-1"}, "NODE_RANK=-1: not in 0..1 - number the machines from 0; NNODES=2 is how many there are"),
    ({"NODE_RANK": "x"}, "NODE_RANK=x: not in 0..1 - number the machines from 0; NNODES=2 is how many there are"),
    ({"NODE_RANK": ""}, f"NNODES=2, but NODE_RANK is not set - {NODE_0}"),
    ({"NNODES": "1"}, "NODE_RANK=1: not in 0..0 - number the machines from 0; NNODES=1 is how many there are"),
    ({"MASTER_ADDR": ""}, f"NNODES=2, but MASTER_ADDR is not set - {MASTER}"),
    ({"MASTER_ADDR": "localhost"}, f"NNODES=2, but MASTER_ADDR is localhost - {MASTER}"),
    ({"MASTER_ADDR": "127.0.1.1"}, f"NNODES=2, but MASTER_ADDR is 127.0.1.1 - {MASTER}"),
    ({"MASTER_ADDR": "::1"}, f"NNODES=2, but MASTER_ADDR is ::1 - {MASTER}"),
    ({"MASTER_PORT": "0"}, "MASTER_PORT=0: not possible - give a whole number from 1 to 65535"),
    ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: not possible - give a whole number from 1 to 65535"),
    ({"MASTER_PORT": "ssh"}, "MASTER_PORT=ssh: not possible - give a whole number from 1 to 65535"),
    ({"MASTER_TIMEOUT": "1m"}, "MASTER_TIMEOUT=1m: not possible - give a whole number from 1 to 999999"),
    ({"GPUS_PER_NODE": "all"}, "GPUS_PER_NODE=all: not possible - give a whole number from 1 to 1024"),
    ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0: not possible - give a whole number from 1 to 1024"),
    ({"GPUS_PER_NODE": "5"}, "GPUS_PER_NODE=5, but 4 visible - give at most 4, or leave it out"),
    ({"CUDA_VISIBLE_DEVICES": "1,4"},
     "CUDA_VISIBLE_DEVICES=1,4: no GPU 4 here - the GPUs are 0 to 3, see nvidia-smi"),
])  # fmt: skip
@pytest.mark.parametrize("dry_run", ["0", "1"])
def test_what_cannot_be_is_said_at_once(start, environment, line, dry_run):
    done = start("-d", "D", script=path_of("finetune_ds.sh"), gpus=4, DRY_RUN=dry_run, **MACHINE | environment)
    assert errors(done) == [f"error: {line}"]


def test_everything_wrong_is_said_together(start):
    settings = {"NNODES": "2", "NODE_RANK": "9", "MASTER_PORT": "x", "GPUS_PER_NODE": "no"}
    done = start("--max_restarts", "often", "--deepspeed", "none.json", script=path_of("finetune_ds.sh"), **settings)
    assert [line.split()[1] for line in errors(done)] == [
        "GPUS_PER_NODE=no:", "--max_restarts", "MASTER_PORT=x:", "NODE_RANK=9:", "NNODES=2,", "DeepSpeed",
    ]  # fmt: skip


def test_scripts_of_one_process_do_not_look_at_the_cluster(dry):
    words = dry("-d", "D", "--max_restarts", "1", script=path_of("finetune_qlora_single_gpu.sh"), NNODES="x")
    assert words[-2:] == ["--max_restarts", "1"]  # which finetune.py will refuse
    assert str(ROOT / "finetune" / "distributed" / "torchrun.py") not in words


# ---- DeepSpeed


def test_deepspeed_configs(dry, start, tmp_path):
    """Ours by name, the user's by path, one of the user's wins over ours of that name; none is none."""
    script = path_of("finetune_lora_ds.sh")
    (tmp_path / "my configs").mkdir()
    (tmp_path / "my configs" / "ds.json").write_text("{}")
    assert flags(dry(script=script))["--deepspeed"] == [str(ROOT / "finetune" / "ds_config_zero2.json")]
    ours = str(ROOT / "finetune" / "ds_config_zero3.json")
    assert flags(dry("--deepspeed", "ds_config_zero3.json", script=script))["--deepspeed"] == [ours]
    assert flags(dry("--deepspeed=ds_config_zero3.json", script=script))["--deepspeed"] == [ours]
    assert flags(dry("--deepspeed", "my configs/ds.json", script=script))["--deepspeed"] == ["my configs/ds.json"]
    assert "--deepspeed" not in flags(dry("--deepspeed", "none", script=script))
    assert flags(dry("--deepspeed", ours, script=script))["--deepspeed"] == [ours]
    (tmp_path / "ds_config_zero2.json").write_text("{}")
    assert flags(dry(script=script))["--deepspeed"] == [str(ROOT / "finetune" / "ds_config_zero2.json")]
    own = dry("--deepspeed", "ds_config_zero2.json", script=script)
    assert flags(own)["--deepspeed"] == ["ds_config_zero2.json"]


@pytest.mark.parametrize("wish", ["ds_config_zero9.json", "finetune/ds_config_zero2.json", "."])
def test_a_deepspeed_config_that_is_not_there(start, tmp_path, wish):
    done = start("-d", "D", "--deepspeed", wish, script=path_of("finetune_ds.sh"), DRY_RUN="1")
    names = " ".join(path.name for path in CONFIGS)
    what = f"error: DeepSpeed config {wish} not found in {tmp_path} - give a file, none, or one of ours: {names}"
    assert errors(done) == [what]


@pytest.mark.parametrize("option", ["--deepspeed", "--max_restarts"])
@pytest.mark.parametrize("rest", [(), ("--bf16",), ("",)])
def test_a_missing_value(start, option, rest):
    done = start(option, *rest, script=path_of("finetune_ds.sh"), DRY_RUN="1")
    assert errors(done) == [f"error: {option} needs a value"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_set_nothing_that_a_flag_sets(path):
    """How things are sharded, and nothing else: no precision, batch, clipping, optimizer or schedule, not even "auto"."""
    config = json.loads(path.read_text())
    assert list(config) == ["zero_optimization"]
    zero = config["zero_optimization"]
    assert zero["stage"] == int(path.stem.split("zero")[1][0])
    offloaded = {key for key in zero if key.startswith("offload")}
    expected = {"offload_optimizer"} | ({"offload_param"} if zero["stage"] == 3 else set())
    assert offloaded == (expected if "offload" in path.stem else set())
    assert all(zero[key] == {"device": "cpu", "pin_memory": True} for key in offloaded)


def test_the_published_sharding():
    two, three = (json.loads(path_of(f"ds_config_zero{n}.json").read_text())["zero_optimization"] for n in (2, 3))
    assert two["allgather_bucket_size"] == two["reduce_bucket_size"] == 2e8
    assert two["overlap_comm"] and two["contiguous_gradients"]
    assert "stage3_gather_16bit_weights_on_model_save" not in three  # the trainer gathers, and saves
    assert three["sub_group_size"] == three["stage3_max_live_parameters"] == three["stage3_max_reuse_distance"] == 1e9


def test_deepspeed_is_needed_only_where_it_is_used(start, tmp_path):
    """An interpreter that lacks it."""
    text = f'#!/bin/sh\n[ "$1" = -c ] || exec echo ran\nshift 2\nexec {shlex.quote(sys.executable)} -c "import sys\n'
    text += 'print(*[name for name in sys.argv[1:] if name == \'deepspeed\'])" "$@"\n'
    python = program(tmp_path / "python", text)
    script = path_of("finetune_lora_ds.sh")
    lines = errors(start("-d", "D", script=script, FINETUNE_PYTHON=str(python)))
    assert len(lines) == 1 and lines[0].startswith(f"error: {python} has no deepspeed - ")
    done = start("-d", "D", "--deepspeed", "none", script=script, FINETUNE_PYTHON=str(python))
    assert (done.returncode, done.stdout) == (0, "ran\n")


# ---- precision


def test_weights_are_kept_in_bf16_only_with_bf16(dry):
    """On the CPU, and where the user wants fp16, float32 weights with torch's own AdamW."""
    script = path_of("finetune_full_single_gpu.sh")
    for words in (dry("-d", "D", script=script, gpus=0), dry("-d", "D", "--fp16", script=script, gpus=1)):
        given = flags(words)
        assert (given["--bf16"], given["--bf16_weights"], given["--optim"]) == (["False"], ["False"], ["adamw_torch"])
    given = flags(dry("-d", "D", "--bf16", script=script, gpus=0))
    assert (given["--bf16_weights"], given["--optim"]) == (["True"], ["adamw_torch_8bit"])
    given = flags(dry("-d", "D", "--optim", "sgd", script=script, gpus=0))
    assert given["--optim"] == ["sgd"]


def test_what_float32_weights_take_is_said(start, tmp_path):
    """A GPU without bf16 may be too small then."""
    full, lora = path_of("finetune_full_single_gpu.sh"), path_of("finetune_lora_single_gpu.sh")
    said = "float32: 16 bytes a parameter instead of 6, in fp16 2 more"
    listing = "echo 'GPU 0: Tesla T4 (UUID: GPU-0)'"
    program(tmp_path / "own" / "nvidia-smi", f"#!/bin/sh\ncase $1 in -L) {listing};; *) echo 7.5;; esac\n")
    path = f"{tmp_path / 'own'}:{os.environ['PATH']}"
    for flags_, script, count in (((), full, 1), (("--fp16",), full, 1), (("--bf16",), full, 0), ((), lora, 0)):
        done = start("-d", "D", *flags_, script=script, DRY_RUN="1", PATH=path)
        assert done.stderr.count(said) == count, flags_
    assert said in start("-d", "D", "--fp16", script=full, gpus=1, DRY_RUN="1").stderr


@pytest.mark.parametrize("name", ["finetune_qlora_ds.sh", "finetune_qlora_single_gpu.sh"])
def test_q_lora_on_an_older_gpu_is_in_fp16(start, tmp_path, name):
    listing = "echo 'GPU 0: Tesla T4 (UUID: GPU-0)'"
    program(tmp_path / "own" / "nvidia-smi", f"#!/bin/sh\ncase $1 in -L) {listing};; *) echo 7.5;; esac\n")
    path = f"{tmp_path / 'own'}:{os.environ['PATH']}"
    given = flags(shlex.split(start("-d", "D", script=path_of(name), DRY_RUN="1", PATH=path).stdout))
    assert (given["--bf16"], given["--fp16"]) == (["False"], ["True"])


# ---- Slurm


def test_the_slurm_example(start, tmp_path):
    """With a made-up scontrol and srun: two machines, each with its own number, and the same address and port."""
    example = path_of("slurm_example.sbatch")
    assert subprocess.run(["bash", "-n", example], capture_output=True, text=True).stderr == ""
    program(
        tmp_path / "bin" / "scontrol",
        '#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"\n',
    )
    srun = '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n'
    program(tmp_path / "bin" / "srun", srun)
    given = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]"}
    given |= {"SLURM_JOB_ID": "1234567", "DRY_RUN": "1"}
    done = start("-m", "a model", "-d", "D", "-o", "O", script=example, gpus=8, **given)
    assert done.returncode == 0, done.stderr
    for rank, line in enumerate(done.stdout.splitlines()):
        words = shlex.split(line)
        assert launched(words) == {
            "--nproc_per_node": "8", "--max_restarts": "3", "--nnodes": "2", "--node_rank": str(rank),
            "--master_addr": "gpu07", "--master_port": "24567",
        }  # fmt: skip
        assert (flags(words)["--model_name_or_path"], flags(words)["--deepspeed"]) == (
            ["a model"],
            [ZERO_3["deepspeed"]],
        )
        assert (flags(words)["--resume_from_checkpoint"], flags(words)["--save_steps"]) == (["auto"], ["200"])
    assert rank == 1


def test_fsdp_takes_the_place_of_the_scripts_deepspeed_config(dry):
    asking = (["--fsdp", "True"], ["--fsdp=True"], ["--fsdp"], ["--fsdp", "--seed", "1"], ["--fsdp", "False", "--fsdp"])
    for wish in asking:
        words = dry("-d", "talks.json", *wish, script=ROOT / "finetune" / "finetune_lora_ds.sh")
        assert "--deepspeed" not in words and wish[0] in words
    for wish in (["--fsdp", "False"], ["--fsdp=false"], ["--fsdp", ""], ["--fsdp="], ["--fsdp", "--fsdp=False"], []):
        words = dry("-d", "talks.json", *wish, script=ROOT / "finetune" / "finetune_lora_ds.sh")
        assert "--deepspeed" in words


@pytest.mark.parametrize("code, requeued", [(75, True), (2, False), (0, False)])
def test_the_slurm_example_puts_a_job_that_has_saved_back(tmp_path, code, requeued):
    toolkit, told = tmp_path / "toolkit", tmp_path / "told"
    (toolkit / "finetune").mkdir(parents=True)
    (toolkit / "finetune" / "finetune_ds.sh").write_text(f"exit {code}\n")
    program(tmp_path / "bin" / "scontrol", f'#!/bin/sh\n[ "$1" = show ] && echo gpu07 || echo "$*" >>"{told}"\n')
    program(tmp_path / "bin" / "srun", '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nSLURM_NODEID=0 "$@"\n')
    given = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(toolkit), "SLURM_JOB_NUM_NODES": "1"}
    given |= {"SLURM_JOB_NODELIST": "gpu07", "SLURM_JOB_ID": "1234567"}
    done = subprocess.run(["bash", path_of("slurm_example.sbatch")], env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert (told.exists() and told.read_text()) == ("requeue 1234567\n" if requeued else False)
