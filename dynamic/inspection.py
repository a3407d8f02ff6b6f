"""Listening to what the predictors decide while a model generates, for images of it and for measurements.

with record_decisions(model) as log:
    model.generate(ids, images=images)
log.prompts[0].images(0)  # which patches of each image of sample 0 were kept
log.stored()              # which generated tokens entered the cache
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dynamic.cache import CacheReport
from dynamic.spans import Parts, Range


@dataclass(frozen=True)
class PromptDecision:
    """What was kept of a batch of prompts. Under beam search each beam is a row of its own.

    Attributes:
        keep: (B, L) bool, False for dropped tokens and for padding.
        segments: one per row, of the sequence before anything was dropped.
    """

    keep: Tensor
    segments: Sequence[Parts]

    def images(self, row: int) -> list[Tensor]:
        """Indices of the kept tokens of each image, counted from the image's first token, ascending."""
        return [self._within(row, span) for span in self.segments[row].images]

    def instruction(self, row: int) -> Tensor:
        """Indices of the kept tokens of the last instruction, counted from its first token, ascending."""
        return self._within(row, self.segments[row].last_instruct)

    def generated(self, row: int) -> Tensor:
        """The same for what stands behind the prompt, without cache; the newest token is always among them."""
        return self._within(row, (self.segments[row].answer[0], self.keep.shape[1]))

    def _within(self, row: int, span: Range) -> Tensor:
        return self.keep[row, slice(*span)].nonzero().flatten()


@dataclass(frozen=True)
class StageDecision:
    """What is left of a batch of prompts from a decoder layer on.

    Attributes:
        layer: before which tokens were dropped.
        decision: in positions of the whole prompts.
    """

    layer: int
    decision: PromptDecision


def tokens_by_layer(stages: Sequence[StageDecision], row: int, layers: int) -> list[int]:
    """Image tokens of a row in each of `layers` layers; `stages` are those of one pass, and at least one."""
    found = [sum(end - start for start, end in stages[0].decision.segments[row].images)] * layers
    for stage in stages:
        left = sum(len(kept) for kept in stage.decision.images(row))
        found[stage.layer :] = [left] * (layers - stage.layer)
    return found


def patch_indices(kept: Tensor, first: int, patches: int) -> list[int]:
    """Which patches of an image are among its kept tokens; of a tiled one those of its overview, which comes first.

    Args:
        kept: (n,) indices of kept tokens, counted from the image's first token.
        first: tokens in front of the patches: 1 where the tower's class token is kept.
        patches: of the image, or of the overview.
    """
    return [index - first for index in kept.tolist() if first <= index < first + patches]


@dataclass
class DecisionLog:
    """The decisions of all passes, in their order, on the CPU.

    Attributes:
        prompts: one for each pass over prompts; without cache every step of generation is one.
        stages: for each of `prompts` that a plan of rules has decided, layer by layer.
        new_tokens: (B, n) bool for each pass on a filled cache: which of the n tokens the sparse layers stored.
    """

    prompts: list[PromptDecision] = field(default_factory=list)
    stages: list[list[StageDecision]] = field(default_factory=list)
    new_tokens: list[Tensor] = field(default_factory=list)

    @property
    def wants_cache(self) -> bool:
        """True: the next pass on a filled cache calls `add_cache`, which waits for the device."""
        return False

    def add_prompts(self, decision: PromptDecision, stages: Sequence[StageDecision]) -> None:
        """What was decided for a batch of prompts: at the end, and stage by stage."""
        self.prompts.append(decision)
        self.stages.append(list(stages))

    def add_tokens(self, keep: Tensor) -> None:
        """(B, n) bool: which of n tokens on a filled cache are stored by the layers that drop any."""
        self.new_tokens.append(keep.cpu())

    def add_cache(self, report: CacheReport) -> None:
        """What the cache holds behind a batch of prompts."""

    def stored(self) -> Tensor:
        """(B, T) bool: which of the tokens that followed the prompt are in the cache. The last token is never fed."""
        if not self.new_tokens:
            raise ValueError("no pass on a filled cache was recorded: generate at least two tokens, with cache")
        return torch.cat(self.new_tokens, dim=1)


_logs: WeakKeyDictionary[nn.Module, list[DecisionLog]] = WeakKeyDictionary()


@contextmanager
def record_decisions(model: nn.Module, log: DecisionLog | None = None) -> Iterator[DecisionLog]:
    """Record every decision that `model` (bare or inside a PEFT model) takes at inference while the block runs.

    Args:
        model: that decides.
        log: that is told; None: a new one, which keeps all.
    """
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    log = DecisionLog() if log is None else log
    logs = _logs.setdefault(decoder, [])
    logs.append(log)
    try:
        yield log
    finally:
        logs[:] = [other for other in logs if other is not log]


def logs_of(model: nn.Module) -> list[DecisionLog]:
    """The logs that listen to `model` now."""
    return _logs.get(model.get_decoder(), [])  # type: ignore[operator]
