"""One update of a planned run, measured: bytes by part, floating-point operations, host waits."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from llava.runtime import checkpointing
from llava.runtime.rehearsal.fake_device import FakeDevice, on_device
from llava.runtime.rehearsal.memory import MemoryMeter, Part
from llava.train.evaluation.rows import NoRows
from llava.train.llava_trainer import LLaVATrainer
from llava.train.plan.command import Command
from llava.train.plan.model import planned_model, trained
from llava.train.plan.rows import planned_rows
from llava.train.train import Parts, build_run


class PlannedTrainer(LLaVATrainer):
    """The Trainer of a run whose batches are on the planned device already; its losses and groups are the run's."""

    planned: torch.device
    half: torch.dtype | None

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """The model is where it belongs."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs

    def compute_loss_context_manager(self) -> Any:
        """Autocast of the planned device; none under DeepSpeed, which has one dtype for all."""
        on = self.half is not None
        return torch.autocast(self.planned.type, dtype=self.half or torch.bfloat16, enabled=on)


@dataclass(frozen=True)
class Update:
    """What was counted in one update.

    Attributes:
        peak: bytes of each part when their sum was largest.
        passes: bytes of all parts when their sum was largest before the optimizer's step; these grow with the batch.
        step: the same of clipping and the optimizer's step, whatever the batch; 0 if it was not made.
        work: activations and logits when their sum was largest, whatever else there was.
        weights: bytes of all weights.
        trained: number of trained parameters.
        state: bytes of the optimizer's state for float32 weights; 0 without DeepSpeed, where it is in `peak`.
        flops: floating-point operations of all micro batches.
        waits: host waits of one micro batch, by kind.
        step_waits: those of clipping and the optimizer's step.
    """

    peak: dict[Part, int]
    passes: int
    step: int
    work: dict[Part, int]
    weights: int
    trained: int
    state: int
    flops: int
    waits: dict[str, int]
    step_waits: dict[str, int]


class Rehearsal:
    """The run of a command with tensors that have no numbers; updates of any batch can be measured.

    Args:
        command: what is planned.

    Raises:
        LlavaError: as the training program, for what is wrong with options and configurations.
    """

    def __init__(self, command: Command) -> None:
        half = torch.bfloat16 if command.args.training.bf16 else None
        sharded = command.zero is not None
        self.command = command
        self.state: int | None = None
        self.fake = FakeDevice(command.device, unknown_truth=True)
        parts = Parts(
            dataset=planned_rows,
            trainer=PlannedTrainer,
            evaluation_rows=lambda *_: NoRows(),
            model=partial(self._model, dtype=(half or torch.float32) if sharded else None),
            records=False,
        )
        # The Trainer makes its output folder; that of the command is not touched.
        with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
            command.args.training.output_dir = output
            run = build_run(command.args, None, parts)
            self.row = run.dataset[0]
        self.model, self.trainer = run.model, run.trainer
        self.trainer.planned, self.trainer.half = command.device, None if sharded else half
        prepare(self.trainer)

    def _model(self, args: Any, tokenizer: Any, attention: str | None, dtype: torch.dtype | None) -> nn.Module:
        self.fake.unknown_number = 0.0  # methods compare outputs of the base with their own, of which there are none
        try:
            with on_device(self.fake), torch.device(self.fake.device):
                return planned_model(args, tokenizer, attention, dtype)
        finally:
            self.fake.unknown_number = None

    def measure(self, batch: int, steps: bool = True) -> Update:
        """One update with micro batches of `batch` rows.

        Args:
            batch: rows.
            steps: make the optimizer's step too, which takes the same whatever the batch; `peak` is without it if not.
        """
        accumulation, fake = self.command.args.training.gradient_accumulation_steps, self.fake
        # Where gradients of an earlier micro batch are kept, the second one is the larger.
        micro_batches = min(2, accumulation)
        rows = self.trainer.data_collator([self.row] * batch)
        meter = MemoryMeter(fake.device, self.model.config.vocab_size)
        with on_device(fake), meter:
            batches = [tree_map(partial(_placed, fake), rows) for _ in range(micro_batches)]
            optimizer = None if self.command.zero is not None else prepared_optimizer(self.trainer, meter.device)
            begin(self.trainer.model, optimizer, meter)
            weights = meter.now[Part.WEIGHTS]
            waits = _counted(fake, partial(run_passes, self.trainer, batches, meter))
            passes, flops = meter.peak_bytes, meter.flops
            peak, work, step, step_waits = dict(meter.peak), dict(meter.peak_work), 0, {}
            if steps and optimizer is not None:
                meter.forget_peak()
                step_waits = _counted(fake, partial(run_step, self.trainer, optimizer))
                step = meter.peak_bytes
                peak = dict(meter.peak) if step > passes else peak
                work = max(work, dict(meter.peak_work), key=lambda parts: sum(parts.values()))
            meter.close()  # what follows is of no update
            if steps and self.command.zero is not None and self.state is None:
                self.state = _optimizer_state(self.trainer, fake)
        return Update(
            peak=peak,
            passes=passes,
            step=step,
            work=work,
            weights=weights,
            trained=sum(weight.numel() for weight in trained(self.model)),
            state=self.state or 0,
            flops=round(flops * accumulation / micro_batches),
            waits={kind: -(-number // micro_batches) for kind, number in waits.items()},
            step_waits=step_waits,
        )


def measure(command: Command, batch: int) -> Update:
    """One update of a command; see `Rehearsal`."""
    return Rehearsal(command).measure(batch)


def prepare(trainer: Any) -> None:
    """Checkpointing and outputs of a model as the Trainer and accelerate set them."""
    if checkpointing.is_checkpointed(trainer.args):
        checkpointing.switch_on(trainer.model, trainer.args)
    if trainer.half is not None:
        trainer.model.forward = convert_outputs_to_fp32(trainer.model.forward)


def prepared_optimizer(trainer: Any, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a run in its course: with the states that a first step makes."""
    optimizer: torch.optim.Optimizer = trainer.create_optimizer()
    if not optimizer.state:
        _as_on_device(optimizer, device)
        for weight in trained(trainer.model):
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def begin(model: nn.Module, optimizer: torch.optim.Optimizer | None, meter: MemoryMeter) -> None:
    """Let the meter, which is on, know weights and states, and count from here."""
    model.zero_grad()
    meter.watch(model)
    if optimizer is not None:
        meter.watch_optimizer(optimizer)
    meter.forget_peak()


