"""Two tiny models behind two servers, for tests of the page: one drops tokens, one has routed experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from llava.eval.answering.loading import load_model
from llava.serve.app import Settings
from llava.serve.defaults import Defaults
from llava.serve.engine import Engine
from llava.serve.page.client import Server
from tests.dynamic.sparse_checkpoint import write_sparse_checkpoint
from tests.golden import golden_dir
from tests.llava.serve.test_api import running

ROUTED = golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle"
BASE = golden_dir("llava") / "tiny-llava-v1.5"
IMAGE = golden_dir("llava") / "data" / "images" / "im0.png"
SETTINGS = Settings("vicuna_v1", Defaults(temperature=0.0, max_new_tokens=8, token_limit=64))


class Served(NamedTuple):
    """A server of one model."""

    name: str
    client: Any
    engine: Engine
    server: Server


@contextmanager
def two_servers(folder: Path) -> Iterator[tuple[Served, Served]]:
    """A sparse model and a routed one, each behind a server of its own."""
    with ExitStack() as stack:
        found = []
        for loaded in (
            load_model(str(write_sparse_checkpoint(folder / "tiny-sparse-v1")), device="cpu"),
            load_model(str(ROUTED), str(BASE), device="cpu"),
        ):
            client, engine = stack.enter_context(running(loaded, SETTINGS))
            url = str(client.base_url).removesuffix("/v1/")
            found.append(Served(loaded.name, client, engine, Server(url, seconds=60)))
        yield found[0], found[1]


def asked_by_api(served: Served, question: str, url: str | None, max_tokens: int, **options: Any) -> Any:
    """The response of OpenAI's client to one question, greedily."""
    image = [] if url is None else [{"type": "image_url", "image_url": {"url": url}}]
    content = [*image, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return served.client.chat.completions.create(
        model=served.name, messages=messages, temperature=0, top_p=0.7, max_tokens=max_tokens, **options
    )
