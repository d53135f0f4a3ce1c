"""The scripts as a person types them: the command that DRY_RUN=1 prints is read back word by word."""

import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "finetune" / "finetune_lora_single_gpu.sh"
PYTHON = shlex.quote(sys.executable)
SHELL_FILES = [
    *ROOT.glob("*.sh"),
    *ROOT.glob("finetune/*.sh"),
    *ROOT.glob("finetune/*.sbatch"),
    ROOT / "tests" / "run.sh",
    ROOT / ".ci" / "run",
]


def program(path: Path, text: str) -> Path:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def start(tmp_path):
    """start(*arguments, gpus=0, shell="bash", script=SCRIPT, **environment) runs the script in a folder of the test.

    A made-up nvidia-smi shows `gpus` GPUs, or fails where there are none. The machine's own settings are taken out.
    """

    def run(*arguments, gpus=0, shell="bash", script=SCRIPT, cwd=None, **environment):
        lines = "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(gpus))
        program(tmp_path / "bin" / "nvidia-smi", f"#!/bin/sh\n{lines or 'echo No devices were found; exit 6'}\n")
        own = ("CUDA_VISIBLE_DEVICES", "FINETUNE_PYTHON", "DRY_RUN")
        inherited = {key: value for key, value in os.environ.items() if key not in own}
        environment = inherited | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | environment
        command = [shell, str(script), *arguments]
        return subprocess.run(command, cwd=cwd or tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def dry(start):
    """dry(...) is start(...) under DRY_RUN=1, and gives the words of the printed command."""

    def run(*arguments, **settings):
        done = start(*arguments, DRY_RUN="1", **settings)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        return shlex.split(done.stdout)

    return run


def flags(words: list[str]) -> dict[str, list[str]]:
    """Each flag's values as argparse would end up with: those of its last mention."""
    found, values = {}, []
    for word in words[words.index(str(ROOT / "finetune.py")) + 1 :]:
        if word.startswith("--"):
            found[word] = values = []
        else:
            values.append(word)
    return found


def test_the_published_hyperparameters(dry):
    """The published finetune_lora_single_gpu.sh, but for --lazy_preprocess, which has no use here, and
    --gradient_checkpointing, which goes by the memory."""
    given = flags(dry("-d", "talks.json", gpus=1))
    published = {
        "model_name_or_path": "Qwen/Qwen-7B", "data_path": "talks.json", "output_dir": "output_qwen",
        "use_lora": "True",
        "bf16": "True", "num_train_epochs": "5", "per_device_train_batch_size": "2",
        "gradient_accumulation_steps": "8", "learning_rate": "3e-4", "weight_decay": "0.1", "adam_beta2": "0.95",
        "warmup_ratio": "0.01", "lr_scheduler_type": "cosine", "logging_steps": "1", "save_strategy": "steps",
        "save_steps": "1000", "save_total_limit": "10", "report_to": "none", "model_max_length": "512",
    }  # fmt: skip
    assert given == {f"--{name}": [value] for name, value in published.items()}


@pytest.mark.parametrize("options", [
    ("-m", "M", "-d", "D", "-o", "O"),
    ("--model", "M", "--data", "D", "--output", "O"),
    ("--output_dir", "O", "--data_path", "D", "--model_name_or_path", "M"),
    ("--model=M", "--data=D", "--output=O"),
    ("--model_name_or_path=M", "--data_path=D", "--output_dir=O"),
    ("-m", "other", "-m", "M", "-d", "D", "-o", "O"),
])  # fmt: skip
def test_every_spelling_of_the_options(dry, options):
    words = dry(*options)
    given = flags(words)
    assert (given["--model_name_or_path"], given["--data_path"], given["--output_dir"]) == (["M"], ["D"], ["O"])
    assert words.count("--model_name_or_path") == 1


@pytest.mark.parametrize("name", [
    "two words", "it's", 'say "so"', "$HOME `id` ;&|*?", "back\\slash", "千问 模型", "tab\tline\nend", "a=b",
])  # fmt: skip
def test_any_path_reaches_the_trainer_unchanged(start, name):
    """bash reads the printed line back, as it would after pasting: no word is split, joined or expanded."""
    done = start("-m", name, "-d", f"{name}/d.json", "-o", f"{name}/", "--run_name", name, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    pasted = subprocess.run(["bash", "-c", f"printf '%s\\0' {done.stdout}"], capture_output=True, text=True, check=True)
    given = flags(pasted.stdout.split("\0")[:-1])
    assert given["--model_name_or_path"] == [name]
    assert given["--data_path"] == [f"{name}/d.json"]
    assert given["--output_dir"] == [f"{name}/"]
    assert given["--run_name"] == [name]


def test_from_another_folder_relative_paths_stay_the_users(dry, tmp_path):
    """The script is found from anywhere, and neither changes the folder nor rewrites paths; a link to it works, too."""
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    link = tmp_path / "tune"
    link.symlink_to(SCRIPT)
    relative = os.path.relpath(SCRIPT, elsewhere)
    for script in (SCRIPT, relative, link):
        words = dry("-m", "./model", "-d", "../d.json", script=script, cwd=elsewhere)
        assert words[1] == str(ROOT / "finetune.py")
        assert flags(words)["--model_name_or_path"] == ["./model"]
        assert flags(words)["--data_path"] == ["../d.json"]


def test_cdpath_does_not_lead_astray(dry, tmp_path):
    """With CDPATH set, bash's cd may go elsewhere and print where it went."""
    (tmp_path / "finetune").mkdir()
    words = dry("-d", "D", CDPATH=str(tmp_path), script="finetune/finetune_lora_single_gpu.sh", cwd=ROOT)
    assert words[1] == str(ROOT / "finetune.py")


def test_a_toolkit_in_a_folder_with_a_space_and_an_equals_sign(start, tmp_path):
    """The copy starts the finetune.py beside it, here one that tells its folder and its arguments."""
    copy = tmp_path / "my lr=1 kit"
    shutil.copytree(ROOT / "finetune", copy / "finetune", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (copy / "finetune.py").write_text("import os, sys\nprint(os.getcwd(), *sys.argv, sep='|')")
    program(copy / ".venv" / "bin" / "python", f'#!/bin/sh\n[ "$1" = -c ] || exec {PYTHON} "$@"\n')
    done = start("-d", "D", script=copy / "finetune" / SCRIPT.name, gpus=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}|{copy / 'finetune.py'}|--model_name_or_path|Qwen/Qwen-7B|--data_path|D|")


@pytest.mark.parametrize("shell", ["sh", "dash"])
def test_sh_goes_over_to_bash(dry, shell):
    if shutil.which(shell) is None:
        shell = "sh"
    assert dry("-m", "a b", "-d", "D", shell=shell) == dry("-m", "a b", "-d", "D")


def test_several_files(dry):
    words = dry("-d", "a.json", "b c.json:0.3", "--data=d", "-m", "M", "--data_path", "e", "--lora_r", "8")
    given = flags(words)
    assert given["--data_path"] == ["a.json", "b c.json:0.3", "d", "e"] and given["--model_name_or_path"] == ["M"] and given["--lora_r"] == ["8"]


@pytest.mark.parametrize("option", ["-m", "-d", "-o", "--model", "--data_path", "--output_dir"])
@pytest.mark.parametrize("rest", [(), ("",), ("-o", "out"), ("--bf16",)])
def test_a_missing_value_is_said(start, option, rest):
    done = start(option, *rest, DRY_RUN="1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {option} needs a value\n")


def test_a_missing_value_after_an_equals_sign(start):
    done = start("--data=", DRY_RUN="1")
    assert (done.returncode, done.stderr) == (2, "error: --data needs a value\n")


def test_other_flags_pass_through_in_order(dry):
    extra = ["--lora_target_modules", "c_attn", "w1", "--seed=7", "--eval_data_path", "held out.json"]
    assert dry("-d", "D", *extra)[-len(extra) :] == extra
    assert dry(*extra, "-d", "D") == dry("-d", "D", *extra)


def test_after_two_dashes_nothing_is_read(dry):
    extra = ["-m", "--help", "-h", "--", "--data_path", "later"]
    words = dry("-d", "D", "--", *extra)
    assert words[-len(extra) :] == extra
    assert words[words.index("--data_path") + 1] == "D"


def test_the_trainer_knows_every_flag_and_the_users_come_out_on_top(dry, tmp_path):
    """The printed words, read by the trainer itself. The last mention counts, as flags() above assumes."""
    from finetune.flags import args

    own = ["--learning_rate", "1e-4", "--fp16", "--lora_target_modules", "w1", "w2"]
    words = dry("-d", "D", "-o", str(tmp_path / "out"), *own)
    read = args.parse(words[words.index(str(ROOT / "finetune.py")) + 1 :])
    assert read.findings == []
    training, lora = read.training, read.lora
    assert (training.learning_rate, training.fp16, training.bf16) == (1e-4, True, False)
    assert lora.lora_target_modules == ["w1", "w2"]
    assert (training.num_train_epochs, training.per_device_train_batch_size, training.adam_beta2) == (5, 2, 0.95)
    assert lora.use_lora and not (tmp_path / "out").exists()


@pytest.mark.parametrize("asked", [("--fp16",), ("--fp16", "True"), ("--fp16=true",), ("--fp16", "--seed", "1")])
def test_fp16_takes_the_place_of_bf16(dry, asked):
    assert flags(dry("-d", "D", *asked))["--bf16"] == ["False"]


@pytest.mark.parametrize("asked", [(), ("--fp16", "False"), ("--fp16=False",), ("--run_name", "fp16")])
def test_bf16_stays_otherwise(dry, asked):
    assert flags(dry("-d", "D", *asked, gpus=1))["--bf16"] == ["True"]


@pytest.mark.parametrize("asked, bf16, said", [
    ((), "False", "running on the CPU in float32\n"),
    (("--bf16",), "True", "running on the CPU\n"),
    (("--bf16", "False"), "False", "running on the CPU in float32\n"),
])  # fmt: skip
def test_the_cpu_computes_in_float32_unless_asked(dry, start, asked, bf16, said):
    """bf16 takes ten times as long on most CPUs."""
    found = flags(dry("-d", "D", *asked, gpus=0))["--bf16"]
    assert found in ([bf16], []) and (found or asked == ("--bf16",))
    assert start("-d", "D", *asked, gpus=0, DRY_RUN="1").stderr.endswith(said)


@pytest.mark.parametrize("capability, asked, expected", [
    ("7.5", (), ("False", "True")),
    ("8.0", (), ("True", None)),
    ("7.5", ("--bf16",), (None, "False")),
    ("No devices", (), ("True", None)),
])  # fmt: skip
def test_an_older_gpu_gets_fp16(start, tmp_path, capability, asked, expected):
    """T4 and V100 have no bf16; a user's own word goes before."""
    listing = "echo 'GPU 0: Tesla T4 (UUID: GPU-0)'"
    text = f'#!/bin/sh\ncase $1 in -L) {listing};; *) echo "{capability}";; esac\n'
    program(tmp_path / "own" / "nvidia-smi", text)
    done = start("-d", "D", *asked, gpus=1, DRY_RUN="1", PATH=f"{tmp_path / 'own'}:{os.environ['PATH']}")
    given = flags(shlex.split(done.stdout))
    assert tuple(given.get(name, [None])[0] if given.get(name) else None for name in ("--bf16", "--fp16")) == expected
    assert ("training in fp16" in done.stderr) == (expected == ("False", "True"))


@pytest.mark.parametrize("gpus, visible, first_word, said", [
    (0, None, "python", "note: no NVIDIA GPU here: running on the CPU"),
    (1, None, "python", "note: running on the GPU"),
    (4, None, "CUDA_VISIBLE_DEVICES=0", "note: 4 GPUs here, and one process uses one of them: GPU 0."),
    (4, "3", "CUDA_VISIBLE_DEVICES=3", "note: running on GPU 3 (CUDA_VISIBLE_DEVICES)"),
    (4, "2,3", "CUDA_VISIBLE_DEVICES=2", "note: running on GPU 2, the first of CUDA_VISIBLE_DEVICES=2,3"),
    (2, "GPU-1", "CUDA_VISIBLE_DEVICES=GPU-1", "note: running on GPU GPU-1 (CUDA_VISIBLE_DEVICES)"),
    (4, "", "CUDA_VISIBLE_DEVICES=", "note: CUDA_VISIBLE_DEVICES= hides every GPU: running on the CPU"),
    (4, "-1", "CUDA_VISIBLE_DEVICES=-1", "note: CUDA_VISIBLE_DEVICES=-1 hides every GPU: running on the CPU"),
    (0, "1", "CUDA_VISIBLE_DEVICES=1", "note: CUDA_VISIBLE_DEVICES=1 is set, but there is no NVIDIA GPU here"),
])  # fmt: skip
def test_which_gpu(start, gpus, visible, first_word, said):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = start("-d", "D", gpus=gpus, DRY_RUN="1", **environment)
    word = shlex.split(done.stdout)[0]
    assert word == first_word or (first_word == "python" and Path(word).name.startswith("python"))
    assert said in done.stderr


def test_a_gpu_that_is_not_there(start):
    done = start("-m", "M", "-d", "D", gpus=2, DRY_RUN="1", CUDA_VISIBLE_DEVICES="7")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: CUDA_VISIBLE_DEVICES=7: no GPU 7 here - the GPUs are 0 to 1, see nvidia-smi\n"


def test_a_broken_driver_is_told(start):
    done = start("-m", "M", "-d", "D", gpus=0, DRY_RUN="1")
    assert done.stderr.startswith("note: nvidia-smi finds no GPU: No devices were found\n")


def test_the_model_that_nobody_named_is_told(start):
    assert "note: no -m: Qwen/Qwen-7B is taken\n" in start("-d", "D", gpus=1, DRY_RUN="1").stderr
    for words in (["-m", "M"], ["--model=M"]):
        assert "no -m" not in start(*words, "-d", "D", gpus=1, DRY_RUN="1").stderr


def test_the_process_gets_exactly_what_was_shown(start, tmp_path):
    """Without DRY_RUN: the same words, the one GPU in its environment, its exit code, and its own standard output."""
    script = '#!/bin/sh\n[ "$1" = -c ] && exit\nprintf "%s\\n" "$CUDA_VISIBLE_DEVICES" "$0" "$@"\nexit 7\n'
    python = program(tmp_path / "my python", script)
    settings = {"gpus": 4, "FINETUNE_PYTHON": str(python), "CUDA_VISIBLE_DEVICES": "2,1"}
    done = start("-m", "a  b", "-d", "D", **settings)
    assert done.returncode == 7
    gpu, *words = done.stdout.splitlines()
    shown = shlex.split(start("-m", "a  b", "-d", "D", DRY_RUN="1", **settings).stdout)
    assert [f"CUDA_VISIBLE_DEVICES={gpu}", *words] == shown
    assert shown[:2] == ["CUDA_VISIBLE_DEVICES=2", str(python)]


def test_the_process_knows_how_the_script_was_started(start, tmp_path):
    """For training.json: a line that bash reads as the same words."""
    python = program(tmp_path / "python", '#!/bin/sh\n[ "$1" = -c ] || printf "%s" "$FINETUNE_COMMAND"\n')
    done = start("-d", "my D", "--run_name", "it's $5", FINETUNE_PYTHON=str(python))
    assert shlex.split(done.stdout) == ["bash", str(SCRIPT), "-d", "my D", "--run_name", "it's $5"]


@pytest.mark.parametrize("value", ["0", ""])
def test_dry_run_off(start, tmp_path, value):
    python = program(tmp_path / "python", '#!/bin/sh\n[ "$1" = -c ] || echo ran\n')
    assert start("-d", "D", DRY_RUN=value, FINETUNE_PYTHON=str(python)).stdout == "ran\n"


def test_missing_packages_are_named(start, tmp_path):
    """An interpreter without site-packages: what is missing and what to do, in the words of errors.py. Nothing is written."""
    python = program(tmp_path / "bare", f'#!/bin/sh\nexec {PYTHON} -I -S "$@"\n')
    done = start("-d", "D", FINETUNE_PYTHON=str(python))
    assert done.returncode == 2
    finding, remedy = done.stderr.splitlines()[-1].split(" - ")
    assert finding == f"error: {python} has no torch, transformers, accelerate, peft, tiktoken"
    assert shlex.split(remedy)[:2] == ["bash", str(ROOT / "setup_env.sh")]
    by_program = subprocess.run([sys.executable, "-S", ROOT / "finetune.py", "-d", "D"], capture_output=True, text=True).stderr
    alike = by_program[: by_program.index("is needed")].replace(sys.executable, str(python))
    assert done.stderr.splitlines()[-1].startswith(alike)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "bin"]


def test_a_python_that_is_not_there(start, tmp_path):
    done = start("-d", "D", FINETUNE_PYTHON=str(tmp_path / "none"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: no program {tmp_path / 'none'} - bash ")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(start, option):
    done = start("-m", "mine", option)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("LoRA fine-tuning")
    assert "  --learning_rate 3e-4" in lines and "  --report_to none" in lines
    for word in ("-m, --model", "-d, --data", "-o, --output", "CUDA_VISIBLE_DEVICES", "DRY_RUN=1", "FINETUNE_PYTHON"):
        assert word in done.stdout


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_files_are_sound(path):
    """bash can parse them; no Windows line ends; no space at a line's end, where it would undo a backslash."""
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    text = path.read_bytes()
    assert b"\r" not in text
    assert not [line for line in text.decode().splitlines() if line.rstrip() != line]
