"""LLaVA on a Llama decoder: the loop over layers, the loss, and batched generation.

Corresponds to upstream's `language_model/llava_llama.py`. The loop over decoder layers is our own so that extensions
can act between two layers (seam 4); layers, masks, caches and attention are transformers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llava.extension import DecoderState, ExtensionSet, MultimodalInputs, Segments
from llava.model.llava_arch import Images, LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.loss import LossReduction, language_model_loss


class LlavaConfig(LlamaConfig):
    """Configuration of a Llama with vision; upstream's `mm_*` keys are plain attributes.

    `extensions` maps the name of every attached extension to its configuration.
    """

    model_type = "llava_llama"


@dataclass
class LlavaOutput(CausalLMOutputWithPast):
    """Output of a forward pass.

    Attributes:
        losses: the parts of `loss` by name: `lm`, and `<extension>/<loss>` already weighted.
    """

    losses: dict[str, Tensor] | None = None


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """Llama decoder with tower and projector, and a seam before every layer."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.extensions = ExtensionSet()
        self.host: list[nn.Module] = []  # the causal LM, in a list so that it is not registered as a child
        self.init_vision_parts()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segments: list[Segments] | None = None,
        **layer_kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (B, L) without image tokens, or None.
            attention_mask: (B, L_total), zero at padding, or None.
            position_ids: (B, L); None counts on from the cache.
            past_key_values: cache, or None.
            inputs_embeds: (B, L, D); exactly one of this and `input_ids`.
            use_cache: make a cache if none is given; never while gradients are checkpointed.
            segments: see `DecoderState`.
            layer_kwargs: handed to every layer and its attention function.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, L, D)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen)[None]
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        positions = self.rotary_emb(hidden, position_ids=position_ids)
        state = DecoderState(
            hidden, attention_mask, position_ids, positions, causal_mask, past_key_values, segments, layer_kwargs
        )
        record_all = bool(state.layer_kwargs.pop("output_hidden_states", False))
        recorded: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            state = self.extensions.before_layer(self.host[0] if self.host else self, index, state)
            if record_all:
                recorded.append(state.hidden_states)
            state.hidden_states = layer(
                state.hidden_states,
                attention_mask=state.causal_mask,
                position_embeddings=state.position_embeddings,
                position_ids=state.position_ids,
                past_key_values=state.cache,
                use_cache=use_cache,
                **state.layer_kwargs,
            )
        hidden = self.norm(state.hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=state.cache,
            hidden_states=(*recorded, hidden) if record_all else None,
        )


