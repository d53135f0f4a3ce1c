"""Trainers of tiny models on random samples in memory."""

import numpy as np
from tiny import random_samples, tiny_model
from transformers import TrainingArguments

from finetune.steps.plan import Plan
from finetune.steps.trainer import PlannedTrainer


class Samples:
    """Samples in memory, with the interface of finetune/samples'."""

    def __init__(self, count=20, seed=0):
        ids, labels = random_samples(count, seed=seed)
        self.rows = [(np.array(a, np.int32), np.array(b, np.int32)) for a, b in zip(ids, labels)]
        self.lengths = np.array([len(a) for a, _ in self.rows])
        self.supervised = np.array([(b[1:] != -100).sum() for _, b in self.rows])
        self.weight_sums = self.supervised.astype(np.float64)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

    def token_weights(self, i):
        return None

    def origin(self, i):
        return "talks.json", i + 1


class NoTokenizer:
    """Saves nothing: these tests train on random ids."""

    def save_pretrained(self, folder):
        pass


def make_trainer(
    folder, model=None, max_tokens_per_pass=60, samples_per_step=8, samples=None, eval_samples=None, stopping=None,
    callbacks=(), **settings
):
    settings = {
        "learning_rate": 1e-2, "num_train_epochs": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "lr_scheduler_type": "cosine", "warmup_steps": 0, "weight_decay": 0.1, "seed": 3, "disable_tqdm": True,
        "use_cpu": True,
    } | settings  # fmt: skip
    samples = samples or Samples()
    plan = Plan(
        samples.lengths,
        samples.supervised,
        weights=samples.weight_sums,
        samples_per_step=samples_per_step,
        max_tokens_per_pass=max_tokens_per_pass,
        seed=3,
    )
    eval_plan = eval_samples and Plan(
        eval_samples.lengths, eval_samples.supervised, weights=eval_samples.weight_sums, samples_per_step=5,
        max_tokens_per_pass=60, shuffle=False,
    )  # fmt: skip
    return PlannedTrainer(
        model or tiny_model(),
        TrainingArguments(output_dir=str(folder), **settings),
        samples=samples,
        plan=plan,
        eval_samples=eval_samples,
        eval_plan=eval_plan,
        tokenizer=NoTokenizer(),
        stopping=stopping,
        callbacks=list(callbacks),
    )


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def stop_after(trainer, step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step

    trainer.add_callback(Stop())
