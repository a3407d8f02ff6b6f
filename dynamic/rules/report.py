"""What a run has kept of its images: tokens per layer, their average, FLOPs by formula, measured bytes of the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dynamic.cache import CacheReport
from dynamic.flops import decoder_of
from dynamic.inspection import DecisionLog, PromptDecision, StageDecision, record_decisions, tokens_by_layer
from dynamic.rules.costs import FORMULA, PlanCost, ranges


class Meter(DecisionLog):
    """Adds up what is decided for prompts with images; keeps numbers alone, however long a run is.

    Args:
        config: of the model.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.decoder = decoder_of(config.to_dict())
        self.kept = [0] * self.decoder.layers
        self.whole = self.text = self.prompts_with_images = self.seen = 0
        self.cache_bytes = self.cached_rows = 0
        self.measured_at = self.last = 0  # prompts that were seen when the cache was measured, and in the last pass

    def add_prompts(self, decision: PromptDecision, stages: Sequence[StageDecision]) -> None:
        """Count the rows that have images."""
        self.last = len(decision.keep)
        self.seen += self.last
        for row, segments in enumerate(decision.segments):
            images = sum(end - start for start, end in segments.images)
            if not images:
                continue
            self.prompts_with_images += 1
            self.whole += images
            self.text += int(decision.keep[row].sum()) - sum(len(kept) for kept in decision.images(row))
            for layer, count in enumerate(tokens_by_layer(stages, row, self.decoder.layers)):
                self.kept[layer] += count

    def add_tokens(self, keep: Tensor) -> None:
        """Not counted."""

    @property
    def wants_cache(self) -> bool:
        """Once behind each batch of prompts."""
        return self.measured_at < self.seen

    def add_cache(self, report: CacheReport) -> None:
        """Add up what is held."""
        self.measured_at = self.seen
        self.cached_rows += self.last
        self.cache_bytes += report.bytes_held

    def words(self) -> str | None:
        """What was kept, in three lines; None if no prompt had an image."""
        count = self.prompts_with_images
        if not count:
            return None
        image = tuple(round(each / count) for each in self.kept)
        whole, text = round(self.whole / count), round(self.text / count)
        cost = PlanCost(self.decoder, image, text)
        dense = PlanCost(self.decoder, (whole,) * self.decoder.layers, text)
        share = f"{cost.flops / dense.flops:.1%} of the dense model's (N tokens in a layer: {FORMULA})"
        lines = [
            f"image tokens by layer, mean of {count} prompts: {ranges(image)}; average {cost.average:.1f} of {whole}",
            f"FLOPs of a prompt with {text} other tokens: {cost.flops / 1e12:.4g}e12, {share}",
        ]
        if self.cached_rows:
            held = self.cache_bytes / self.cached_rows
            lines.append(f"cache behind a prompt, measured, free slots included: {held / 2**20:.4g} MiB a row")
        return "\n".join(lines)


@contextmanager
def metered(model: Any) -> Iterator[Callable[[], str | None]]:
    """A meter of all calls in this context; the function that it gives says what was kept."""
    meter = Meter(model.config)
    with record_decisions(model, meter):
        yield meter.words
