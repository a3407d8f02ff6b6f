"""The untrained base: a square CLIP tower, a Llama and a tokenizer, all from configurations and the training text.

Pieces of the tokenizer may span blanks and punctuation, so a question that is asked often is a single token together
with the `ASSISTANT:` behind it. Questions of fifteen tokens would cost more time than the image, and a decoder of
three layers learns to count much later when the question has to be carried over many tokens to the place of the answer.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from string import ascii_letters

import sentencepiece
import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from benchmarks.experiments.common.rows import Asked
from benchmarks.experiments.common.sizes import Sizes
from llava.conversation import conv_templates

SYSTEM_REPEATS = 3000
LONGEST_PIECE = 80
"""In characters; the longest question that is asked often has 68 with what follows it."""


def tokenizer_text(asked: Iterable[Asked], template: str) -> list[str]:
    """Lines to train the tokenizer on.

    `USER:` and questions also stand behind a random letter, and no line joins a turn to the one before or an answer to
    its question: such a piece would make the tokens of a turn depend on what is before it.
    """
    random = Random("tokenizer")
    conversation = conv_templates[template]
    user, assistant = conversation.roles
    lines = [conversation.system] * SYSTEM_REPEATS
    for one in asked:
        question = f"{one.question} {assistant}:"
        lines += [
            random.choice(ascii_letters) + question,
            question,
            one.answer,
            random.choice(ascii_letters) + f"{user}:",
        ]
    return lines


def train_tokenizer(lines: Sequence[str], vocabulary: int, required: str = "") -> bytes:
    """Content of a `tokenizer.model` with the special ids of Llama; characters of `required` get a piece each."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        split_by_number=False,
        required_chars=required,
        max_sentencepiece_length=LONGEST_PIECE,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def save_tokenizer(folder: Path, model: bytes, max_length: int) -> None:
    """Write `tokenizer.model` and the settings of a Vicuna tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": max_length,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(special | settings, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def save_tower(folder: Path, sizes: Sizes, seed: int) -> None:
    """Write an untrained CLIP tower and its image processor; the global random generator is left as it was."""
    config = CLIPVisionConfig(
        image_size=sizes.image,
        patch_size=sizes.patch,
        hidden_size=sizes.width,
        intermediate_size=sizes.tower_mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        projection_dim=sizes.width,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPVisionModel(config).save_pretrained(folder)
    crop = {"height": sizes.image, "width": sizes.image}
    CLIPImageProcessorPil(size={"shortest_edge": sizes.image}, crop_size=crop).save_pretrained(folder)


def save_language_model(folder: Path, sizes: Sizes, seed: int) -> None:
    """Write an untrained Llama; the global random generator is left as it was."""
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.max_length,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
