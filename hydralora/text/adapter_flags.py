"""Flags of `python -m hydralora.finetune` that say what the adapter is, and the configuration that they make.

Every field of `HydraLoraConfig` that a user may want has a flag here; `ROWS` says which, and how its text is read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydralora.tuner.balance.losses import BalanceForm
from hydralora.tuner.config import HydraLoraConfig, RoutingUnit
from hydralora.tuner.initialization import Initialization
from llava.errors import FlagError
from llava.runtime.options import option
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, POSITIVE, PROBABILITY, Range

ADAPTER_RANGES: Mapping[str, Range] = {
    "lora_rank": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": PROBABILITY,
    "top_k": COUNT,
    "top_p": Range(0, 1, above=True),
    "router_temperature": POSITIVE,
    "balance_weight": NOT_NEGATIVE,
    "balance_ema": PROBABILITY,
    "balance_warmup": NOT_NEGATIVE,
    "information_weight": NOT_NEGATIVE,
    "head_dropout": PROBABILITY,
    "expert_dropout": PROBABILITY,
    "head_dropout_start": NOT_NEGATIVE,
}
"""What the numbers may be."""


@dataclass
class AdapterArguments:
    """What the adapter is. It stays as it is with `--peft_path`, but for `--balance_weight`."""

    trainable: str = option("linear layers to adapt, by comma, or all-linear", "q_proj,v_proj")
    exclude_modules: str | None = option("linear layers to leave out, by comma")
    layers_to_transform: str | None = option("numbers of the layers to adapt, by comma; none given: all")
    layers_pattern: str | None = option("name of the list of layers, with --layers_to_transform")
    lora_rank: int = option("rank of A and of every B", 8)
    lora_dropout: float = option("dropout before A", 0.1)
    lora_alpha: float = option("the update is scaled by alpha / rank", 32.0)
    use_rslora: bool = option("scale the update by alpha / sqrt(rank)", False)
    lora_nums: str = option("number of experts, or auto:FILE (see python -m hydralora.components)", "2")
    rank_pattern: str | None = option('ranks of some layers, as JSON: {"down_proj": 16}, by the end of their names')
    alpha_pattern: str | None = option("alphas of some layers, in the same way")
    experts_pattern: str | None = option("numbers of experts of some layers, in the same way")
    bias: str = option("biases of the base to train along", "none", choices=["none", "all", "lora_only"])
    trainable_token_indices: str | None = option(
        'ids of tokens whose embeddings are trained along, by comma, or by layer as JSON: {"embed_tokens": [5]}'
    )
    routing: str = option(
        "what is decided for: token (the paper); sequence, by the mean over the prompt; task, learned weights for each "
        "task_type of the data",
        RoutingUnit.TOKEN.value,
    )
    tasks: str | None = option(
        "--routing task: names of the tasks, by comma, in the order of their table; none given: the task_type of the "
        "training records, in their order"
    )
    top_k: int | None = option("so many experts act, the most probable ones; none given: all")
    top_p: float | None = option("the most probable experts act until their probabilities add up to this")
    router_temperature: float = option("the router's logits are divided by it: above 1 the weights become even", 1.0)
    frozen_experts: bool = option("train the routers, or the table of the tasks, alone", False)
    balance_weight: float | None = option(
        "weight of an expert-balance loss; 0: none, as the original; none given: that of --peft_path's adapter, or 0"
    )
    balance: str | None = option(
        "what that loss balances: sample, the experts over all layers in each sample, as the original; batch, those of "
        "each layer over the batch; none given: sample, or that of --peft_path's adapter",
        choices=list(BalanceForm),
    )
    balance_ema: float | None = option("--balance batch: weight of the past in a running mean of the shares")
    balance_warmup: int | None = option("updates during which the weight of the balance loss grows from 0")
    information_weight: float | None = option("weight of a loss that makes routers decide, and tokens differ")
    init: str = option(
        "how the experts start: zero, B = 0 (the paper); centered, random B that cancel, and a router of 0",
        Initialization.ZERO.value,
        choices=list(Initialization),
    )
    init_lora_weights: str = option(
        "how A starts: True, uniform as the original's; gaussian, normal", "True", choices=["True", "gaussian"]
    )
    head_dropout: float = option("dropout between A and each B, by expert", 0.0)
    expert_dropout: float = option("probability of leaving out a whole expert for a token in training", 0.0)
    head_dropout_start: int = option("updates before --head_dropout and --expert_dropout begin", 0)
    modules_to_save: str | None = option("other modules to train in full, by comma")


def module_names(value: str | None) -> list[str]:
    """The names in the value of a flag, without blanks."""
    return [name.strip() for name in (value or "").split(",") if name.strip()]


def _sorted_names(text: str) -> list[str] | None:
    return sorted(module_names(text)) or None


def _targets(text: str) -> str | list[str]:
    names = sorted(module_names(text))
    return "all-linear" if names == ["all-linear"] else names


def _numbers(text: str) -> list[int]:
    return sorted(int(number) for number in text.split(","))


def _mapping(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"is a {type(value).__name__}")
    return value


@dataclass(frozen=True)
class Row:
    """A field of the configuration, and the flag that sets it.

    Attributes:
        field: its name.
        flag: name of the flag, without dashes.
        read: what the flag's value means; a `ValueError` says that it means nothing.
        words: what the value must be, for messages.
    """

    field: str
    flag: str
    read: Callable[[Any], Any] = lambda value: value
    words: str = ""


_PATTERN = (_mapping, 'a JSON object from names of layers to numbers, as {"down_proj": 8}')
ROWS = (
    Row("r", "lora_rank"),
    Row("target_modules", "trainable", _targets),
    Row("exclude_modules", "exclude_modules", _sorted_names),
    Row("layers_to_transform", "layers_to_transform", _numbers, "whole numbers by comma"),
    Row("layers_pattern", "layers_pattern"),
    Row("modules_to_save", "modules_to_save", _sorted_names),
    *(Row(f"{name}_pattern", f"{name}_pattern", *_PATTERN) for name in ("rank", "alpha", "experts")),
    Row(
        "trainable_token_indices",
        "trainable_token_indices",
        lambda text: _mapping(text) if text.lstrip().startswith("{") else _numbers(text),
        "whole numbers by comma, or a JSON object from names of embeddings to lists of them",
    ),
    Row("tasks", "tasks", lambda text: module_names(text) or None),
    Row("init_lora_weights", "init_lora_weights", lambda text: True if text == "True" else text),
    *(
        Row(name, name)
        for name in (
            *("lora_alpha", "lora_dropout", "use_rslora", "bias", "routing", "top_k", "top_p", "router_temperature"),
            *("frozen_experts", "balance_weight", "balance", "balance_ema", "balance_warmup", "information_weight"),
            *("init", "head_dropout", "expert_dropout", "head_dropout_start"),
        )
    ),
)
"""All flags but `--lora_nums`, whose number may be in a file."""

CHANGEABLE = frozenset({"balance_weight"})
"""Fields that a run on an adapter of `--peft_path` may change."""


def _value(row: Row, flags: AdapterArguments) -> Any:
    """What a flag says; None: nothing.

    Raises:
        FlagError: it cannot be read.
    """
    given = getattr(flags, row.flag)
    if given is None:
        return None
    try:
        return row.read(given)
    except ValueError as error:
        raise FlagError(f"--{row.flag} {given}: expected {row.words} ({error})") from error


def adapter_config(flags: AdapterArguments, experts: int, tasks: Sequence[str] | None = None) -> HydraLoraConfig:
    """The configuration of a new adapter.

    Args:
        flags: of the run.
        experts: E, what `--lora_nums` means.
        tasks: those of the data, which `--tasks` does not name.

    Raises:
        FlagError: a value cannot be read, is out of range, or contradicts another.
    """
    values = {row.field: _value(row, flags) for row in ROWS}
    if values["routing"] == RoutingUnit.TASK:
        values["tasks"] = values["tasks"] or list(tasks or ())
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return HydraLoraConfig(lora_nums=experts, task_type="CAUSAL_LM", **given)
    except ValueError as error:
        renamed = {row.field: row.flag for row in ROWS if row.field != row.flag}
        names = ", ".join(f"{field} is --{flag}" for field, flag in renamed.items())
        raise FlagError(f"flags of the adapter ({names}, the others have the names of their flags): {error}") from error


def contradictions(flags: AdapterArguments, experts: int, stored: HydraLoraConfig) -> list[str]:
    """The flags that were given with other values than the adapter of `--peft_path` has, in a line each."""
    defaults = {item.name: item.default for item in dataclasses.fields(AdapterArguments)}
    pairs = {row.flag: (_value(row, flags), getattr(stored, row.field)) for row in ROWS if row.field not in CHANGEABLE}
    pairs["lora_nums"] = (experts, stored.lora_nums)
    return [
        f"--{flag} {getattr(flags, flag)} contradicts the adapter of --peft_path, which has {_plain(theirs)} and stays "
        "as it is; leave the flag out"
        for flag, (ours, theirs) in pairs.items()
        if _plain(ours) != _plain(theirs) and getattr(flags, flag) != defaults[flag]
    ]


def _plain(value: Any) -> Any:
    """A value of either side, lists in order: names in another order are the same."""
    if isinstance(value, set | frozenset | list | tuple):
        return sorted(value) or None
    return value


def routing_problems(flags: Any, config: HydraLoraConfig) -> list[str]:
    """Flags that would act on routers which this adapter does not have.

    Args:
        flags: the options of training.
        config: of the adapter.
    """
    rate = flags.router_learning_rate
    if config.routing == RoutingUnit.TASK:
        given = {name: getattr(flags, name) for name in ("balance_weight", "information_weight")}
        given = {name: value for name, value in given.items() if value}
        given |= {} if rate is None else {"router_learning_rate": rate}
        reason = "an adapter that routes by task has a table and no router"
        return [f"--{name} {value}: {reason}; leave the flag out" for name, value in given.items()]
    if config.most_experts == 1 and rate is not None:
        return [f"--router_learning_rate {rate}: one expert has no router; leave the flag out"]
    return []
