"""The model: tower, projector, decoder, checkpoints (upstream `llava/model`)."""

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.language_model.llava_qwen2 import LlavaQwen2Config, LlavaQwen2ForCausalLM
from llava.model.language_model.llava_qwen3 import LlavaQwen3Config, LlavaQwen3ForCausalLM

__all__ = [
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "LlavaQwen2Config",
    "LlavaQwen2ForCausalLM",
    "LlavaQwen3Config",
    "LlavaQwen3ForCausalLM",
]
