"""A Trainer that says how fast it trains, measures the loss on other rows, and keeps the best checkpoint.

An evaluation leaves no trace in the training. Knows nothing of the model, as the classes it is made of; the trainers of
LLaVA and of the text HydraLoRA say what the losses of a batch are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.integrations import deepspeed_init
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from llava.errors import CheckpointError, FlagError
from llava.runtime.failure import good_batches
from llava.runtime.fsdp.evaluation import split_again
from llava.runtime.monitoring.losses import Losses, Reduction, RowLosses, over_targets, predicting_positions, row_losses
from llava.runtime.monitoring.shares import LEFT_OUT, ShareSampler, share_loader
from llava.runtime.monitoring.speed import SpeedMeter, shifted_targets
from llava.runtime.monitoring.stopping import metric_key
from llava.runtime.monitoring.untouched import untouched
from llava.runtime.resumable_trainer import ResumableTrainer
from llava.runtime.saving import is_checkpoint


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model of transformers in `model`, which may be wrapped, takes `logits_to_keep`."""
    causal = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    return causal is not None and "logits_to_keep" in inspect.signature(causal.forward).parameters


class MonitoredTrainer(ResumableTrainer):
    """Trainer whose lines of progress have rates, memory and the time that is left, and whose evaluations are ours."""

    loss_reduction: Reduction = staticmethod(over_targets)
    """What the means of an evaluation are over."""

    _said_left_out = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.speed = SpeedMeter(self.args.device)

    # Speed

    def count_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Trained tokens of a micro batch, int64 scalar; a model that changes its sequences counts in its own way."""
        return shifted_targets(batch["labels"])

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """The batches of one update, counted; errors as of the base class."""
        self.speed.begin(self.state.global_step)
        found = super().get_batch_samples(epoch_iterator, *args, **kwargs)
        for batch in found[0]:
            self.speed.add(len(batch["input_ids"]), self.count_targets(batch))
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the speed to a line of progress, and put that of the whole run right in its last line."""
        if "loss" in logs:
            logs |= self.speed.line(self.accelerator.gather, self.state.global_step, self.state.max_steps)
        if logs.get("train_runtime"):
            samples = torch.tensor([self.speed.all_samples], device=self.args.device)
            made = self.state.global_step - self.updates_before
            # transformers below 5.24 counts the updates that were made before a run was resumed too.
            logs["train_samples_per_second"] = round(
                self.accelerator.gather(samples).sum().item() / logs["train_runtime"], 3
            )
            logs["train_steps_per_second"] = round(made / logs["train_runtime"], 3)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.speed.paused():
            super()._save_checkpoint(model, trial)

    # Evaluation; what a program's trainer says of its rows comes first

    def row_losses(self, model: nn.Module, batch: dict[str, Any]) -> RowLosses:
        """The losses of a batch's rows, by a causal language model of transformers.

        Logits are of the positions that any row predicts a trained token from, where the model can be told so.
        """
        labels = batch.pop("labels")
        if not keeps_logits(model):
            return row_losses(model(**batch).logits, labels)
        positions = predicting_positions(labels)
        return row_losses(model(**batch, logits_to_keep=positions).logits, labels, positions)

    @property
    def eval_collator(self) -> Any:
        """Makes the batches of an evaluation, a row for each item."""
        return self.data_collator

    def row_groups(self, row: int) -> Sequence[str]:
        """The groups of a row of the evaluation data; each has a loss of its own, `eval_<group>_loss`."""
        return ()

    def further_metrics(self, prefix: str) -> dict[str, float]:
        """What an evaluation measures besides losses; the model is in evaluation mode, and all processes are here."""
        return {}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure, log and return the metrics; the training continues as if nothing had been done.

        Raises:
            TrainingError: a loss is NaN or infinite.
            BadSampleError: no row has a loss, or one cannot be read.
        """
        with self.speed.paused(), untouched(self.model_wrapped):
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                split_again(self.model_wrapped)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> Any:
        # --eval_on_start is of the run's start, not of each process: early stopping counts the evaluations.
        if skip_scheduler and self.updates_before:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The batches of this process; see `ShareSampler`."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        args = self.args
        sampler = ShareSampler(len(dataset), args.eval_batch_size, args.process_index, args.world_size)
        return share_loader(
            dataset,
            self.eval_collator,
            sampler,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The losses of all rows and of their groups, and the further metrics; the same in all processes."""
        metrics: dict[str, float] = {}
        model, rows = self._evaluated_model(), 0
        with torch.no_grad():
            if len(dataloader.dataset):  # type: ignore[arg-type]
                losses = self._measured(model, dataloader)
                self._say_left_out(losses)
                metrics, rows = losses.metrics(metric_key_prefix), losses.rows
            metrics |= self.further_metrics(metric_key_prefix)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    def _measured(self, model: nn.Module, dataloader: DataLoader) -> Losses:
        sampler: Any = dataloader.batch_sampler
        losses = Losses(self.loss_reduction)
        for rows, counts, batch in zip(sampler, sampler.counted(), good_batches(dataloader), strict=True):
            reasons = batch.pop(LEFT_OUT)
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                found = self.row_losses(model, inputs)
            if counts:
                losses.add(rows, found, [self.row_groups(row) for row in rows], reasons)
        return losses.merge(gather_object([losses]))

    def _evaluated_model(self) -> nn.Module:
        """The model as the training has prepared it, or prepared now if there is no training."""
        if self.is_deepspeed_enabled and self.deepspeed is None:
            deepspeed_init(self, num_training_steps=0, inference=True)
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models and model is self.model:
            if self.is_deepspeed_enabled:
                model = self.model_wrapped = self.deepspeed = self.accelerator.prepare(model)
                model.eval()
            else:
                model = self.accelerator.prepare_model(model, evaluation_mode=True)
        if not self.is_in_train and (self.args.fp16_full_eval or self.args.bf16_full_eval):
            model = model.to(dtype=torch.float16 if self.args.fp16_full_eval else torch.bfloat16)
        return model

    def _say_left_out(self, losses: Losses) -> None:
        """Say once how many rows no mean is over, and why the first one is not."""
        if not losses.left_out or self._said_left_out or not self.args.should_log:
            return
        self._said_left_out = True
        row, reason = min(losses.left_out.items())
        count = len(losses.left_out)
        print(f"evaluation  {count} of {count + losses.rows} rows are left out; the first is row {row}: {reason}")

    # The best checkpoint

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this evaluation is the best so far.

        Raises:
            FlagError: `--metric_for_best_model` is not among the metrics; names those that are.
        """
        wanted = self.args.metric_for_best_model
        if wanted is not None and metric_key(wanted) not in metrics:
            known = sorted(name.removeprefix("eval_") for name in metrics)
            raise FlagError(f"--metric_for_best_model {wanted}: this run measures {', '.join(known)}")
        best = super()._determine_best_metric(metrics=metrics, trial=trial)
        if best and self.args.load_best_model_at_end:  # whatever --save_steps says: it will be asked for
            self.control.should_save = True
        return best

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Where the run starts.

        Raises:
            FlagError: as of the base class.
            CheckpointError: the best checkpoint so far is wanted at the end, and is not there.
        """
        found = super()._init_training_state(max_steps, *args, **kwargs)
        if self.resumption is not None and self.state.best_global_step:
            self._find_best(self.resumption.folder)
        return found

    def _find_best(self, resumed: Path) -> None:
        """Look for the best checkpoint by its number, where this run's are; a path in a file is not followed."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        places = (Path(self.args.output_dir) / name, resumed.parent / name)
        best = next((place for place in places if is_checkpoint(place)), None)
        self.state.best_model_checkpoint = None if best is None else str(best)
        if best is None and self.args.load_best_model_at_end:
            raise CheckpointError(
                f"{places[0]}: is not there, but {resumed} says that it is the best checkpoint so far "
                f"({self.args.metric_for_best_model} {self.state.best_metric}), which --load_best_model_at_end may "
                "need; put it back, or pass --load_best_model_at_end False --resume_changed True"
            )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.args.should_log:
            name, value = self.args.metric_for_best_model, self.state.best_metric
            print(f"best        {self.state.best_model_checkpoint}: {metric_key(str(name))} {value:.6g}")

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The end of a run.

        Under `--save_total_limit 1` transformers would delete the newest checkpoint if it is not the best one, so that
        the same command made its last updates again.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
