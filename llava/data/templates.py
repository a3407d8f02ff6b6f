"""Which conversation template a `--version` or `--conv-mode` means (upstream: the branches of `train.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava.conversation import TOKENIZER_VERSION, Conversation, conv_templates, default_conversation
from llava.data.chat_template import chat_template
from llava.errors import BadSampleError, FlagError

VERSIONS_WITHOUT_TEMPLATE = frozenset({"v0", "v0.5"})
"""Values of `--version` that choose how the tokenizer is padded and leave the default template in place."""


SYSTEM = "system"
"""Key of a row whose text takes the place of the template's system text."""


def row_template(template: Conversation, row: Mapping[str, Any]) -> Conversation:
    """The template with the system text of a row, if it has one."""
    text = row.get(SYSTEM)
    if not isinstance(text, str) or not text:
        return template
    return template.with_system(text)


def check_system(row: Mapping[str, Any], prompt: str) -> None:
    """Refuse a row whose system text the template has left out.

    Args:
        row: a row.
        prompt: made of it by `row_template`.

    Raises:
        BadSampleError: the template has no place for it.
    """
    text = row.get(SYSTEM)
    if isinstance(text, str) and text and text not in prompt:
        raise BadSampleError(
            f"the row has the system text {text!r:.80}, for which the template of --version has no place; choose "
            "another template, or remove it"
        )


def select_template(version: str, tokenizer: Any = None) -> Conversation:
    """The template of a `--version`, as a copy; `v0` and `v0.5` give the default one, as upstream.

    Args:
        version: name of a template, or `tokenizer`.
        tokenizer: only needed for its own template.

    Raises:
        FlagError: there is no template of that name (upstream falls back to `vicuna_v1` silently).
    """
    if version == TOKENIZER_VERSION:
        return chat_template(tokenizer)
    if version in VERSIONS_WITHOUT_TEMPLATE:
        return default_conversation.copy()
    if version not in conv_templates:
        known = ", ".join(sorted({TOKENIZER_VERSION} | VERSIONS_WITHOUT_TEMPLATE | set(conv_templates)))
        raise FlagError(f"--version {version}: there is no conversation template of that name; known: {known}")
    return conv_templates[version].copy()


def template_of_mode(conv_mode: str, tokenizer: Any = None) -> Conversation:
    """The template of a `--conv-mode`, as a copy; there `v0` is the template of that name, as upstream.

    Args:
        conv_mode: name of a template, or `tokenizer`.
        tokenizer: only needed for its own template.

    Raises:
        FlagError: the template is not known.
    """
    return conv_templates[conv_mode].copy() if conv_mode in conv_templates else select_template(conv_mode, tokenizer)
