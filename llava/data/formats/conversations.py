"""Rows of other programs in the form of LLaVA's: `messages` of OpenAI and TRL, ShareGPT, images in the row itself.

A row in LLaVA's own form is returned as it is. Where images go in a prompt: at the `<image>` of a text, or where their
part is among the parts of a message; a row of messages that says neither shows them before its first question.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.image_names import READ_KEYS, RowImage, StoredImage, image_names
from llava.errors import BadSampleError

SPEAKER_OF = {
    **{"human": "human", "user": "human"},
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bard", "bing"), "gpt"),
}
"""LLaVA's name of a speaker by the names that data sets use."""

OWN_SPEAKERS = frozenset({"human", "gpt"})
SYSTEM_ROLES = frozenset({"system", "developer"})

SOURCE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")
"""Keys of an image part under which its image may be."""

DATA_ADDRESS = "data:"
FETCHED = ("http://", "https://", "ftp://", "s3://", "gs://", "hf://")
"""Beginnings of addresses that are not opened while a model trains."""

LONGEST = max(map(len, (DATA_ADDRESS, *FETCHED)))
"""Characters of a name that show whether it is an address."""


@dataclass
class _Chat:
    """A conversation while it is read.

    Attributes:
        turns: in LLaVA's form.
        system: of a system message.
        images: in the order of their places; None: the next one of the row's own list.
    """

    turns: list[dict[str, str]] = field(default_factory=list)
    system: str | None = None
    images: list[RowImage | None] = field(default_factory=list)


def to_llava(row: dict[str, Any]) -> dict[str, Any]:
    """A row in LLaVA's form: `conversations` of `from` and `value`, `image`, and `system` where it has one.

    A row of no known form is returned as it is; what it lacks is said where it is used.

    Raises:
        BadSampleError: a message or an image has a form that cannot be trained on.
    """
    messages = _messages(row)
    if messages is None:
        turns = _as_list(row.get("conversations"))
        as_table = isinstance(row.get("conversations"), Mapping) and turns is not None
        return _with_images({**row, "conversations": turns} if as_table else row)
    chat = _Chat()
    for number, message in enumerate(messages):
        _read_message(chat, message, number)
    images = _placed(chat, image_names({key: _images(key, row.get(key)) for key in READ_KEYS}))
    kept = {name: value for name, value in row.items() if name not in ("messages", "prompt", "completion", *READ_KEYS)}
    system = {} if chat.system is None else {"system": chat.system}
    return {**kept, "conversations": chat.turns, **system} | ({"image": images} if images else {})


def _messages(row: Mapping[str, Any]) -> Sequence[Any] | None:
    """The messages of a row that is not in LLaVA's form."""
    turns = _as_list(row.get("conversations"))
    if turns is not None:
        known = all(isinstance(turn, Mapping) for turn in turns)
        own = known and all(turn.get("from") in OWN_SPEAKERS for turn in turns)
        others = known and all(_speaker(turn) in SPEAKER_OF or _speaker(turn) in SYSTEM_ROLES for turn in turns)
        return turns if others and not own else None
    messages = _as_list(row.get("messages"))
    if messages is not None:
        return messages
    prompt, completion = _as_list(row.get("prompt")), _as_list(row.get("completion"))
    return None if prompt is None or completion is None else [*prompt, *completion]


def _speaker(turn: Mapping[str, Any]) -> Any:
    return turn.get("from") if turn.get("from") is not None else turn.get("role")


