"""Carries out a plan of rules on a LLaVA: an extension that is in use for a while and part of no checkpoint.

Rules in front of the decoder choose in `on_images`; their choice travels in the segments of a row and is carried out
before layer 0. Rules before layers choose there. What is dropped is gone from hidden states, masks and cache, each row
by itself; positions stay those of the whole sequence unless the plan renumbers.

Shape letters: B batch, L positions, n new tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dynamic.cache import SparseCache
from dynamic.decisions import with_last
from dynamic.inspection import PromptDecision, StageDecision, logs_of
from dynamic.rules.images import Batch, place_features, reduce_image
from dynamic.rules.plan import Plan
from dynamic.rules.rows import Entered, LayerInput, Row
from dynamic.rules.rule import LayerRule
from dynamic.sequence import shorten, valid_positions, with_mask
from llava.errors import FlagError
from llava.extension import Config, Extension, LayerVisit
from llava.segments import DecoderState, MultimodalInputs, Segments

if TYPE_CHECKING:
    from transformers import Cache

    from llava.encoded_images import EncodedImages

NAME = "reduction"


class ReductionExtension(Extension):
    """Drops image tokens by a plan; the configuration is `{"plan": Plan}`."""

    name = NAME
    transient = True

    def wants_images(self, config: Config) -> bool:
        """Only if a rule acts in front of the decoder."""
        return bool(config["plan"].image_stages)

    def on_images(self, model: nn.Module, config: Config, images: EncodedImages) -> None:
        """Let the rules in front of the decoder choose; what they merge takes the place of features."""
        plan: Plan = config["plan"]
        if not plan.image_stages:
            return
        batch = Batch(images, model.get_input_embeddings())  # type: ignore[operator]
        with torch.no_grad():
            depth = len(model.get_decoder().layers)  # type: ignore[operator]
            reduced = [reduce_image(batch, number, plan.image_stages, depth) for number in range(len(images.sources))]
            images.features = place_features(batch, reduced)
        for notes, each in zip(images.notes, reduced, strict=True):
            notes[NAME] = each.kept

    def on_inputs(self, model: nn.Module, config: Config, inputs: MultimodalInputs) -> MultimodalInputs:
        """Give each row what was chosen of its images.

        Raises:
            FlagError: a loss is asked for.
        """
        if inputs.labels is not None:
            raise FlagError(self.loss_problem(config, inputs.segments))
        if inputs.image_notes is None or not config["plan"].image_stages:
            return inputs
        noted, segments = iter(inputs.image_notes), []
        for row in inputs.segments:
            mine = [next(noted)[NAME] for _ in range(max(1, len(row.images)))]
            segments.append(dataclasses.replace(row, notes={**row.notes, NAME: tuple(mine[: len(row.images)])}))
        return dataclasses.replace(inputs, segments=segments)

    def loss_problem(self, config: Config, segments: Sequence[Segments] | None) -> str:
        """A rule drops tokens that a loss over all positions needs."""
        return f"the rule '{config['plan'].text}' drops tokens, and a loss over all positions needs them; take it off"

    def attach(self, model: nn.Module, config: Config) -> None:
        """Check that the plan fits; nothing is added.

        Raises:
            FlagError: a layer does not exist, or layers attend within a window, which gaps would widen.
        """
        host: Any = model
        config["plan"].check(len(host.get_decoder().layers))
        tower = host.get_vision_tower()
        if tower is not None and tower.interval is not None:
            raise FlagError(
                f"--reduce {config['plan'].text}: this model reads class tokens (--mm_vision_select_feature "
                f"{tower.select_feature}), not patches, so there is nothing to reduce"
            )
        kinds = set(getattr(host.config, "layer_types", None) or ())
        if kinds - {"full_attention"} or (not kinds and getattr(host.config, "sliding_window", None) is not None):
            raise FlagError(
                f"--reduce {config['plan'].text}: layers of this backbone attend within a window (sliding_window "
                f"{host.config.sliding_window}), and a window over a sequence with gaps reaches farther; set "
                "sliding_window to null in config.json if no sequence is longer"
            )

    def layer_visit(self, model: nn.Module, config: Config, state: DecoderState) -> LayerVisit | None:
        """What drops tokens in this pass."""
        return Walk(model, config["plan"], state)

    def make_cache(self, model: nn.Module, config: Config) -> Cache | None:
        """A cache with a stage for each place where tokens are dropped."""
        host: Any = model
        return SparseCache(len(host.get_decoder().layers), *config["plan"].starts)


class Walk:
    """One pass through the decoder.

    Args:
        model: the causal language model.
        plan: to be carried out.
        state: in front of layer 0.

    Raises:
        FlagError: the cache is of another kind or plan.
        ValueError: a prompt comes on top of a filled cache.
    """

    def __init__(self, model: nn.Module, plan: Plan, state: DecoderState) -> None:
        self.model, self.plan = model, plan
        host: Any = model
        self.decoder: Any = host.get_decoder()
        self.cache = _checked_cache(state, plan)
        self.begins = self.cache is None or not self.cache.is_filled
        self.stages = {layer: (stage, at) for stage in plan.layer_stages for at, layer in enumerate(stage.layers)}
        self.before: LayerInput | None = None
        self.start: Entered | None = None
        self.images: list[list[int]] = []  # tokens of each image of each row, before anything is dropped
        self.decided: list[StageDecision] = []
        # Of the prompts before anything is dropped, and where what is left of them was then.
        self.whole, self.length, self.origin = state.segments, state.hidden_states.shape[1], None

    def __call__(self, index: int, state: DecoderState) -> DecoderState:
        """Drop tokens before layer `index` if the plan says so."""
        if index in self.plan.starts:
            number = self.plan.starts.index(index)
            state = self._begin(index, number, state) if self.begins else self._go_on(index, number, state)
        if index == 0 and self.stages and state.segments is not None:
            self.start = Entered(state.hidden_states, state.segments)
        self.before = LayerInput.of(self.decoder.layers[index], state) if index + 1 in self.stages else None
        return state

    def _begin(self, index: int, number: int, state: DecoderState) -> DecoderState:
        """A stage of a pass over prompts."""
        valid = valid_positions(state)
        length = valid.shape[1]
        keep = valid
        if state.segments is not None:
            if self.origin is not None:  # layers of one model may be on several devices
                self.origin = self.origin.to(keep.device)
            if self.origin is None:
                self.images = [[end - start for start, end in row.images] for row in state.segments]
                self.origin = torch.arange(length, device=valid.device).expand(len(valid), -1)
            keep = self._kept_in_front(state, valid) if index == 0 else self._kept_before(index, state, valid)
            if not torch.equal(keep, valid):
                state = shorten(self.model, index, state, keep, valid)
                left = valid_positions(state)
                self.origin = _moved(cast(Tensor, self.origin), keep, left)
                keep = left
            self._record(index, keep)
        if self.cache is not None:
            self.cache.plan_pass(keep, keep, number, positions=length)
        return self._renumbered(state, keep, None)

    def _go_on(self, index: int, number: int, state: DecoderState) -> DecoderState:
        """A stage of a pass on a filled cache: every new token is stored."""
        valid = valid_positions(state)
        cache = cast(SparseCache, self.cache)
        before = cache.ledgers[number].kept.clone()
        visible = cache.plan_pass(valid, valid, number)
        if index == self.plan.starts[0]:
            for log in logs_of(self.model):
                log.add_tokens(valid)
                if log.wants_cache:
                    log.add_cache(cache.report())
        always = valid.shape[1] == 1  # free slots are masked, and nobody waits to find out whether there are any
        mask = torch.cat([visible, valid], dim=1) if always else None
        state = with_mask(self.model, index, state, visible, always=always)
        if mask is not None:
            state = dataclasses.replace(state, attention_mask=mask)
        return self._renumbered(state, valid, before)

    def _kept_in_front(self, state: DecoderState, valid: Tensor) -> Tensor:
        """(B, L) bool: what rules in front of the decoder have left; the last position always stays."""
        keep = valid.clone()
        for row, segments in enumerate(state.segments or ()):
            for (start, end), kept in zip(segments.images, segments.notes.get(NAME, ()), strict=False):
                keep[row, start:end] = False
                keep[row, start + kept[kept < end - start].to(keep.device)] = True
        return with_last(keep, valid)

    def _kept_before(self, index: int, state: DecoderState, valid: Tensor) -> Tensor:
        """(B, L) bool: what the rule of a layer leaves."""
        stage, at = self.stages[index]
        rule, keep = cast(LayerRule, stage.rule), valid.clone()
        now = LayerInput.of(self.decoder.layers[index], state)
        for number, segments in enumerate(state.segments or ()):
            places = valid[number].nonzero().flatten()
            if not segments.images or not len(places):
                continue
            row = Row(number, index, now, self.before, places, segments, self.decoder.norm, cast(Entered, self.start))
            depth = len(self.decoder.layers)
            wanted = sum(stage.counts(tokens, depth)[at] for tokens in self.images[number])
            wanted = min(wanted, len(row.image_places))
            if wanted == len(row.image_places):
                continue
            with torch.no_grad():
                selection = rule.select(row, wanted)
            selection.check(len(row.image_places), wanted, rule.name)
            if selection.merge is not None:
                raise ValueError(f"rule '{rule.name}' merges tokens before a layer, which is not carried out")
            keep[number, places[row.image_places]] = False
            keep[number, places[row.image_places[selection.kept]]] = True
        return with_last(keep, valid)

    def _record(self, index: int, keep: Tensor) -> None:
        """Note for those who listen which positions of the prompts are left; `keep` is of those that are there."""
        logs = logs_of(self.model)
        if not logs:
            return
        kept = torch.zeros(len(keep), self.length, dtype=torch.bool, device=keep.device)
        rows = torch.arange(len(keep), device=keep.device)[:, None].expand_as(keep)[keep]
        kept[rows, cast(Tensor, self.origin)[keep]] = True
        self.decided.append(StageDecision(index, PromptDecision(kept.cpu(), self.whole or ())))
        if index == self.plan.starts[-1]:
            for log in logs:
                log.add_prompts(self.decided[-1].decision, self.decided)

    def _renumbered(self, state: DecoderState, valid: Tensor, before: Tensor | None) -> DecoderState:
        """`state` with positions that count what is left, if the plan says so; `before` (B,) are in the cache."""
        if self.plan.positions == "original":
            return state
        positions = (valid.cumsum(dim=1) - 1).clamp(min=0)  # (B, L)
        if before is not None:
            positions = positions + before[:, None].to(positions.device)
        rotary = self.decoder.rotary_emb(state.hidden_states, position_ids=positions)
        return dataclasses.replace(state, position_ids=positions, position_embeddings=rotary)


def _checked_cache(state: DecoderState, plan: Plan) -> SparseCache | None:
    cache = state.cache
    if cache is None:
        return None
    if not isinstance(cache, SparseCache) or cache.starts != plan.starts:
        kind = type(cache).__name__
        raise FlagError(
            f"--reduce {plan.text} needs a cache of its own, with stages at layers {plan.starts}, but got a {kind}; "
            "pass none and let the model make one. Static caches and continuing with another plan do not work."
        )
    if cache.is_filled and state.segments is not None:
        raise ValueError(
            f"a prompt begins a sequence, but the cache holds {cache.get_seq_length()} positions already; pass an "
            "empty cache, or continue with `model(input_ids=..., cache=cache)`"
        )
    return cache


def _moved(origin: Tensor, keep: Tensor, left: Tensor) -> Tensor:
    """(B, L') of what each position was before: `keep` (B, L) of `origin` (B, L) at the places `left` (B, L')."""
    found = torch.zeros(left.shape, dtype=origin.dtype, device=origin.device)
    found[left] = origin[keep]
    return found
