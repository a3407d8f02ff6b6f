"""A small Llama tokenizer, trained by SentencePiece on the playground's own text.

It has what the label code relies on in Vicuna's tokenizer: ids 0, 1, 2 are `<unk>`, `<s>`, `</s>`, unknown characters
fall back to bytes, a prefix blank is added, and `USER` is one token directly after `</s>` but two after a prefix blank.
Saved as `tokenizer.model` with `tokenizer_config.json`, the layout of LLaVA-1.5's own checkpoints.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from random import Random

import sentencepiece

from llava.conversation import conv_templates
from playground.families import BASE_IMAGE, BASE_TEXT, NEW_IMAGE, NEW_TEXT
from playground.scenes import distinct_scenes

VOCABULARY_SIZE = 544
CORPUS_SCENES = 300
SYSTEM_REPEATS = 50
"""The system prompt opens every conversation; repeated this often it costs one token per word."""
MODEL_MAX_LENGTH = 512


def corpus(seed: int) -> list[str]:
    """Conversations of all families in the wording of the `v1` template, one string per line of text.

    `USER` follows a full stop and no blank, so that no piece with both the blank and `USER` is learnt; no question mark
    follows a digit, so that every digit is one token wherever it stands.
    """
    random = Random(f"{seed}/tokenizer")
    template = conv_templates["v1"]
    user, assistant = template.roles
    lines = [template.system] * SYSTEM_REPEATS
    for scene, _ in zip(distinct_scenes(random), range(CORPUS_SCENES), strict=False):
        asked = [family.ask(scene, random) for family in (*BASE_IMAGE, *NEW_IMAGE)]
        asked += [family.ask(random) for family in (*BASE_TEXT, *NEW_TEXT)]
        for question, answer in filter(None, asked):
            lines.append(f".{user}: {question} {assistant}: {answer}")
    return [re.sub(r"(?<=\d)\?", "", line) for line in lines]


def train_tokenizer(seed: int) -> bytes:
    """Train the model; returns the content of `tokenizer.model`. The same seed gives the same bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(seed)),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY_SIZE,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def save_tokenizer(folder: Path, seed: int) -> None:
    """Train the tokenizer and write `tokenizer.model`, `tokenizer_config.json` and `special_tokens_map.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_tokenizer(seed))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    config = special | {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
