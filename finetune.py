"""Fine-tunes a Qwen model on conversations: full-parameter or LoRA. The scripts in finetune/ start it; by hand it is

    python finetune.py --model_name_or_path MODEL --data_path DATA.json --output_dir OUT --use_lora --bf16

The job from top to bottom; its parts are in finetune/.
"""

import sys
from pathlib import Path


def main() -> None:
    """Everything a user gave is checked before a weight is loaded, and all findings are shown together."""
    from finetune import args as arguments

    args = arguments.parse()  # before the imports that take seconds: --help is there at once
    from finetune import checkpoint, model, report
    from finetune.errors import note

    out = Path(args.training.output_dir)
    folder, tokenizer, samples, eval_samples = check(args)
    resume_from = checkpoint.resume_point(out, args.training.resume_from_checkpoint)
    plan, eval_plan = make_plans(args, samples, eval_samples)
    trainer = make_trainer(args, folder, tokenizer, samples, eval_samples, plan, eval_plan)

    if resume_from is not None:
        note(f"continuing from {resume_from}")
    elif args.training.overwrite_output_dir:
        checkpoint.remove_all(out)
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))

    trained = trainer.accelerator.unwrap_model(trainer.model)
    if not args.lora.use_lora:  # checkpoints keep the float32 masters; the result needs them no more
        trained.to(model.compute_dtype(args.training))
    checkpoint.save_final(trained, tokenizer, out, record=trainer.record)
    report.farewell(out, args.lora.use_lora)


def check(args):
    """(model folder, tokenizer, samples, evaluation samples or None), or one UserError with all findings."""
    from finetune import args as arguments
    from finetune import data, model
    from finetune.errors import Findings

    findings, files = Findings(), {"--data_path": args.data.data_path, "--eval_data_path": args.data.eval_data_path}
    files = {flag: path for flag, path in files.items() if path}
    with findings:
        arguments.check(args)
    if findings.findings:  # there may be no tokenizer: say at least what is wrong with the data as such
        for flag, path in files.items():
            with findings:
                data.read(path, flag=flag)
    findings.raise_if_any()

    folder = model.find_folder(args.model.model_name_or_path, args.training.cache_dir)
    tokenizer, loaded = model.load_tokenizer(folder), []
    for flag, path in files.items():
        with findings:
            loaded.append(load_samples(path, flag, tokenizer, args))
    findings.raise_if_any()
    return folder, tokenizer, loaded[0], loaded[1] if len(loaded) > 1 else None


def load_samples(path: str, flag: str, tokenizer, args):
    """The rendered conversations of a file; prints what is worth knowing about them."""
    from finetune import data
    from finetune.errors import warn

    length, wish = args.training.model_max_length, args.data
    settings = {"supervise": wish.supervise, "allow_special": wish.allow_special, "long_samples": wish.long_samples}
    samples = data.load(path, tokenizer, max_length=length, flag=flag, **settings)
    for line in samples.notes:
        warn(line)
    return samples


def make_plans(args, samples, eval_samples):
    """The step plan of training, and the layout of evaluation."""
    from finetune.plan import Plan

    training, ranks = args.training, args.training.world_size
    limits = {
        "world_size": ranks,
        "max_tokens_per_pass": args.data.max_tokens_per_pass,
        "seed": training.seed if training.data_seed is None else training.data_seed,
    }
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * ranks
    plan = Plan(
        samples.lengths,
        samples.supervised,
        samples_per_step=per_step,
        drop_last=training.dataloader_drop_last,
        **limits,
    )
    if eval_samples is None:
        return plan, None
    per_step = training.per_device_eval_batch_size * ranks
    return plan, Plan(eval_samples.lengths, eval_samples.supervised, samples_per_step=per_step, shuffle=False, **limits)


def make_trainer(args, folder, tokenizer, samples, eval_samples, plan, eval_plan):
    """The model with what trains of it, and the trainer; prints the summary."""
    from transformers import set_seed

    from finetune import model, report
    from finetune.trainer import PlannedTrainer

    set_seed(args.training.seed)  # adapters start from random numbers
    loaded = model.load_model(folder, tokenizer, args.lora, args.training)
    print(report.summary(args, samples, eval_samples, plan, loaded), file=sys.stderr, flush=True)
    trainer = PlannedTrainer(
        loaded, args.training, samples=samples, plan=plan, eval_samples=eval_samples, eval_plan=eval_plan, tokenizer=tokenizer,
        record=model.record(args.model.model_name_or_path, folder, args, samples),
    )  # fmt: skip
    report.take_over(trainer)
    return trainer


if __name__ == "__main__":
    from finetune.errors import run
    from finetune.quiet import quiet

    quiet()
    run(main)
