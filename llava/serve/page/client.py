"""Asking servers of `llava.serve.api`: which models they serve, and an answer as it comes.

The page has no model of its own. Whatever a server refuses, or does not do, is one error with its own words.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llava.errors import FlagError, LlavaError
from llava.serve.guard import is_this_machine

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 10.0
"""For a connection; an answer may take as long as the page is told."""

SHOWN = 300
"""Characters of what a server says that is not an error of its API."""


class ServerError(LlavaError):
    """A server cannot be reached, or refuses what it is asked."""


@dataclass(frozen=True)
class Server:
    """One server.

    Attributes:
        url: its address without the `/v1` of its routes.
        key: what it has to be given; None: nothing.
        seconds: for the next piece of an answer.
    """

    url: str
    key: str | None = None
    seconds: float = 300.0


@dataclass(frozen=True)
class Model:
    """A model of a server.

    Attributes:
        label: by which the page offers it; no other model has it.
        name: by which the server knows it.
    """

    label: str
    name: str
    server: Server


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated."""

    temperature: float
    top_p: float
    max_tokens: int


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: what is added to it.
        details: what the server says of the whole answer, with its last piece; None: nothing.
    """

    text: str = ""
    details: Any = None


def server_address(url: str) -> str:
    """The address of a server as it is asked: without `/v1` and slashes at its end.

    Raises:
        FlagError: it is not an address of a server.
    """
    # Checked first, since a password of an address must not be repeated in an error.
    if "@" in url:
        raise FlagError("--server: give an address without NAME:PASSWORD@; a key is read from LLAVA_API_KEY")
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        known = known and not (parts.query or parts.fragment)
    except ValueError:  # a port that is not a number, or half a bracket
        known = False
    if not known:
        raise FlagError(f"--server {url}: give the address of a server, for example http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


async def list_models(servers: Sequence[Server]) -> tuple[list[Model], list[ServerError]]:
    """The models of all servers, and what is wrong with those that do not say theirs.

    A name that two servers have gets the server's address behind it.
    """
    found: list[tuple[str, Server]] = []
    problems = []
    for server in servers:
        try:
            found += [(name, server) for name in await _names(server)]
        except ServerError as error:
            problems.append(error)
    counts = Counter(name for name, _ in found)
    return [Model(n if counts[n] == 1 else f"{n} ({s.url})", n, s) for n, s in dict.fromkeys(found)], problems


async def _names(server: Server) -> list[str]:
    async with _client(server) as client:
        answer = await client.get("/v1/models")
        said = _json(answer.content)
    models = said.get("data") if isinstance(said, Mapping) else None
    if not answer.is_success or not isinstance(models, list):
        raise _refusal(server, answer.status_code, answer.content)
    return [model["id"] for model in models if isinstance(model, Mapping) and isinstance(model.get("id"), str)]


async def stream_answer(
    model: Model, messages: Sequence[Mapping[str, Any]], sampling: Sampling, *, details: bool = False
) -> AsyncIterator[Piece]:
    """The answer to a conversation, piece by piece; who stops reading ends its generation.

    Args:
        model: that is asked.
        messages: as OpenAI's API has them, the last one of the user.
        sampling: how the answer is generated.
        details: ask for what the model did, too.

    Raises:
        ServerError: the server cannot be reached, or says what is wrong.
    """
    body: dict[str, Any] = {"model": model.name, "messages": list(messages), "stream": True}
    body |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_tokens}
    body |= {"details": True} if details else {}
    ended = False
    async with _client(model.server) as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if not answer.is_success:
            raise _refusal(model.server, answer.status_code, await answer.aread())
        async for line in answer.aiter_lines():
            field, _, value = line.partition(":")
            if field != "data":
                continue
            ended = value.strip() == "[DONE]"
            if ended:
                break
            yield _piece(_json(value.encode()), model.server)
    if not ended:
        raise ServerError(f"{model.server.url}: the answer broke off; ask again")


def _piece(event: Any, server: Server) -> Piece:
    """What an event of a stream adds to the answer.

    Raises:
        ServerError: it is an error, or of another form.
    """
    if not isinstance(event, Mapping) or "error" in event:
        raise _refusal(server, 200, json.dumps(event).encode())
    choices = event.get("choices") or [{}]
    choice = choices[0] if isinstance(choices, list) else None
    delta = (choice.get("delta") or {}) if isinstance(choice, Mapping) else None
    text = (delta.get("content") or "") if isinstance(delta, Mapping) else None
    if not isinstance(text, str):
        raise _refusal(server, 200, json.dumps(event).encode())
    return Piece(text, event.get("details"))


@asynccontextmanager
async def _client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server; what fails on the way is a `ServerError`.

    A proxy of the environment is not asked for what runs on this machine.
    """
    # An extra of the installation, like the page itself.
    import httpx

    headers = {} if server.key is None else {"Authorization": f"Bearer {server.key}"}
    local = is_this_machine(urlsplit(server.url).hostname or "")
    timeout = httpx.Timeout(server.seconds, connect=CONNECT_SECONDS)
    try:
        async with httpx.AsyncClient(
            base_url=server.url, headers=headers, timeout=timeout, trust_env=not local
        ) as client:
            yield client
    except httpx.ConnectError as error:
        raise ServerError(f"{server.url}: no server answers there; start one: python -m llava.serve.api") from error
    except httpx.TimeoutException as error:
        raise ServerError(f"{server.url}: nothing came for {server.seconds:g} s; ask again") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"{server.url}: {type(error).__name__}: {error}") from error


def _json(content: bytes) -> Any:
    """Decoded JSON, or None if it is none."""
    try:
        return json.loads(content)
    except ValueError:
        return None


def _refusal(server: Server, status: int, content: bytes) -> ServerError:
    """What a server says is wrong, in its own words where it has OpenAI's form."""
    said = _json(content)
    error = said.get("error") if isinstance(said, Mapping) else None
    message = error.get("message") if isinstance(error, Mapping) else None
    if isinstance(message, str):
        key = "; set LLAVA_API_KEY to the key of the server where the page is started" if status == 401 else ""
        return ServerError(f"{message}{key}")
    shown = content[:SHOWN].decode("utf-8", "replace").strip()
    return ServerError(f"{server.url}: is not a server of this API (status {status}): {shown!r}")
