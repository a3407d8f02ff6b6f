r"""A server with OpenAI's chat API, for VLMEvalKit, the `openai` client and whatever else speaks it.

python -m llava.serve.api --model-path checkpoints/llava-v1.5-7b

Then `POST http://127.0.0.1:8000/v1/chat/completions`, `GET /v1/models`, `GET /health`. Images come inside the request
(`data:image/...;base64,...`). Requests of the same moment are answered in one batch. A key that clients have to give
is read from the environment (LLAVA_API_KEY), where other users of the machine do not see it, or from --api-key.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import FlagError
from llava.eval.answering.options import TEMPLATE_HELP, add_model_options
from llava.inference_options import put_on
from llava.runtime.program import run_program
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, POSITIVE, Range, check_ranges
from llava.serve.body import BodyLimits
from llava.serve.connection import listen, make_server
from llava.serve.defaults import Defaults
from llava.serve.guard import access_of, is_this_machine

if TYPE_CHECKING:
    from llava.serve.app import Settings

KEY = "LLAVA_API_KEY"
RANGES = {
    "port": Range(0, 65535),
    "temperature": Range(0, 2, hint="0 is greedy decoding, and a request may ask for up to 2"),
    "max_new_tokens": COUNT,
    "token_limit": COUNT,
    "batch_size": COUNT,
    "max_waiting": COUNT,
    "gather_ms": NOT_NEGATIVE,
    "request_timeout": POSITIVE,
    "max_images": COUNT,
    "max_image_mb": POSITIVE,
    "max_image_pixels": COUNT,
    "max_request_pixels": COUNT,
    "image_timeout": POSITIVE,
    "max_prompt_chars": COUNT,
    "max_body_mb": POSITIVE,
    "body_timeout": POSITIVE,
}
"""What the server's numbers may be."""

MEGABYTE = 2**20


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.serve.api", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser, required=True)
    add = parser.add_argument
    add("--conv-mode", default=None, help=f"{TEMPLATE_HELP}, by the model's name")
    add("--load-8bit", action="store_true", help="quantise the weights to 8 bits")
    add("--load-4bit", action="store_true", help="quantise the weights to 4 bits")
    add("--temperature", type=float, default=0.2, help="where a request names none; 0: greedy decoding")
    add("--max-new-tokens", type=int, default=512, help="tokens of an answer where a request names none")
    add("--images-first", action="store_true", help="put the images of a message before its texts; default: in order")
    add("--batch-size", type=int, default=16, help="requests answered together; less when memory runs out")
    add("--gather-ms", type=float, default=10, help="milliseconds that a first request waits for others")
    _add_access(parser)
    _add_limits(parser)
    return parser


