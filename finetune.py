"""Fine-tunes a Qwen model on conversations: full-parameter or LoRA. The scripts in finetune/ start it; by hand it is

    python finetune.py --model_name_or_path MODEL --data_path DATA.json --output_dir OUT --use_lora --bf16

The job from top to bottom; its parts are in finetune/.
"""

import os
import sys
from pathlib import Path


def main() -> None:
    """Everything a user gave is checked before a weight is loaded, and all findings are shown together."""
    from finetune import args as arguments

    args = arguments.parse()  # before the imports that take seconds: --help is there at once
    from finetune import checkpoint, model, report
    from finetune.errors import note

    out = Path(args.training.output_dir)
    folder = check(args)
    tokenizer = model.load_tokenizer(folder)
    samples, eval_samples = load_data(args, tokenizer)
    plan, eval_plan = make_plans(args, samples, eval_samples)
    record = model.record(args.model.model_name_or_path, folder, args, samples, plan.samples_per_step)
    resume_from = checkpoint.resume_point(out, args.training.resume_from_checkpoint)
    if resume_from is not None:
        checkpoint.check_same_run(resume_from, record)
        note(f"continuing from {resume_from}")

    trainer = make_trainer(args, folder, tokenizer, samples, eval_samples, plan, eval_plan, record)
    if resume_from is None and args.training.overwrite_output_dir:
        checkpoint.remove_all(out)
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))

    trained = trainer.accelerator.unwrap_model(trainer.model)
    if not args.lora.use_lora:  # checkpoints keep the float32 masters; the result needs them no more
        trained.to(model.compute_dtype(args.training))
    checkpoint.save_final(trained, tokenizer, out, record=record)
    report.farewell(out, args.lora.use_lora)


def check(args) -> Path:
    """The model's folder, or one UserError with all findings. What has to be downloaded comes last."""
    from finetune import args as arguments
    from finetune import checkpoint, data, model
    from finetune.errors import Findings

    findings, name = Findings(), args.model.model_name_or_path
    with findings:
        arguments.check(args)
    if findings.findings or not os.path.isdir(name):  # else the data is read once, when it is rendered
        for flag, path in args.data.files().items():
            with findings:
                data.read(path, flag=flag)
    findings.raise_if_any()
    folder = model.find_folder(name, args.training.cache_dir)
    if not os.path.isdir(name):
        arguments.check(arguments.on_folder(args, folder))
    if args.lora.lora_weight_path:
        checkpoint.check_base(Path(args.lora.lora_weight_path), folder, remedy="give that one with -m")
    return folder


def load_data(args, tokenizer) -> list:
    """[samples, evaluation samples or None], rendered; prints what is worth knowing about them."""
    from finetune import data
    from finetune.errors import Findings, warn

    wish, findings, loaded = args.data, Findings(), []
    settings = {"supervise": wish.supervise, "allow_special": wish.allow_special, "long_samples": wish.long_samples}
    for flag, path in args.data.files().items():
        with findings:
            loaded.append(data.load(path, tokenizer, max_length=args.training.model_max_length, flag=flag, **settings))
    findings.raise_if_any()
    for line in [line for samples in loaded for line in samples.notes]:
        warn(line)
    return [*loaded, None][:2]


def make_plans(args, samples, eval_samples):
    """The step plan of training, and the layout of evaluation."""
    from finetune.plan import Plan

    training, ranks = args.training, args.training.world_size
    seed = training.seed if training.data_seed is None else training.data_seed
    limits = {"world_size": ranks, "max_tokens_per_pass": args.data.max_tokens_per_pass, "seed": seed}
    count = training.per_device_train_batch_size * training.gradient_accumulation_steps * ranks
    drop = training.dataloader_drop_last
    plan = Plan(samples.lengths, samples.supervised, samples_per_step=count, drop_last=drop, **limits)
    if eval_samples is None:
        return plan, None
    count = training.per_device_eval_batch_size * ranks
    return plan, Plan(eval_samples.lengths, eval_samples.supervised, samples_per_step=count, shuffle=False, **limits)


def make_trainer(args, folder, tokenizer, samples, eval_samples, plan, eval_plan, record):
    """The model with what trains of it, and the trainer; prints the summary."""
    from transformers import set_seed

    from finetune import model, report
    from finetune.trainer import PlannedTrainer

    set_seed(args.training.seed)  # adapters start from random numbers
    loaded = model.load_model(folder, tokenizer, args.lora, args.training)
    print(report.summary(args, samples, eval_samples, plan, loaded), file=sys.stderr, flush=True)
    kept = {"tokenizer": tokenizer, "record": record, "eval_samples": eval_samples, "eval_plan": eval_plan}
    trainer = PlannedTrainer(loaded, args.training, samples=samples, plan=plan, **kept)
    report.take_over(trainer)
    return trainer


if __name__ == "__main__":
    from finetune.errors import run
    from finetune.quiet import quiet

    quiet()
    run(main, when_stopped="stopped; --resume_from_checkpoint auto goes on from the newest checkpoint")