def _as_list(value: Any) -> list[Any] | None:
    """A list; a table of columns, as some data sets store a list of objects, becomes one."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, entries, strict=False)) for entries in zip(*value.values(), strict=False)]
    return value if isinstance(value, list) and value else None


def _read_message(chat: _Chat, message: Any, number: int) -> None:
    if not isinstance(message, Mapping):
        raise BadSampleError(f"message {number} is not an object: {message!r:.200}")
    role = _speaker(message)
    content = message.get("content") if message.get("content") is not None else message.get("value")
    if role in SYSTEM_ROLES:
        text = "".join(_pieces(_Chat(), content, number))
        if chat.turns or chat.system is not None:
            raise BadSampleError(f"message {number} is of the system; only the first one may be")
        chat.system = text
        return
    if role not in SPEAKER_OF:
        raise BadSampleError(f"message {number} is of {role!r}; roles are system, {', '.join(SPEAKER_OF)}")
    chat.turns.append({"from": SPEAKER_OF[role], "value": "\n".join(_pieces(chat, content, number))})


def _pieces(chat: _Chat, content: Any, number: int) -> Iterator[str]:
    """The texts and the marks of images of a message, in order."""
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, list):
        raise BadSampleError(f"the content of message {number} must be a text or a list of parts, not {content!r:.200}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield part["text"]
        elif kind in ("image", "image_url"):
            found = [part[key] for key in SOURCE_KEYS if part.get(key) is not None]
            chat.images.append(_image(kind, found[0]) if found else None)
            yield DEFAULT_IMAGE_TOKEN
        else:
            raise BadSampleError(f"message {number} has a part that is not a text or an image: {part!r:.200}")


def _placed(chat: _Chat, own: list[RowImage]) -> list[RowImage]:
    """All images in the order of their marks."""
    if not chat.images:
        marks = sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in chat.turns)
        first = next((turn for turn in chat.turns if turn["from"] == "human"), None)
        if own and not marks and first is not None:
            first["value"] = "\n".join([*[DEFAULT_IMAGE_TOKEN] * len(own), first["value"]])
        return own
    waiting = sum(image is None for image in chat.images)
    if waiting != len(own):
        raise BadSampleError(f"{waiting} image parts name no image of their own, and the row has {len(own)} images")
    rest = iter(own)
    return [next(rest) if image is None else image for image in chat.images]


def _with_images(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the images that are in it, rather than named by it, as `StoredImage`."""
    changed = {}
    for key in READ_KEYS:
        value = row.get(key)
        values = value if isinstance(value, list) else [value]
        if any(isinstance(each, Mapping | bytes | Image.Image) or _is_address(each) for each in values):
            changed[key] = _images(key, value)
    return {**row, **changed} if changed else row


def _is_address(value: Any) -> bool:
    """Whether an image is named by an address that is decoded or refused here; `file://` is left to `images.py`."""
    return isinstance(value, str) and value[:LONGEST].lower().startswith((DATA_ADDRESS, *FETCHED))


def _images(key: str, value: Any) -> list[RowImage]:
    """The images under a key of a row; null and an empty list are none."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    return [_image(key, each) for each in values]


def _image(key: str, value: Any) -> RowImage:
    """An image: its name, or what is stored of it.

    Raises:
        BadSampleError: it is neither, or an address that would have to be fetched.
    """
    if isinstance(value, Mapping):
        content = value.get("bytes")
        name = next((value[each] for each in ("path", "url") if isinstance(value.get(each), str)), None)
        if isinstance(content, bytes):
            return StoredImage(content, name or "in the row")
        if name is None:
            raise BadSampleError(f"'{key}' has neither bytes nor a path: {value!r:.200}")
        value = name
    if isinstance(value, bytes | Image.Image):
        return StoredImage(value, "in the row")
    if not isinstance(value, str) or not value:
        raise BadSampleError(f"'{key}' must be a file name, stored bytes or a list of them, not {value!r:.200}")
    if value[: len(DATA_ADDRESS)].lower() == DATA_ADDRESS:
        return StoredImage(_decoded(value), "in the row")
    if value.lower().startswith(FETCHED):
        raise BadSampleError(
            f"'{key}' is the address {value!r:.200}, and nothing is fetched while a model trains; put the file into "
            "--image_folder and name it"
        )
    return value


def _decoded(address: str) -> bytes:
    """The bytes of a `data:` address."""
    head, comma, content = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise BadSampleError(f"an image is {address[:60]!r}..., which is not a base64 data address")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSampleError(f"an image is a data address that is not valid base64 ({error})") from error
