"""Fine-tunes a Qwen model on conversations: full-parameter, LoRA or Q-LoRA. The scripts in finetune/ start it; by hand it is

    python finetune.py --model_name_or_path MODEL --data_path DATA.json --output_dir OUT --use_lora --bf16

or, on several GPUs, torchrun --nproc_per_node GPUS finetune.py and the same flags.
The job from top to bottom; its parts are in finetune/.
"""

from pathlib import Path

from finetune.distributed.ranks import meeting


def main() -> None:
    """Everything a user gave is checked before a weight is loaded, and all findings are shown together."""
    with meeting.as_one("flags"):
        from finetune.flags import args as arguments
        from finetune.flags import first_look

        first_look.take(alone=meeting.is_alone())  # before the imports that take seconds
        args = arguments.parse()
    from finetune.distributed import engines, ranks
    from finetune.errors import Stopped
    from finetune.lifecycle import best, resuming, run_record
    from finetune.memory import memory_plan
    from finetune.steps import preparation, report

    out = Path(args.training.output_dir)
    launches = sorted({launch for launch in meeting.exchange("launches", ranks.launch()) if launch})
    free = min(meeting.exchange("free memory", memory_plan.free_bytes(args)))
    preparation.begin(args, out, launches)
    with meeting.as_one("checks and data"):
        job = preparation.prepare(args, out, meeting.restarted, launches, free)
    ranks.agree(preparation.consistency_record(args, job), preparation.REMEDIES)
    preparation.check_storage(args, out)
    if args.look.dry_run:
        return show_look(args, job, free)
    if meeting.exchange("what is left to do", job.way.kind)[0] == resuming.NOTHING:
        return
    preparation.make_room(args, job, out)
    preparation.write_left_out(job, out)

    engines.connect(args.training)
    trainer = make_trainer(args, job)
    trainer.train(resume_from_checkpoint=job.resume_from and str(job.resume_from))
    if stopped := trainer.stopping.describe(out):
        engines.disconnect()
        raise Stopped(stopped)
    run_record.complete(job.record, trainer.state, args.training)
    trainer.save_result()
    if ranks.rank() == 0:
        report.print_next_steps(out, args.lora.use_lora, best.describe_delivered(trainer.state, args.training))
    engines.disconnect()


def show_look(args, job, free) -> None:
    """--dry_run: what the run would do. free: bytes of memory for each process."""
    from finetune.data import present
    from finetune.errors import on_first_rank

    if on_first_rank():
        present.show(present.look_at_run(args, job, free), args.look.html)


def make_trainer(args, job):
    """The model with what trains of it, and the trainer; prints the summary."""
    from transformers import set_seed

    from finetune import quiet
    from finetune.data import present
    from finetune.lifecycle import run_record
    from finetune.lifecycle.best import StopEarly
    from finetune.lifecycle.stopping import Stopping
    from finetune.model import loading
    from finetune.steps import activation_checkpointing, report
    from finetune.steps.self_tests import SelfTests
    from finetune.steps.trainer import PlannedTrainer

    training = args.training
    quiet.first_rank_only()
    set_seed(training.seed)  # adapters start from random numbers, the same on all ranks
    loaded = loading.load_model(
        job.folder, job.tokenizer, args.lora, training, job.resume_from, args.model.model_name_or_path
    )
    report.show(report.summary(args, job, loaded))
    report.show(present.first_sample(job))
    names = ("samples", "plan", "eval_samples", "eval_plan", "tokenizer", "record", "way")
    parts = {name: getattr(job, name) for name in names} | {"stopping": Stopping.of(training)}
    parts["callbacks"] = [*StopEarly.of(training), run_record.Clock(job.record, job.way.before)]
    trainer = PlannedTrainer(loaded, training, loraplus_lr_ratio=args.lora.loraplus_lr_ratio, **parts)
    activation_checkpointing.install(trainer, training.recomputed_blocks, job.memory)
    set_seed(training.seed + training.process_index)  # from here on dropout draws: on each rank something else
    trainer.add_callback(SelfTests(trainer, loading.compute_dtype(training), training.skip_self_tests))
    report.replace_progress_callbacks(trainer)
    return trainer


if __name__ == "__main__":
    from finetune.errors import run
    from finetune.quiet import quiet
    from finetune.writing import run_lock

    quiet()
    stopped = "stopped; the same command goes on from the newest checkpoint, if --save_steps has written one"
    with run_lock.until_the_end():
        run(main, when_stopped=stopped, speak=meeting.speak)
