"""Tiny models of several kinds, for tests of calls: attention, recurrent, both, and encoders with a decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.hydralora.tuner.models import adapted, tiny_llama, tiny_opt

WIDTH = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


def tiny_mamba() -> MambaForCausalLM:
    """Recurrent layers alone."""
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(**WIDTH, **ENDS, state_size=4))


def tiny_rwkv() -> RwkvForCausalLM:
    """Recurrent, with a state that is not a `Cache`; transformers runs it for one row at a time."""
    torch.manual_seed(0)
    return RwkvForCausalLM(RwkvConfig(**WIDTH, **ENDS))


def tiny_bamba() -> BambaForCausalLM:
    """One recurrent layer, one of attention."""
    torch.manual_seed(0)
    recurrent = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2}
    return BambaForCausalLM(BambaConfig(**WIDTH, **ENDS, **HEADS, **recurrent, attn_layer_indices=[1]))


def tiny_t5() -> T5ForConditionalGeneration:
    """Encoder and decoder, without positions."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 80, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(**sizes, **ends, dropout_rate=0.0))


def tiny_bart() -> BartForConditionalGeneration:
    """Encoder and decoder in a model of their own."""
    torch.manual_seed(0)
    sides = {"layers": 1, "ffn_dim": 48, "attention_heads": 4}
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    ends = ENDS | {"decoder_start_token_id": 2, "forced_eos_token_id": None}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=80, d_model=32, max_position_embeddings=64, dropout=0.0, **sizes, **ends)
    )


@dataclass(frozen=True)
class Host:
    """A model and the layers of it that are adapted."""

    make: Callable[[], Any]
    targets: list[str]
    pair: bool = False

    def adapted(self, **changes: Any) -> PeftModel:
        """With an adapter that routes by sequence and is not the identity."""
        options = {"base": self.make(), "target_modules": self.targets, "routing": "sequence"}
        return adapted(**options | {"task_type": "SEQ_2_SEQ_LM" if self.pair else "CAUSAL_LM"} | changes)


HOSTS = {
    "llama": Host(tiny_llama, ["q_proj", "v_proj", "down_proj"]),
    "opt": Host(tiny_opt, ["fc1", "v_proj"]),
    "mamba": Host(tiny_mamba, ["in_proj", "x_proj"]),
    "bamba": Host(tiny_bamba, ["in_proj", "q_proj", "v_proj", "down_proj"]),
    "t5": Host(tiny_t5, ["q", "k", "v", "wi"], pair=True),
    "bart": Host(tiny_bart, ["q_proj", "k_proj", "v_proj", "fc1"], pair=True),
}
