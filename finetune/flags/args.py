"""The flags of finetune.py: ours, the published trainer's, and everything that transformers' TrainingArguments takes.

    args = parse()                # args.model, args.data, args.lora, args.training
    checks.check_flags(args)      # one UserError that lists all findings

This module imports neither torch nor transformers until it parses, so that --help is there at once.
"""

import dataclasses
import difflib
import re
import sys
from dataclasses import dataclass

from ..errors import note, shortened
from . import synonyms
from .definitions import Args, DataArguments, LookArguments, LoraArguments, ModelArguments, TrainingFlags
from .parser import Parser

# ---- flags that transformers had at 4.32 or later, and dropped or renamed up to 5.23


@dataclass(frozen=True)
class Old:
    """new: today's name; else the flag is left out, saying why, or (stop) refused, saying what to do instead."""

    new: str | None = None
    why: str = ""
    stop: bool = False


AMP, SOFTWARE = "autocasting is torch's own", "transformers dropped what it switched"
OLD_FLAGS = {
    "evaluation_strategy": Old("eval_strategy"),
    "no_cuda": Old("use_cpu"),
    "per_gpu_train_batch_size": Old("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Old("per_device_eval_batch_size"),
    "push_to_hub_model_id": Old("hub_model_id"),
    "push_to_hub_token": Old("hub_token"),
    "push_to_hub_organization": Old(why="give --hub_model_id ORGANIZATION/NAME", stop=True),
    "torchdynamo": Old("torch_compile_backend"),
    "adafactor": Old(why="give --optim adafactor", stop=True),
    "sharded_ddp": Old(why="leave it out; --fsdp True shards by the model's blocks", stop=True),
    "fsdp_min_num_params": Old(why="leave it out; --fsdp True shards by the model's blocks", stop=True),
    "fsdp_transformer_layer_cls_to_wrap": Old(why="leave it out; --fsdp True shards by the model's blocks", stop=True),
    "use_mps_device": Old(why="a GPU of any make is used where there is one"),
    "fp16_opt_level": Old(why=AMP),
    "fp16_backend": Old(why=AMP),
    "half_precision_backend": Old(why=AMP),
    "save_safetensors": Old(why="weights are always saved as safetensors"),
    "group_by_length": Old(why="samples are laid one after another without padding, so there is nothing to group"),
    "include_tokens_per_second": Old(why="tokens per second are always shown"),
    "include_inputs_for_metrics": Old(why="evaluation computes the loss"),
    "use_legacy_prediction_loop": Old(why="evaluation computes the loss"),
    "past_index": Old(why=SOFTWARE),
    "jit_mode_eval": Old(why=SOFTWARE),
    "use_ipex": Old(why=SOFTWARE),
    "tpu_num_cores": Old(why=SOFTWARE),
    "tpu_metrics_debug": Old(why=SOFTWARE),
    "mp_parameters": Old(why=SOFTWARE),
    "ray_scope": Old(why=SOFTWARE),
    "dispatch_batches": Old(why="each process reads its own share of a step"),
    "split_batches": Old(why="each process reads its own share of a step"),
}


def modernize(argv: list[str]) -> tuple[list[str], list[str]]:
    """(argv with today's flags, findings): OLD_FLAGS applied. Prints a note for each flag without effect."""
    result, findings, skipping = [], [], False
    for word in argv:
        name, equals, value = word.partition("=")
        old = OLD_FLAGS.get(name[2:].replace("-", "_")) if name.startswith("--") else None
        skipping = skipping and not word.startswith("--")  # the value of a flag that is left out
        if old is None:
            result += [] if skipping else [word]
        elif old.new:
            result.append(f"--{old.new}{equals}{value}")
        else:
            skipping = True
            if old.stop:
                findings.append(f"{name}: transformers has dropped it - {old.why}")
            else:
                note(f"{name} has no effect: {old.why}")
    return result, findings


# ---- parsing


def parse(argv: list[str] | None = None) -> Args:
    """The flags of the command line, or of `argv`. Prints the help and ends, where that is asked for.

    Raises UserError where a value has the wrong type. Writes nothing.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    help_asked_for(argv)
    from . import training_args

    args = parse_as(training_args.TrainingArguments, argv)
    args.training, more = training_args.build(args.training)
    args.findings += more
    return args


def parse_as(training_kind, argv: list[str]) -> Args:
    """The parsed flags. training_kind: the dataclass of the training flags, whose values stay a plain dict here."""
    argv, findings = modernize(argv)
    kinds = (ModelArguments, DataArguments, LoraArguments, LookArguments, training_kind)
    parser = Parser(kinds)
    namespace, rest = parser.parse_known_args(argv)
    findings += unknown(rest, parser)
    usual = {name: parser.get_default(name) for name in vars(namespace)}
    given = {name: value for name, value in vars(namespace).items() if value != usual[name]}
    *values, training = [{f.name: getattr(namespace, f.name) for f in dataclasses.fields(kind) if f.init} for kind in kinds]
    own = [kind(**chosen) for kind, chosen in zip(kinds, values)]
    model, data, lora, look = own
    lora.use_lora |= lora.q_lora  # Q-LoRA is LoRA over quantized weights
    findings += data.parse_pass_size()
    training["eval_strategy"] = evaluation(data, training, argv)
    return Args(model, data, lora, training, look, findings, given, usual)


def evaluation(data: DataArguments, training: dict, argv: list[str]) -> str:
    """--eval_strategy; where there are data to evaluate on and nothing is said of it, after each epoch, or by --eval_steps."""
    given = training["eval_strategy"]
    said = any(re.match(r"--eval[_-]strategy(=|$)", word) for word in argv) or training["eval_on_start"]
    if said or given != "no" or not (data.eval_data_path or data.eval_split):
        return given
    steps = training["eval_steps"]
    if data.eval_data_path:
        when = "after each epoch" if steps is None else "by --eval_steps"
        note(f"--eval_data_path is evaluated {when}; --eval_strategy says otherwise")
    return "epoch" if steps is None else "steps"


def unknown(rest: list[str], parser: Parser) -> list[str]:
    """A finding for each unknown flag of `rest`; one finding for words that belong to no flag."""
    flags = [word.partition("=")[0] for word in rest if re.match(r"-+[^\W\d]", word)]
    if rest and not flags:
        return [f"{shortened(' '.join(rest))}: belongs to no flag - put a flag before it, or quotes around a value with blanks"]
    known = sorted(parser.spellings() | {f"--{name}" for name, old in OLD_FLAGS.items() if old.new})
    return [f"{shortened(word)}: unknown flag - {synonyms.of_flag(word) or closest(word, known)}" for word in flags]


def closest(word: str, known: list[str]) -> str:
    """What to do about a flag that nobody knows: the nearest one by its letters, under today's name."""
    close = difflib.get_close_matches("--" + word.lstrip("-").replace("-", "_"), known, 1)
    if not close:
        return "python finetune.py --help_all lists all flags"
    old = OLD_FLAGS.get(close[0][2:])
    return f"did you mean {f'--{old.new}' if old else close[0]}?"


# ---- help


def help_asked_for(argv: list[str]) -> None:
    """Prints the help and ends, where that is asked for."""
    if {"-h", "--help", "--help_all"} & set(argv):
        show_help(every_flag="--help_all" in argv)
        sys.exit(0)


def show_help(every_flag: bool) -> None:
    """Our flags and the usual ones of training; with every_flag, transformers' other ones behind them."""
    parser = Parser((ModelArguments, DataArguments, LoraArguments, LookArguments, TrainingFlags))
    parser.description = "Fine-tunes a Qwen model on conversations. A switch may be written --bf16 or --bf16 True."
    if not every_flag:
        parser.epilog = "All other flags of transformers' TrainingArguments work too: --help_all shows them."
        parser.print_help()
        return
    from .training_args import TrainingArguments

    parser.print_help()
    usual = {f.name for f in dataclasses.fields(TrainingFlags)}
    others = [(f.name, f.type, f) for f in dataclasses.fields(TrainingArguments) if f.name not in usual]
    rest = dataclasses.make_dataclass("TransformersArguments", others)
    rest._argument_group_name = "the other flags of transformers' TrainingArguments"
    print("\n" + Parser((rest,)).format_help().split("\n\n", 1)[1])
