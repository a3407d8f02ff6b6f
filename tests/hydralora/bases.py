"""Tiny models whose decoder layers have a gated MLP, most of them with more in it than Llama's, and random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

IDS = torch.arange(1, 11).reshape(2, 5)
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}

BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "a norm before the last projection": ("BitNetForCausalLM", "BitNetConfig", {}),
    "a sparse gate": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            "intermediate_size": [24, 24],
            "activation_sparsity_pattern": [0.9, 0.0],
            "layer_types": ["full_attention", "sliding_attention"],
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "num_kv_shared_layers": 0,
        },
    ),
    "multipliers": ("FalconH1ForCausalLM", "FalconH1Config", {**MAMBA, "mlp_multipliers": [0.5, 0.7]}),
    "multipliers outside": ("GraniteForCausalLM", "GraniteConfig", {"residual_multiplier": 0.3, "logits_scaling": 2.0}),
    "gelu": ("Gemma2ForCausalLM", "Gemma2Config", {}),
    "biases": ("Ernie4_5ForCausalLM", "Ernie4_5Config", {"use_bias": True}),
    "dropout behind": ("SeedOssForCausalLM", "SeedOssConfig", {"residual_dropout": 0.3}),
    "dropout within, under the name of a setting": ("T5GemmaForConditionalGeneration", "T5GemmaConfig", {}),
    "clamped": (
        "DeepseekV4ForCausalLM",
        "DeepseekV4Config",
        {"moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 0.05},
    ),
    "in fp32": ("BeamForCausalLM", "BeamConfig", {}),
    "multipliers that are trained, layers that run twice": ("DoryForCausalLM", "DoryConfig", {}),
    "a shared expert": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**EXPERTS, "shared_expert_intermediate_size": 20},
    ),
    "a dense layer, then a shared expert": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**LATENT, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "shared experts in one": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12, "moe_num_shared_experts": 1},
    ),
    "an activation of another name": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"intermediate_size_mlp": 24, "num_local_experts": 2, "interleave_moe_layer_step": 2},
    ),
}
REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "a fused projection": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {},
        r"its Phi3MLP computes both in one linear layer gate_up",
    ),
    "experts alone": ("MixtralForCausalLM", "MixtralConfig", {}, r"MixtralExperts keeps the weights of all experts"),
    "no gate": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 24}, r"holds 0 gated MLPs"),
    "layers of another name": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16}, r"a GPT2Model, has no list 'layers'"),
}


def tiny(kind: str) -> Any:
    """A model of `BASES`, in evaluation mode; skips where the installed transformers has none of its class."""
    return built(*BASES[kind])


def built(model_class: str, config_class: str, options: dict[str, Any]) -> Any:
    """A model of transformers with weights of a size at which everything in an MLP matters."""
    if not hasattr(transformers, model_class):
        pytest.skip(f"transformers {transformers.__version__} has no {model_class}")
    sizes = {**SIZES, **options}
    if config_class == "T5GemmaConfig":
        sizes["dropout_rate"] = 0.3
        config = transformers.T5GemmaConfig(encoder=sizes, decoder=sizes)
    else:
        config = getattr(transformers, config_class)(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: nn.Module = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def run(model: Any, labels: bool = False) -> Any:
    """The output of a model for `IDS`, of both halves where it has an encoder."""
    inputs: dict[str, Any] = {"input_ids": IDS, "labels": IDS if labels else None}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS.flip(1)
    return model(**inputs)
