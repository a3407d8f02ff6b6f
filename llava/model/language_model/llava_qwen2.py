"""LLaVA on a Qwen2 decoder."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.model.language_model.decoder import LlavaDecoder


class LlavaQwen2Config(Qwen2Config):
    """Configuration of a Qwen2 with vision; upstream's `mm_*` keys are plain attributes.

    `extensions` maps the name of every attached extension to its configuration.
    """

    model_type = "llava_qwen2"


class LlavaQwen2Model(LlavaDecoder, Qwen2Model):
    """Qwen2 decoder with tower and projector, and a seam before every layer."""

    config_class = LlavaQwen2Config


class LlavaQwen2ForCausalLM(LlavaForCausalLM, Qwen2ForCausalLM):
    """Qwen2 with vision and a language-model head; biases in attention and sliding layers are kept."""

    config_class = LlavaQwen2Config
    decoder_class = LlavaQwen2Model


AutoConfig.register(LlavaQwen2Config.model_type, LlavaQwen2Config)
AutoModelForCausalLM.register(LlavaQwen2Config, LlavaQwen2ForCausalLM)
