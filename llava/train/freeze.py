"""The one function that decides what is trained, and prints it.

Corresponds to the scattered `requires_grad` lines of upstream's `train.py`; which parameter belongs to which part
comes from `llava.model.components`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn

from llava.errors import FlagError
from llava.model.checkpoint import bare_model
from llava.model.components import Component, components
from llava.runtime.quantization import parameter_count
from llava.train.options import RunArguments


@dataclass(frozen=True)
class ComponentCount:
    """Size of one part of the model, in parameters."""

    component: str
    total: int
    trainable: int


def trained_components(args: RunArguments) -> set[Component]:
    """Parts that the options say are trained.

    `--tune_mm_mlp_adapter` leaves the projector, and the rows of new image tokens, which are always trained; LoRA
    and `--freeze_backbone` freeze the language model; the projector is trained unless `--freeze_mm_mlp_adapter`; the
    tower only by `--unfreeze_mm_vision_tower`.
    """
    if args.model.tune_mm_mlp_adapter:
        return {Component.PROJECTOR, Component.IMAGE_TOKENS}
    trained = {Component.ADAPTER, Component.EXTENSION, Component.IMAGE_TOKENS}
    if not (args.training.has_adapter or args.model.freeze_backbone):
        trained.add(Component.LANGUAGE_MODEL)
    if not args.training.freeze_mm_mlp_adapter:
        trained.add(Component.PROJECTOR)
    if args.model.unfreeze_mm_vision_tower:
        trained.add(Component.VISION_TOWER)
    return trained


def freeze(model: nn.Module, args: RunArguments) -> list[ComponentCount]:
    """Set `requires_grad` of every parameter.

    Args:
        model: LLaVA model or the PEFT model around it, extensions attached.
        args: options of the run.

    Returns:
        One row per part that has parameters.

    Raises:
        FlagError: nothing would be trained.
    """
    trained = trained_components(args)
    llava = bare_model(model)
    untrained = {id(weight) for weight in llava.extensions.untrained_parameters(llava)}
    tower = llava.get_vision_tower()
    parts = components(model)
    for part, named in parts.items():
        for weight in named.values():
            own = part is Component.ADAPTER and not weight.requires_grad  # some methods freeze a part of what they add
            weight.requires_grad_(part in trained and id(weight) not in untrained and not own)
        if part is Component.VISION_TOWER and part in trained:
            _freeze_unused_blocks(tower)
    if tower is not None:  # gradients have to pass through a frozen tower too, if extensions train something in it
        tower.trainable = any(weight.requires_grad for weight in tower.parameters())
    counts: list[ComponentCount] = []
    for part, named in parts.items():
        total = sum(parameter_count(weight) for weight in named.values())
        trainable = sum(parameter_count(weight) for weight in named.values() if weight.requires_grad)
        if total:
            counts.append(ComponentCount(str(part), total, trainable))
    if not any(count.trainable for count in counts):
        raise FlagError(
            "nothing would be trained: look at --freeze_backbone, --freeze_mm_mlp_adapter and the LoRA flags"
        )
    return counts


def _freeze_unused_blocks(tower: nn.Module) -> None:
    """Blocks behind the selected layer never run, so they would be parameters without gradient."""
    used = {id(weight) for _, weight in tower.used_parameters()}
    for weight in tower.parameters():
        weight.requires_grad_(id(weight) in used)


def print_trainable(counts: list[ComponentCount]) -> None:
    """Show the table at the start of a run."""
    table = Table(title="What is trained", title_justify="left")
    table.add_column("part")
    for heading in ("parameters", "trainable", "share"):
        table.add_column(heading, justify="right")
    total = ComponentCount("all", sum(c.total for c in counts), sum(c.trainable for c in counts))
    for count in [*counts, total]:
        share = f"{100 * count.trainable / count.total:.2f} %"
        table.add_row(count.component, f"{count.total:,}", f"{count.trainable:,}", share)
    Console().print(table)
