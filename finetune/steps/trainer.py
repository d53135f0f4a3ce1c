"""transformers' Trainer, driven by the step plan.

Towards transformers an item of the loader is a whole step and gradient accumulation is 1; the passes of a step are walked
here. Everything else (optimizers, schedules, checkpoints, callbacks, engines) stays transformers' own.
"""

import contextlib
import dataclasses
import math
import time

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from qwen_model.compat import overrides
from qwen_model.head_loss import counting

from ..compat import on_accelerate, on_torch
from ..distributed import engines
from ..distributed.ranks import meeting
from ..lifecycle import changed_flags
from ..lifecycle.stopping import Stopping
from ..memory.peak_memory import memory_gb
from ..model import optimizers
from . import health, saving, utilization
from .batches import StepBatch, step_loader
from .plan import Plan


class FollowEpoch(TrainerCallback):
    """Tells the loader which epoch begins: also after a resume, when transformers wraps the sampler."""

    def __init__(self, sampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch = state.global_step // len(self.sampler)


class PlannedTrainer(health.WatchesNumbers, changed_flags.GoesOn, saving.SavesCheckpoints, Trainer):
    """Trains on packed rows. `plan` and `samples` (and `eval_*`) take the place of a data set and a collator.

    The loss of a step is the sum of its token losses over its supervised tokens, all passes and ranks together: a number
    that the plan knows beforehand. So the layout of a step changes none of its numbers, and no token weighs more than another,
    but where the data says so: then it is the sum of weight times loss, over the sum of weights.
    """

    def __init__(
        self, model, args, *, samples, plan: Plan, eval_samples=None, eval_plan=None, tokenizer, record=None,
        loraplus_lr_ratio=None, stopping: Stopping | None = None, **kwargs
    ):  # fmt: skip
        args.gradient_accumulation_steps = 1  # a step is one item; see above
        args.logging_nan_inf_filter = False  # a loss that is not a number must be seen
        self.engine = engines.name_of(vars(args))
        super().__init__(model=model, args=args, train_dataset=samples, eval_dataset=eval_samples, **kwargs)
        # kept from transformers, which would "align" the model's stop tokens with the tokenizer's
        self.chat_tokenizer, self.record = tokenizer, record
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.samples, self.plan, self.eval_samples, self.eval_plan = samples, plan, eval_samples, eval_plan
        self.throughput = Throughput()
        self.hits = torch.zeros((), dtype=torch.int32, device=args.device)  # this rank's, since the last line of the log
        self.work, self.matrix_rate = None, 0.0  # FLOP of a step, and what the device could do in a second; from get_train_dataloader on
        self.stopping = stopping or Stopping()
        self.add_callback(self.stopping)

    @overrides(Trainer)
    def create_accelerator_and_postprocess(self):
        """fp16 on the CPU too: accelerate scales gradients on GPUs only, and would train in float32 without a word.

        FSDP2 in half precision adds gradients up in float32, and leaves the loss as it is: accelerate would round both.
        """
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled and (policy := self.accelerator.state.fsdp_plugin.mixed_precision_policy) is not None:
            exact = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = exact
        if self.accelerator.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    # ---- the run

    def train(self, *args, **kwargs):
        """Until the end, or until it is asked to stop: then stopping.stopped_at says where."""
        meeting.bar_is_elsewhere = self.args.process_index > 0
        try:
            with self.stopping.listening():
                found = super().train(*args, **kwargs)
            meeting.bar_is_elsewhere = False
            return found
        finally:  # the line of an error stands below the bar, not behind it
            for callback in self.callback_handler.callbacks:
                if hasattr(callback, "close_bar"):
                    callback.close_bar()

    @overrides(Trainer, "trial", "num_train_samples", "start_time")
    def _finalize_training(self, trial, num_train_samples, start_time):
        """Loads the best checkpoint only where the run is over; keeps the last one, which transformers would remove."""
        self.look_at_norm()
        self.tell_skipped()
        usual = {name: getattr(self.args, name) for name in ("save_total_limit", "load_best_model_at_end")}
        self.args.save_total_limit = None
        self.args.load_best_model_at_end &= self.stopping.stopped_at is None
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            vars(self.args).update(usual)
            self.tidy_up()

    # ---- data

    @overrides(Trainer)
    def get_train_dataloader(self):
        loader = self.loader(self.samples, self.plan)
        self.work = utilization.Work(self.accelerator.unwrap_model(self.model))
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        self.matrix_rate = utilization.matrix_rate(self.args.device, dtype)
        self.throughput.drain()  # from here on it is training
        self.remove_callback(FollowEpoch)
        self.add_callback(FollowEpoch(loader.batch_sampler))
        return loader

    @overrides(Trainer, "eval_dataset")
    def get_eval_dataloader(self, eval_dataset=None):
        return self.loader(self.eval_samples, self.eval_plan)

    def loader(self, samples, plan: Plan):
        workers, on_gpu = self.args.dataloader_num_workers, self.args.device.type == "cuda"
        return step_loader(samples, plan, self.args.process_index, workers, on_gpu and self.args.dataloader_pin_memory)

    @overrides(Trainer, "dataloader")
    def num_examples(self, dataloader) -> int:
        return len(dataloader.dataset.samples)

    @overrides(Trainer, "batch_samples", "device")
    def _get_num_items_in_batch(self, batch_samples, device):
        return None  # the plan knows

    # ---- a step

    @overrides(Trainer, "model", "inputs", "num_items_in_batch")
    def training_step(self, model, step: StepBatch, num_items_in_batch=None) -> torch.Tensor:
        """All passes of a step, forward and backward; returns this rank's share of the loss, times the ranks.

        Gradients are averaged over ranks by DDP and the engines, so a rank's loss counts `world_size` fold beforehand.
        """
        model.train()
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()  # optimizers that average weights (schedule-free) switch modes
        assert step.loss_weight > 0, "a step in which nothing is learned"
        denominator = step.loss_weight / self.accelerator.num_processes
        total = torch.zeros((), device=self.args.device)
        for number, row in enumerate(step.rows, start=1):
            last = number == len(step.rows)
            # DDP and FSDP keep their gradients to themselves until the last pass; DeepSpeed's engine asks gradient_state
            on_accelerate.set_last_pass(self.accelerator, last)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with counting(self.hits):
                    loss = self.loss_of(model, row, denominator)
                self.accelerator.backward(loss)
            total += loss.detach()
        self.throughput.add(step)
        self.step_loss = total
        return total

    def loss_of(self, model, row: dict, denominator: float) -> torch.Tensor:
        """A row's summed loss over the denominator; no logits."""
        if self.is_fsdp_enabled and "shift_weights" in row:
            on_torch.leave_inputs(model)
        return model(**self.on_device(row), num_items_in_batch=denominator, skip_logits=True).loss

    def on_device(self, row: dict) -> dict:
        """A row's tensors on this rank's device. Nobody waits for the copy, as transformers would, and with it for the GPU."""
        device = self.args.device
        return {key: x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for key, x in row.items()}

    @overrides(Trainer, "model")
    def create_optimizer(self, model=None):
        """transformers' choice; with --bf16_weights rounding stochastically, with LoRA+ in more groups."""
        optimizers.prepare(self.args)
        optimizer = super().create_optimizer(model)
        return optimizers.add_lora_plus(optimizer, model or self.model, self.loraplus_lr_ratio)

    @overrides(Trainer, "model")
    def get_decay_parameter_names(self, model) -> list[str]:
        """Matrices decay; biases and norms, vectors all of them, do not, whatever a model calls them."""
        # ds_shape: under ZeRO-3 a parameter is a flat shard that remembers its shape
        return [name for name, p in model.named_parameters() if len(getattr(p, "ds_shape", p.shape)) >= 2]

    @overrides(Trainer, "inputs")
    def floating_point_ops(self, step: StepBatch) -> float:
        """Of this rank's share; see utilization.py."""
        return self.work.of(step.tokens, step.supervised_tokens) / self.accelerator.num_processes

    @overrides(Trainer, "inputs")
    def _track_num_input_tokens(self, step: StepBatch) -> None:
        self.state.num_input_tokens_seen += step.tokens

    # ---- evaluation

    def evaluate(self, *args, **kwargs):
        with self.throughput.paused():
            return super().evaluate(*args, **kwargs)

    @overrides(Trainer, "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix")
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The mean loss over all supervised tokens of the evaluation data, weighted as in training, its exponential, and accuracy."""
        model = (
            self.model_wrapped if self.is_in_train else self.accelerator.prepare_model(self.model, evaluation_mode=True)
        )
        training = model.training
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        hits = torch.zeros((), dtype=torch.int32, device=self.args.device)
        tokens, weight = 0, 0.0  # of all ranks
        with torch.no_grad(), counting(hits):
            for step in dataloader:
                for row in step.rows:
                    total += self.loss_of(model, row, 1).double()
                tokens, weight = tokens + step.supervised_tokens, weight + step.loss_weight
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(training)
        assert weight > 0, "evaluation data of which nothing counts"
        loss = self.accelerator.reduce(total, reduction="sum").item() / weight
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700)),  # exp overflows at 710
            f"{metric_key_prefix}_token_accuracy": self.share(hits, tokens),
            f"{metric_key_prefix}_supervised_tokens": tokens,
        }
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(self.eval_samples))

    def share(self, hits: torch.Tensor, tokens: int) -> float:
        """Of `tokens` supervised tokens of all ranks, those than which the model found no token likelier. hits: this rank's."""
        return round(self.accelerator.reduce(hits.clone(), reduction="sum").item() / tokens, 4)

    # ---- the log

    @overrides(Trainer, "logs", "start_time")
    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Adds what the run really does (all ranks together): accuracy, tokens a second, memory; of this rank, the share of its device's
        matrix rate. Stops at a loss that is no number."""
        if "loss" in logs:
            if self.throughput.supervised:
                logs["token_accuracy"] = self.share(self.hits, self.throughput.supervised)
                self.hits.zero_()
            work = self.work.of(self.throughput.tokens, self.throughput.supervised) / self.accelerator.num_processes
            logs.update(self.throughput.drain(), memory_gb=round(memory_gb(), 3))
            if work:
                logs["flop_utilization"] = round(work / self.throughput.seconds / self.matrix_rate, 4)
        super().log(self.check_log(logs), start_time)


class Throughput:
    """Tokens a second, all ranks together, since the last line of the log; evaluating and saving do not count."""

    def __init__(self):
        self.drain()

    @contextlib.contextmanager
    def paused(self):
        """Takes out the time of what is not training."""
        begin = time.perf_counter()
        yield
        self.since += time.perf_counter() - begin

    def add(self, step: StepBatch) -> None:
        self.tokens += step.tokens
        self.supervised += step.supervised_tokens
        self.passes += len(step.rows)

    def drain(self) -> dict[str, float]:
        """{tokens_per_second, supervised_tokens_per_second, passes (of this rank)} since the last call; starts anew. seconds: how many."""
        now = time.perf_counter()
        self.seconds = seconds = max(now - getattr(self, "since", now), 1e-9)
        rates = {}
        if getattr(self, "tokens", 0):
            rates = {
                "tokens_per_second": round(self.tokens / seconds, 1),
                "supervised_tokens_per_second": round(self.supervised / seconds, 1),
                "passes": self.passes,
            }
        self.since, self.tokens, self.supervised, self.passes = now, 0, 0, 0
        return rates
