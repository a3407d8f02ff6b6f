"""From a question to the text that the model continues (upstream `llava/eval/model_vqa_loader.py`, `run_llava.py`)."""

from __future__ import annotations

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_PLACEHOLDER,
)
from llava.conversation import conv_templates
from llava.errors import BadSampleError, FlagError

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


def build_prompt(message: str, conv_mode: str) -> str:
    """A conversation of the template `conv_mode` with `message` as the only user turn and the answer still open.

    Raises:
        FlagError: there is no such template; lists those that exist.
    """
    check_conv_mode(conv_mode)
    conversation = conv_templates[conv_mode].copy()
    conversation.append_message(conversation.roles[0], message)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def check_conv_mode(conv_mode: str) -> None:
    """Refuse an unknown template.

    Raises:
        FlagError: there is no such template; lists those that exist.
    """
    if conv_mode not in conv_templates:
        raise FlagError(f"--conv-mode {conv_mode}: no such template; there are {sorted(conv_templates)}")
