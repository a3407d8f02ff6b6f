"""A thin `transformers.Trainer`: sampling by modality, parameter groups, named losses, complete checkpoints.

Corresponds to upstream's `llava/train/llava_trainer.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from llava.data.streams.dataset import StreamedDataset, stream_loader
from llava.eval.answering.loading import LoadedModel
from llava.model.checkpoint import bare_model, load_full_weights, load_trained, save_checkpoint
from llava.model.compiled import uncompiled
from llava.model.formats import inspect_checkpoint
from llava.model.loss import LossReduction
from llava.model.splice import count_targets
from llava.runtime.monitoring.losses import RowLosses, of_totals, over_batches, over_positions, over_targets
from llava.runtime.monitoring.trainer import MonitoredTrainer
from llava.runtime.monitoring.untouched import random_states_kept
from llava.runtime.run_record import copy_run_record
from llava.runtime.sampling import EpochSampler, modality_order
from llava.train.evaluation.scores import Examination
from llava.train.optimizer import BASE_GROUP, optimizer_groups
from llava.train.options import RunArguments

REDUCTIONS = {
    LossReduction.TARGET: over_targets,
    LossReduction.MICRO_BATCH: over_batches,
    LossReduction.ALL: over_positions,
}
"""What a mean of the evaluation is over, by `--loss_reduction`."""


class LLaVATrainer(MonitoredTrainer):
    """Trainer of a LLaVA with any set of extensions.

    Args:
        run: options of the run.
        examination: the questions of `--eval_questions`; None for none.
        kwargs: as transformers' Trainer takes them.
    """

    def __init__(self, *, run: RunArguments, examination: Examination | None = None, **kwargs: Any) -> None:
        self.run = run
        self.examination = examination
        self.loss_reduction = REDUCTIONS[LossReduction(run.training.loss_reduction)]
        self._loss_sums: dict[str, Tensor] = {}
        self._loss_count = 0
        self._rates: dict[str, float] = {}  # learning rate of each parameter group in the latest update
        with _adapters_declared(kwargs["model"]):
            super().__init__(args=run.training, **kwargs)
        # Layers are compiled in their places (`compile_layers`); accelerate would wrap the whole model.
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        # The loss is divided by the targets of the whole global batch in `compute_loss`, not by the Trainer.
        self.model_accepts_loss_kwargs = True
        self.neftune_noise_alpha = None  # the model has its own, see `train`

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The updates of a run; noise on embeddings ends with them."""
        llava = bare_model(self.model)
        llava.noise_alpha = self.args.neftune_noise_alpha
        try:
            return super().train(*args, **kwargs)
        finally:
            llava.noise_alpha = None

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        ranks = self.args.world_size * self.args.gradient_accumulation_steps
        order = modality_order(dataset.modality_lengths, self.args.train_batch_size, ranks)
        return EpochSampler(order, len(dataset), self._order_seed)

    def get_train_dataloader(self) -> DataLoader:
        """The batches of this process. A stream gives each process its own rows; accelerate must not share them out."""
        data, args = self.train_dataset, self.args
        if not isinstance(data, StreamedDataset):
            return super().get_train_dataloader()
        return stream_loader(
            data,
            self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Where the run starts, in a stream too; errors as of the base class."""
        found = super()._init_training_state(*args, **kwargs)
        if isinstance(self.train_dataset, StreamedDataset):
            self.train_dataset.passed = self.state.global_step * self.args.gradient_accumulation_steps
        return found

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Optimizer of the class that `--optim` names, over the groups of `optimizer_groups`."""
        if self.optimizer is None:
            target = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            groups = [group for group in optimizer_groups(target, self.run) if group["params"]]
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def count_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Targets of a micro batch, int64 scalar; what truncation cuts off does not count."""
        if batch.get("plan") is not None:
            return torch.tensor(batch["plan"].targets)
        llava = bare_model(self.model)
        limit = getattr(llava.config, "tokenizer_model_max_length", None)
        images, sizes = batch.get("images"), batch.get("image_sizes")
        lengths = [] if images is None else llava.image_lengths(images, sizes)
        return count_targets(batch["input_ids"], batch["labels"], lengths, limit)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Targets of all micro batches and ranks of one update."""
        counts = [self.count_targets(batch) for batch in batch_samples]
        total = torch.stack(counts).sum().to(device) if counts else torch.zeros((), dtype=torch.long, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the LM loss and the extensions' losses, scaled so that one update sees their means.

        The LM loss of a micro batch is its summed cross entropy over the targets of the global batch; data-parallel
        averaging is undone by the number of ranks. Everything else is a mean per micro batch and is averaged over
        the micro batches of an update.
        """
        over_targets = bare_model(self.accelerator.unwrap_model(model)).loss_reduction is LossReduction.TARGET
        items = num_items_in_batch if over_targets else None
        # Who asks for the outputs may want the logits, whose size is that of all positions times the vocabulary.
        outputs = model(**inputs, num_items_in_batch=items, skip_logits=not return_outputs)
        losses: dict[str, Tensor] = outputs.losses
        if num_items_in_batch is None:
            loss = outputs.loss
        else:
            world = self.args.world_size if self.args.average_tokens_across_devices else 1
            steps = self.current_gradient_accumulation_steps
            scales = {name: world if name == "lm" and over_targets else 1 / steps for name in losses}
            losses = {name: value * scales[name] for name, value in losses.items()}
            loss = torch.stack([value.float() for value in losses.values()]).sum()
        if model.training:
            self._record(losses)
        return (loss, outputs) if return_outputs else loss

    def _record(self, losses: dict[str, Tensor]) -> None:
        if not self._loss_sums:
            self._loss_count = self.state.global_step
        for name, value in losses.items():
            previous = self._loss_sums.get(name, torch.zeros((), device=value.device))
            self._loss_sums[name] = previous + value.detach().float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a line of training progress: parts of the loss, metrics of extensions, rates of special groups."""
        if "loss" in logs and self._loss_sums:
            steps = max(1, self.state.global_step - self._loss_count)
            for name, total in self._loss_sums.items():
                mean = self.accelerator.gather(total.reshape(1)).mean() / steps
                logs[f"loss/{name}"] = round(mean.item(), 6)
            logs |= bare_model(self.model).extensions.metrics(bare_model(self.model))
            logs |= {f"learning_rate/{name}": rate for name, rate in self._rates.items() if name != BASE_GROUP}
            self._loss_sums = {}
        super().log(logs, start_time)

    def _get_learning_rate(self) -> float:
        # The Trainer asks after the step of the optimizer and before that of the schedule.
        self._rates = {
            group.get("name", BASE_GROUP).partition(",")[0]: float(group["lr"]) for group in self.optimizer.param_groups
        }
        return super()._get_learning_rate()

    # Evaluation

    @property
    def eval_collator(self) -> Any:
        """Rows of one sample each, whose losses are told apart."""
        planner = getattr(self.data_collator, "planner", None)
        if planner is None or not planner.packing:
            return self.data_collator
        return replace(self.data_collator, planner=replace(planner, packing=False))

    def row_losses(self, model: nn.Module, batch: dict[str, Any]) -> RowLosses:
        """The language-model losses of a batch's rows, and the losses of the extensions."""
        outputs = model(**batch, skip_logits=True, by_row=True)
        others = {name: value for name, value in outputs.losses.items() if name != "lm"}
        return of_totals(outputs.row_totals, outputs.labels, others)

    def row_groups(self, row: int) -> Sequence[str]:
        """The modality and the task of a row."""
        return self.eval_dataset.groups(row)

    def further_metrics(self, prefix: str) -> dict[str, float]:
        """The scores of the answers to `--eval_questions`."""
        if self.examination is None:
            return {}
        llava = bare_model(self.model)
        tower = llava.get_vision_tower()
        processor = None if tower is None else tower.image_processor
        loaded = LoadedModel("training", self.processing_class, llava, processor, "--bf16 True in place of --fp16")
        with self.compute_loss_context_manager(), uncompiled():
            scores = self.examination.scores(loaded, self.state.global_step)
        return {f"{prefix}_{name}": value for name, value in scores.items()}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure, log and show sample answers; errors as of the base class."""
        metrics = super().evaluate(*args, **kwargs)
        if self.examination is not None:
            with self.speed.paused(), random_states_kept():
                self.examination.show(self.callback_handler.callbacks, self.state.global_step)
        return metrics

    # Checkpoints

    def _write_model(self, folder: Path) -> None:
        splits = self.is_deepspeed_enabled or self.is_fsdp_enabled  # then all processes gather
        if self.args.should_save or splits:
            save_checkpoint(self.model, folder, self.processing_class, write=self.args.should_save)
        if self.args.should_save:
            copy_run_record(Path(self.args.output_dir), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        contents = inspect_checkpoint(resume_from_checkpoint)
        if contents.weights is not None:
            load_full_weights(bare_model(target), contents)
        load_trained(target, resume_from_checkpoint)


@contextlib.contextmanager
def _adapters_declared(model: nn.Module) -> Iterator[None]:
    """Let transformers train what extensions added to a quantised model; by itself it knows PEFT's adapters alone."""
    if isinstance(model, PeftModel) or not bare_model(model).extensions:
        yield
        return
    model._hf_peft_config_loaded = True  # type: ignore[assignment]  # the attribute that transformers asks
    try:
        yield
    finally:
        del model._hf_peft_config_loaded
