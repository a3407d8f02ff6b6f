"""What can be varied: the configuration of the routed MLP blocks, and the flags of MLLM-HydraLoRA.

The configuration is what a checkpoint stores; the flags are what a command line offers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class RoutedMLPConfig:
    """Configuration of the routed MLP blocks of one model; the defaults are those of MLLM-HydraLoRA.

    Raises:
        ValueError: a value is out of range or of the wrong type; the message names all of them.
    """

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

    def __post_init__(self) -> None:
        problems = [*self._wrong_types(), *self._out_of_range()]
        if problems:
            raise ValueError("configuration of the routed MLP blocks: " + "; ".join(problems))

    def _wrong_types(self) -> list[str]:
        """One line per field whose value is not of its type; bool is no number here, int is a float."""
        wanted: dict[str, tuple[type, ...]] = {
            "experts": (int,),
            "rank": (int,),
            "alpha": (int, float),
            "dropout": (int, float),
            "dense": (bool,),
            "balance_weight": (int, float),
        }
        return [
            f"{name} is {value!r}, expected {' or '.join(kind.__name__ for kind in kinds)}"
            for name, kinds in wanted.items()
            if not isinstance(value := getattr(self, name), kinds) or (isinstance(value, bool) and bool not in kinds)
        ]

    def _out_of_range(self) -> list[str]:
        """One line per numeric field outside its range; values of a wrong type are `_wrong_types`' business."""
        minimum = {"experts": 1, "rank": 1, "alpha": 0, "dropout": 0, "balance_weight": 0}
        problems = [
            f"{name} is {value}, expected at least {least}"
            for name, least in minimum.items()
            if isinstance(value := getattr(self, name), int | float) and not value >= least
        ]
        if isinstance(self.dropout, int | float) and self.dropout >= 1:
            problems.append(f"dropout is {self.dropout}, expected less than 1")
        return problems

    @property
    def needs_balance_loss(self) -> bool:
        """True if there is something to balance and a weight to do it with."""
        return self.experts > 1 and self.balance_weight > 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoutedMLPConfig:
        """Configuration from JSON values; a missing one takes its default.

        Raises:
            ValueError: a name is unknown, or a value is refused.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"configuration of the routed MLP blocks: unknown {unknown}; known: {sorted(known)}")
        return cls(**values)


def _option(default: Any, help_text: str) -> Any:
    """A command-line option with its help text."""
    return field(default=default, metadata={"help": help_text})


@dataclass
class HydraLoraOptions:
    """Options of MLLM-HydraLoRA, with its names, types and defaults.

    `--lora_alpha`, `--lora_dropout` and `--lora_bias` are options of the core and hold for the experts too.
    """

    _argument_group_name: ClassVar[str] = "MLLM-HydraLoRA"

    use_lora: bool = _option(False, "train LoRA (and routed MLP blocks, see --llm_moe) instead of the language model")
    lora_rank: int = _option(64, "rank of the LoRA on --lora_modules and of the experts")
    lora_modules: str = _option("q_proj,k_proj,v_proj,o_proj", "linear layers of the decoder that get LoRA, by comma")
    llm_moe: bool = _option(True, "replace every MLP of the decoder by a routed block; needs --use_lora True")
    dense_moe: bool = _option(True, "weight all experts by the router (True) or use the most probable one (False)")
    llm_moe_num_experts: int = _option(3, "experts per routed block")
    moe_balance_w: float = _option(0.05, "weight of the expert-balance loss; 0: none")
    vit_trainable: str = _option("", "refused unless empty: the original never reads it")
