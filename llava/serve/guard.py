"""Who may talk to the server: by the name in the address, by the page that asks, and by key. Checked before all else.

A web page can point its own host name at 127.0.0.1 (DNS rebinding), and then its scripts read this server's answers.
The browser still sends the page's name as `Host` and `Origin`, so both have to be names that the server was given.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from llava.errors import FlagError
from llava.serve.problems import RequestError, problem

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
ANY_HOST = "*"
OPEN = ("/health",)
"""Paths that need no key."""


@dataclass(frozen=True)
class Access:
    """Whom a server answers.

    Attributes:
        hosts: names that `Host` and `Origin` may have, without port, in lower case; `*`: all.
        any_address: IP addresses are accepted whatever they are; they cannot be rebound.
        api_key: what `Authorization: Bearer` must say; None: nothing is asked.
    """

    hosts: frozenset[str] = frozenset(THIS_MACHINE)
    any_address: bool = False
    api_key: str | None = None

    def allows(self, host: str) -> bool:
        """True if the server may be called by this name."""
        return ANY_HOST in self.hosts or host in self.hosts or (self.any_address and is_address(host))


def access_of(bound: str, also: list[str], api_key: str | None) -> Access:
    """Whom a server that listens on `bound` answers.

    Args:
        bound: address or name that it listens on. All addresses (`0.0.0.0`, `::`) stand for whatever address, and for
            this machine's name.
        also: further names.
        api_key: see `Access`.

    Raises:
        FlagError: an address is empty, or a name has a port, which no request would match.
    """
    if not bound.strip():
        raise FlagError("--host is empty; give an address, 0.0.0.0 for all")
    for name in also:
        bare = name.strip().strip("[]")
        if not bare or (":" in bare and not is_address(bare)) or "/" in bare:
            raise FlagError(f"--allowed-host {name}: give a name or an address alone, without scheme and port")
    everywhere = is_address(bound) and ipaddress.ip_address(bound).is_unspecified
    own = (socket.gethostname(),) if everywhere else (bound,)
    names = (*THIS_MACHINE, *own, *also)
    return Access(frozenset(name.lower().strip("[]") for name in names), everywhere, api_key)


def is_address(host: str) -> bool:
    """True for an IP address, false for a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_this_machine(host: str) -> bool:
    """True for an address, or a name, that other machines cannot reach."""
    return ipaddress.ip_address(host).is_loopback if is_address(host) else host == "localhost"


class Guard:
    """Wraps an application: requests of strangers end here.

    Args:
        app: what answers the others.
        access: whom it answers.
    """

    def __init__(self, app: App, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on."""
        if scope["type"] == "http":
            try:
                check_access(scope["headers"], scope["path"], self.access)
            except RequestError as error:
                await refuse(error, send)
                return
        await self.app(scope, receive, send)


def check_access(headers: list[tuple[bytes, bytes]], path: str, access: Access) -> None:
    """Refuse strangers.

    Raises:
        RequestError: the host or the page is not allowed (403), or the key is missing or wrong (401).
    """
    given = {name.lower(): value.decode("latin-1") for name, value in headers}
    host = host_of(f"//{given.get(b'host', '')}")
    if not access.allows(host):
        raise RequestError(
            f"this server does not answer to the host {host[:100]!r}; start it with --allowed-host if that is its name",
            status=403,
        )
    origin = given.get(b"origin")
    if origin is not None and not access.allows(host_of(origin)):
        raise RequestError(f"this server does not answer pages of {origin[:100]!r}", status=403)
    if access.api_key is None or path in OPEN:
        return
    scheme, _, key = given.get(b"authorization", "").partition(" ")
    matches = hmac.compare_digest(key.strip().encode("latin-1"), access.api_key.encode())
    if scheme.lower() != "bearer" or not matches:
        raise RequestError("the API key is missing or wrong", status=401)


def host_of(address: str) -> str:
    """The host of an address, in lower case and without port; empty if there is none."""
    try:
        return (urlsplit(address).hostname or "").rstrip(".")
    except ValueError:
        return ""


async def refuse(error: RequestError, send: Send) -> None:
    """Send an error in OpenAI's form."""
    content = json.dumps(problem(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if error.status == 401 else []
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
