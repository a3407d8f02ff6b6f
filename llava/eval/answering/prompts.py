"""From a question to the text that the model continues (upstream `llava/eval/model_vqa_loader.py`, `run_llava.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_PLACEHOLDER,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import TOKENIZER_VERSION, Conversation, conv_templates
from llava.data.templates import template_of_mode
from llava.errors import BadSampleError, FlagError
from llava.runtime.tokenizer import starts_with_bos

CONV_MODE_RULES = (
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
)
"""Part of a model's name and the conversation template it means, in order of precedence (upstream `run_llava.py`)."""

FALLBACK_CONV_MODE = "llava_v0"


def infer_conv_mode(model_name: str) -> str:
    """Name of the conversation template that a model's name suggests: the first rule that fits, else `llava_v0`."""
    name = model_name.lower()
    return next((mode for part, mode in CONV_MODE_RULES if part in name), FALLBACK_CONV_MODE)


def plain_conv_mode(conv_mode: str, model_name: str) -> str:
    """The template's `_mmtag` form for a model after stage 1 only, otherwise `conv_mode` itself.

    Such a model is known by `plain` without `finetune` in its name (upstream `model_vqa_loader.py`).
    """
    only_pretrained = "plain" in model_name and "finetune" not in model_name.lower()
    return f"{conv_mode}_mmtag" if only_pretrained and "mmtag" not in conv_mode else conv_mode


def image_marker(mm_use_im_start_end: bool) -> str:
    """The text that stands for one image."""
    if mm_use_im_start_end:
        return f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}"
    return DEFAULT_IMAGE_TOKEN


def add_image_markers(question: str, image_count: int, *, mm_use_im_start_end: bool, where: str) -> str:
    """Put `image_count` image markers into a question.

    Every `<image-placeholder>` in the text becomes a marker; without any, the markers go in front, one a line.

    Args:
        question: the text of the question.
        image_count: number of images that belong to it; 0 for a text-only question.
        mm_use_im_start_end: wrap each marker in the start and end token, as the model was trained.
        where: names the question in errors.

    Raises:
        BadSampleError: the text holds a literal `<image>`, or placeholders that are not as many as the images.
    """
    if DEFAULT_IMAGE_TOKEN in question:
        raise BadSampleError(
            f"{where}: the question holds a literal '{DEFAULT_IMAGE_TOKEN}', which would be taken for one more image; "
            f"remove it (the marker is added for each image), or write '{IMAGE_PLACEHOLDER}' where the image goes"
        )
    marker = image_marker(mm_use_im_start_end)
    placeholders = question.count(IMAGE_PLACEHOLDER)
    if placeholders == 0:
        return f"{marker}\n" * image_count + question
    if placeholders != image_count:
        raise BadSampleError(
            f"{where}: {placeholders} '{IMAGE_PLACEHOLDER}' in the question, but {image_count} image(s) given"
        )
    return question.replace(IMAGE_PLACEHOLDER, marker)


def new_conversation(conv_mode: str, tokenizer: Any = None) -> Conversation:
    """A conversation of the template `conv_mode`, as far as the template itself begins it.

    Args:
        conv_mode: name of a template, or `tokenizer`.
        tokenizer: only needed for its own template.

    Raises:
        FlagError: there is no such template; lists those that exist.
    """
    check_conv_mode(conv_mode)
    return template_of_mode(conv_mode, tokenizer)


def ask(message: str, conv_mode: str, tokenizer: Any = None) -> Conversation:
    """A conversation of the template `conv_mode` with `message` as the only user turn and the answer still open.

    Raises:
        FlagError: there is no such template; lists those that exist.
    """
    conversation = new_conversation(conv_mode, tokenizer)
    conversation.append_message(conversation.roles[0], message)
    conversation.append_message(conversation.roles[1], None)
    return conversation


def build_prompt(message: str, conv_mode: str, tokenizer: Any = None) -> str:
    """The text of `ask`."""
    return ask(message, conv_mode, tokenizer).get_prompt()


def prompt_ids(conversation: Conversation, tokenizer: Any) -> Tensor:
    """Ids of a conversation, int64 (T,), with `IMAGE_TOKEN_INDEX` for each `<image>`."""
    return tokenizer_image_token(
        conversation.get_prompt(), tokenizer, return_tensors="pt", add_bos=not conversation.writes_bos
    )


def check_conv_mode(conv_mode: str) -> None:
    """Refuse an unknown template.

    Raises:
        FlagError: there is no such template; lists those that exist.
    """
    known = sorted({TOKENIZER_VERSION, *conv_templates})
    if conv_mode not in known:
        raise FlagError(f"--conv-mode {conv_mode}: no such template; there are {known}")


def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
    *,
    add_bos: bool = True,
) -> list[int] | Tensor:
    """Ids of a prompt in which each `<image>` is one `image_token_index`.

    The text between two images is tokenized as a text of its own, so the text after an image begins with a blank.

    Args:
        prompt: text.
        tokenizer: any tokenizer; one that puts `<s>` in front gives it once.
        image_token_index: id of an image.
        return_tensors: `pt` for an int64 tensor (T,), None for a list.
        add_bos: put `<s>` in front, if the tokenizer does so at all; False for a prompt that has it already.

    Raises:
        ValueError: another `return_tensors`.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors is {return_tensors!r}; it may be 'pt' or None")
    ids = [tokenizer.bos_token_id] if add_bos and starts_with_bos(tokenizer) else []
    for number, chunk in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        ids += [image_token_index] * (number > 0)
        ids += tokenizer(chunk, add_special_tokens=False).input_ids
    return ids if return_tensors is None else torch.tensor(ids, dtype=torch.long)
