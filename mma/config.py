"""What can be varied: the configuration of the adapters that a checkpoint stores, and the flags.

Flags have the names, types and defaults of LaVIN's `train.py`; `mma` switches them on. Not among them is what LLaVA
has a flag of its own for (features of the tower, projector, normalisation of pixels): `extension.py` sets those.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

ADAPTER_TYPES = ("attn", "block", "none")
"""Where the language model has routed adapters: before attention; before attention and MLP; nowhere."""

VISUAL_ADAPTER_TYPES = ("normal", "router", "router_block", "none")
"""In the vision tower: plain before attention; routed before attention; routed before attention and MLP; nowhere."""

TOWER = "openai/clip-vit-large-patch14"
"""The tower of the original, which has no option for it."""

VISUAL_INPUTS = ("lavin", "llava")
"""Six class tokens through a narrow projector as in LaVIN, or what LLaVA's own flags say."""


@dataclass(frozen=True)
class MmaConfig:
    """Configuration of the adapters of one model.

    Raises:
        ValueError: a value is out of range or of the wrong type; the message names all of them.
    """

    adapter_type: str = "attn"
    """One of `ADAPTER_TYPES`."""

    visual_adapter_type: str = "normal"
    """One of `VISUAL_ADAPTER_TYPES`."""

    adapter_dim: int = 8
    """Hidden width h of the adapters."""

    adapter_groups: int = 2
    """Groups g of the way up; 2 in the original."""

    adapter_scale: float = 1.0
    """Factor of the update of a routed adapter; plain ones ignore it, as in the original."""

    temperature: float = 10.0
    """Of the softmax over the two ways up."""

    adapter_dropout: float = 0.1
    """Probability of dropping an entry of an adapter's hidden state in training."""

    drop_path: float = 0.0
    """Probability of skipping attention or MLP of a decoder layer for a whole sample in training."""

    shifted_decoding: bool = False
    """Give every token that follows on a cache the position before its own, as the original's generation does."""

    merged_for: str = ""
    """Modality for which the adapters were folded into the language model; other samples are refused."""

    def __post_init__(self) -> None:
        problems = [*self._wrong_types(), *self._out_of_range()]
        if problems:
            raise ValueError("configuration of the adapters: " + "; ".join(problems))

    def _wrong_types(self) -> list[str]:
        """One line per field whose value is not of its type; bool is no number here, int is a float."""
        kinds: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
        return [
            f"{item.name} is {value!r}, expected {item.type}"
            for item in dataclasses.fields(self)
            if not isinstance(value := getattr(self, item.name), kinds[str(item.type)])
            or (isinstance(value, bool) and item.type != "bool")
        ]

    def _out_of_range(self) -> list[str]:
        """One line per field outside its range; values of a wrong type are `_wrong_types`' business."""
        if self._wrong_types():
            return []
        problems = []
        if self.adapter_type not in ADAPTER_TYPES:
            problems.append(f"adapter_type is '{self.adapter_type}', expected one of {ADAPTER_TYPES}")
        if self.visual_adapter_type not in VISUAL_ADAPTER_TYPES:
            problems.append(
                f"visual_adapter_type is '{self.visual_adapter_type}', expected one of {VISUAL_ADAPTER_TYPES}"
            )
        if self.merged_for not in ("", "text", "image") or (self.merged_for and self.adapter_type != "none"):
            problems.append(f"merged_for is '{self.merged_for}' beside adapter_type '{self.adapter_type}'")
        for name in ("adapter_dim", "adapter_groups"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}, expected at least 1")
        if not problems and self.adapter_dim % self.adapter_groups:
            problems.append(f"adapter_dim {self.adapter_dim} is not a multiple of adapter_groups {self.adapter_groups}")
        for name in ("temperature", "adapter_scale"):
            if not 0 < getattr(self, name) < math.inf:
                problems.append(f"{name} is {getattr(self, name)}, expected more than 0")
        for name in ("adapter_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}, expected at least 0 and less than 1")
        return problems

    @property
    def adapters_per_layer(self) -> int:
        """Routed adapters in each decoder layer."""
        return {"none": 0, "attn": 1, "block": 2}[self.adapter_type]

    @property
    def adapters_per_block(self) -> int:
        """Adapters in each block of the vision tower."""
        return {"none": 0, "normal": 1, "router": 1, "router_block": 2}[self.visual_adapter_type]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MmaConfig:
        """Configuration from JSON values; a missing one takes its default.

        Raises:
            ValueError: a name is unknown, or a value is refused.
        """
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"configuration of the adapters: unknown {unknown}; known: {sorted(known)}")
        return cls(**values)


def _option(default: Any, help_text: str) -> Any:
    """A command-line option with its help text."""
    return field(default=default, metadata={"help": help_text})


@dataclass
class MmaOptions:
    """Options of Mixture-of-Modality Adaptation; `mma` switches them on."""

    _argument_group_name: ClassVar[str] = "Mixture-of-Modality Adaptation (LaVIN)"

    mma: bool = _option(False, "train adapters mixed by the modality of a sample; the language model is frozen")
    adapter_type: str = _option("attn", "routed adapters before attention (attn), before the MLP too (block), or none")
    visual_adapter_type: str = _option(
        "normal", "adapters in the vision tower: normal (plain), router, router_block (before the MLP too), or none"
    )
    adapter_dim: int = _option(8, "hidden width of the adapters")
    adapter_scale: float = _option(1.0, "factor of the update of a routed adapter")
    temperature: float = _option(10.0, "temperature of the softmax that mixes the two ways of an adapter")
    hidden_proj: int = _option(128, "hidden width of the projector that --visual_input lavin puts behind the tower")
    n_prompt: int = _option(10, "accepted for compatibility: training never reads it, in the original either")
    drop_path: float = _option(0.0, "probability of skipping attention or MLP of a layer for a sample in training")
    adapter_dropout: float = _option(0.1, "dropout inside the adapters in training")
    visual_input: str = _option(
        "lavin",
        "lavin: the class token after every fourth block of the tower through a narrow projector, whole images, "
        "ImageNet's mean and deviation; llava: what the other flags say",
    )

    def config(self) -> MmaConfig:
        """The part that a checkpoint stores.

        Raises:
            ValueError: a value is refused.
        """
        own = {item.name for item in dataclasses.fields(self)}
        names = [item.name for item in dataclasses.fields(MmaConfig) if item.name in own]
        return MmaConfig(**{name: getattr(self, name) for name in names})
