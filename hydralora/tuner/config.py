"""Configuration of a HydraLoRA adapter; its fields are stored as `adapter_config.json`.

`r`, `lora_alpha`, `lora_dropout` and `lora_nums` have the names of the original's configuration (its fork of PEFT).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType
from peft.utils.other import get_pattern_key

from hydralora.tuner.balance.losses import BalanceForm
from hydralora.tuner.fields import (
    COUNT,
    DICT,
    FLAG,
    INDEX,
    NONE,
    NOT_NEGATIVE,
    PATTERN,
    POSITIVE,
    PROBABILITY,
    TEXT,
    Kind,
    RefusedValueError,
    list_of,
    mapping_of,
    number,
    one_of,
    problems,
)
from hydralora.tuner.initialization import Initialization
from hydralora.tuner.lora_options import explains_refused
from hydralora.tuner.registration import NAME, peft_type
from hydralora.tuner.routing.rule import rule_problems

FILE = "adapter_config.json"


class RoutingUnit(StrEnum):
    """What a router decides for."""

    TOKEN = "token"
    """Every token has weights of its own, as in the paper."""

    SEQUENCE = "sequence"
    """All tokens of a sequence share the mean of its prompt's weights, tokens generated later included."""

    TASK = "task"
    """Every task has weights of its own, which are learned; each call names the tasks of its rows."""


START = dataclasses.replace(
    FLAG | one_of(["gaussian"]),
    hint="pissa, olora, corda, loftq and lora_ga also change the frozen weights, which the file of an adapter does not "
    "hold, so it would fit no base; eva and orthogonal are defined for a single B",
)
"""How A and B begin."""

PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha", "experts_pattern": "lora_nums"}
"""Options that give some layers a value of their own, by the option whose value it replaces."""

FIELDS: dict[str, Kind] = {
    "r": COUNT,
    "lora_alpha": POSITIVE,
    "lora_nums": COUNT,
    "lora_dropout": PROBABILITY,
    "use_rslora": FLAG,
    "rank_pattern": mapping_of(PATTERN, COUNT),
    "alpha_pattern": mapping_of(PATTERN, POSITIVE),
    "target_modules": PATTERN | list_of(TEXT) | NONE,
    "exclude_modules": PATTERN | list_of(TEXT) | NONE,
    "layers_to_transform": INDEX | list_of(INDEX) | NONE,
    "layers_pattern": TEXT | list_of(TEXT) | NONE,
    "modules_to_save": list_of(TEXT) | NONE,
    "trainable_token_indices": list_of(INDEX) | mapping_of(TEXT, list_of(INDEX)) | NONE,
    "routing": one_of(RoutingUnit),
    "bias": one_of(["none", "all", "lora_only"]),
    "top_k": COUNT | NONE,
    "top_p": number(0, 1, above=True) | NONE,
    "router_temperature": POSITIVE,
    "tasks": list_of(TEXT, empty=False) | NONE,
    "experts_pattern": mapping_of(PATTERN, COUNT),
    "frozen_experts": FLAG,
    "balance_weight": NOT_NEGATIVE,
    "balance": one_of(BalanceForm),
    "balance_ema": PROBABILITY,
    "balance_warmup": INDEX,
    "information_weight": NOT_NEGATIVE,
    "init": one_of(Initialization),
    "head_dropout": PROBABILITY,
    "expert_dropout": PROBABILITY,
    "head_dropout_start": INDEX,
    "init_lora_weights": START,
    "init_weights": FLAG,
    # Of every configuration of PEFT.
    "peft_type": one_of([NAME]),
    "task_type": one_of(TaskType) | NONE,
    "auto_mapping": DICT | NONE,
    "peft_version": TEXT | NONE,
    "base_model_name_or_path": Kind("text", lambda value: isinstance(value, str)) | NONE,
    "revision": TEXT | NONE,
    "inference_mode": FLAG,
}
"""What the value of each field may be. A new field gets a row here, and in `VALUES` of its test."""


