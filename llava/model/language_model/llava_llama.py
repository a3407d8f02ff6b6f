"""LLaVA on a Llama decoder (upstream's `language_model/llava_llama.py`)."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.model.language_model.decoder import LlavaDecoder


class LlavaConfig(LlamaConfig):
    """Configuration of a Llama with vision; upstream's `mm_*` keys are plain attributes.

    `extensions` maps the name of every attached extension to its configuration.
    """

    model_type = "llava_llama"


class LlavaLlamaModel(LlavaDecoder, LlamaModel):
    """Llama decoder with tower and projector, and a seam before every layer."""

    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlavaForCausalLM, LlamaForCausalLM):
    """Llama with vision and a language-model head."""

    config_class = LlavaConfig
    decoder_class = LlavaLlamaModel


AutoConfig.register(LlavaConfig.model_type, LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
