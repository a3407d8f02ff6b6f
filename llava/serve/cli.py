r"""Talk to a model in the terminal (upstream `llava/serve/cli.py`, with several images and commands).

python -m llava.serve.cli --model-path checkpoints/llava-v1.5-7b --image-file view.jpg other.jpg

In the conversation: `/image PATH ...` shows further images with the next message, `/reset` starts again with the first
ones, `/exit`, an empty line or Ctrl-D ends. Ctrl-C stops an answer. `<image-placeholder>` says where an image goes.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava.conversation import Conversation, SeparatorStyle
from llava.errors import FlagError, LlavaError
from llava.eval.answering.options import TEMPLATE_HELP, add_model_options
from llava.inference_options import put_on
from llava.runtime.program import run_program
from llava.runtime.ranges import COUNT, check_ranges

if TYPE_CHECKING:
    from llava.serve.chat import Chat

HELP = "/image PATH ... shows images with your next message; /reset starts again; /exit ends"


def build_parser() -> argparse.ArgumentParser:
    """The original options with their defaults, and ours."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.serve.cli", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--image-file", nargs="+", default=[], metavar="IMAGE", help="files or http addresses; none: text only")
    add("--conv-mode", type=str, default=None, help=f"{TEMPLATE_HELP}, by the model's name")
    add("--temperature", type=float, default=0.2, help="0: greedy decoding; above 0: sampling")
    add("--top_p", type=float, default=None, help="sample from the most probable tokens up to this mass")
    add("--max-new-tokens", type=int, default=512, help="limit on the tokens of an answer")
    add("--seed", type=int, default=None, help="seed of sampling; none given: another one each time")
    add("--load-8bit", action="store_true", help="quantise the weights to 8 bits")
    add("--load-4bit", action="store_true", help="quantise the weights to 4 bits")
    add("--debug", action="store_true", help="show the prompt and the answer as the model sees them")
    return parser


def start_chat(args: argparse.Namespace) -> Chat:
    """Load the model and the first images.

    Raises:
        LlavaError: a flag, an image or the checkpoint is wrong; the message says what to do.
    """
    from llava.eval.answering.conv_mode import choose_conv_mode
    from llava.eval.answering.generation import GenerationOptions
    from llava.eval.answering.loading import load_model
    from llava.eval.run_llava import open_image
    from llava.serve.chat import Chat

    check_ranges(args, {"max_new_tokens": COUNT}, dashes=True)
    if args.load_8bit and args.load_4bit:
        raise FlagError("--load-8bit and --load-4bit exclude each other")
    conv_mode = choose_conv_mode(args.conv_mode, args.model_path)
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    options = GenerationOptions(args.temperature, args.top_p, max_new_tokens=args.max_new_tokens, seed=seed)
    loaded = load_model(
        args.model_path,
        args.model_base,
        device=args.device,
        torch_dtype=args.torch_dtype,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
    )
    put_on(loaded, args)
    chat = Chat(loaded, conv_mode, options, open_image)
    chat.show(args.image_file)
    return chat


def speaker_names(conversation: Conversation) -> tuple[str, str]:
    """What stands in front of the lines of the user and of the model."""
    named = conversation.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO, SeparatorStyle.LLAMA_2)
    return conversation.roles if named else ("user", "assistant")


def obey(chat: Chat, line: str, first_images: Sequence[str]) -> bool:
    """Carry out a line that begins with a slash.

    Returns:
        False if the conversation is to end.

    Raises:
        LlavaError: an image cannot be shown.
    """
    command, _, rest = line.partition(" ")
    if command == "/exit":
        return False
    if command == "/reset":
        chat.reset()
        chat.show(first_images)
        print("A new conversation.")
    elif command == "/image" and rest.strip():
        try:
            names = shlex.split(rest)
        except ValueError as error:
            raise FlagError(f"/image {rest}: {error}") from error
        chat.show(names)
        print(f"{len(chat.waiting)} image(s) go with your next message.")
    else:
        print(HELP)
    return True


def answer(chat: Chat, message: str, *, debug: bool) -> None:
    """Print the answer to a message as it comes; Ctrl-C stops it and keeps what there is.

    Raises:
        BadSampleError: the message cannot be said.
    """
    pieces = chat.ask(message)
    print(f"{speaker_names(chat.conversation)[1]}: ", end="", flush=True)
    with contextlib.closing(pieces):
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
    print()
    if debug:
        print(f"\n{ {'conversation': chat.conversation.get_prompt(), 'images': len(chat.images)} }\n")


def main(argv: Sequence[str] | None = None) -> Chat:
    """Run the program until the user ends it.

    Returns:
        the conversation as it was at the end.

    Raises:
        LlavaError: a flag, a first image or the checkpoint is wrong; the message says what to do.
    """
    args = build_parser().parse_args(argv)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` a history and line editing
    chat = start_chat(args)
    print(HELP)
    while True:
        try:
            line = input(f"{speaker_names(chat.conversation)[0]}: ").strip()
        except (EOFError, KeyboardInterrupt):
            line = ""
            print()
        if not line:
            break
        try:
            if not line.startswith("/"):
                answer(chat, line, debug=args.debug)
            elif not obey(chat, line, args.image_file):
                break
        except LlavaError as error:  # of this message or image alone; the conversation continues
            print(f"error: {error}")
    print("exit...")
    return chat


if __name__ == "__main__":
    run_program(main)
