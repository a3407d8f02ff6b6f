"""The loop over decoder layers that every backbone shares, with a seam before each layer.

Corresponds to the `forward` of the decoders in transformers. The loop is our own so that extensions can act between two
layers (seam 4); layers, masks, caches, rotary embeddings and attention are those of the backbone's own class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava.errors import FlagError
from llava.extension import ExtensionSet
from llava.model.language_model.masks import layer_kinds, layer_masks
from llava.model.language_model.packed_attention import packed_masks
from llava.model.llava_arch import LlavaMetaModel
from llava.runtime.cache_name import cache_keyword, layer_cache_keyword, takes_cache
from llava.segments import DecoderState, PackedRows, Segments

_OUTPUT_CACHE = cache_keyword(BaseModelOutputWithPast)


class LlavaDecoder(LlavaMetaModel):
    """Mixin for a decoder of transformers: tower, projector, and a seam before every layer.

    The decoder must have `embed_tokens`, `layers`, `norm` and `rotary_emb`, and layers that are called as Llama's are.
    """

    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module
    gradient_checkpointing: bool
    layer_cache_name: str

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.extensions = ExtensionSet()
        self.host: list[nn.Module] = []  # the causal LM, in a list so that it is not registered as a child
        # A layer that an extension adapts passes the cache on to the class of this one, under the same name.
        self.layer_cache_name = layer_cache_keyword(self.layers[0])
        self.init_vision_parts()

    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segments: list[Segments] | None = None,
        right_padded: bool | None = None,
        packed: PackedRows | None = None,
        extensions: ExtensionSet | None = None,
        **layer_kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (B, L) without image tokens, or None.
            attention_mask: (B, L_total), zero at padding, or None.
            position_ids: (B, L); None counts on from the cache.
            cache: keys and values of earlier positions, or None; also under the name that transformers uses.
            inputs_embeds: (B, L, D); exactly one of this and `input_ids`.
            use_cache: make a cache if none is given, an extension's own if there is one; never while gradients are
                checkpointed.
            segments: see `DecoderState`.
            right_padded: True: `attention_mask` is known to be padded on the right alone; see `layer_masks`.
            packed: where the samples of rows with several of them are; such rows leave no cache.
            extensions: of this pass; None: those of the model.
            layer_kwargs: handed to every layer and its attention function.

        Raises:
            FlagError: the attention of this model does not keep packed samples apart.
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        # A checkpointed layer runs again in the backward pass and would store its keys twice.
        if (self.gradient_checkpointing and self.training) or packed is not None:
            use_cache = False
        # Extensions are attached to the causal model where there is one, and find their parts from there.
        host = self.host[0] if self.host else self
        extensions = self.extensions if extensions is None else extensions
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, L, D)
        # An extension that drops tokens keeps fewer of them in some layers, so it may bring a cache of its own.
        if use_cache and cache is None:
            cache = extensions.make_cache(host)
            if cache is None:
                cache = DynamicCache(config=self.config)
        # Like transformers' decoders: what the cache holds has been counted already.
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen)[None]
        # One mask for each kind of layer (full, sliding window), made once and shared by all layers of that kind.
        kinds = layer_kinds(self.config)
        if packed is None:
            masks = layer_masks(self.config, hidden, attention_mask, position_ids, cache, right_padded)
        else:
            masks, bounds = packed_masks(self.config, hidden, packed)
            layer_kwargs |= bounds
        # The state is what travels from layer to layer. An extension may shorten it, together with positions and masks.
        positions = self.rotary_emb(hidden, position_ids=position_ids)
        state = DecoderState(
            hidden,
            attention_mask,
            position_ids,
            positions,
            masks[kinds[0]],
            cache,
            segments,
            layer_kwargs,
            packed=packed,
        )
        visits = extensions.layer_visits(host, state)
        # Collected here, before each layer: between two layers an extension may have dropped tokens.
        record_all = bool(state.layer_kwargs.pop("output_hidden_states", False))
        recorded: list[Tensor] = []
        for index, (layer, kind) in enumerate(zip(self.layers, kinds, strict=True)):
            # Set again before each layer: the layer before may have been of another kind.
            if len(masks) > 1:
                state.causal_mask = masks[kind]
            for visit in visits:
                state = visit(index, state)
            # The next layer would get back the mask of its kind, and what the extension hides would be seen again.
            if len(masks) > 1 and state.causal_mask is not masks[kind]:
                raise FlagError(
                    f"an extension replaces the attention mask before layer {index}, but the layers of this backbone "
                    f"have masks of several kinds ({sorted(masks)}); it works on backbones with one kind only"
                )
            # As in transformers: the input of each layer, and at the end the output of the norm.
            if record_all:
                recorded.append(state.hidden_states)
            state.hidden_states = layer(
                state.hidden_states,
                attention_mask=state.causal_mask,
                position_embeddings=state.position_embeddings,
                position_ids=state.position_ids,
                use_cache=use_cache,
                **{self.layer_cache_name: state.cache},
                **state.layer_kwargs,
            )
        hidden = self.norm(state.hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=(*recorded, hidden) if record_all else None,
            **{_OUTPUT_CACHE: state.cache},
        )
