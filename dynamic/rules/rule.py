"""The seam of token reduction: what a rule declares, what it is shown, and what it returns.

A rule acts at one of three places: on the features of the tower, on the projected features in front of the decoder, or
before a decoder layer. It sees one image (or one tile of it) or one row at a time, so nothing crosses rows by
construction. A third party adds a rule by a subclass with `@register`, or by an entry point of the group
"llava.reduction_rules" that names such a module.

Shape letters: n tokens that are judged, D width of the language model, D_vision of the tower, H attention heads,
C width of a head, L positions of a row without padding.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from dynamic.rules.regions import Region
from dynamic.rules.selection import Selection

VARIANTS = ("paper", "code")
"""Values of `variant` in rules whose published code does something else than their paper."""


class ImageView(Protocol):
    """One image, or one tile of it, as a rule in front of the decoder sees it. What is not asked for is not computed.

    The n tokens are the patches; tokens that end a line of tiles are not shown to rules: they stay with their line.
    """

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches of this tile; of several tiles together: those of one of them."""

    @property
    def places(self) -> Tensor:
        """(n, 2) float32: row and column of each patch within its tile."""

    @property
    def region(self) -> Region | None:
        """What this tile shows of its image; None if tiles have no layout, or of several tiles together."""

    @property
    def tower(self) -> Tensor:
        """(n, D_vision): features of the tower, from the layer that this model reads."""

    @property
    def projected(self) -> Tensor:
        """(n, D): the same behind the projector."""

    @property
    def received(self) -> Tensor:
        """(n,) float32: attention of the class token to each patch in the last block that runs, mean over the heads.

        Of a tower without class token it is the mean over all queries.
        """

    @property
    def received_early(self) -> Tensor:
        """(n,) float32: the same in the first block."""

    @property
    def keys(self) -> Tensor:
        """(n, C) float32: keys of the last block that runs, mean over the heads."""

    @property
    def question(self) -> Tensor:
        """(tokens, D): embeddings of the text of the row behind its last image, special tokens included."""

    def digest(self) -> int:
        """A number that depends on the pixels of the whole image alone: seeds what is drawn for it."""


class RowView(Protocol):
    """One row in front of decoder layer k, without padding. What is not asked for is not computed."""

    @property
    def layer(self) -> int:
        """K."""

    @property
    def hidden(self) -> Tensor:
        """(L, D): input of layer k."""

    @property
    def image_places(self) -> Tensor:
        """(n,) int64: places of the image tokens that are still there, of all images of the row, ascending."""

    @property
    def text_places(self) -> Tensor:
        """(text,) int64: places of the last instruction, which ends the prompt."""

    def attention(self, queries: Tensor, *, layer: int | None = None, rotary: bool = True) -> Tensor:
        """(H, queries, L) float32: attention probabilities of the queries at these places, causal.

        Args:
            queries: (queries,) int64 places.
            layer: k, computed from the input of layer k by its own norm and projections, or k - 1, what the layer
                before has computed; None: k - 1.
            rotary: False: without rotary embedding.
        """

    def keys(self, *, layer: int | None = None) -> Tensor:
        """(L, K C) float32: keys of all places behind rotary embedding, heads side by side; `layer` as above."""

    def normed(self) -> Tensor:
        """(L, D): the input of layer k behind the last norm of the decoder."""

    def entered(self) -> tuple[Tensor, Tensor]:
        """(images, D) and (text, D): image tokens of the row and tokens of `text_places` as they entered layer 0.

        All of them, those included that rules before layers have dropped since.
        """


@dataclass(frozen=True)
class Rule(abc.ABC):
    """What all rules have in common; the fields of a subclass are its options, with defaults.

    Attributes:
        name: in plans and on the command line.
        reference: the paper.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    modifiers: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Words that may follow the rule in a plan (`divprune+cen`), each with the options that it sets."""


@dataclass(frozen=True)
class ImageRule(Rule):
    """A rule in front of the decoder."""

    place: ClassVar[str]
    """`tower`: merging mixes features of the tower, in front of the projector; `features`: those behind it."""

    per_tile: ClassVar[bool] = False
    """True: each tile of an image is judged by itself, with a part of the budget."""

    @abc.abstractmethod
    def select(self, image: ImageView, keep: int) -> Selection:
        """Exactly `keep` of the n tokens, 1 <= keep < n."""

    def quotas(self, tiles: Sequence[ImageView], sizes: Sequence[int], keep: int) -> list[int]:
        """How many tokens each tile keeps, `keep` in all; by default in proportion to their sizes (`per_tile`)."""
        from dynamic.rules.budget import largest_remainder

        return largest_remainder(sizes, sizes, keep)


@dataclass(frozen=True)
class LayerRule(Rule):
    """A rule before one decoder layer or several."""

    layers: ClassVar[tuple[int, ...]]
    """Where it acts in a decoder of 32 layers if the plan does not say."""

    @abc.abstractmethod
    def select(self, row: RowView, keep: int) -> Selection:
        """Exactly `keep` of the n image tokens of a row; indices count `row.image_places`."""

    def counts(self, keep: int, tokens: int, layers: Sequence[int]) -> list[int]:
        """How many of `tokens` image tokens stay from each of `layers` on, the last of them `keep`."""
        return [keep] * len(layers)


_registered: dict[str, type[Rule]] = {}


def register(rule: type[Rule]) -> type[Rule]:
    """Make a rule known under its name; a decorator.

    Raises:
        ValueError: the name is that of another rule.
    """
    known = _registered.setdefault(rule.name, rule)
    if known is not rule:
        raise ValueError(f"two reduction rules call themselves '{rule.name}': {known} and {rule}")
    return rule


def registered() -> Mapping[str, type[Rule]]:
    """The rules of all modules that were imported so far."""
    return _registered
