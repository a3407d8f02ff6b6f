"""The corpus of requests that have stalled or broken a server, or might: `corpus/requests.json`.

An entry has a name and the status that is expected, and where it matters the parameter that the error names. Its body
is one of

- `body`: texts, and pairs of a text and how often it is repeated; a character is a byte;
- `set`: values of a JSON body, put over a request that is answered;
- `content`: the content of its only message, put in the same way.

Other than these it may have a `method`, a `path` and `headers`, put over those of a usual request; null takes one out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.llava.serve.asgi_calls import CHAT, JSON_HEADERS, Call
from tests.llava.serve.fuzzed_server import MODEL

FILE = Path(__file__).parent / "corpus" / "requests.json"
KEYS = frozenset({"name", "status", "param", "body", "set", "content", "method", "path", "headers"})


@dataclass(frozen=True)
class Entry:
    """A request of the corpus.

    Attributes:
        name: says what is in it.
        call: what is sent.
        status: what has to come back.
        param: the parameter that the error names; None: not compared.
    """

    name: str
    call: Call
    status: int
    param: str | None


def load_corpus() -> list[Entry]:
    """All entries, in the order of the file."""
    return [_entry(written) for written in json.loads(FILE.read_text(encoding="utf-8"))]


def _entry(written: dict[str, Any]) -> Entry:
    assert written.keys() <= KEYS, f"unknown keys: {written}"
    headers = dict(JSON_HEADERS) | written.get("headers", {})
    call = Call(
        _body(written),
        written.get("method", "POST"),
        written.get("path", CHAT),
        tuple((name, value) for name, value in headers.items() if value is not None),
    )
    return Entry(written["name"], call, written["status"], written.get("param"))


def _body(written: dict[str, Any]) -> bytes:
    if "body" in written:
        pieces = [(piece, 1) if isinstance(piece, str) else piece for piece in written["body"]]
        return b"".join(text.encode("latin-1") * count for text, count in pieces)
    message = {"role": "user", "content": written.get("content", "Hello")}
    return json.dumps({"model": MODEL, "messages": [message]} | written.get("set", {})).encode()
