"""The flags of finetune.py: ours and the training flags that most runs need, as dataclasses with their defaults and help.

Imports neither torch nor transformers: --help is there at once. training_args.py adds all other flags of transformers.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


def flag(default: Any, help: str, **argparse_settings) -> Any:
    """A dataclass field that becomes a flag. Further settings go to argparse's add_argument; `aliases` to the field."""
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**kind, metadata={"help": help, **argparse_settings})


# A value that a user must give is None here, and check_flags() misses it.


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str | None = flag(
        None, "Folder of a checkpoint, or its Hugging Face id (Qwen/Qwen-7B).", metavar="MODEL", aliases=["-m"]
    )
    model_kind: Literal["auto", "base", "chat"] = flag(
        "auto", "Whether the model is a base or a chat model. auto: what its generation_config and tokenizer say."
    )


@dataclass
class DataArguments:
    _argument_group_name = "data"

    data_path: list[str] = flag(
        [],
        "The conversations to learn: files or folders of JSON, JSON lines, CSV, parquet, also packed, or the id of a data set on the "
        "Hugging Face Hub. FILE:0.3 takes a share of a file. May be given several times.",
        metavar="FILE",
        aliases=["-d"],
        action="extend",
    )
    eval_data_path: list[str] = flag(
        [],
        "Conversations to evaluate on while training, in the same forms: after each epoch, unless --eval_strategy or --eval_steps says "
        "otherwise.",
        metavar="FILE",
        action="extend",
    )
    eval_split: float | None = flag(
        None,
        "Hold out this share of the training conversations to evaluate on, the same ones on every start. Evaluates after each epoch, "
        "unless --eval_strategy says otherwise.",
        metavar="SHARE",
    )
    bad_samples: Literal["error", "drop"] = flag(
        "error",
        "What happens to samples with something wrong. error: nothing starts. drop: they are left out, and OUTPUT/left_out.jsonl has them "
        "with the reasons; a last question without an answer is cut off.",
    )
    supervise: Literal["assistant", "chatml"] = flag(
        "assistant",
        "What is learned. assistant: each answer and the <|im_end|> after it. chatml: the published trainer's mask, "
        "which adds the format's own tokens of every turn.",
    )
    long_samples: Literal["error", "cut", "drop", "split"] = flag(
        "cut",
        "What happens to a sample longer than --model_max_length. cut: it ends with the last answer that is whole, or in the midst of the "
        "first. drop: it is left out. split: it becomes several, each beginning with a question. error: nothing starts.",
    )
    allow_special: bool = flag(
        False,
        "Let special tokens (<|im_start|>, <|im_end|>, <|endoftext|>, <|extra_N|>, those of the model at hand) inside a "
        "conversation's text become control tokens. Without it, text is text, but for --train_tokens.",
    )
    multi_turn: Literal["unroll", "last", "as_is"] = flag(
        "unroll",
        "Conversations of several answers. unroll: each answer is learned after the prompt that the model will get for it; where "
        "the chat template shows earlier answers differently (Qwen3 drops their thoughts), it gets a sample of its own. last: only "
        "the answer to the last question, with its tool calls. as_is: one sample a conversation.",
    )
    empty_thoughts: Literal["context", "learn"] = flag(
        "context",
        "For models that think: whether the empty block of thoughts, which the chat template puts before an answer without "
        "thoughts, is learned.",
    )
    max_tokens_per_pass: str = flag(
        "auto",
        "How many tokens lie in one forward pass. The samples of a step are laid into as few passes as this allows; "
        "a longer sample has a pass of its own. Changes speed and memory, never the result. auto: what fits.",
        metavar="N",
    )
    lazy_preprocess: bool = flag(False, "Accepted for the published scripts' sake; without effect.")

    def parse_pass_size(self) -> list[str]:
        """max_tokens_per_pass as a number, unless it is auto; returns the findings."""
        given = self.max_tokens_per_pass
        if given != "auto":
            try:
                self.max_tokens_per_pass = int(given)
            except ValueError:
                self.max_tokens_per_pass = "auto"
                return [f"--max_tokens_per_pass {given}: is no number of tokens - give one, or auto"]
        return []

    def rendering(self) -> dict:
        """How conversations become ids and labels, but for --train_tokens."""
        names = ("supervise", "allow_special", "multi_turn", "empty_thoughts")
        return {name: getattr(self, name) for name in names}

    def title(self) -> str:
        """The training data in a few words."""
        return ", ".join(self.data_path)

    def sources(self) -> list:
        """The files of conversations, training's first: data_files.sources.Source each. Raises UserError for what names none."""
        from ..data_files.sources import sources_of

        return [
            *sources_of(self.data_path, "--data_path"),
            *sources_of(self.eval_data_path, "--eval_data_path"),
        ]