@explains_refused
@dataclass
class HydraLoraConfig(PeftConfig):
    """HydraLoRA on linear layers: one shared A, `lora_nums` matrices B, one router per layer.

    Raises:
        ValueError: a value is of the wrong type or out of range (`FIELDS`), or contradicts another; all problems are
            listed.
    """

    r: int = 8
    """Rank of A and of every B."""

    lora_alpha: float = 32
    """The update is scaled by lora_alpha / r; see `use_rslora`."""

    lora_nums: int = 4
    """Number of experts E, one matrix B each; with 1 the method is LoRA."""

    lora_dropout: float = 0.0
    """Dropout before A; one mask serves all experts."""

    use_rslora: bool = False
    """Scale the update by lora_alpha / sqrt(r) (arXiv 2312.03732)."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of some layers, by a name or pattern at the end of the layer's; the first that matches decides."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas of some layers, in the same way."""

    target_modules: list[str] | str | None = None
    """Linear layers to adapt: a list of names, a pattern, or 'all-linear'; none given: PEFT's choice for LoRA on this
    kind of model."""

    exclude_modules: list[str] | str | None = None
    """Linear layers to leave out: a list of names or a pattern."""

    layers_to_transform: list[int] | int | None = None
    """Numbers of the layers to adapt; none given: all."""

    layers_pattern: list[str] | str | None = None
    """Name of the list of layers, with layers_to_transform."""

    modules_to_save: list[str] | None = None
    """Other modules to train in full and save along."""

    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Ids of tokens whose embeddings are trained along, or ids by the name of an embedding layer."""

    bias: str = "none"
    """Biases of the base to train along: none, all, or lora_only, those of the adapted layers."""

    routing: str = RoutingUnit.TOKEN.value
    """`token` (the paper), `sequence`: the mean over the prompt, or `task`: learned weights for each task."""

    top_k: int | None = None
    """So many experts act, the most probable ones, weighted by their share of their sum; None: all act."""

    top_p: float | None = None
    """The most probable experts act until their probabilities add up to this, weighted likewise; None: all act."""

    router_temperature: float = 1.0
    """The router's logits are divided by it: above 1 the weights become even, below 1 they become sharp."""

    tasks: list[str] | None = None
    """Names of the tasks, for routing by task; their order is that of the learned table."""

    experts_pattern: dict[str, int] = field(default_factory=dict)
    """Number of experts of some layers, by a pattern for the end of their names; the others have lora_nums."""

    frozen_experts: bool = False
    """Train the routers (or the table of the tasks) alone: A and B stay as they are."""

    balance_weight: float = 0.0
    """Weight of the expert-balance loss, which acts under any trainer; 0: none. See `balance`."""

    balance: str = BalanceForm.SAMPLE.value
    """What the balance loss balances: `sample`, the shares of the experts over all layers in each sample, as the
    original; `batch`, those of each layer over the whole batch, so that layers and samples may differ in theirs."""

    balance_ema: float = 0.0
    """With balance='batch': weight of the past in a running mean of the shares, for small batches."""

    balance_warmup: int = 0
    """Updates during which the weight of the balance loss grows linearly from 0."""

    information_weight: float = 0.0
    """Weight of the information loss, which makes a router decide, and differently for different tokens; 0: none."""

    init: str = Initialization.ZERO.value
    """How the experts start: `zero`, B = 0 (the paper); `centered`, random B minus their mean and a router of 0."""

    head_dropout: float = 0.0
    """Dropout between A and each B, with a mask of its own for each expert."""

    expert_dropout: float = 0.0
    """Probability of leaving out a whole expert for a token in training."""

    head_dropout_start: int = 0
    """Updates before `head_dropout` and `expert_dropout` begin."""

    init_lora_weights: bool | str = True
    """True: A uniform as the original's, B = 0; gaussian: A normal with deviation 1/r, B = 0; False: B is drawn too."""

    init_weights: bool = True
    """Start as the identity (B = 0); False draws B like A, for tests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self.check()
        for name in ("target_modules", "exclude_modules"):  # PEFT matches names of a set, not of a list
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple | frozenset) else value)
        for name in ("modules_to_save", "layers_to_transform", "layers_pattern", "trainable_token_indices", "tasks"):
            value = getattr(self, name)
            if isinstance(value, set | frozenset | tuple):
                setattr(self, name, list(value) if isinstance(value, tuple) else sorted(value))

    def check(self) -> None:
        """Refuse wrong values, also those that were set after the configuration was made.

        Raises:
            ValueError: lists all problems.
        """
        found = [*problems(self, FIELDS), *self._contradictions()]
        found = found or rule_problems(self)
        if found:
            raise RefusedValueError(f"{type(self).__name__}: " + "; ".join(found))

    def _contradictions(self) -> list[str]:
        """One line for each pair of options that do not go together."""
        found = []
        if self.layers_pattern and self.layers_to_transform is None:
            found.append("layers_pattern needs layers_to_transform")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:  # PEFT would ignore it
            found.append(
                f"layers_to_transform is {self.layers_to_transform!r}, but target_modules is the text "
                f"{self.target_modules!r}; list names of modules, or write the numbers of the layers into a pattern"
            )
        if self.balance_ema and self.balance != BalanceForm.BATCH:
            found.append(f"balance_ema is {self.balance_ema}, which is of balance='batch', and balance is 'sample'")
        return found + self._start_problems()

    def _start_problems(self) -> list[str]:
        """What would let a centered start differ from the base: its B cancel where all act with equal weights."""
        if self.init != Initialization.CENTERED:
            return []
        found = []
        if not self.starts_as_identity:
            given = "init_lora_weights" if self.init_weights else "init_weights"
            found.append(f"init='centered' starts as the base and {given}=False does not; leave one of them out")
        dropped = {name: getattr(self, name) for name in ("head_dropout", "expert_dropout")}
        dropped = {name: value for name, value in dropped.items() if value}
        if dropped and not self.head_dropout_start:
            found.append(
                f"init='centered' needs all experts at the start, where they cancel, and {dropped} drops parts of "
                "them; let it begin later by head_dropout_start, or leave it out"
            )
        return found

    @property
    def scaling(self) -> float:
        """Factor of the update."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def most_experts(self) -> int:
        """The number of experts of the layers that have most."""
        return max([self.lora_nums, *self.experts_pattern.values()])

    @property
    def starts_as_identity(self) -> bool:
        """True if the adapter changes nothing at the start."""
        return self.init_weights and self.init_lora_weights is not False

    def for_layer(self, name: str) -> HydraLoraConfig:
        """What a layer of this name gets: the values of the patterns that match it."""
        given = {pattern: getattr(self, pattern) for pattern in PATTERNS}
        matching = {pattern: get_pattern_key(values, name) for pattern, values in given.items()}
        changes = {PATTERNS[pattern]: given[pattern][key] for pattern, key in matching.items() if key in given[pattern]}
        return dataclasses.replace(self, **changes) if changes else self

    @classmethod
    def packing_problem(cls, settings: Mapping[str, Any]) -> str | None:
        """Why an adapter with these settings cannot be trained on the packed rows of a LLaVA, or None."""
        if settings.get("routing", cls.routing) == RoutingUnit.SEQUENCE:
            return "routing 'sequence' is decided once for each row; use 'token'"
        weights = [name for name in ("balance_weight", "information_weight") if settings.get(name)]
        if weights:
            return f"{weights[0]} {settings[weights[0]]}: the loss is over the tokens of a row; leave it out"
        return None

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """The configuration of these values, those of a file for example; unknown ones are named and ignored.

        Warns:
            UserWarning: some are unknown, as options of a later version are.
        """
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = {name: kwargs[name] for name in sorted(kwargs.keys() - known)}
        if unknown and kwargs.get("peft_type", NAME) == NAME:
            warnings.warn(
                f"Unexpected keyword arguments {list(unknown)} for class {cls.__name__}, these are ignored. The "
                f"configuration was probably saved by a later version of hydralora or PEFT: {unknown}. If one of these "
                "options changes what the adapter computes, its outputs will be wrong here; install that version",
                stacklevel=3,
            )
            kwargs = {name: value for name, value in kwargs.items() if name in known}
        return super().from_peft_type(**kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """As of PEFT; a value that is refused is named with its file.

        Raises:
            ValueError: there is no configuration, or it has a wrong value.
        """
        folder = str(pretrained_model_name_or_path)
        try:
            return super().from_pretrained(folder, subfolder, **kwargs)
        except RefusedValueError as error:
            raise RefusedValueError(f"{Path(folder, subfolder or '', FILE)}: {error}") from error
