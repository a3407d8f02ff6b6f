"""A `transformers.Trainer` that stops at the first loss, gradient or trained weight that is NaN or infinite.

transformers trains on through such values and logs a loss of 0. Here the run ends with the number of the update and the
last whole checkpoint, before anything of it is saved. Knows nothing of the model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from llava.errors import TrainingError
from llava.runtime.partition import local_part
from llava.runtime.saving import last_checkpoint

SMALLEST_LOSS_SCALE = 1.0
"""With fp16 the scale of the loss is halved after every overflow; at this one, the loss is not scaled at all."""


class FiniteTrainer(Trainer):
    """Trainer whose updates, evaluations and files hold numbers only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # transformers would look at each loss twice more, and wait for the device each time.
        self.args.logging_nan_inf_filter = False

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro batch.

        Raises:
            TrainingError: the loss is NaN or infinite.
        """
        loss = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            self._refuse("loss", loss.item())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # With fp16 the loss scale is searched for: updates with overflow are skipped and are no error.
        if norm is not None and not math.isfinite(float(norm)) and not self._searches_loss_scale:
            self._refuse("gradient norm", float(norm))
        return norm

    @property
    def _searches_loss_scale(self) -> bool:
        """True while an overflow of the gradient may be the fault of the scale alone."""
        scaler = self.accelerator.scaler
        return self.args.fp16 and (scaler is None or scaler.get_scale() > SMALLEST_LOSS_SCALE)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The metrics of the evaluation data.

        Raises:
            TrainingError: the loss is NaN or infinite.
        """
        metrics = super().evaluate(*args, **kwargs)
        broken = {name: value for name, value in metrics.items() if name.endswith("loss") and not math.isfinite(value)}
        for name, value in broken.items():
            raise TrainingError(
                f"the loss on the evaluation data ({name}) is {value} after {self.state.global_step} updates, so there "
                f"is nothing to report. {self._advice()} {last_checkpoint(Path(self.args.output_dir))}"
            )
        return metrics

    def check_trained_weights(self) -> None:
        """Look at every trained weight before it is written; all processes must call this.

        Raises:
            TrainingError: one holds NaN or infinite values.
        """
        # Under ZeRO-3 and FSDP2 each process holds a share of the values.
        held = {name: local_part(weight) for name, weight in self.model.named_parameters() if weight.requires_grad}
        if not held:
            return
        finite = torch.stack([torch.isfinite(value).all().to(self.args.device) for value in held.values()])[None]
        everywhere = self.accelerator.gather(finite.int()).amin(0).tolist()  # of all processes
        names = [name for name, sound in zip(held, everywhere, strict=True) if not sound]
        if names:
            raise TrainingError(
                f"{len(names)} of {len(held)} trained tensors hold NaN or infinite values after update "
                f"{self.state.global_step} of {self.state.max_steps} (the first is {names[0]}); they are not written. "
                f"{self._advice()} {last_checkpoint(Path(self.args.output_dir))}"
            )

    def _refuse(self, what: str, value: float) -> None:
        raise TrainingError(
            f"the {what} is {value} at update {self.state.global_step + 1} of {self.state.max_steps}; nothing "
            f"of it has been saved. {self._advice()} {last_checkpoint(Path(self.args.output_dir))}"
        )

    def _advice(self) -> str:
        """What to look at; float16 is the usual reason, because many models are trained in bfloat16."""
        half = self.args.fp16 or any(weight.dtype is torch.float16 for weight in self.model.parameters())
        precision = f"float16 overflows on some models: {self._instead_of_float16()}. " if half else ""
        return f"{precision}Look at --learning_rate and at the data."

    def _instead_of_float16(self) -> str:
        """The option that chooses another precision; a program with others says so."""
        return "pass --bf16 True in place of --fp16"
