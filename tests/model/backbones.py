"""Tiny language models of every backbone with random weights, and a byte-level tokenizer like Qwen's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.golden import golden_dir

WINDOW = 6
SIZES: dict[str, Any] = {
    "vocab_size": 900,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
ROPE = {"rope_type": "default", "rope_theta": 1e6}

MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**SIZES)),
    "mistral": (
        MistralForCausalLM,
        lambda: MistralConfig(**SIZES, head_dim=16, sliding_window=WINDOW, rope_parameters=dict(ROPE)),
    ),
    "mistral, no window": (MistralForCausalLM, lambda: MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, lambda: Qwen2Config(**SIZES, rope_parameters=dict(ROPE))),
    "qwen2, window": (Qwen2ForCausalLM, lambda: Qwen2Config(**SIZES, **SLIDING)),
    "qwen2, tied": (Qwen2ForCausalLM, lambda: Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": (
        Qwen3ForCausalLM,
        lambda: Qwen3Config(**SIZES, head_dim=16, rope_parameters={**ROPE, "rope_type": "linear", "factor": 2.0}),
    ),
    "qwen3, window": (Qwen3ForCausalLM, lambda: Qwen3Config(**SIZES, **SLIDING, head_dim=10)),
}


def plain_model(kind: str) -> PreTrainedModel:
    """Transformers' own model with weights of a size at which biases, norms and windows matter."""
    model_class, config = MODELS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = model_class(config())
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.15 * torch.randn_like(weight))
    return model.eval()


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without `<s>`, with ChatML's markers as special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["What is shown in this picture? A large red ship lies on the lake."] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    named = {"pad_token": markers[0], "eos_token": markers[2]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def save_base(kind: str, folder: Path) -> Path:
    """A folder as on a model hub: the weights and the tokenizer of the family."""
    plain_model(kind).save_pretrained(folder)
    if kind.startswith("qwen"):
        byte_level_tokenizer().save_pretrained(folder)
    else:
        for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copyfile(golden_dir("llava") / "tiny-vicuna" / name, folder / name)
    return folder
