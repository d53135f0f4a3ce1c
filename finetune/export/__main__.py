"""Writes a model, or a LoRA adapter, in another layout: python -m finetune.export MODEL OUT --to qwen2

First-generation Qwen (Qwen-7B and the like) is written in the layout of transformers' own Qwen2, which servers load without
remote code; --to qwen converts it back. The weights stay the same, 16 bit or GPTQ; only their names change. Afterwards the
logits of both are compared. Qwen2 has no dynamic NTK and no LogN attention: a note says so, and config.json states the
length up to which both compute the same.

For an adapter, export its base first, then the adapter with --base EXPORTED_BASE.
"""

from pathlib import Path

from ..errors import Options, UserError, note, run
from ..folders import hub
from ..folders.tensor_files import MAX_SHARD_SIZE, max_shard_bytes
from ..model import packages
from ..quiet import quiet
from ..writing.new_folder import check_free
from . import export_checks

HELP = {
    "model": "a model's folder (or its id on a hub), or the output folder of a LoRA run",
    "out": "a new folder for what is exported",
    "to": "qwen2: first-generation Qwen for servers; qwen: back, to its own layout and code",
    "base": "for an adapter: its base, exported to the same layout",
    "max_shard_size": f"of a file of weights (default: {MAX_SHARD_SIZE})",
}


def main(argv: list[str] | None = None) -> None:
    about, *more = __doc__.split("\n\n")
    parser = Options(prog="python -m finetune.export", description=about, epilog=" ".join(more))
    parser.add_argument("model", metavar="MODEL", help=HELP["model"])
    parser.add_argument("out", type=Path, metavar="OUT", help=HELP["out"])
    parser.add_argument("--to", choices=["qwen2", "qwen"], required=True, help=HELP["to"])
    parser.add_argument("--base", metavar="EXPORTED_BASE", help=HELP["base"])
    parser.add_argument("--max_shard_size", help=HELP["max_shard_size"])
    options = vars(parser.parse_args(argv))
    quiet()

    def job():
        if argv is None:  # a process of its own
            packages.leave_out_with([options["model"]], options["base"])
        export(**options)

    run(job)


def export(model: str, out: Path, to: str, base: str | None = None, max_shard_size: str | None = None) -> float:
    """Exports `model` into `out`; returns the largest difference between the two layouts' logits."""
    folder, max_bytes = hub.find_folder(str(model)), max_shard_bytes(max_shard_size or MAX_SHARD_SIZE)
    check_free(out, "what is exported", folder)
    if (folder / "adapter_config.json").is_file():
        if max_shard_size is not None:
            what = f"--max_shard_size {max_shard_size}: {folder} is an adapter, which is written as one file"
            raise UserError(f"{what} - leave it out")
        if base is not None:
            export_checks.find_base(folder, to, base)
        from . import export_adapter  # with torch, whose import takes seconds: after the checks

        difference = export_adapter.export(folder, out, to, base)
    elif base is not None:
        raise UserError(f"--base {base}: {folder} is a whole model, which has none - leave it out")
    else:
        export_checks.check_model(folder, to)
        from . import export_model

        difference = export_model.export(folder, out, to, max_bytes)
    note(f"done: {out} is in the layout of {to}")
    return difference


if __name__ == "__main__":
    main()
