"""Random command lines of finetune.py, each in a fork of one process, up to where weights would be loaded (or to the end: TRAIN=1).

random_lines.py FOLDER SEED COUNT prints a JSON line for each: the words, the exit code, and what was printed. FOLDER has base/, data.json,
bad.json and eval.json. The same seed draws the same lines.
"""

import dataclasses
import json
import os
import random
import runpy
import sys
import tempfile
from enum import Enum
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
LIMIT_S = 120  # of a line

# what people write, flag by flag; others are drawn by their type
RIGHT = {
    "eval_data_path": ["eval.json", "data.json:0.5", "eval.json data.json"],
    "data_path": ["data.json", "data.json eval.json", "data.json:0.5", "."],
    "max_tokens_per_pass": ["auto", "64", "4096"],
    "model_max_length": ["64", "512", "8192"],
    "lora_target_modules": ["c_attn", "auto", "c_attn w1", "attn.c_proj"],
    "lora_bias": ["none", "all", "lora_only"],
    "train_tokens": ["<|extra_0|>", "<|extra_0|> <|extra_1|>"],
    "init_lora_weights": ["default", "gaussian", "pissa", "pissa_niter_4"],
    "loraplus_lr_ratio": ["16"],
    "lora_weight_path": ["base", "nowhere"],
    "resume_from_checkpoint": ["auto", "True", "False"],
    "gradient_checkpointing": ["auto", "True", "False"],
    "report_to": ["none", "tensorboard", "all"],
    "deepspeed": ["ds_config_zero2.json", "ds_config_zero3.json"],
    "fsdp": ["True", "full_shard", "False"],
    "fsdp_config": ["{}", '{"cpu_offload": false}'],
    "metric_for_best_model": ["loss", "eval_loss", "perplexity", "token_accuracy"],
    "optim_args": ["momentum=0.9", "eps=1e-8", "bf16_stochastic_round=True"],
    "optim_target_modules": ["all-linear", "c_attn"],
    "lr_scheduler_kwargs": ['{"num_cycles": 2}', '{"min_lr_rate": 0.1}', '{"num_decay_steps": 3}', "{}"],
    "activation_checkpointing_kwargs": ['{"use_reentrant": false}', '{"use_reentrant": true}'],
    "gradient_checkpointing_kwargs": ['{"use_reentrant": false}'],
    "accelerator_config": ['{"split_batches": true}', '{"even_batches": false}'],
    "debug": ["underflow_overflow"],
    "ddp_backend": ["gloo", "nccl"],
    "torch_compile_backend": ["inductor", "eager"],
    "torch_compile_mode": ["default", "reduce-overhead"],
    "include_num_input_tokens_seen": ["True", "False"],
    "html": ["page.html"],
    "logging_dir": ["logs"],
    "cache_dir": ["cache"],
    "run_name": ["mine"],
    "warmup_steps": ["2", "0.1"],
    "logging_steps": ["1", "10", "0.1"],
    "save_steps": ["1", "500", "0.5"],
    "eval_steps": ["1", "5", "0.2"],
    "num_train_epochs": ["1", "0.5", "3"],
    "max_steps": ["-1", "1", "3"],
    "seed": ["0", "1", "4294967295"],
    "data_seed": ["0", "7"],
    "lora_r": ["1", "8"],
    "lora_alpha": ["16"],
    "per_device_train_batch_size": ["1", "4", "1000"],
    "dataloader_num_workers": ["0", "1"],
    "ddp_timeout": ["1800"],
    "save_total_limit": ["1", "3"],
}
WRONG = ["", " ", "x", "-1", "0", "nan", "inf", "-inf", "1e400", "1e-400", "0.1", "1.5", "9" * 30, "9" * 5000, "None", "null", "[]", "{", "{}", "[" * 2000,
         '{"a": {"b": [1]}}', "é\udcff", "a\nb\x1b[31m", "../..", "/dev/null", "/proc/self/mem", "bad.json", "base", "data.json", "nowhere", "n" * 300,
         "true", "no", "auto", "--bf16", "%s%n", "~", "~nobody/x", "C:\\x", "a=b,c", "=", ",", "steps"]  # fmt: skip
UNKNOWN = ["--lr", "--lora_rank", "--epochs", "--packing", "-x", "--", "--=3", "--bf", "--fp16_opt_level", "--adafactor", "--no_cuda", "-", "word"]
NOT_HERE = ("output_dir", "model_name_or_path", "hub_token")


def flags() -> dict[str, object]:
    """{flag: what its type says}."""
    from finetune.flags.definitions import DataArguments, LookArguments, LoraArguments, ModelArguments
    from finetune.flags.parser import one_type
    from finetune.flags.training_args import TrainingArguments

    kinds = (ModelArguments, DataArguments, LoraArguments, LookArguments, TrainingArguments)
    found = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        found |= {field.name: one_type(hints[field.name]) for field in dataclasses.fields(kind) if field.init and field.name not in NOT_HERE}
    return found


def right_values(name: str, kind) -> list[str]:
    from finetune.flags import values

    if name in RIGHT:
        return RIGHT[name]
    if name in values.WORDS:
        return list(values.WORDS[name])
    if kind is bool or kind == bool | None:
        return ["True", "False", ""]
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [choice.value for choice in kind]
    return ["1"] if kind is int else ["0.5", "0"] if kind is float else ["x"]


def drawn(chance: random.Random, known: dict) -> list[str]:
    """A command line: a few flags, most of their values plausible."""
    words = []
    for name in chance.sample(sorted(known), chance.randint(1, 7)):
        wrong = chance.random() < 0.07
        value = chance.choice(WRONG) if wrong else chance.choice(right_values(name, known[name]))
        words += [f"--{name}={value}"] if wrong and chance.random() < 0.3 else [f"--{name}", *([value] if wrong or value[:1] == "{" else value.split())]
    if chance.random() < 0.5:
        words += ["--use_lora"]
    if chance.random() < 0.04:
        words.insert(chance.randint(0, len(words)), chance.choice(UNKNOWN))
    return [word.replace("\x00", "") for word in words]


def in_fork(words: list[str], folder: Path, train: bool) -> tuple[int, str]:
    """(exit code, what was printed) of one command line. -1: it took too long."""
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            run(words, folder, file, train)
        _, status = os.waitpid(child, 0)
        file.seek(0)
        return os.waitstatus_to_exitcode(status), file.read().decode(errors="replace")


def run(words: list[str], folder: Path, file, train: bool) -> None:
    """finetune.py, in this process; does not come back. A line that takes too long ends by a signal, which is no right end."""
    import signal

    code = 1
    try:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        signal.alarm(LIMIT_S)
        os.chdir(folder)
        if not train:
            from finetune.model import loading

            loading.load_model = lambda *args, **kwargs: os._exit(0)
        sys.argv = ["finetune.py", *words]
        runpy.run_path(str(ROOT / "finetune.py"), run_name="__main__")
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    train = os.environ.get("TRAIN") == "1"
    import finetune.steps.preparation
    import finetune.steps.report
    import finetune.steps.trainer  # noqa: F401 (once, for all forks)

    known, chance = flags(), random.Random(seed)
    for number in range(count):
        words = ["-m", "base", "-d", "data.json", "-o", f"out{number}", *(["--max_steps", "1"] if train else []), *drawn(chance, known)]
        code, text = in_fork(words, folder, train)
        print(json.dumps({"words": words, "code": code, "text": text}), flush=True)


if __name__ == "__main__":
    main()
