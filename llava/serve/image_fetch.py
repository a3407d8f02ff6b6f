"""Images that a request names by http and https addresses: fetched from named hosts, under one deadline.

The deadline is of all images of a request together, from the first name lookup to the last byte: a host that sends a
byte a second reaches no limit of a single read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from llava.errors import BadImageError
from llava.serve.image_urls import ImagePolicy
from llava.serve.problems import BusyError, RequestError, short

if TYPE_CHECKING:
    import httpx

SCHEMES = ("http", "https")
MAX_REDIRECTS = 5
WHERE = "messages"
PORTS = {"http": 80, "https": 443}


Take = Callable[[int], None]


async def fetch_images(urls: Iterable[str], policy: ImagePolicy, take: Take = lambda count: None) -> dict[str, bytes]:
    """The content of all http and https addresses.

    Args:
        urls: addresses of a request; other kinds are left out.
        policy: hosts, size and time.
        take: called with the number of bytes that are about to be held; see `llava.serve.body.Held`.

    Returns:
        content by address.

    Raises:
        BadImageError: a host is not allowed, an address cannot be read, is too large, or the time is over.
        BusyError, RequestError: `take` refuses the bytes.
    """
    wanted = [url for url in dict.fromkeys(urls) if url.partition(":")[0].lower() in SCHEMES]
    if not wanted:
        return {}
    # An extra of the installation, needed by nothing else.
    import httpx

    try:
        async with (
            asyncio.timeout(policy.seconds),
            # Compressed answers are not asked for: a small one could become large in one step.
            httpx.AsyncClient(timeout=policy.seconds, headers={"Accept-Encoding": "identity"}) as client,
            asyncio.TaskGroup() as group,
        ):
            tasks = {url: group.create_task(_fetch(client, url, policy, take)) for url in wanted}
    except TimeoutError as error:
        raise BadImageError(f"{WHERE}: the images did not arrive within {policy.seconds:g} s") from error
    except BaseExceptionGroup as errors:  # the first of them; the others were cancelled by it, or are alike
        refusals = errors.subgroup((BadImageError, BusyError, RequestError))
        if refusals is None:
            raise
        raise refusals.exceptions[0] from errors
    return {url: task.result() for url, task in tasks.items()}


async def _fetch(client: httpx.AsyncClient, url: str, policy: ImagePolicy, take: Take) -> bytes:
    """The content of one address; redirections lead only to hosts that may be asked directly."""
    import httpx

    address = url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            _check_host(httpx.URL(address), policy)
            async with client.stream("GET", address) as response:
                if response.next_request is None:
                    response.raise_for_status()
                    return await _read(response, policy, take)
                address = str(response.next_request.url)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
        if isinstance(error, BadImageError):
            raise
        said = str(error).partition("\n")[0] or type(error).__name__
        raise BadImageError(f"{WHERE}: cannot read an image from {short(url)}: {said[:200]}") from error
    raise BadImageError(f"{WHERE}: {short(url)} leads to more than {MAX_REDIRECTS} other addresses")


async def _read(response: httpx.Response, policy: ImagePolicy, take: Take) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_raw():
        take(len(chunk))
        content += chunk
        if len(content) > policy.max_bytes:
            raise BadImageError(f"{WHERE}: an image has more than {policy.max_bytes} bytes, make it smaller")
    return bytes(content)


def _check_host(url: httpx.URL, policy: ImagePolicy) -> None:
    """Refuse a host that was not named, with the very parser that finds the host for the request."""
    name = url.netloc.decode("ascii").lower()
    if not 0 < (url.port or PORTS.get(url.scheme, 1)) < 2**16:
        raise BadImageError(f"{WHERE}: '{name[:100]}' has no possible port")
    names = {name} if url.port is not None else {name, f"{name}:{PORTS.get(url.scheme, 0)}"}
    if url.scheme not in SCHEMES or not names & policy.hosts:
        raise BadImageError(
            f"{WHERE}: this server does not fetch from '{name[:100]}'; send the image itself (data:...), or start it "
            f"with --allow-image-host {name[:100]}"
        )
