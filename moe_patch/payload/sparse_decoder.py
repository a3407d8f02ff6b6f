"""The decoder of a pass in which tokens count for less, or are gone, from one layer on.

In place of the loop of transformers 4.37, which makes mask, positions and length of the cache once for all layers. The
layers themselves are upstream's.

Shape letters: B batch, L sequence length, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from dynamic.config import SparseConfig
from dynamic.decisions import later_decision, prompt_decision
from dynamic.model import Predictors
from dynamic.training import MaskedPass
from llava.segments import Segments
from moe_patch.payload.sparse_attention import ARGUMENT, TokensOfPass, length_of
from moe_patch.payload.sparse_cache import KeptCache


@dataclass(frozen=True)
class State:
    """What enters a layer.

    Attributes:
        hidden: (B, L, D).
        positions: (B or 1, L) int64.
        mask: what the attention of these layers takes.
        options: further arguments of the layer.
    """

    hidden: Tensor
    positions: Tensor
    mask: Tensor | None
    options: dict[str, Any]


class DecoderOfPass(nn.Module):
    """Upstream's decoder for one pass.

    Args:
        decoder: with predictors.
        settings: of the predictors.
        judges: the predictors.
        segments: the parts of each sample, None for tokens on top of a filled cache.
        masked: for a pass with a loss, in which nothing is dropped; it gets the decisions.
    """

    def __init__(
        self,
        decoder: Any,
        settings: SparseConfig,
        judges: Predictors,
        segments: Sequence[Segments] | None,
        masked: MaskedPass | None,
    ) -> None:
        super().__init__()
        self.decoder, self.settings, self.judges = decoder, settings, judges
        self.segments, self.masked = segments, masked

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """What upstream's decoder returns; arguments as there.

        Raises:
            ValueError: what the caller wants is not carried out.
        """
        decoder, config = self.decoder, self.decoder.config
        hidden = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        recomputes = decoder.gradient_checkpointing and decoder.training
        use_cache = (config.use_cache if use_cache is None else use_cache) and not recomputes and self.masked is None
        self._check(
            hidden,
            attention_mask,
            past_key_values,
            config.output_attentions if output_attentions is None else output_attentions,
        )
        cache = (
            past_key_values if past_key_values is not None or not use_cache else KeptCache(self.settings.sparse_layer)
        )
        seen = 0 if cache is None else cache.seen_tokens
        if position_ids is None:
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        state = State(hidden, position_ids, self._mask(attention_mask, hidden, seen), {})
        collect = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        collected: tuple[Tensor, ...] = ()
        for index, layer in enumerate(decoder.layers):
            if index == self.settings.sparse_layer:
                state = self._enter_sparse_layers(state, attention_mask, cache)
            if collect:  # else what enters a layer is freed when the layer has run
                collected += (state.hidden,)
            call = functools.partial(layer.__call__, **state.options)
            arguments = (state.hidden, state.mask, state.positions, cache, False, use_cache)
            outputs = decoder._gradient_checkpointing_func(call, *arguments) if recomputes else call(*arguments)
            state = State(outputs[0], state.positions, state.mask, state.options)
        hidden = decoder.norm(state.hidden)
        states = (*collected, hidden) if collect else None
        if not (config.use_return_dict if return_dict is None else return_dict):
            return tuple(value for value in (hidden, cache if use_cache else None, states) if value is not None)
        return BaseModelOutputWithPast(hidden, cache if use_cache else None, states)

    def _enter_sparse_layers(self, state: State, attention_mask: Tensor | None, cache: Any) -> State:
        """Let the predictors judge; with a loss mask what they drop, without one drop it."""
        hidden, positions = state.hidden, state.positions
        if self.masked is not None:
            policy = self.masked.decide(self.settings, self.judges, hidden, self.segments or [])
            if policy is None:
                return state
            padding = None if attention_mask is None else attention_mask.bool()
            tokens = TokensOfPass(length_of(positions), policy, padding)
            return State(hidden, positions, None, {ARGUMENT: tokens})
        valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        options = {ARGUMENT: TokensOfPass(length_of(positions))}
        if self.segments is None:
            cache.plan(later_decision(self.judges, hidden, valid)[0])
            return State(hidden, positions, self._later_mask(hidden, cache.kept_tokens), options)
        keep = prompt_decision(self.settings, self.judges, hidden, self.segments, valid)[0]
        hidden, positions = hidden[:, keep], positions[:, keep]
        if cache is not None:
            cache.plan(keep[keep])
        return State(hidden, positions, None, options)

    def _mask(self, attention_mask: Tensor | None, hidden: Tensor, seen: int) -> Tensor | None:
        """The mask of the layers below the sparse one, as upstream makes it for all layers."""
        decoder, shape = self.decoder, hidden.shape[:2]
        if decoder._use_flash_attention_2:
            return attention_mask if attention_mask is not None and 0 in attention_mask else None
        from transformers import modeling_attn_mask_utils as masks  # here, since transformers 5 has it no longer

        if decoder._use_sdpa:
            return masks._prepare_4d_causal_attention_mask_for_sdpa(attention_mask, shape, hidden, seen)
        return masks._prepare_4d_causal_attention_mask(attention_mask, shape, hidden, seen)

    @staticmethod
    def _later_mask(hidden: Tensor, kept: int) -> Tensor | None:
        """The mask of the sparse layers for several tokens on top of `kept` ones."""
        from transformers import modeling_attn_mask_utils as masks

        return masks._prepare_4d_causal_attention_mask_for_sdpa(None, hidden.shape[:2], hidden, kept)

    def _check(self, hidden: Tensor, attention_mask: Tensor | None, cache: Any, output_attentions: bool) -> None:
        """Raise `ValueError` for what is not carried out."""
        if output_attentions:
            raise ValueError("output_attentions: the attention of --dynamic gives no probabilities")
        if self.masked is not None:
            if cache is not None:
                raise ValueError("a pass of --dynamic with labels takes no past_key_values")
            return
        if len(hidden) > 1:
            raise ValueError(
                f"a pass over {len(hidden)} sequences: moe_patch carries --dynamic for one sequence at a "
                "time (beams and num_return_sequences count); call it for each, or run the batch in llava-extensions"
            )
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("the attention mask hides tokens of a single sequence; pass it without padding")
        if cache is not None and not isinstance(cache, KeptCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; --dynamic needs a cache of kept tokens, so pass what an "
                "earlier pass has returned, or none"
            )
        if cache is None and self.segments is None:
            raise ValueError(
                "where images and instructions lie in these embeddings is unknown: call forward or generate with token "
                "ids and images, or pass segments"
            )