def run_passes(trainer: Any, batches: list[dict[str, Any]], meter: MemoryMeter) -> None:
    """Forward and backward of the micro batches of an update, as `transformers.Trainer` makes them.

    Args:
        trainer: of the run.
        batches: micro batches on the planned device.
        meter: counts.
    """
    number = trainer._get_num_items_in_batch(batches, meter.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    for batch in batches:
        trainer.training_step(trainer.model, dict(batch), number)


def run_step(trainer: Any, optimizer: torch.optim.Optimizer) -> None:
    """Clipping and the step of torch's optimizer; under DeepSpeed its own one makes it."""
    if trainer.args.max_grad_norm:
        nn.utils.clip_grad_norm_(trained(trainer.model), trainer.args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def _counted(fake: FakeDevice, work: Callable[[], object]) -> dict[str, int]:
    """The host waits of some work."""
    fake.waits.clear()
    work()
    return dict(fake.waits)


def _as_on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Work on lists of tensors, as torch's optimizers do on a GPU; fake tensors are not of the types that they know."""
    for group in optimizer.param_groups if device.type == "cuda" else ():
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def _placed(fake: FakeDevice, leaf: Any) -> Any:
    """A tensor of a batch on the planned device; pixels need no values."""
    if is_dataclass(leaf) and not isinstance(leaf, type):
        moved = {field.name: _placed(fake, getattr(leaf, field.name)) for field in fields(leaf)}
        return replace(leaf, **moved)
    if not isinstance(leaf, Tensor):
        return leaf
    if not leaf.is_floating_point():
        return fake.put(leaf)
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=fake.device)


def _optimizer_state(trainer: Any, fake: FakeDevice) -> int:
    """Bytes of the optimizer's state for the trained weights in float32, as DeepSpeed keeps them."""
    weights = [nn.Parameter(torch.zeros(each.shape, device=fake.device)) for each in trained(trainer.model)]
    optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    optimizer = optimizer_class(weights, **options)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    states = (leaf for state in optimizer.state.values() for leaf in state.values() if isinstance(leaf, Tensor))
    return sum(leaf.untyped_storage().nbytes() for leaf in states)
