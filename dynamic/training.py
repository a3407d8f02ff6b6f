"""Passes with a loss: every token stays, and a policy tells attention which keys count (paper, section 3.3).

Corresponds to the training branch of `DynamicLlamaModel.forward` in `dynamic_modeling_llama.py`. The decisions are made
once, at the input of the sparse layer; the layers from there on get them as `policy`, losses and statistics read them.

Shape letters: B batch, L sequence length, D width, R spans that a predictor judges, n longest span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from dynamic.config import TOPK, SparseConfig
from dynamic.layer import (
    gumbel_keep,
    gumbel_noise,
    gumbel_top_keep,
    hard_keep,
    keep_rate_loss,
    temperature,
    top_keep_mask,
)
from dynamic.model import Predictors
from dynamic.spans import Parts, SpanTable, answers, gather, images, instructions, write


@dataclass(frozen=True)
class Decision:
    """What one predictor decided.

    Attributes:
        logits: (R, n, 2).
        kept: (R, n) float32, 1 where a token is kept and 0 where it is dropped, with the gradient of the decision.
        table: where the tokens lie.
        judged: (R, n) bool, the tokens that were judged: no padding, and none of a span that is too short.
        top_rate: the share of each span that inference keeps by rank; None where it asks each token by itself.
    """

    logits: Tensor
    kept: Tensor
    table: SpanTable
    judged: Tensor
    top_rate: float | None


@dataclass(frozen=True)
class Judge:
    """One of the three predictors with its part of the configuration.

    Attributes:
        name: of the predictor, in losses and metrics.
        predictor: the module.
        keep_rate: the share that is kept, or aimed at.
        at_least: shorter spans are kept whole in training.
        spans: which tokens it judges.
        exact: True if training too keeps exactly the share of each span, so that no loss has to ask for it.
    """

    name: str
    predictor: nn.Module
    keep_rate: float
    at_least: int
    spans: Callable[[Sequence[Parts], torch.device], SpanTable]
    exact: bool = False

    @property
    def top_rate(self) -> float | None:
        """The share that inference keeps by rank."""
        return self.keep_rate if self.spans is images else None


def judges(settings: SparseConfig, predictors: Predictors) -> list[Judge]:
    """The predictors that exist, in the order in which the original draws their noise."""
    s, p = settings, predictors
    found = []
    if p.image is not None:
        found.append(Judge("image", p.image, s.vision_keep_rate, 0, images, exact=s.vision_decision == TOPK))
    if p.output_text is not None:
        at_least = s.output_text_len_for_training
        found.append(Judge("output_text", p.output_text, s.output_text_keep_rate, at_least, answers))
    if p.instruct is not None:
        found.append(Judge("instruct", p.instruct, s.instruct_keep_rate, s.instruct_len_for_training, instructions))
    return found


def train_decision(judge: Judge, hidden: Tensor, samples: Sequence[Parts], tau: float) -> Decision:
    """Decide under Gumbel noise, each token by itself or the best of each span.

    Spans shorter than the configuration asks for are kept whole, without gradient.

    Args:
        judge: whose tokens are judged.
        hidden: (B, L, D) input of the sparse layer.
        samples: the parts of each.
        tau: temperature.
    """
    table = judge.spans(samples, hidden.device)
    logits = _logits(judge, hidden, table)  # (R, n, 2)
    if judge.exact:
        noise = gumbel_noise(logits.shape[:-1], logits.device)
        kept = gumbel_top_keep(logits, noise, judge.keep_rate, table.valid, tau)  # (R, n)
    else:
        kept = gumbel_keep(logits, gumbel_noise(logits.shape, logits.device), tau)  # (R, n)
    long_enough = (table.lengths >= judge.at_least)[:, None]
    return Decision(logits, torch.where(long_enough, kept, 1.0), table, table.valid & long_enough, judge.top_rate)


def inference_decision(judge: Judge, hidden: Tensor, samples: Sequence[Parts]) -> Decision:
    """Decide as inference does: the best of each image, and of the text what the larger logit says.

    The last token before the answer is kept in any case, since the answer is generated from it. Arguments as of
    `train_decision`.
    """
    table = judge.spans(samples, hidden.device)
    logits = _logits(judge, hidden, table)  # (R, n, 2)
    judged = table.valid
    if judge.spans is images:
        keep = top_keep_mask(logits, judge.keep_rate, table.valid)
    elif judge.spans is instructions:
        judged = judged & (table.offsets < table.lengths[:, None] - 1)
        keep = hard_keep(logits) | ~judged
    else:
        keep = hard_keep(logits)
    return Decision(logits, keep.float(), table, judged, judge.top_rate)


def _logits(judge: Judge, hidden: Tensor, table: SpanTable) -> Tensor:
    device = next(judge.predictor.parameters()).device  # may be another one where layers are spread over several
    tokens = gather(hidden, table).to(device)  # (R, n, D)
    if judge.spans is images:
        return judge.predictor(tokens, valid=table.valid.to(device)).to(hidden.device)
    return judge.predictor(tokens).to(hidden.device)


def policy(hidden: Tensor, decisions: Sequence[Decision]) -> Tensor:
    """Which keys count: (B, L) float32 with 1 where nothing was judged."""
    result = torch.ones(hidden.shape[:2], dtype=torch.float32, device=hidden.device)
    for decision in decisions:
        result = write(result, decision.table, decision.kept)
    return result


@dataclass
class MaskedPass:
    """One forward pass with a loss.

    Attributes:
        tau: temperature of the decisions; None decides as inference does.
        decisions: by the names of `judges`; empty until the sparse layer is reached.
    """

    tau: float | None
    decisions: dict[str, Decision] = field(default_factory=dict)

    def decide(
        self, settings: SparseConfig, predictors: Predictors, hidden: Tensor, samples: Sequence[Parts]
    ) -> Tensor | None:
        """Let all predictors decide, whatever the batch holds, so that all processes run the same modules.

        Args:
            settings: of the predictors.
            predictors: of the decoder.
            hidden: (B, L, D) input of the sparse layer.
            samples: the parts of each.

        Returns:
            The policy (B, L) for all following layers, or None for ordinary attention: in training without vision
            predictor the text decisions feed their losses only, as in the original.
        """
        for judge in judges(settings, predictors):
            if self.tau is None:
                self.decisions[judge.name] = inference_decision(judge, hidden, samples)
            else:
                self.decisions[judge.name] = train_decision(judge, hidden, samples, self.tau)
        if not self.decisions or (self.tau is not None and predictors.image is None):
            return None
        return policy(hidden, list(self.decisions.values()))

    def losses(self, settings: SparseConfig, predictors: Predictors) -> dict[str, Tensor]:
        """The keep-rate losses by name, each already weighted; means over the samples; none of exact decisions."""
        return {
            judge.name: settings.mask_loss_weight
            * keep_rate_loss(
                self.decisions[judge.name].kept,
                judge.keep_rate,
                self.decisions[judge.name].table.valid,
                judge.at_least,
                self.decisions[judge.name].table.weights,
            )
            for judge in judges(settings, predictors)
            if judge.name in self.decisions and not judge.exact
        }


class TemperatureSchedule(TrainerCallback):
    """Sets the temperature when an update begins; a resumed run takes it from the number of updates already done.

    Attributes:
        tau: temperature of the present update.
    """

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end, self.tau = start, end, start

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self.tau = temperature(state.global_step, state.max_steps, self.start, self.end)
