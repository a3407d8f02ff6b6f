r"""A page to talk with models of servers: images, several models side by side, votes (upstream `gradio_web_server.py`).

python -m llava.serve.api --model-path checkpoints/llava-v1.5-7b --port 8000
python -m llava.serve.web --server http://127.0.0.1:8000 --feedback-dir votes

`--server` may be given several times. A key that the servers want is read from the environment (LLAVA_API_KEY); so is
a login for visitors, as NAME:PASSWORD (LLAVA_PAGE_LOGIN). Needs the extra `serve`. `llava.serve.gradio_web_server` is
the same program with upstream's options, which are accepted here, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.errors import FlagError
from llava.runtime.program import run_program
from llava.runtime.ranges import COUNT, POSITIVE, Range, check_ranges
from llava.serve.guard import Guard, access_of, is_this_machine

KEY, LOGIN = "LLAVA_API_KEY", "LLAVA_PAGE_LOGIN"
SERVER = "http://127.0.0.1:8000"
MOST_COLUMNS = 4

RANGES = {
    "port": Range(0, 65535),
    "columns": Range(1, MOST_COLUMNS),
    "concurrency_count": COUNT,
    "max_new_tokens": COUNT,
    "timeout": POSITIVE,
}
"""What the numbers of the page may be."""


def build_parser() -> argparse.ArgumentParser:
    """Options of the page, and upstream's."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.serve.web", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--server",
        action="append",
        default=None,
        metavar="URL",
        help=f"address of a server; may be given several times; default: {SERVER}",
    )
    add("--host", default="127.0.0.1", help="address to listen on; another than this machine needs a login")
    add("--port", type=int, default=None, help="port to listen on; default: the first free one from 7860")
    add("--allow-anyone", action="store_true", help="serve other machines without a login")
    add(
        "--allowed-host",
        action="append",
        default=[],
        metavar="HOST",
        help="further name that browsers call this page by; '*': any; may be given several times; default: the address "
        "of --host and names of this machine",
    )
    add(
        "--model-list-mode",
        choices=["once", "reload"],
        default="once",
        help="ask the servers for their models when the page starts (once), or for each visitor (reload)",
    )
    add("--columns", type=int, default=None, help=f"models side by side; default: all, up to {MOST_COLUMNS}")
    add("--concurrency-count", type=int, default=16, help="answers at the same time; further ones wait")
    add("--max-new-tokens", type=int, default=1024, help="longest answer that visitors may choose")
    add("--timeout", type=float, default=300, help="seconds until the next piece of an answer must come")
    add("--feedback-dir", type=Path, default=None, help="directory of the votes; default: the page has no votes")
    add("--embed", action="store_true", help="leave out the title, for a page within another one")
    for name, meaning in REFUSED.items():
        add(name, action="store_true", help=f"refused: {meaning}")
    add("--controller-url", default=None, help="ignored: there is no controller; --server names the servers")
    return parser


REFUSED = {
    "--share": "would open this machine to the internet through a program and a host of gradio's; use a reverse proxy, "
    "or ssh -L, with LLAVA_PAGE_LOGIN",
    "--moderate": "upstream sends every question to OpenAI's moderation; nothing here checks questions, so ask for it "
    "in front of the page",
}
"""Options of upstream that are not supported, and why."""


def login_of(args: argparse.Namespace) -> tuple[str, str] | None:
    """Name and password of visitors, or None where nobody has to log in.

    Raises:
        FlagError: the login has another form, or other machines could use the page without one.
    """
    given = os.environ.get(LOGIN) or None
    if given is None:
        if not args.allow_anyone and not is_this_machine(args.host):
            raise FlagError(
                f"--host {args.host}: other machines could use this page; set {LOGIN} to NAME:PASSWORD, or pass "
                "--allow-anyone"
            )
        return None
    name, colon, password = given.partition(":")
    if not (name and colon and password):
        raise FlagError(f"{LOGIN}: must be NAME:PASSWORD")
    return name, password


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other or are not supported.

    Raises:
        FlagError: names the option.
    """
    check_ranges(args, RANGES, dashes=True)
    for name, meaning in REFUSED.items():
        if getattr(args, name.removeprefix("--")):
            raise FlagError(f"{name}: is not supported: it {meaning}")


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until the user ends the program.

    Raises:
        FlagError: an option is wrong, the extra `serve` is missing, or the port is taken.
        ServerError: no server answers, and the models are asked for once.
    """
    args = build_parser().parse_args(argv)
    check_options(args)
    login = login_of(args)
    if importlib.util.find_spec("gradio") is None or importlib.util.find_spec("httpx") is None:
        raise FlagError("the page needs gradio and httpx: pip install 'llava-extensions[serve]'")
    from llava.serve.page.client import Server, server_address
    from llava.serve.page.feedback import Feedback
    from llava.serve.page.layout import build_page
    from llava.serve.page.models import ModelList

    addresses = list(dict.fromkeys(server_address(url) for url in args.server or [SERVER]))
    models = ModelList([Server(address, os.environ.get(KEY) or None, args.timeout) for address in addresses])
    feedback = None if args.feedback_dir is None else Feedback(args.feedback_dir)
    models.look_now()
    # A server that is started later is found by a visitor's look, not by one that is never taken.
    if models.problems and args.model_list_mode == "once":
        raise type(models.problems[0])(f"{models.problems[0]}; or pass --model-list-mode reload")
    if args.controller_url is not None:
        print(f"--controller-url {args.controller_url}: ignored, there is no controller; --server names the servers")
    page = build_page(
        models,
        args.columns or min(MOST_COLUMNS, max(len(models.models), len(addresses))),
        feedback=feedback,
        reload=args.model_list_mode == "reload",
        embed=args.embed,
        concurrency=args.concurrency_count,
        max_new_tokens=args.max_new_tokens,
    )
    launch(page, args, login)
    names = ", ".join(model.label for model in models.models) or "no model yet"
    print(f"the page is at {page.local_url}; it asks {', '.join(addresses)} ({names})", flush=True)
    page.block_thread()


def launch(page: Any, args: argparse.Namespace, login: tuple[str, str] | None) -> None:
    """Start to serve a page; returns when it can be opened.

    Raises:
        FlagError: the port is taken.
    """
    from starlette.middleware import Middleware

    from llava.serve.uploads import launch_limits

    guard = Middleware(Guard, access=access_of(args.host, args.allowed_host, None))
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port,
            auth=login,
            prevent_thread_lock=True,
            quiet=True,
            **launch_limits(guard),
        )
    except OSError as error:
        raise FlagError(f"--host {args.host} --port {args.port}: cannot listen there ({error})") from error


if __name__ == "__main__":
    run_program(main)
