"""What a plan costs by formula: image tokens per layer, their average, FLOPs of the prompt, bytes of keys and values.

FLOPs are those of `dynamic.flops.Decoder.layer`. What a rule itself computes is not counted, and neither are norms,
embeddings, the head and the vision tower: times are measured, not computed here.

In formulas: N tokens of a layer, C width of the decoder, Q of its queries, K of its keys, I of its MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dynamic.flops import Decoder

FORMULA = "4 N C Q + 4 N C K + 4 N N Q + 6 N C I"
PAPER_FORMULA = "32 N C C + 4 N N C"


@dataclass(frozen=True)
class PlanCost:
    """One prompt.

    Attributes:
        decoder: whose layers count.
        image: image tokens that each layer works on.
        text: the other tokens, which all layers work on.
        bytes_per_value: of keys and values in the cache.
    """

    decoder: Decoder
    image: tuple[int, ...]
    text: int = 0
    bytes_per_value: int = 2

    def __post_init__(self) -> None:
        if len(self.image) != self.decoder.layers:
            raise ValueError(f"tokens of {len(self.image)} layers for a decoder of {self.decoder.layers}")

    @property
    def average(self) -> float:
        """Image tokens of a layer on average."""
        return sum(self.image) / len(self.image)

    @property
    def flops(self) -> float:
        """Of the prompt in all layers."""
        return sum(self.decoder.layer(tokens + self.text, tokens + self.text) for tokens in self.image)

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values of the prompt in all layers."""
        return sum(2 * self.bytes_per_value * self.decoder.kv_width * (tokens + self.text) for tokens in self.image)


def tokens_per_layer(tokens: int, counts: Sequence[int], starts: Sequence[int], layers: int) -> tuple[int, ...]:
    """Image tokens that each layer works on.

    Args:
        tokens: of the image.
        counts: that stay from each of `starts` on.
        starts: layers before which tokens are dropped, ascending; 0 for rules in front of the decoder.
        layers: of the decoder.
    """
    found = [tokens] * layers
    for count, start in zip(counts, starts, strict=True):
        found[start:] = [count] * (layers - start)
    return tuple(found)


def ranges(image: Sequence[int]) -> str:
    """Tokens per layer as text, equal neighbors together: `576 (0-1), 166 (2-31)`."""
    parts, start = [], 0
    for layer, tokens in enumerate(image):
        if layer + 1 == len(image) or image[layer + 1] != tokens:
            parts.append(f"{tokens} ({start}-{layer})" if layer > start else f"{tokens} ({layer})")
            start = layer + 1
    return ", ".join(parts)


def table(decoder: Decoder, plans: Mapping[str, Sequence[int]], text: int = 0, bytes_per_value: int = 2) -> str:
    """Plans side by side, each a line, with the formula below.

    Args:
        decoder: whose layers count.
        plans: by name, image tokens of each layer; shares are of the first one.
        text: the other tokens of the prompt.
        bytes_per_value: of keys and values in the cache.
    """
    costs = {name: PlanCost(decoder, tuple(image), text, bytes_per_value) for name, image in plans.items()}
    first = next(iter(costs.values()))
    names = max(len("plan"), *map(len, costs))
    lines = [f"{'plan':<{names}}{'average':>10}{'TFLOPs':>10}{'':>8}{'cache MiB':>12}{'':>8}  image tokens (layers)"]
    for name, cost in costs.items():
        lines.append(
            f"{name:<{names}}{cost.average:>10.1f}{cost.flops / 1e12:>10.3f}{cost.flops / first.flops:>8.1%}"
            f"{cost.cache_bytes / 2**20:>12.1f}{cost.cache_bytes / first.cache_bytes:>8.1%}  {ranges(cost.image)}"
        )
    return "\n".join([*lines, *_explained(decoder, text, bytes_per_value)])


def _explained(decoder: Decoder, text: int, bytes_per_value: int) -> list[str]:
    """How the numbers of `table` were computed."""
    sizes = f"C {decoder.width}, K {decoder.kv_width}, Q {decoder.query_width}"
    if decoder.inner_width is None:
        formula = f"{PAPER_FORMULA}, the convention of Dynamic-LLaVA's paper"
    else:
        formula, sizes = FORMULA, f"{sizes}, I {decoder.inner_width}"
    flops = f"FLOPs of a layer with N tokens, image tokens and {text} others: {formula}; {sizes}."
    cache = f"Cache of a layer: 2 N K values of {bytes_per_value} bytes."
    return [flops, f"{cache} The layer before which tokens are dropped is the first that works on fewer."]
