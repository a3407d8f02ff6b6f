"""The causal language model that every backbone shares: logits, named losses, and batched generation.

Corresponds to upstream's `language_model/llava_llama.py` and its copies for other backbones, which differ in the names
of their classes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.data.targets import Targets
from llava.extension import ExtensionSet
from llava.model import decoding
from llava.model.head import LanguageHead
from llava.model.language_model.decoder import LlavaDecoder
from llava.model.llava_arch import Images, LlavaMetaForCausalLM
from llava.model.loss import LossReduction, language_model_loss, reduced, row_totals, target_loss
from llava.runtime.cache_name import cache_argument, cache_keyword, cache_of, takes_cache
from llava.runtime.finite_logits import WatchedGeneration
from llava.runtime.offloading import execution_device
from llava.runtime.trainer_options.noise import text_positions, with_noise
from llava.runtime.versions import warn_once
from llava.segments import MultimodalInputs, PackedRows, Segments, SplicePlan


@dataclass
class LlavaOutput(CausalLMOutputWithPast):
    """Output of a forward pass.

    Attributes:
        losses: the parts of `loss` by name: `lm`, and `<extension>/<loss>` already weighted.
        labels: (B, L) int64 at the positions of the logits, images spliced in; None without a loss.
        row_totals: (B,) float32, summed cross entropy of each row where it was asked for.
    """

    losses: dict[str, Tensor] | None = None
    labels: Tensor | None = None
    row_totals: Tensor | None = None


_OUTPUT_CACHE = cache_keyword(LlavaOutput)


class LlavaForCausalLM(LlavaMetaForCausalLM):
    """Mixin for a causal language model of transformers: vision, extensions, losses, generation from embeddings.

    It comes before transformers' class in the list of bases. Extensions are attached after construction, by
    `model.extensions.attach(model, extension, config)`.

    Attributes:
        decoder_class: the decoder with `LlavaDecoder` mixed in.
        loss_reduction: what the language-model loss is divided by.
        label_smoothing: of the loss while training.
        noise_alpha: of NEFTune's noise on embeddings of text while training; None: no noise.
    """

    decoder_class: ClassVar[type[LlavaDecoder]]

    def __init__(self, config: Any) -> None:
        warn_once()
        PreTrainedModel.__init__(self, config)  # not the backbone's own, which would build its decoder without vision
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LanguageHead(config.hidden_size, config.vocab_size, bias=False)
        self.extensions = ExtensionSet()
        self.model.extensions = self.extensions
        self.model.host = [self]
        self.loss_reduction = LossReduction.TARGET
        self.label_smoothing = 0.0
        self.noise_alpha: float | None = None
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Take another head; transformers makes a plain layer where it resizes the vocabulary."""
        if type(new_embeddings) is nn.Linear:
            new_embeddings.__class__ = LanguageHead
        self.lm_head = new_embeddings

    def get_model(self) -> LlavaDecoder:
        """The decoder, with tower and projector."""
        return self.model

    @property
    def device(self) -> torch.device:
        """Where ids and images are sent: where they are embedded, even if the table is elsewhere between passes."""
        place: torch.device = self.model.embed_tokens.weight.device
        return execution_device(self, "model.embed_tokens") if place.type == "meta" else place

    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: Images | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        logits_to_keep: int | Tensor = 0,
        segments: list[Segments] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        plan: SplicePlan | None = None,
        skip_logits: bool = False,
        extensions: ExtensionSet | None = None,
        by_row: bool = False,
        **kwargs: Any,
    ) -> LlavaOutput:
        """Logits, and the loss if `labels` are given.

        Args:
            input_ids: (B, T) with image tokens.
            attention_mask: (B, T), zero at padding; (B, L) beside `inputs_embeds`.
            position_ids: (B, L); only beside `inputs_embeds` or a filled cache.
            cache: keys and values of earlier positions; also under the name that transformers uses.
            inputs_embeds: (B, L, D) already spliced, in place of `input_ids`.
            labels: (B, T), -100 where ignored; (B, L) beside `inputs_embeds`.
            use_cache: see `LlavaDecoder.forward`.
            images: see `Images`.
            image_sizes: width and height per image, for tiled images.
            logits_to_keep: as in transformers.
            segments: beside `inputs_embeds`: what `build_inputs` returned.
            num_items_in_batch: target positions of the whole global batch, to divide the LM loss by.
            plan: of `input_ids`, made by the collator; without one it is made here, for which the ids are waited for.
            skip_logits: with labels, compute the loss of trained tokens alone; `logits` is None then.
            extensions: of this call, for example with another configuration of one of them; None: those of the model.
            by_row: with `skip_logits`, the loss of each row as well, as `row_totals`; for an evaluation.
            kwargs: handed to every layer.

        Returns:
            `loss` is the sum of `losses`; `logits` is (B, L, V).

        Raises:
            ValueError: images and image tokens do not match in number.
            FlagError: an extension cannot take part in a loss of these embeddings.
        """
        inputs: MultimodalInputs | None = None
        targets: Targets | None = None
        right_padded: bool | None = None
        packed: PackedRows | None = None
        own = self.extensions if extensions is None else extensions
        starts_sequence = cache is None or cache.get_seq_length() == 0
        if plan is not None and (inputs_embeds is not None or not starts_sequence):
            raise ValueError("`plan` goes with the `input_ids` of a first pass, not with embeddings or a filled cache")
        if inputs_embeds is None and starts_sequence:
            # A prompt that was padded on the left stays so: the last position is the one to continue from.
            planned = plan is not None or labels is not None
            padding_side = None if planned else self._input_padding_side(attention_mask)
            inputs = self.build_inputs(input_ids, attention_mask, labels, images, image_sizes, padding_side, plan, own)
            if self.training and self.noise_alpha:
                noised = text_positions(inputs)
                inputs.inputs_embeds = with_noise(inputs.inputs_embeds, noised, self.noise_alpha, inputs.packed)
            inputs = own.on_inputs(self, inputs)
            # What the plan knows holds as long as no extension puts other tensors in place.
            plan = inputs.plan
            if plan is not None and inputs.labels is plan.labels:
                targets = Targets(plan.target_positions, plan.target_labels)
            if plan is not None and inputs.attention_mask is plan.attention_mask:
                right_padded = plan.padding != "left"
            input_ids, inputs_embeds, segments = None, inputs.inputs_embeds, inputs.segments
            position_ids, labels = inputs.position_ids, inputs.labels
            attention_mask, packed = inputs.attention_mask, inputs.packed
        if labels is not None and inputs is None:
            own.check_loss(segments)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segments=segments,
            right_padded=right_padded,
            packed=packed,
            extensions=extensions,
            **kwargs,
        )
        hidden, losses = outputs.last_hidden_state, None  # (B, L, D)
        # Of all positions times the vocabulary: the largest tensor of a training step, if it is made.
        logits = totals = None
        if labels is None or not skip_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])  # (B, L, V)
        if labels is not None:
            smoothing = self.label_smoothing if self.training else 0.0  # an evaluation's loss is a perplexity's
            divided = (self.loss_reduction, num_items_in_batch, smoothing, None if packed is None else packed.positions)
            if logits is None and by_row:
                totals = row_totals(self.lm_head, hidden, labels, targets)  # (B,)
                lm = reduced(totals.sum(), labels, self.loss_reduction, num_items_in_batch, divided[-1])
            elif logits is None:
                lm = target_loss(self.lm_head, hidden, labels, targets, *divided)
            else:
                lm = language_model_loss(logits, labels, *divided)
            losses = {"lm": lm}
            # Whoever gives embeddings has called the hooks of the extensions, and asks for their losses too.
            if inputs is not None:
                losses |= own.losses(self, inputs)
        return LlavaOutput(
            loss=None if losses is None else torch.stack([loss.float() for loss in losses.values()]).sum(),
            logits=logits,
            hidden_states=outputs.hidden_states,
            losses=losses,
            labels=labels,
            row_totals=totals,
            **{_OUTPUT_CACHE: cache_of(outputs)},
        )

    def _input_padding_side(self, attention_mask: Tensor | None) -> str | None:
        """`left` if the caller padded on the left, so that the last position stays the one to continue from."""
        if attention_mask is None or bool(attention_mask.bool().all()):
            return None
        return "left" if not bool(attention_mask[:, 0].all()) else None

    @torch.no_grad()
    @takes_cache
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Images | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        cache: Cache | None = None,
        extensions: ExtensionSet | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Continue a batch of prompts.

        Args:
            inputs: (B, T) prompts with image tokens; shorter rows padded (any side) and masked by `attention_mask`.
            images: images in row order; a row without image token takes one dummy if any images are passed.
            image_sizes: width and height per image, for tiled images.
            cache: to fill, or to continue: `inputs` and `images` are then the whole conversation, whose beginning the
                cache holds. Also under the name that transformers uses.
            extensions: of this call; None: those of the model.
            kwargs: `attention_mask` and everything that transformers' `generate` knows; with `use_cache=False` every
                step computes the whole sequence again.

        Returns:
            (B, new) generated ids only: no prompt, no dummy token in front.

        Raises:
            ValueError: `inputs_embeds` is given: the prompt enters as ids.
            FlagError: the options ask for a search that a prompt with images cannot follow, or contradict each other.
            NotFiniteError: logits of a row are NaN or infinite; holds the rows, and the ids of all.
        """
        if "inputs_embeds" in kwargs:
            raise ValueError("generate() builds inputs_embeds from ids and images; pass `inputs` and `images`")
        given: GenerationConfig | None = kwargs.get("generation_config")
        decoding.check_options(self, given, kwargs)
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        kwargs.pop("position_ids", None)
        own = self.extensions if extensions is None else extensions
        offered = own.make_cache(self)
        implementation = kwargs.get("cache_implementation") or (given or self.generation_config).cache_implementation
        decoding.check_cache(cache, offered is not None, kwargs, implementation)
        mask = kwargs.pop("attention_mask", None)
        spliced = self.build_inputs(ids, mask, None, images, image_sizes, "left", extensions=own)
        segments: list[Segments] | None
        if cache is not None and cache.get_seq_length() > 0:
            decoding.check_continuation(cache, spliced.attention_mask, kwargs, given or self.generation_config)
            segments = None  # what comes is a later part of sequences that the extensions have seen begin
        else:
            spliced = own.on_inputs(self, spliced)
            segments = spliced.segments
        if kwargs.pop("use_cache", given is None or given.use_cache) is False:
            kwargs["recompute"] = True
        elif cache is None:
            cache = offered
        if cache is not None:
            kwargs |= cache_argument(GenerationMixin.prepare_inputs_for_generation, cache)
        if extensions is not None:
            kwargs["extensions"] = extensions
        watched = WatchedGeneration(self, kwargs, rows=len(spliced.inputs_embeds))
        output = super().generate(
            inputs_embeds=spliced.inputs_embeds,
            attention_mask=spliced.attention_mask.long(),
            segments=segments,
            **kwargs,
        )
        return watched.checked(output)

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

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """The mask as it is: with a static cache too the decoder makes the masks of its layers itself."""
        return attention_mask

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *args: Any) -> None:
        """Make no cache for `use_cache=False`, which transformers overrules for prompts that enter as embeddings."""
        if model_kwargs.get("recompute"):
            generation_config.use_cache = False
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