class LlavaLlamaForCausalLM(LlamaForCausalLM, LlavaMetaForCausalLM):
    """Llama with vision and a language-model head.

    Extensions are attached after construction, by `model.extensions.attach(model, extension, config)`.
    """

    config_class = LlavaConfig
    # Upstream stores the tower inside full checkpoints and never reads it from there; neither do we.
    _keys_to_ignore_on_load_unexpected = [r"model\.vision_tower\."]  # noqa: RUF012 (transformers' own way to declare it)

    def __init__(self, config: LlavaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.extensions = ExtensionSet()
        self.model.extensions = self.extensions
        self.model.host = [self]
        self.loss_reduction = LossReduction.TARGET
        self.post_init()

    def get_model(self) -> LlavaLlamaModel:
        """The decoder, with tower and projector."""
        return self.model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: Images | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        logits_to_keep: int | Tensor = 0,
        segments: list[Segments] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> LlavaOutput:
        """Logits, and the loss if `labels` are given.

        Args:
            input_ids: (B, T) with image tokens.
            attention_mask: (B, T), zero at padding; (B, L) beside `inputs_embeds`.
            position_ids: (B, L); only beside `inputs_embeds` or a filled cache.
            past_key_values: cache of earlier positions.
            inputs_embeds: (B, L, D) already spliced, in place of `input_ids`.
            labels: (B, T), -100 where ignored; (B, L) beside `inputs_embeds`.
            use_cache: see `LlavaLlamaModel.forward`.
            images: see `Images`.
            image_sizes: width and height per picture, for tiled pictures.
            logits_to_keep: as in transformers.
            segments: beside `inputs_embeds`: what `build_inputs` returned.
            num_items_in_batch: target positions of the whole global batch, to divide the LM loss by.
            kwargs: handed to every layer.

        Returns:
            `loss` is the sum of `losses`; `logits` is (B, L, vocabulary).

        Raises:
            ValueError: pictures and image tokens do not match in number.
        """
        inputs: MultimodalInputs | None = None
        starts_sequence = past_key_values is None or past_key_values.get_seq_length() == 0
        if inputs_embeds is None and starts_sequence:
            padding_side = None if labels is not None else self._input_padding_side(attention_mask)
            inputs = self.build_inputs(input_ids, attention_mask, labels, images, image_sizes, padding_side)
            inputs = self.extensions.on_inputs(self, inputs)
            input_ids, inputs_embeds, segments = None, inputs.inputs_embeds, inputs.segments
            position_ids, labels = inputs.position_ids, inputs.labels
            attention_mask = inputs.attention_mask
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segments=segments,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])  # (B, L, vocabulary)
        losses = None
        if labels is not None:
            losses = {"lm": language_model_loss(logits, labels, self.loss_reduction, num_items_in_batch)}
            if inputs is not None:
                losses |= self.extensions.losses(self, inputs)
        return LlavaOutput(
            loss=None if losses is None else torch.stack([loss.float() for loss in losses.values()]).sum(),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            losses=losses,
        )

    def _input_padding_side(self, attention_mask: Tensor | None) -> str | None:
        """`left` if the caller padded on the left, so that the last position stays the one to continue from."""
        if attention_mask is None or bool(attention_mask.bool().all()):
            return None
        return "left" if not bool(attention_mask[:, 0].all()) else None

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Images | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Continue a batch of prompts.

        Args:
            inputs: (B, T) prompts with image tokens; shorter rows padded (any side) and masked by `attention_mask`.
            images: pictures in row order; a row without image token takes one dummy if any pictures are passed.
            image_sizes: width and height per picture, for tiled pictures.
            kwargs: `attention_mask` and everything that transformers' `generate` knows; with `use_cache=False` every
                step computes the whole sequence again.

        Returns:
            (B, new) generated ids only: no prompt, no dummy token in front.

        Raises:
            ValueError: `inputs_embeds` is given: the prompt enters as ids.
        """
        if "inputs_embeds" in kwargs:
            raise ValueError("generate() builds inputs_embeds from ids and images; pass `inputs` and `images`")
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        kwargs.pop("position_ids", None)
        spliced = self.build_inputs(ids, kwargs.pop("attention_mask", None), None, images, image_sizes, "left")
        spliced = self.extensions.on_inputs(self, spliced)
        given = kwargs.get("generation_config")
        if kwargs.pop("use_cache", given is None or given.use_cache) is False:
            kwargs["recompute"] = True
        elif "past_key_values" not in kwargs:
            cache = self.extensions.make_cache(self)
            if cache is not None:
                kwargs["past_key_values"] = cache
        return super().generate(
            inputs_embeds=spliced.inputs_embeds,
            attention_mask=spliced.attention_mask.long(),
            segments=spliced.segments,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        segments: list[Segments] | None = None,
        recompute: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the next forward pass; segments go with the prompt alone, not with single tokens.

        transformers asks this signature for `inputs_embeds` before it lets `generate` start from embeddings. With
        `recompute` every pass is a first one, over the prompt and all that was generated.
        """
        if recompute and inputs_embeds is not None:
            inputs_embeds = torch.cat([inputs_embeds, self.get_input_embeddings()(input_ids)], dim=1)  # (B, L + new, D)
            kwargs["is_first_iteration"] = True
        prepared = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if prepared.get("inputs_embeds") is not None and segments is not None:
            copies = len(prepared["inputs_embeds"]) // len(segments)  # beams of one sample stand side by side
            prepared["segments"] = [segment for segment in segments for _ in range(copies)]
        return prepared

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *args: Any) -> None:
        """Make no cache for `use_cache=False`, which transformers overrules for prompts that enter as embeddings."""
        if model_kwargs.get("recompute"):
            generation_config.use_cache = False
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)


AutoConfig.register(LlavaConfig.model_type, LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
