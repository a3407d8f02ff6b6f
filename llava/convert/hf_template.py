"""Conversation templates as chat templates of transformers' processors (Jinja), and back.

A processor's messages have content of several parts; the images of a message stand in front of its text, each with a
line feed behind it, which is where a LLaVA was trained to see them.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import TOKENIZER_VERSION, Conversation, SeparatorStyle, conv_templates
from llava.data.chat_template import ChatTemplate
from llava.eval.answering.prompts import build_prompt

PREFERRED = ("v1",)
"""Of templates that write the same, the name that is taken."""

QUESTION, ANSWER = "What is shown?", "A ship."

TemplateText = str
"""A chat template in Jinja."""


def chat_template(template: Conversation, mm_use_im_start_end: bool) -> TemplateText:
    """A Jinja chat template that writes the prompts of a conversation template.

    Args:
        template: without messages of a conversation.
        mm_use_im_start_end: images stand between `<im_start>` and `<im_end>`.

    Raises:
        BadSampleError: the tokenizer's own template refuses a message.
    """
    image = DEFAULT_IMAGE_TOKEN
    if mm_use_im_start_end:
        image = f"{DEFAULT_IM_START_TOKEN}{image}{DEFAULT_IM_END_TOKEN}"
    if isinstance(template, ChatTemplate):
        return _body(image) + _with_texts(template)
    return _body(image) + (_inst if template.sep_style is SeparatorStyle.LLAMA_2 else _turns)(template)


def _body(image: str) -> TemplateText:
    """A macro: the content of a message as one text."""
    return "".join(
        [
            "{%- macro body(content) -%}",
            "{%- if content is string -%}{{- content -}}{%- else -%}",
            "{%- for part in content if part.type == 'image' -%}{{- " + _literal(image + "\n") + " -}}{%- endfor -%}",
            "{%- for part in content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}",
            "{%- endif -%}{%- endmacro -%}",
        ]
    )


def _turns(template: Conversation) -> TemplateText:
    """Turns between separators, with a role in front of each or without."""
    named = template.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO)
    first = "" if template.sep_style is SeparatorStyle.PLAIN else template.sep  # what follows the system text
    ends = [template.sep, template.sep]
    if template.sep_style in (SeparatorStyle.TWO, SeparatorStyle.PLAIN):
        ends[1] = template.sep2 or ""
    heads = [f"{role}: " if named else role for role in template.roles]
    # An example that the template begins with stays where the system text is another one.
    example = "".join(heads[turn % 2] + text + ends[turn % 2] for turn, (_, text) in enumerate(template.messages))
    prefix = "" if named else _system_prefix(template.system)
    return "".join(
        [
            "{%- if messages[0].role == 'system' -%}",
            "{{- " + _literal(prefix) + " + body(messages[0].content) + " + _literal(first + example) + " -}}",
            "{%- else -%}{{- " + _literal(template.system + first + example) + " -}}{%- endif -%}",
            "{%- for message in messages -%}",
            "{%- if message.role == 'user' -%}",
            "{{- " + _literal(heads[0]) + " + body(message.content) + " + _literal(ends[0]) + " -}}",
            "{%- elif message.role == 'assistant' -%}",
            "{{- " + _literal(heads[1]) + " + body(message.content) + " + _literal(ends[1]) + " -}}",
            "{%- endif -%}{%- endfor -%}",
            "{%- if add_generation_prompt -%}{{- " + _literal(heads[1].rstrip(" ")) + " -}}{%- endif -%}",
        ]
    )


def _inst(template: Conversation) -> TemplateText:
    """Llama 2: user messages in `[INST] ... [/INST]`, the system text inside the first."""
    return "".join(
        [
            "{%- set system, turns = " + _literal(template.system) + ", messages -%}",
            "{%- if messages[0].role == 'system' -%}",
            "{%- set system, turns = body(messages[0].content), messages[1:] -%}{%- endif -%}",
            "{%- for message in turns -%}",
            "{%- if message.role == 'user' -%}",
            "{%- if not loop.first -%}{{- " + _literal(template.sep) + " -}}{%- endif -%}{{- '[INST] ' -}}",
            "{%- if loop.first and system -%}{{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' -}}{%- endif -%}",
            "{{- body(message.content) + ' [/INST]' -}}",
            "{%- elif message.role == 'assistant' -%}",
            "{{- ' ' + body(message.content) + " + _literal(f" {template.sep2}") + " -}}",
            "{%- endif -%}{%- endfor -%}",
        ]
    )


def _with_texts(template: ChatTemplate) -> TemplateText:
    """The tokenizer's own template, which is given messages whose content is one text."""
    texts = (
        "{%- set all = namespace(messages=[]) -%}{%- for message in messages -%}"
        "{%- set text = body(message.content) if message.content is iterable else message.content -%}"
        "{%- set all.messages = all.messages + [dict(message, content=text)] -%}{%- endfor -%}"
        "{%- set messages = all.messages -%}"
    )
    own = template.tokenizer.get_chat_template()
    # A comment and a line feed: what follows is at the beginning of a line, as it is in a file of its own.
    if not _opening_ends_in_blank(template):
        return f"{texts}{{# #}}\n{own}"
    # Blanks in front of an answer are the answer's, as in training.
    captured = f"{{%- set prompt %}}{{# #}}\n{own.removesuffix(chr(10))}{{% endset -%}}"
    return f"{texts}{captured}{{{{- prompt.rstrip(' ') if add_generation_prompt else prompt -}}}}"


