"""LLaVA on a Qwen3 decoder."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.model.language_model.decoder import LlavaDecoder


class LlavaQwen3Config(Qwen3Config):
    """Configuration of a Qwen3 with vision; upstream's `mm_*` keys are plain attributes.

    `extensions` maps the name of every attached extension to its configuration.
    """

    model_type = "llava_qwen3"


class LlavaQwen3Model(LlavaDecoder, Qwen3Model):
    """Qwen3 decoder with tower and projector, and a seam before every layer."""

    config_class = LlavaQwen3Config


class LlavaQwen3ForCausalLM(LlavaForCausalLM, Qwen3ForCausalLM):
    """Qwen3 with vision and a language-model head; norms of queries and keys and sliding layers are kept."""

    config_class = LlavaQwen3Config
    decoder_class = LlavaQwen3Model


AutoConfig.register(LlavaQwen3Config.model_type, LlavaQwen3Config)
AutoModelForCausalLM.register(LlavaQwen3Config, LlavaQwen3ForCausalLM)