@dataclass
class LoraArguments:
    _argument_group_name = "LoRA"

    use_lora: bool = flag(False, "Train LoRA adapters. Without it, all parameters are trained.")
    q_lora: bool = flag(False, "LoRA over quantized weights: a GPTQ checkpoint, or --quant nf4. Implies --use_lora.")
    quant: Literal["none", "nf4"] = flag(
        "none", "With --q_lora, how a 16-bit checkpoint is quantized while it is loaded: nf4 (4 bits, bitsandbytes)."
    )
    lora_r: int = flag(64, "Rank of the adapters.", metavar="N")
    lora_alpha: int = flag(16, "Scale of the adapters: their output counts alpha / r fold.", metavar="N")
    lora_dropout: float = flag(0.05, "Dropout on the input of the adapters.", metavar="P")
    lora_target_modules: list[str] = flag(
        ["auto"],
        "Layers that get an adapter, separated by blanks. auto: every linear layer of the blocks (c_attn c_proj w1 w2 "
        "in first-generation Qwen).",
        metavar="NAME",
    )
    lora_bias: str = flag("none", "Biases to train: none, all, or lora_only (of the adapted layers).", metavar="WHICH")
    lora_weight_path: str | None = flag(
        None, "Folder of an adapter to go on from; its own settings then win over --lora_*.", metavar="FOLDER"
    )
    train_embeddings: Literal["auto", "none", "chat_rows", "all"] = flag(
        "auto",
        "What trains of embedding and head beside the adapters. chat_rows: the rows of the chat format's tokens; all: "
        "both matrices; auto: chat_rows for a base model, which does not know these tokens yet, none for a chat model.",
    )
    train_tokens: list[str] = flag(
        [], "Special tokens (<|extra_0|> ...) whose rows of embedding and head train, too.", metavar="TOKEN"
    )
    use_dora: bool = flag(False, "DoRA: the adapters' direction and magnitude are trained apart.")
    use_rslora: bool = flag(False, "rsLoRA: adapters count alpha / sqrt(r) fold.")
    init_lora_weights: str = flag(
        "default",
        "How adapters start: default, gaussian, pissa, or pissa_niter_N (a faster decomposition).",
        metavar="HOW",
    )
    loraplus_lr_ratio: float | None = flag(
        None, "LoRA+: the learning rate of the B matrices is so many times that of the others.", metavar="X"
    )


