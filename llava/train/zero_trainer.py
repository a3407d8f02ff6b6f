"""A `transformers.Trainer` whose checkpoints under DeepSpeed can be resumed by any number of processes.

Knows nothing of the model: the trainers of LLaVA and of the text HydraLoRA are both made of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from llava.train.zero import load_zero_state


class ZeroTrainer(Trainer):
    """Trainer that writes and reads DeepSpeed's part of a checkpoint; without DeepSpeed it is transformers'."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # What is frozen comes from the base; what is trained is in DeepSpeed's files as each process holds it.
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        load_zero_state(self.model_wrapped, Path(resume_from_checkpoint), self.args)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)  # under DeepSpeed, only the schedule
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        return prepared
