"""Requests made of others by a seeded draw: bytes changed, values of the JSON replaced, headers and paths spoiled."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tests.llava.serve.asgi_calls import Call

LONGEST = 200_000
"""Bytes of a body that is changed byte by byte; longer ones are cut, so that thousands take seconds."""

BYTES = (
    *(
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"\\",
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"1" * 400,
        b"-",
        b".",
    ),
    *(
        b"NaN",
        b"Infinity",
        b"1e400",
        b"null",
        b"true",
        b"\xef\xbb\xbf",
        b"\r\n\r\n",
        b"%00",
        b"<image>",
        b"data:",
        b"/../",
    ),
)
"""What is put somewhere into a body."""

VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        0.5,
        -0.0,
        2**31,
        2**63,
        -(2**63) - 1,
        10**400,
        1e308,
        "",
        "a",
        "\0",
        "\ud800",
        "é" * 9,
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {"": None},
        {"type": "text"},
        {"url": 1},
        "1",
        "<image>",
        "<image-placeholder>",
        "x" * 5000,
    ),
    *(
        "http://[",
        "http://127.0.0.1:9/",
        "data:image/png;base64,AAAA",
        "file:a",
        "user",
        "system",
        "assistant",
        "image_url",
    ),
)
"""What a value of a JSON body becomes."""

WORDS = (
    "",
    "\0",
    "é",
    "*",
    "null",
    "x" * 3000,
    "127.0.0.1",
    "localhost",
    "evil.example",
    "application/json",
    "text/plain",
    "[",
)
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "X")
SEGMENTS = (
    "v1",
    "chat",
    "completions",
    "models",
    "health",
    "openapi.json",
    "..",
    "",
    "%2e",
    "%00",
    "%ff",
    "é",
    "x" * 300,
)

Change = Callable[[Call, random.Random], Call]


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of each value in a JSON value, the whole first."""
    found = [place]
    if isinstance(value, dict):
        for key, item in value.items():
            found += _places(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:20]):
            found += _places(item, (*place, index))
    return found


def _changed(value: Any, place: Sequence[Any], change: Callable[[Any], Any]) -> Any:
    """A copy in which `change` was applied to the value at a place."""
    if not place:
        return change(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = _changed(copy[place[0]], place[1:], change)
    return copy


def _values(call: Call, draw: random.Random) -> Call:
    """One to three values of the JSON body replaced, taken out, put twice, wrapped or added."""
    try:
        body = json.loads(call.body)
    except (ValueError, RecursionError):
        return _bytes(call, draw)

    def change(value: Any) -> Any:
        kind, other = draw.randrange(6), draw.choice(VALUES)
        if kind == 0 and isinstance(value, dict) and value:
            gone = draw.choice(list(value))
            return {key: item for key, item in value.items() if key != gone}
        if kind == 1 and isinstance(value, list):
            return value * draw.randint(0, 3)
        if kind == 2 and isinstance(value, dict):
            return value | {draw.choice([*value, "n", "stop", "seed", "stream", "max_tokens", "", "\ud800"]): other}
        if kind == 3:
            return [value]
        if kind == 4 and isinstance(value, str) and value:
            at = draw.randrange(len(value))
            return (
                value[:at] + draw.choice(("\0", "\ud800", "é", "<image>", "=", "")) + value[at + draw.randint(0, 2) :]
            )
        return other

    for _ in range(draw.randint(1, 3)):
        body = _changed(body, draw.choice(_places(body)), change)
    return replace(call, body=json.dumps(body, ensure_ascii=True).encode())


def _bytes(call: Call, draw: random.Random) -> Call:
    """One to four spans of the body replaced, cut, repeated or flipped."""
    body = bytearray(call.body[:LONGEST])
    for _ in range(draw.randint(1, 4)):
        begin = draw.randint(0, len(body))
        end = min(len(body), begin + draw.choice((0, 0, 1, 2, 9, 100)))
        kind = draw.randrange(4)
        if kind == 0:
            body[begin:end] = draw.choice(BYTES)
        elif kind == 1:
            body[begin:end] = b""
        elif kind == 2:
            body[begin:end] = body[begin:end] * draw.choice((2, 3, 50))
        elif body:
            body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
    return replace(call, body=bytes(body))


def _headers(call: Call, draw: random.Random) -> Call:
    """A header spoiled, taken out, sent twice or added."""
    headers = list(call.headers)
    kind, place = draw.randrange(4), draw.randrange(max(1, len(headers)))
    if kind == 0 and headers:
        headers[place] = (headers[place][0], draw.choice(WORDS))
    elif kind == 1 and headers:
        headers.pop(place)
    elif kind == 2 and headers:
        headers.append((headers[place][0], draw.choice(WORDS)))
    else:
        name = draw.choice(("origin", "authorization", "content-length", "content-encoding", "accept", "expect", "x"))
        headers.append((name, draw.choice(WORDS)))
    return replace(call, headers=tuple(headers))


def _route(call: Call, draw: random.Random) -> Call:
    """Another method, or other segments in the path."""
    if draw.random() < 0.3:
        return replace(call, method=draw.choice(METHODS))
    segments = call.path.split("/")
    segments[draw.randrange(len(segments))] = draw.choice(SEGMENTS)
    return replace(call, path="/".join(segments), method=draw.choice((call.method, "GET")))


CHANGES: tuple[tuple[Change, int], ...] = ((_values, 8), (_bytes, 5), (_headers, 2), (_route, 2))
"""Kinds of changes, and how often each is made."""


def mutations(seeds: Sequence[Call], count: int, seed: int) -> list[Call]:
    """Changed copies of seeds.

    Args:
        seeds: requests.
        count: number of copies.
        seed: of the draw.
    """
    draw = random.Random(seed)
    changes, weights = zip(*CHANGES, strict=True)
    return [draw.choices(changes, weights)[0](draw.choice(seeds), draw) for _ in range(count)]
