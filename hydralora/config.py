"""What can be varied: the configuration that a checkpoint stores, and the flags that a command line offers.

The flags are those of MLLM-HydraLoRA and, with names that begin with `hydralora_`, ours. Standard library only: with
`hydralora.patch_llava` this file also runs next to upstream's `llava`, which has no `llava.runtime`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing import Self  # Python 3.11; `moe_patch` carries this file to 3.10

NUMBER = (int, float)


class _Checked:
    """What the configurations share: checking their values, and JSON there and back.

    Attributes:
        subject: what is configured, for messages.
        kinds: types of each field's values; bool is no number, int is a float.
        minimum: smallest value of each number.
    """

    subject: ClassVar[str]
    kinds: ClassVar[dict[str, tuple[type, ...]]]
    minimum: ClassVar[dict[str, float]] = {"experts": 1, "rank": 1, "dropout": 0, "balance_weight": 0}

    def __post_init__(self) -> None:
        problems = [*self._wrong_types(), *self._out_of_range()]
        if problems:
            raise ValueError(f"configuration of {self.subject}: " + "; ".join(problems))

    def _wrong_types(self) -> list[str]:
        """One line per field whose value is not of its type."""
        return [
            f"{name} is {value!r}, expected {' or '.join(kind.__name__ for kind in kinds)}"
            for name, kinds in self.kinds.items()
            if not isinstance(value := getattr(self, name), kinds) or (isinstance(value, bool) and bool not in kinds)
        ]

    def _out_of_range(self) -> list[str]:
        """One line per number outside its range; values of a wrong type are `_wrong_types`' business."""
        problems = [
            f"{name} is {value}, expected at least {least}"
            for name, least in self.minimum.items()
            if isinstance(value := getattr(self, name), NUMBER) and not least <= value < math.inf
        ]
        alpha = getattr(self, "alpha", 1)
        if isinstance(alpha, NUMBER) and not 0 < alpha < math.inf:
            problems.append(f"alpha is {alpha}, expected more than 0: it is the factor of every update")
        dropout = getattr(self, "dropout", 0)
        if isinstance(dropout, NUMBER) and dropout >= 1:
            problems.append(f"dropout is {dropout}, expected less than 1")
        return problems

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` is the inverse."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Configuration from JSON values; a missing one takes its default.

        Raises:
            ValueError: a name is unknown, or a value is refused.
        """
        known = set(cls.__match_args__)  # type: ignore[attr-defined]  # not by `fields`: the compiler reads this
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"configuration of {cls.subject}: unknown {unknown}; known: {sorted(known)}")
        return cls(**values)


@dataclass(frozen=True)
class RoutedMLPConfig(_Checked):
    """Configuration of the routed MLP blocks of one model; the defaults are those of MLLM-HydraLoRA.

    Raises:
        ValueError: a value is out of range or of the wrong type; the message names all of them.
    """

    subject: ClassVar[str] = "the routed MLP blocks"
    kinds: ClassVar[dict[str, tuple[type, ...]]] = {
        "experts": (int,),
        "rank": (int,),
        "alpha": NUMBER,
        "dropout": NUMBER,
        "dense": (bool,),
        "balance_weight": NUMBER,
    }

    experts: int = 3
    """Number of experts E, one matrix B each per projection."""

    rank: int = 64
    """Rank r of A and B."""

    alpha: float = 16.0
    """The update is scaled by alpha / rank."""

    dropout: float = 0.05
    """Probability of dropping an input of A in training."""

    dense: bool = True
    """Weight all experts by the router (True) or use the most probable one alone (False)."""

    balance_weight: float = 0.05
    """Factor of the expert-balance loss; 0 leaves it out."""

    @property
    def needs_balance_loss(self) -> bool:
        """True if there is something to balance and a weight to do it with."""
        return self.experts > 1 and self.balance_weight > 0

    @property
    def trains_routers(self) -> bool:
        """True if any loss depends on the routers: choosing one expert passes no gradient, the balance loss does."""
        return self.dense or self.needs_balance_loss


PARTS = {"attention": "the decoder", "vision": "the vision tower"}
"""Where attention layers can be adapted, by the name that stands for it in `--hydralora_modules`."""


@dataclass(frozen=True)
class RoutedLinearConfig(_Checked):
    """Configuration of HydraLoRA on the projections of attention layers.

    Raises:
        ValueError: a value is out of range or of the wrong type; the message names all of them.
    """

    subject: ClassVar[str] = "HydraLoRA on attention layers"
    kinds: ClassVar[dict[str, tuple[type, ...]]] = {
        "targets": (list,),
        "experts": (int,),
        "rank": (int,),
        "alpha": NUMBER,
        "dropout": NUMBER,
        "balance_weight": NUMBER,
    }

    targets: list[str]
    """`attention` (the decoder's layers) and `vision` (the tower's blocks), each alone for all projections or followed
    by one, as `attention.q_proj`."""

    experts: int = 3
    """Number of experts E, one matrix B each per projection."""

    rank: int = 64
    """Rank r of A and B."""

    alpha: float = 16.0
    """The update is scaled by alpha / rank."""

    dropout: float = 0.05
    """Probability of dropping an input of A in training."""

    balance_weight: float = 0.0
    """Factor of an expert-balance loss over the decoder's attention layers; 0 leaves it out."""

    def _out_of_range(self) -> list[str]:
        problems = super()._out_of_range()
        if isinstance(self.targets, list):
            parts = [str(target).split(".") for target in self.targets]
            wrong = any(part[0] not in PARTS or len(part) > 2 or not part[-1] for part in parts)
            if wrong or not self.targets:
                problems.append(
                    f"targets are {self.targets}, expected {' or '.join(PARTS)}, alone or with a projection as in "
                    "'attention.q_proj'"
                )
        return problems

    def projections(self, part: str) -> list[str] | None:
        """Names of the adapted projections in a part; an empty list for all of them, None for no adaptation."""
        found = [target.partition(".")[2] for target in self.targets if target.partition(".")[0] == part]
        if not found:
            return None
        return [] if "" in found else list(dict.fromkeys(found))


@dataclass(frozen=True)
class HydraLoraSettings:
    """Everything that one model carries."""

    mlp: RoutedMLPConfig | None = None
    linear: RoutedLinearConfig | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values. Of routed MLP blocks alone they are those of the blocks, as in checkpoints of any age."""
        mlp = None if self.mlp is None else self.mlp.to_dict()
        if self.linear is None:
            return mlp or {}
        return {"mlp": mlp, "linear": self.linear.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HydraLoraSettings:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a name is unknown, or a value is refused.
        """
        if "linear" not in values:
            return cls(RoutedMLPConfig.from_dict(values))
        mlp = values.get("mlp")
        linear = RoutedLinearConfig.from_dict(values["linear"])
        return cls(None if mlp is None else RoutedMLPConfig.from_dict(mlp), linear)


def _option(help_text: str, default: Any = None) -> Any:
    """A command-line option with its help text."""
    return field(default=default, metadata={"help": help_text})


@dataclass
class OriginalOptions:
    """Options of MLLM-HydraLoRA, with its names, types and defaults.

    `--lora_alpha`, `--lora_dropout` and `--lora_bias` are options of the core and hold for the experts too.
    """

    use_lora: bool = _option("train LoRA (and routed MLP blocks, see --llm_moe) instead of the language model", False)
    lora_rank: int = _option("rank of the LoRA on --lora_modules and of the experts", RoutedMLPConfig.rank)
    lora_modules: str = _option("linear layers of the decoder that get LoRA, by comma", "q_proj,k_proj,v_proj,o_proj")
    llm_moe: bool = _option("replace every MLP of the decoder by a routed block; needs --use_lora True", True)
    dense_moe: bool = _option(
        "weight all experts by the router (True) or use the most probable one (False)", RoutedMLPConfig.dense
    )
    llm_moe_num_experts: int = _option("experts per routed block", RoutedMLPConfig.experts)
    moe_balance_w: float = _option("weight of the expert-balance loss; 0: none", RoutedMLPConfig.balance_weight)
    vit_trainable: str = _option("refused unless empty: the original never reads it", "")


@dataclass
class HydraLoraOptions(OriginalOptions):
    """The original's options and those of HydraLoRA on attention layers."""

    _argument_group_name: ClassVar[str] = "HydraLoRA"

    hydralora_modules: str = _option(
        "attention layers that get HydraLoRA in place of LoRA: attention (the decoder's), vision (the tower's), or one "
        "projection of them as attention.q_proj; by comma; needs --use_lora True",
        "",
    )
    hydralora_rank: int | None = _option("rank of the experts on --hydralora_modules; none given: --lora_rank")
    hydralora_alpha: float | None = _option("their update is scaled by alpha / rank; none given: --lora_alpha")
    hydralora_dropout: float | None = _option("dropout before them; none given: --lora_dropout")
    hydralora_num_experts: int | None = _option("experts per projection; none given: --llm_moe_num_experts")
    hydralora_balance_w: float = _option(
        "weight of an expert-balance loss over the decoder's attention layers; 0: none, as in the paper",
        RoutedLinearConfig.balance_weight,
    )
