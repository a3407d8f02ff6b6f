"""A `transformers.Trainer` whose runs can be killed at any moment and continued exactly.

Checkpoints appear whole or not at all, the order of the data is the same after an interruption, and DeepSpeed's part of
a checkpoint is read by any number of processes. Knows nothing of the model: the trainers of LLaVA and of the text
HydraLoRA are both made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llava.errors import CheckpointError, LlavaError, TrainingError
from llava.runtime.failure import good_batches
from llava.runtime.files import reading
from llava.runtime.finite_trainer import FiniteTrainer
from llava.runtime.fsdp.layers import layer_classes
from llava.runtime.fsdp.state import load_optimizer, save_optimizer
from llava.runtime.output import claim, discard, replacing
from llava.runtime.resume_check import check_optimizer
from llava.runtime.resumed_schedule import apply_settings, check_length, own_settings
from llava.runtime.run_record import Resumption
from llava.runtime.sampling import EpochSampler, random_order
from llava.runtime.saving import FINAL, last_checkpoint, publish_files, publish_folder, rotate, staging_path
from llava.runtime.trainer_options.lengths import length_order, lengths_of
from llava.runtime.weights.completeness import require, write_file_list
from llava.runtime.weights.torch_files import check_training_state, load_plain
from llava.runtime.zero import load_zero_state, saved_processes


class ResumableTrainer(FiniteTrainer):
    """Trainer that writes whole checkpoints; without DeepSpeed its updates are transformers'."""

    resumption: Resumption | None = None
    """What the program knows of a run that continues; set before `train`."""

    updates_before = 0
    """Updates that were made before this process started."""

    _staged: Path | None = None  # the checkpoint that is being written
    _schedule_changes: Sequence[str] = ()

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length":
            order = length_order(
                lengths_of(dataset), self.args.train_batch_size * self.args.gradient_accumulation_steps
            )
            return EpochSampler(order, len(dataset), self._order_seed)
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        return EpochSampler(random_order(len(dataset)), len(dataset), self._order_seed)

    @property
    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed after the last update, or after it was stopped early; Trainer would make another update.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # Data that other processes prepare

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The updates of a run.

        Raises:
            TrainingError: the loss is no number, a checkpoint cannot be written, or a data worker died.
        """
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):  # torch has no class of its own for this
                raise
            raise TrainingError(
                f"a process that prepares data died at update {self.state.global_step + 1} ({error}); the usual reason "
                "is that the machine ran out of memory, so use fewer --dataloader_num_workers. "
                f"{last_checkpoint(Path(self.args.output_dir))}"
            ) from error

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """The batches of one update.

        Raises:
            LlavaError: a worker met a sample that cannot be trained on.
        """
        return super().get_batch_samples(good_batches(epoch_iterator), *args, **kwargs)

    # Writing

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staged is None else str(self._staged.parent)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write `checkpoint-N` under another name and rename it when it is complete; then drop the oldest ones.

        Raises:
            TrainingError: it cannot be written; the earlier checkpoints are whole.
        """
        target = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = staging_path(target)
        self._staged = staging / target.name
        try:
            self.check_trained_weights()
            claim(staging)
            super()._save_checkpoint(model, trial)
            self._name_best(self._staged, target)
            self._publish(self._staged, target)
            if self.args.should_save:
                discard(staging)
                rotate(target.parent, self.args.save_total_limit, self.state.best_model_checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            self._could_not_write(target, staging, error)
        finally:
            self._staged = None

    def _name_best(self, staged: Path, target: Path) -> None:
        """Where the checkpoint is the best one so far, call it by the name that it will have."""
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(target)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained; into its folder only when all of it could be written.

        Raises:
            TrainingError: it cannot be written.
        """
        target = Path(output_dir or self.args.output_dir)
        if _internal_call:  # by `_save_checkpoint`, whose folder is not the real one yet
            self._write_model(target)
            return
        staged = target / FINAL
        try:
            self.check_trained_weights()
            if self.args.should_save:  # another process might come when all has been published
                claim(staged)
            self._write_model(staged)
            if self.args.should_save:
                write_file_list(staged)
                publish_files(staged, target)
        except (OSError, RuntimeError, SafetensorError) as error:
            self._could_not_write(target, staged, error)
        self.accelerator.wait_for_everyone()

    def _write_model(self, folder: Path) -> None:
        super().save_model(str(folder), _internal_call=True)

    def _publish(self, staged: Path, target: Path) -> None:
        """Rename when all processes have written; once per file system where the nodes do not share one."""
        self.accelerator.wait_for_everyone()
        if self.args.process_index == 0:
            write_file_list(staged)
            publish_folder(staged, target)
        self.accelerator.wait_for_everyone()
        if self.args.process_index != 0 and self.args.local_process_index == 0 and staged.is_dir():
            write_file_list(staged)
            publish_folder(staged, target)
            discard(staged.parent)

    def _could_not_write(self, target: Path, staging: Path, error: Exception) -> None:
        if isinstance(error, LlavaError):
            raise error
        discard(staging)
        raise TrainingError(
            f"{target}: could not be written ({error}). {last_checkpoint(Path(self.args.output_dir))}"
        ) from error

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make no repository: the program publishes when the run is finished (`llava.runtime.publishing`)."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish no checkpoint."""

    def save_state(self) -> None:
        """Write `trainer_state.json`, whole or not at all."""
        if self.args.should_save:
            path = Path(self.args.output_dir) / TRAINER_STATE_NAME
            with replacing(path) as partial:
                self.state.save_to_json(str(partial))

    # Reading; `resume_check` has seen before that everything is there

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore both.

        Raises:
            CheckpointError: the file does not fit this run, or contains NaN or infinite values.
        """
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        path, schedule = Path(checkpoint) / OPTIMIZER_NAME, Path(checkpoint) / SCHEDULER_NAME
        expected = self.lr_scheduler.state_dict().keys()
        own = own_settings(self.optimizer)
        with reading(path, f"does not fit this run, or {SCHEDULER_NAME} does not"):
            self._read_optimizer_and_scheduler(checkpoint)
        lacking = sorted(expected - load_plain(schedule).keys())
        if lacking:
            raise CheckpointError(f"{schedule}: lacks {lacking}, which the schedule of this run has")
        check_optimizer(self.optimizer, path)
        if self._has_changed:
            apply_settings(self.optimizer, self.lr_scheduler, own)

    def _read_optimizer_and_scheduler(self, checkpoint: str) -> None:
        if not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(self.model, self._bare_optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(load_plain(Path(checkpoint) / SCHEDULER_NAME))

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def _has_changed(self) -> bool:
        return self.resumption is not None and bool(self.resumption.changes or self._schedule_changes)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Where the run starts.

        Raises:
            FlagError: the run is longer or shorter than the one that the checkpoint is of, or nothing is left of it.
        """
        found = super()._init_training_state(max_steps, *args, **kwargs)
        self.updates_before = self.state.global_step
        if self.resumption is not None:
            free = self.resumption.length_is_free or self.resumption.accepts_changes
            self._schedule_changes = check_length(self.resumption.folder, max_steps, free, self.resumption.changes)
            self.state.compute_steps(self.args, max_steps)  # how often to save and log is what the options of now say
        return found

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.accelerator.scaler is None:
            return
        path = Path(checkpoint) / SCALER_NAME
        require(path, Path(checkpoint) / TRAINER_STATE_NAME, "describes a run in float16, which scales its loss by it")
        with reading(path, "does not fit this run"):
            super()._load_scaler(checkpoint)

    # The part of a checkpoint that DeepSpeed or FSDP2 has split

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            save_optimizer(self.model, self._bare_optimizer, Path(output_dir), self.args.should_save)
        elif self.is_deepspeed_enabled:
            # What is frozen comes from the base; what is trained is in DeepSpeed's files as each process holds it.
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or layer_classes(self.model)
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        else:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
            self._load_zero(Path(resume_from_checkpoint))
        if self.resumption is not None and self.args.should_save:  # everything of the checkpoint has been read
            self.resumption.keep_record(self._schedule_changes)
        return prepared

    def _load_zero(self, checkpoint: Path) -> None:
        own = own_settings(self.optimizer)
        load_zero_state(self.model_wrapped, checkpoint, self.args)
        self._load_optimizer_and_scheduler(str(checkpoint))  # under DeepSpeed, only the schedule
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if self._has_changed:
            apply_settings(self.optimizer, self.lr_scheduler, own)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if not self.is_deepspeed_enabled:
            self._load_from_checkpoint(str(best), self.model)
            return
        # Its folder is named by a file of a resumed checkpoint, and DeepSpeed runs the pickles that it opens.
        check_training_state(best, deepspeed=True)
        # Written by this run, or by another number of processes before it was resumed.
        other = saved_processes(best) != self.args.world_size
        self.model_wrapped._config.load_universal_checkpoint = other
        load_zero_state(self.model_wrapped, best, self.args)
