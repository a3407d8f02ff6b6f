"""Conversations as records: `messages` with `role` and `content`, as OpenAI's API and TRL have them.

The tokenizer's chat template writes them, a whole conversation is one sequence, and its answers are trained on, with
the end that the template writes behind each. Records of instruction and output are a conversation of two messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava.errors import FlagError
from llava.runtime.chat.rendering import ChatRenderer
from llava.runtime.tokenizer import encode_with_spans

ROLES = ("system", "user", "assistant")
ANSWERING = ROLES[-1]
OWN = "tokenizer"
"""`--chat_template tokenizer`: all records by the tokenizer's own template."""


def messages_problem(messages: Any) -> str | None:
    """What is wrong with the `messages` of a record, or None."""
    if not isinstance(messages, list) or not messages:
        return f"'messages' is {messages!r:.60}, expected a list of objects with role and content"
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return f"message {number} is {message!r:.60}, expected an object with a role of {list(ROLES)}"
        if text_of(message.get("content")) is None:
            return f"'content' of message {number} is {message.get('content')!r:.60}, expected text or parts of text"
    if not any(message["role"] == ANSWERING for message in messages):
        return f"none of its {len(messages)} messages is from {ANSWERING!r}, so nothing would be trained on"
    return None


def text_of(content: Any) -> str | None:
    """The text of a message's content, which may be a list of parts; None if it is something else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else None


def conversation(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a checked record of either kind."""
    if "messages" in record:
        return [{"role": each["role"], "content": str(text_of(each["content"]))} for each in record["messages"]]
    return [{"role": "user", "content": asked(record)}, {"role": ANSWERING, "content": record["output"]}]


def asked(record: Mapping[str, Any]) -> str:
    """What a checked record asks: instruction and input, or all messages but the answers."""
    if "messages" in record:
        return "\n".join(each["content"] for each in conversation(record) if each["role"] != ANSWERING)
    given = record.get("input")
    return f"{record['instruction']}\n{given}" if given else str(record["instruction"])


def renderer(tokenizer: Any) -> ChatRenderer:
    """The chat template of a tokenizer.

    Raises:
        FlagError: it has none.
    """
    if not tokenizer.chat_template:
        raise FlagError(
            f"{tokenizer.name_or_path}: this tokenizer has no chat template to write 'messages' with; pass "
            "--chat_template FILE, a Jinja template as transformers documents it"
        )
    return ChatRenderer(
        tokenizer.get_chat_template(), tokenizer.special_tokens_map, "--chat_template: the tokenizer's chat template"
    )


def encode(messages: Sequence[Mapping[str, str]], chat: ChatRenderer, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which of them belong to answers; a token in both parts belongs to the answer.

    Raises:
        BadSampleError: the template does not take the messages, or does not say where answers are.
    """
    answers = [number for number, message in enumerate(messages) if message["role"] == ANSWERING]
    prompt, spans = chat.prompt(messages, answers)
    ids, covered = encode_with_spans(tokenizer, prompt)
    # A token that covers nothing belongs to the character behind it.
    ends = [max(span.end, span.start + 1) for span in covered]
    trained = [
        any(span.start < answer.end and end > answer.start for answer in spans)
        for span, end in zip(covered, ends, strict=True)
    ]
    return ids, trained


def turn_end(tokenizer: Any) -> tuple[str, int | None]:
    """What the chat template writes behind an answer: its text, and the token that ends the answer; None without one.

    Raises:
        FlagError: see `renderer`.
    """
    question, answer = "question", "answer"
    messages = [{"role": "user", "content": question}, {"role": ANSWERING, "content": answer}]
    prompt, spans = renderer(tokenizer).prompt(messages, [1])
    start = prompt.rindex(answer, 0, spans[0].end) + len(answer)
    text = prompt[start : spans[0].end].strip() or prompt[spans[0].end :].strip()
    ids = tokenizer(text, add_special_tokens=False).input_ids if text else []
    known = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    first = next((token for token in ids if tokenizer.decode([token]).strip()), None)
    return text, first if first in known else None
