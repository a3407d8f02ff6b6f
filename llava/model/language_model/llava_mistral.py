"""LLaVA on a Mistral decoder (upstream's `language_model/llava_mistral.py`)."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM, MistralModel

from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.model.language_model.decoder import LlavaDecoder


class LlavaMistralConfig(MistralConfig):
    """Configuration of a Mistral with vision; upstream's `mm_*` keys are plain attributes.

    `extensions` maps the name of every attached extension to its configuration.
    """

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaDecoder, MistralModel):
    """Mistral decoder with tower and projector, and a seam before every layer."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaForCausalLM, MistralForCausalLM):
    """Mistral with vision and a language-model head; its sliding window is kept."""

    config_class = LlavaMistralConfig
    decoder_class = LlavaMistralModel


AutoConfig.register(LlavaMistralConfig.model_type, LlavaMistralConfig)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM)