def _add_access(parser: argparse.ArgumentParser) -> None:
    """Where the server listens, and to whom."""
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; another than this machine needs a key")
    add("--port", type=int, default=8000, help="port to listen on; 0: a free one, which is printed")
    add("--allow-anyone", action="store_true", help="serve other machines without a key")
    add("--api-key", default=None, help=f"key that clients have to give; ps shows it, but not the environment's {KEY}")
    add(
        "--allowed-host",
        action="append",
        default=[],
        metavar="HOST",
        help="further name that clients call this server by and pages come from; '*': any; may be given several times; "
        "default: the address of --host and names of this machine",
    )
    add("--image-folder", type=Path, default=None, help="open file: addresses below this folder; default: none")
    add(
        "--allow-image-host",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch images from this host (name, or name:port); may be given several times; default: none",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """What a request may ask for, and how long it may take."""
    add = parser.add_argument
    add("--token-limit", type=int, default=4096, help="the most tokens of an answer that a request may ask for")
    add("--max-waiting", type=int, default=64, help="requests that may wait; further ones are told to come back (429)")
    add("--request-timeout", type=float, default=300, help="seconds for a whole answer, waiting included")
    add("--max-prompt-chars", type=int, default=Defaults.max_prompt_chars, help="characters of a request's texts")
    add("--max-images", type=int, default=16, help="images in one request")
    add("--max-image-mb", type=float, default=20, help="size of one image as it comes")
    add("--max-image-pixels", type=int, default=200_000_000, help="pixels of one image, padded if it is")
    add("--max-request-pixels", type=int, default=200_000_000, help="pixels of all images of one request")
    add("--image-timeout", type=float, default=10, help="seconds until the images of a request are fetched")
    add("--max-body-mb", type=float, default=64, help="size of one request")
    add("--body-timeout", type=float, default=BodyLimits.seconds, help="seconds until a whole request has arrived")


def settings_of(args: argparse.Namespace) -> Settings:
    """Limits and defaults of the server.

    Raises:
        FlagError: a flag is out of its range, or the server would be open to everybody.
    """
    from llava.eval.answering.conv_mode import choose_conv_mode
    from llava.serve.app import Settings
    from llava.serve.image_urls import ImagePolicy

    check_ranges(args, RANGES, dashes=True)
    if args.token_limit < args.max_new_tokens:
        raise FlagError(f"--token-limit {args.token_limit} is below --max-new-tokens {args.max_new_tokens}")
    if args.load_8bit and args.load_4bit:
        raise FlagError("--load-8bit and --load-4bit exclude each other")
    if args.image_folder is not None and not args.image_folder.is_dir():
        raise FlagError(f"--image-folder {args.image_folder}: no such folder")
    key = _key(args.api_key)
    if key is None and not args.allow_anyone and not is_this_machine(args.host):
        raise FlagError(
            f"--host {args.host}: other machines could ask this server; set {KEY} or --api-key to a key that clients "
            "have to give, or pass --allow-anyone"
        )
    return Settings(
        conv_mode=choose_conv_mode(args.conv_mode, args.model_path),
        defaults=Defaults(
            args.temperature,
            args.max_new_tokens,
            args.token_limit,
            args.max_images,
            args.max_prompt_chars,
            args.images_first,
        ),
        images=ImagePolicy(
            max_bytes=int(args.max_image_mb * MEGABYTE),
            max_pixels=args.max_image_pixels,
            max_request_pixels=args.max_request_pixels,
            folder=args.image_folder,
            hosts=frozenset(host.lower() for host in args.allow_image_host),
            seconds=args.image_timeout,
        ),
        seconds=args.request_timeout,
        body=BodyLimits(int(args.max_body_mb * MEGABYTE), args.body_timeout, args.max_prompt_chars),
        access=access_of(args.host, args.allowed_host, key),
    )


def _key(option: str | None) -> str | None:
    """The key of the option, or of the environment.

    Raises:
        FlagError: a header cannot carry it.
    """
    key, source = (option, "--api-key") if option is not None else (os.environ.get(KEY) or None, KEY)
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise FlagError(f"{source}: a key is one word of printable ASCII characters")
    return key


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until interrupted.

    Raises:
        FlagError: a flag is wrong, the extra `serve` is missing, or the port is taken.
        CheckpointError: the model cannot be loaded.
    """
    args = build_parser().parse_args(argv)
    from llava.eval.answering.loading import load_model
    from llava.serve.app import create_app
    from llava.serve.engine import Engine

    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise FlagError("the server needs FastAPI and uvicorn: pip install 'llava-extensions[serve]'")
    settings = settings_of(args)
    try:  # before the model is loaded, which takes minutes
        listener = listen(args.host, args.port)
    except OSError as error:
        raise FlagError(f"--host {args.host} --port {args.port}: cannot listen there ({error.strerror})") from error
    loaded = load_model(
        args.model_path,
        args.model_base,
        device=args.device,
        torch_dtype=args.torch_dtype,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
    )
    put_on(loaded, args)
    # What is loaded stays, so the collector need not look through it while requests wait.
    gc.collect()
    gc.freeze()
    engine = Engine(loaded, args.batch_size, args.max_waiting, args.gather_ms / 1000)
    address = f"http://{args.host}:{listener.getsockname()[1]}/v1"
    print(f"serving '{loaded.name}' at {address}; try: curl {address}/models", flush=True)
    try:
        make_server(create_app(loaded, engine, settings)).run(sockets=[listener])
    finally:
        gc.unfreeze()


if __name__ == "__main__":
    run_program(main)
