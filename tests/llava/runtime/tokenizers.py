"""The tiny tokenizer in the variants of the golden cases."""

from __future__ import annotations

from functools import cache

from transformers import PreTrainedTokenizerBase

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.runtime.tokenizer import load_tokenizer
from tests.golden import golden_dir


@cache
def make_tokenizer(
    *,
    legacy: bool = False,
    add_bos: bool = True,
    patch_token: bool = False,
    im_tokens: bool = False,
    chat_tokens: bool = False,
    model_max_length: int = 512,
) -> PreTrainedTokenizerBase:
    """The tiny tokenizer; the last three flags add special tokens as the original does."""
    tokenizer = load_tokenizer(
        golden_dir("llava") / "tiny-vicuna", legacy=legacy, add_bos_token=add_bos, model_max_length=model_max_length
    )
    if patch_token:
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if im_tokens:
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    if chat_tokens:
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer
