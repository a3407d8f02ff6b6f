"""Configuration of a HydraLoRA adapter; its fields are stored as `adapter_config.json`.

`r`, `lora_alpha`, `lora_dropout` and `lora_nums` have the names of the original's configuration (its fork of PEFT).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from peft import PeftConfig

from hydralora.tuner.registration import peft_type
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, POSITIVE, PROBABILITY, Range


class RoutingUnit(StrEnum):
    """What a router decides for."""

    TOKEN = "token"
    """Every token has weights of its own, as in the paper."""

    SEQUENCE = "sequence"
    """All tokens of a sequence share the mean of its prompt's weights, tokens generated later included."""


def _within(value: object, limits: Range, *kinds: type) -> bool:
    """True for a number of these classes in a range; a bool is not accepted as a number."""
    return isinstance(value, kinds) and not isinstance(value, bool) and value in limits


@dataclass
class HydraLoraConfig(PeftConfig):
    """HydraLoRA on linear layers: one shared A, `lora_nums` matrices B, one router per layer.

    Raises:
        ValueError: a value is out of range; all problems are listed.
    """

    r: int = 8
    """Rank of A and of every B."""

    lora_alpha: float = 32
    """The update is scaled by lora_alpha / r."""

    lora_nums: int = 4
    """Number of experts E, one matrix B each; with 1 the method is LoRA."""

    lora_dropout: float = 0.0
    """Dropout before A; one mask serves all experts."""

    target_modules: list[str] | str | None = None
    """Linear layers to adapt: a list of names, a pattern, or 'all-linear'."""

    exclude_modules: list[str] | str | None = None
    """Linear layers to leave out: a list of names or a pattern."""

    layers_to_transform: list[int] | int | None = None
    """Numbers of the layers to adapt; none given: all."""

    layers_pattern: list[str] | str | None = None
    """Name of the list of layers, with layers_to_transform."""

    modules_to_save: list[str] | None = None
    """Other modules to train in full and save along."""

    bias: str = "none"
    """Biases to train along: none."""

    routing: str = RoutingUnit.TOKEN.value
    """`token` (the paper), or `sequence`: the mean over the prompt."""

    balance_weight: float = 0.0
    """Weight of the expert-balance loss that it is trained with by `hydralora.finetune`; 0: none."""

    init_weights: bool = True
    """Start as the identity (B = 0); False draws B like A, for tests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self.target_modules = set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        problems = self._problems()
        if problems:
            raise ValueError("HydraLoraConfig: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        problems = [
            f"{name} is {value!r}, expected a whole number of at least 1"
            for name, value in (("r", self.r), ("lora_nums", self.lora_nums))
            if not _within(value, COUNT, int)
        ]
        if not _within(self.lora_alpha, POSITIVE, int, float):
            problems.append(f"lora_alpha is {self.lora_alpha!r}, expected more than 0, as a factor of every update")
        if not _within(self.lora_dropout, PROBABILITY, int, float):
            problems.append(f"lora_dropout is {self.lora_dropout!r}, expected at least 0 and less than 1")
        if not _within(self.balance_weight, NOT_NEGATIVE, int, float):
            problems.append(f"balance_weight is {self.balance_weight!r}, expected at least 0")
        if self.routing not in list(RoutingUnit):
            problems.append(f"routing is '{self.routing}', expected one of {[unit.value for unit in RoutingUnit]}")
        if self.bias != "none":
            problems.append(f"bias is '{self.bias}'; only 'none' is possible, list modules in modules_to_save instead")
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append("layers_pattern needs layers_to_transform")
        return problems