def _opening_ends_in_blank(template: ChatTemplate) -> bool:
    conversation = template.copy()
    conversation.append_message(conversation.roles[0], QUESTION)
    conversation.append_message(conversation.roles[1], None)
    messages = [{"role": "user", "content": QUESTION}]
    return conversation.get_prompt() != _render(template.tokenizer.get_chat_template(), messages, template.tokenizer)


def _system_prefix(system: str) -> str:
    """The marker line in front of a system text (`<|im_start|>system` and the like)."""
    first, found, _ = system.partition("\n")
    return first + "\n" if found and first.startswith("<|") else ""


def _literal(text: str) -> str:
    """A Jinja string."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _render(text: TemplateText, messages: list[dict[str, Any]], tokenizer: Any, opened: bool = True) -> str | None:
    """The prompt of messages, None where the template refuses them."""
    try:
        prompts, _ = render_jinja_template(
            [messages], chat_template=text, add_generation_prompt=opened, **tokenizer.special_tokens_map
        )
    except (TemplateError, TypeError):  # a filter or an operator on a kind of content that the template does not expect
        return None
    return prompts[0]


def recognized_mode(text: TemplateText, tokenizer: Any) -> str | None:
    """The `--conv-mode` that asks a first question as a chat template of transformers does; None if there is none.

    Args:
        text: takes messages with content of several parts, or of one text.
        tokenizer: whose special tokens the template may use.

    Returns:
        The name of a template that writes the same prompt; or `tokenizer` if the chat template writes it for a message
        of one text too; or the name of a template whose system text has to be given as a message for that.
    """
    named = {name: conv_templates[name] for name in dict.fromkeys((*PREFERRED, *conv_templates))}
    # No chat template writes tags, nor an example that is part of the conversation.
    named = {name: one for name, one in named.items() if not (one.messages or one.uses_image_tags)}
    prompts = {name: build_prompt(f"{DEFAULT_IMAGE_TOKEN}\n{QUESTION}", name) for name in named}
    written = _render(text, _question(), tokenizer)
    exact = next((name for name, prompt in prompts.items() if prompt == written), None)
    if exact is not None:
        return exact
    if takes_texts(text, tokenizer):
        return TOKENIZER_VERSION
    for name, template in named.items():
        system = template.system.removeprefix(_system_prefix(template.system))
        if system and _render(text, _question(system), tokenizer) == prompts[name]:
            return name
    return None


def takes_texts(text: TemplateText, tokenizer: Any) -> bool:
    """True if a chat template writes the same for messages of one text, `<image>` within it, as for those of parts."""
    image, later = f"{DEFAULT_IMAGE_TOKEN}\n", [("assistant", ANSWER), ("user", QUESTION)]
    in_parts = [*_question(), *({"role": role, "content": [_text(said)]} for role, said in later)]
    whole = [{"role": role, "content": said} for role, said in [("user", image + QUESTION), *later]]
    written = _render(text, whole, tokenizer)
    return written is not None and image + QUESTION in written and written == _render(text, in_parts, tokenizer)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _question(system: str = "") -> list[dict[str, Any]]:
    """A question about an image, after a system message if there is one."""
    question = {"role": "user", "content": [{"type": "image"}, _text(QUESTION)]}
    return [{"role": "system", "content": [_text(system)]}, question] if system else [question]
