"""Models and adapters that the tests of the tuner share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from hydralora import HydraLoraConfig

IDS = torch.tensor([[5, 9, 31, 7, 60, 2], [8, 3, 44, 12, 0, 0], [1, 22, 70, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two layers of width 32 with grouped key-value heads."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | {"eos_token_id": 2} | changes)).eval()


def adapted(seed: int = 0, base: Any = None, **changes: Any) -> PeftModel:
    """A tiny Llama with an adapter that is not the identity."""
    base = tiny_llama() if base is None else base
    torch.manual_seed(seed + 100)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_nums": 3, "target_modules": TARGETS}
    options |= {"task_type": "CAUSAL_LM", "init_weights": False} | changes
    return get_peft_model(base, HydraLoraConfig(**options)).eval()


def logits(model: Any, ids: Tensor = IDS, mask: Tensor = MASK, **kwargs: Any) -> Tensor:
    """Logits at valid tokens, (tokens, vocabulary)."""
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **kwargs).logits[mask.bool()]


def tiny_opt() -> OPTForCausalLM:
    """One layer of a model that flattens the batch, (B * T, D), before its MLP."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 80, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"dropout": 0.0}
    return OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=32, word_embed_proj_dim=32, pad_token_id=0)).eval()


def as_earlier(tensors: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
    """A file's tensors as versions before wrote them: bare names, the B of E `experts` stacked, always a router."""
    earlier: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, part, _ = name.rsplit(".", 2)
        if part == "lora_B":
            tensor = torch.stack(tensor.chunk(experts, dim=1))  # (E, out_features, r)
        if part == "lora_A" and experts == 1:
            earlier[f"{layer}.hydralora_router"] = torch.randn(1, tensor.shape[1])
        earlier[f"{layer}.hydralora_{part.removeprefix('lora_')}"] = tensor.contiguous()
    return earlier
