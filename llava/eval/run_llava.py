r"""Ask a model one question about one or several images (upstream `llava/eval/run_llava.py`).

python -m llava.eval.run_llava --model-path checkpoints/llava-v1.5-7b --image-file view.jpg --query "What is shown?"

Several images are given as `a.jpg,b.jpg`, http addresses as they are. `<image-placeholder>` in the question says where
an image goes; without it all images come first.
"""

from __future__ import annotations

import argparse
import io
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import BadImageError
from llava.eval.answering.answers import Task
from llava.eval.answering.options import TEMPLATE_HELP, add_model_options, add_sampling_options
from llava.inference_options import put_on
from llava.runtime.program import run_program

if TYPE_CHECKING:
    from PIL import Image

DOWNLOAD_SECONDS = 60


def build_parser() -> argparse.ArgumentParser:
    """The original options with their defaults, and ours."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.run_llava", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument(
        "--image-file", type=str, required=True, help="file or http address, or several with --sep between"
    )
    parser.add_argument("--query", type=str, required=True, help="the question")
    parser.add_argument("--conv-mode", type=str, default=None, help=f"{TEMPLATE_HELP}, by the model's name")
    parser.add_argument("--sep", type=str, default=",", help="what separates several images")
    add_sampling_options(parser, max_new_tokens=512)
    return parser


def open_image(name: str, where: str) -> Image.Image:
    """Open a file or download an http address, as RGB.

    Raises:
        BadImageError: it cannot be had or read.
    """
    from llava.data.images import load_image, read_rgb

    if not name.startswith(("http://", "https://")):
        path = Path(name).resolve()  # the user may name a link; data sets may not
        return load_image(path.parent, path.name, row=where)
    try:
        with urllib.request.urlopen(name, timeout=DOWNLOAD_SECONDS) as response:  # noqa: S310 - http(s) only, see above
            content = io.BytesIO(response.read())
    except OSError as error:  # URLError
        raise BadImageError(f"{where}: cannot read an image from {name}: {error}") from error
    return read_rgb(content, f"{where}: image {name}")


def eval_model(args: Any) -> str:
    """Ask one question, print the answer and return it.

    Args:
        args: any object with the original options as attributes: `model_path`, `model_base`, `query`, `image_file`,
            `sep`, `conv_mode`, `temperature`, `top_p`, `num_beams`, `max_new_tokens`. `device`, `torch_dtype` and
            `seed` may be missing.

    Raises:
        LlavaError: a flag, an image or the checkpoint is wrong; the message says what to do.
    """
    from llava.eval.answering.conv_mode import choose_conv_mode
    from llava.eval.answering.generation import GenerationOptions
    from llava.eval.answering.loading import load_model
    from llava.eval.answering.runner import answer_batch, load_images, make_prompt

    conv_mode = choose_conv_mode(args.conv_mode, args.model_path)
    options = GenerationOptions(
        args.temperature, args.top_p, args.num_beams, args.max_new_tokens, seed=getattr(args, "seed", 0)
    )
    images = tuple(name.strip() for name in args.image_file.split(args.sep))
    task = Task(0, args.query, args.query, images, where="--query")

    loaded = load_model(
        args.model_path,
        args.model_base,
        device=getattr(args, "device", None),
        torch_dtype=getattr(args, "torch_dtype", "auto"),
    )
    put_on(loaded, args)
    prompt = make_prompt("0", task, loaded, conv_mode)
    answer = answer_batch([prompt], [load_images(task, loaded, open_image)], loaded, options)[prompt.key]
    print(answer)
    return answer


def main(argv: Sequence[str] | None = None) -> str:
    """Run the program; returns the printed answer."""
    return eval_model(build_parser().parse_args(argv))


if __name__ == "__main__":
    run_program(main)