@dataclass
class TrainingFlags:
    """The training flags that most runs need, with our defaults; training_args.py adds all others of transformers."""

    _argument_group_name = "training"

    output_dir: str = flag("output_qwen", "Folder for checkpoints and the result.", metavar="FOLDER", aliases=["-o"])
    overwrite_output_dir: bool = flag(False, "Train into a folder that holds the results of an earlier run.")
    resume_from_checkpoint: str | None = flag(
        None,
        "Go on from a checkpoint: its folder, True for the newest in --output_dir, auto: the newest if there is any. The same command, "
        "started again, goes on by itself.",
        metavar="WHERE",
        nargs="?",
        const="auto",
    )
    trust_checkpoint: bool = flag(
        False,
        "Go on from a checkpoint of DeepSpeed or FSDP that no run of yours has written. Reading it can run any code that is in it.",
    )
    bf16: bool = flag(False, "Compute in bfloat16 (GPUs from Ampere on, and CPUs). Trained weights stay in float32.")
    fp16: bool = flag(False, "Compute in float16, with loss scaling. Trained weights stay in float32.")
    bf16_weights: bool = flag(
        False,
        "Full-parameter: hold the trained weights themselves in bfloat16 and round each update stochastically, so that "
        "small ones count on average: 6 bytes a parameter instead of 18. Needs --bf16 and --optim adamw_torch_8bit.",
    )
    num_train_epochs: float = flag(3.0, "How often the data is gone through.", metavar="N")
    max_steps: int = flag(-1, "Optimizer steps; wins over --num_train_epochs where positive.", metavar="N")
    per_device_train_batch_size: int = flag(8, "Samples of a step, per device.", metavar="N")
    gradient_accumulation_steps: int = flag(1, "Multiplies the samples of a step.", metavar="N")
    learning_rate: float = flag(5e-5, "The highest learning rate, after the warm-up.", metavar="X")
    lr_scheduler_type: str = flag("linear", "Curve of the learning rate: cosine, linear, constant, ...", metavar="NAME")
    warmup_ratio: float = flag(0.0, "Share of all steps in which the rate rises from 0; rounded up.", metavar="X")
    weight_decay: float = flag(0.0, "Of matrices; biases and norms do not decay.", metavar="X")
    adam_beta2: float = flag(0.999, "AdamW's second beta.", metavar="X")
    optim: str = flag("adamw_torch_fused", "The optimizer, as transformers names it.", metavar="NAME")
    model_max_length: int = flag(8192, "Longest sample, in tokens; see --long_samples.", metavar="N")
    gradient_checkpointing: str = flag(
        "auto",
        "Compute activations twice instead of keeping them: less memory, a third more work. auto: in as many blocks as "
        "it takes for passes of a useful size to fit.",
        metavar="WHEN",
        nargs="?",
        const="True",
    )
    logging_steps: float = flag(1, "Steps from one line of the log to the next.", metavar="N")
    report_to: list[str] = flag(["none"], "Also log to: tensorboard, wandb, ...", metavar="NAME")
    logging_dir: str | None = flag(None, "Folder for TensorBoard; default: runs/ in --output_dir.", metavar="FOLDER")
    save_strategy: str = flag("steps", "When checkpoints are written: steps, epoch, best, no.", metavar="WHEN")
    save_steps: float = flag(500, "Steps from one checkpoint to the next.", metavar="N")
    save_total_limit: int | None = flag(None, "Checkpoints to keep; default: all.", metavar="N")
    eval_strategy: str = flag("no", "When --eval_data_path or --eval_split is evaluated: steps, epoch, no.", metavar="WHEN")
    eval_steps: float | None = flag(
        None, "Steps from one evaluation to the next, or below 1 a share of the run; default: 0.1.", metavar="N"
    )
    load_best_model_at_end: bool = flag(
        False, "Deliver the checkpoint with the best evaluation instead of the last step. A checkpoint is then written at each evaluation."
    )
    metric_for_best_model: str | None = flag(
        None, "What the best checkpoint is the best in: loss, perplexity or token_accuracy; default: loss.", metavar="NAME"
    )
    early_stopping_patience: int | None = flag(
        None, "Stop when so many evaluations in a row were no better than the best, and deliver that one.", metavar="N"
    )
    per_device_eval_batch_size: int = flag(8, "Samples of an evaluation step, per device.", metavar="N")
    skip_self_tests: list[str] = flag(
        [], "Leave out tests of the first seconds.", metavar="NAME", choices=["kernels", "causality", "packing"]
    )
    stop_after: str | None = flag(
        None, "Stop so long after the start, as 3h50m, 90m or 300s, with a checkpoint from which the same command goes on.",
        metavar="TIME",
    )
    seed: int = flag(42, "Orders the samples and starts adapters and dropout.", metavar="N")
    use_cpu: bool = flag(False, "Do not use a GPU. Without one the CPU is used anyway.")
    cache_dir: str | None = flag(None, "Where models from the Hugging Face Hub are kept.", metavar="FOLDER")


@dataclass
class LookArguments:
    _argument_group_name = "a look before the run"

    dry_run: bool = flag(
        False,
        "Show what the run would do, and end: the data and what is odd about them, lengths, three samples with what is learned of "
        "them, steps, memory, disk, time.",
    )
    html: str | None = flag(None, "With --dry_run: write the same as one page for a browser.", metavar="FILE.html")
    gpu_memory: float | None = flag(None, "With --dry_run: plan for a GPU of so many GB that is not here.", metavar="GB")


@dataclass
class Args:
    """What a user asked for. findings: what could not even be parsed; check_flags() lists them with its own.

    training: training_args.TrainingArguments; where there are findings, possibly a plain object with its attributes.
    given: {flag: value} of the flags that differ from their defaults, before anything is resolved; usual: the defaults.
    """

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    training: Any
    look: LookArguments = field(default_factory=LookArguments)
    findings: list[str] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    usual: dict[str, Any] = field(default_factory=dict)


# flags that name places or devices of one machine
LOCAL_FLAGS = {"model_name_or_path", "data_path", "eval_data_path", "lora_weight_path", "output_dir", "logging_dir",
               "cache_dir", "deepspeed", "resume_from_checkpoint", "run_name", "local_rank", "hub_token"}  # fmt: skip


def shared_flags(args: Args) -> dict[str, str]:
    """{--flag: value} of all flags that must be alike on all machines."""
    found = {}
    for part in (args.model, args.data, args.lora, args.training):
        for known in dataclasses.fields(part):
            if known.init and known.name not in LOCAL_FLAGS and known.metadata:
                found[f"--{known.name}"] = str(getattr(part, known.name))
    return found


def on_folder(args: Args, folder) -> Args:
    """The same flags, for a model that has been downloaded to `folder`."""
    return dataclasses.replace(args, model=dataclasses.replace(args.model, model_name_or_path=str(folder)))
