"""What can be varied: the configuration of the adapters that a checkpoint stores, and the flags.

Flags have the names, types and defaults of LaVIN's `train.py`; `mma` switches them on. Not among them is what LLaVA
has a flag of its own for (features of the tower, projector, normalisation of pixels): `extension.py` sets those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from llava.runtime.checked_config import CheckedConfig
from llava.runtime.options import config_of, flags_of, option
from llava.runtime.ranges import COUNT, POSITIVE, PROBABILITY, Range

ADAPTER_TYPES = ("attn", "block", "none")
"""Where the language model has routed adapters: before attention; before attention and MLP; nowhere."""

VISUAL_ADAPTER_TYPES = ("normal", "router", "router_block", "none")
"""In the vision tower: plain before attention; routed before attention; routed before attention and MLP; nowhere."""

MODALITIES = ("text", "image")
"""Rows of the modality embedding."""

TOWER = "openai/clip-vit-large-patch14"
"""The tower of the original, which has no option for it."""

VISUAL_INPUTS = ("lavin", "llava")
"""Six class tokens through a narrow projector as in LaVIN, or what LLaVA's own flags say."""


@dataclass(frozen=True)
class MmaConfig(CheckedConfig):
    """Configuration of the adapters of one model.

    Raises:
        ValueError: a value is out of range or of the wrong type; the message names all of them.
    """

    subject: ClassVar[str] = "the adapters"
    ranges: ClassVar[Mapping[str, Range]] = {
        "adapter_dim": COUNT,
        "adapter_groups": COUNT,
        "temperature": POSITIVE,
        "adapter_scale": POSITIVE,
        "adapter_dropout": PROBABILITY,
        "drop_path": PROBABILITY,
    }

    adapter_type: str = option("routed adapters before attention (attn), before the MLP too (block), or none", "attn")
    """One of `ADAPTER_TYPES`."""

    visual_adapter_type: str = option(
        "adapters in the vision tower: normal (plain), router, router_block (before the MLP too), or none", "normal"
    )
    """One of `VISUAL_ADAPTER_TYPES`."""

    adapter_dim: int = option("hidden width of the adapters", 8)
    """Called h where shapes are given."""

    adapter_groups: int = 2
    """Groups g of the up-projection; 2 in the original."""

    adapter_scale: float = option("factor of the update of a routed adapter", 1.0)
    """Plain adapters ignore it, as in the original."""

    temperature: float = option("temperature of the softmax that mixes the two ways of an adapter", 10.0)

    adapter_dropout: float = option("dropout inside the adapters in training", 0.1)

    drop_path: float = option("probability of skipping attention or MLP of a layer for a sample in training", 0.0)

    shifted_decoding: bool = False
    """Give every token that follows on a cache the position before its own, as the original's generation does."""

    merged_for: str = ""
    """Modality for which the adapters were folded into the language model; other samples are refused."""

    def _out_of_range(self) -> list[str]:
        if self._wrong_types():
            return []
        problems = [*self._wrong_choices(), *self._range_problems("adapter_dim", "adapter_groups")]
        if not problems and self.adapter_dim % self.adapter_groups:
            problems.append(f"adapter_dim {self.adapter_dim} is not a multiple of adapter_groups {self.adapter_groups}")
        return problems + self._range_problems("temperature", "adapter_scale", "adapter_dropout", "drop_path")

    def _wrong_choices(self) -> list[str]:
        """One line per value that is not one of those possible."""
        problems = []
        if self.adapter_type not in ADAPTER_TYPES:
            problems.append(f"adapter_type is '{self.adapter_type}', expected one of {ADAPTER_TYPES}")
        if self.visual_adapter_type not in VISUAL_ADAPTER_TYPES:
            problems.append(
                f"visual_adapter_type is '{self.visual_adapter_type}', expected one of {VISUAL_ADAPTER_TYPES}"
            )
        if self.merged_for not in ("", "text", "image") or (self.merged_for and self.adapter_type != "none"):
            problems.append(f"merged_for is '{self.merged_for}' beside adapter_type '{self.adapter_type}'")
        return problems

    @property
    def adapters_per_layer(self) -> int:
        """Routed adapters in each decoder layer."""
        return {"none": 0, "attn": 1, "block": 2}[self.adapter_type]

    @property
    def adapters_per_block(self) -> int:
        """Adapters in each block of the vision tower."""
        return {"none": 0, "normal": 1, "router": 1, "router_block": 2}[self.visual_adapter_type]


@flags_of(
    MmaConfig,
    after={
        "mma": ("adapter_type", "visual_adapter_type", "adapter_dim", "adapter_scale", "temperature"),
        "n_prompt": ("drop_path", "adapter_dropout"),
    },
)
class MmaOptions:
    """Options of Mixture-of-Modality Adaptation, some of them fields of `MmaConfig`; `mma` switches them on."""

    _argument_group_name: ClassVar[str] = "Mixture-of-Modality Adaptation (LaVIN)"

    mma: bool = option("train adapters mixed by the modality of a sample; the language model is frozen", False)
    hidden_proj: int = option("hidden width of the projector that --visual_input lavin puts behind the tower", 128)
    n_prompt: int = option("accepted for compatibility: training never reads it, in the original either", 10)
    visual_input: str = option(
        "lavin: the class token after every fourth block of the tower through a narrow projector, whole images, "
        "ImageNet's mean and deviation; llava: what the other flags say",
        "lavin",
    )

    def config(self) -> MmaConfig:
        """The part that a checkpoint stores.

        Raises:
            ValueError: a value is refused.
        """
        return config_of(MmaConfig, self)


FLAG_RANGES: Mapping[str, Range] = {**MmaConfig.ranges, "hidden_proj": COUNT}
"""What the numbers of `MmaOptions` may be; `MmaConfig` checks what depends on several."""
