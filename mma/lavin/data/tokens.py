"""Token ids and labels in LaVIN's layout (`util/datasets.py`, `lavin/model.py` and `lavin/generator.py`).

    <s>  "Image: "  <image>  prompt  answer  </s>        with an image
    <s>  "Image: N/A"        prompt  answer  </s>        without

The words in front are tokenized by themselves, prompt and answer together. `<image>` is one `IMAGE_TOKEN_INDEX`, where
the model puts its image features; the modality token in front of everything is added by the model too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.runtime.tokenizer import LlamaTokenizer

WITH_IMAGE = "Image: "
WITHOUT_IMAGE = "Image: N/A"


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text with SentencePiece's own leading blank, and with `</s>` in a text as the letters it consists of.

    Args:
        tokenizer: see `llava.runtime.tokenizer.load_tokenizer`.
        text: any text.
    """
    if not isinstance(tokenizer, LlamaTokenizer):
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    # The corrected form has that blank switched off in its model.
    return list(tokenizer.sp_model.encode(text if tokenizer.legacy or not text else f" {text}"))


def head_ids(tokenizer: Any, has_image: bool) -> list[int]:
    """What stands in front of the prompt."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    words = encode(tokenizer, WITH_IMAGE if has_image else WITHOUT_IMAGE)
    return [*begin, *words, *([IMAGE_TOKEN_INDEX] if has_image else [])]


def prompt_ids(tokenizer: Any, prompt: str, has_image: bool) -> Tensor:
    """Ids of a prompt that the model is to continue, int64 (T,)."""
    return torch.tensor(head_ids(tokenizer, has_image) + encode(tokenizer, prompt))


def sample_ids(tokenizer: Any, prompt: str, answer: str, has_image: bool) -> tuple[Tensor, Tensor]:
    """Ids and labels of a sample to train on, both int64 (T,).

    Prompt and answer are tokenized as one text; as many tokens as the prompt has by itself are no targets, nor is
    `<unk>`, which the original uses to mark what is none.
    """
    head, both = head_ids(tokenizer, has_image), [*encode(tokenizer, prompt + answer), tokenizer.eos_token_id]
    first = len(encode(tokenizer, prompt))
    targets = [IGNORE_INDEX if token == tokenizer.unk_token_id else token for token in both[first:]]
    labels = [IGNORE_INDEX] * (len(head) + min(first, len(both))) + targets
    return torch.tensor(head + both), torch.tensor(labels)
