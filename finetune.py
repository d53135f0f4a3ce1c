"""Fine-tunes a Qwen model on conversations: full-parameter or LoRA. Started by the scripts in finetune/, or by hand:

    python finetune.py --model_name_or_path MODEL --data_path DATA.json --output_dir OUT --use_lora --bf16

The job from top to bottom; its parts are in finetune/.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    from finetune import args as arguments
    from finetune import checkpoint, data, model, report
    from finetune.errors import Findings, note, warn

    args = arguments.parse()
    findings = Findings()
    with findings:
        arguments.check(args)
    with findings:
        samples, eval_samples = read_data(args, data, model)
    findings.raise_if_any()
    for line in samples.notes + (eval_samples.notes if eval_samples else []):
        warn(line)

    folder = model.find_folder(args.model.model_name_or_path, args.training.cache_dir)
    resume_from = checkpoint.resume_point(Path(args.training.output_dir), args.training.resume_from_checkpoint)
    plan, eval_plan = make_plans(args, samples, eval_samples)
    trainer = make_trainer(args, folder, samples, eval_samples, plan, eval_plan)
    print(report.summary(args, trainer, samples, eval_samples, plan), file=sys.stderr)

    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    save(args, trainer)
    note(f"done: {args.training.output_dir}")


if __name__ == "__main__":
    main()
