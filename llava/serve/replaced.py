"""What upstream's programs of a cluster of workers say here: which command does their work.

Upstream serves by a controller, a worker for each model and a web page, which find each other over HTTP. Here one
process serves one model, `llava.serve.api`, and clients are given its address; the page, `llava.serve.web`, is one.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from typing import NoReturn

SERVER = "python -m llava.serve.api"
PAGE = "python -m llava.serve.web"


def end(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, instead: Callable[[argparse.Namespace], str]
) -> NoReturn:
    """Say what replaces a program, whatever options it is given.

    Args:
        parser: of the program, with upstream's options.
        argv: its words.
        instead: from the options to the message.

    Raises:
        SystemExit: always, with status 2; 0 after `--help`.
    """
    args, _ = parser.parse_known_args(argv)
    parser.exit(2, f"{parser.prog}: this program does not exist here. {instead(args)}\n")


def server_command(args: argparse.Namespace) -> str:
    """The server's command with the options of a worker that have a meaning there.

    Args:
        args: options of upstream's `model_worker.py`; None and False are left out.
    """
    words = SERVER.split()
    for name in ("model_path", "model_base", "device", "host", "port"):
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += [f"--{name.replace('_', '-')}" for name in ("load_8bit", "load_4bit") if getattr(args, name)]
    return shlex.join(words)
