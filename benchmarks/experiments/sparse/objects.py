r"""How many of the image tokens that a sparse model keeps lie on an object, in images of NLVR.

python -m benchmarks.experiments.sparse.objects --model-path checkpoints/sparse/late-learned-0.2-0 \
    --question-file checkpoints/sparse/questions.jsonl --image-folder data/nlvr --figure kept.png

Objects are yellow, blue or black on grey, so a pixel of an object is colourful or dark.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image

from benchmarks.experiments.sparse.rules import NAME
from dynamic.figures import KeptImage, draw_sheet
from dynamic.inspection import record_decisions
from llava.data.images import load_image
from llava.errors import CheckpointError
from llava.eval.answering.loading import load_model
from llava.eval.answering.questions import read_questions
from llava.eval.answering.runner import image_arguments, load_images, make_prompt
from llava.eval.model_vqa_loader import make_task
from llava.runtime.output import replacing
from llava.runtime.program import run_program

COLOURFUL = 60
"""Difference of the largest and the smallest channel from which a pixel counts as yellow or blue."""
DARK = 60
"""Largest channel below which a pixel counts as black."""
COVERED = 0.1
"""Share of a patch's pixels from which it shows an object."""
DRAWN = 3


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="sparse checkpoint")
    parser.add_argument("--question-file", required=True, help="questions whose images are looked at, each once")
    parser.add_argument("--image-folder", required=True, help="folder that image names are relative to")
    parser.add_argument("--conv-mode", default="v1", help="conversation template")
    parser.add_argument("--limit", type=int, default=100, help="images")
    parser.add_argument("--figure", type=Path, default=None, help="draw the first images into this PNG")
    return parser


def object_patches(image: Image.Image, side: int) -> set[int]:
    """Indices of the patches that show an object, in a grid of `side` x `side`, row by row."""
    resized = image.convert("RGB").resize((side * 12, side * 12))
    pixels = numpy.asarray(resized).astype(int)  # (height, width, 3)
    spread, brightest = pixels.max(axis=2) - pixels.min(axis=2), pixels.max(axis=2)
    on_object = (spread > COLOURFUL) | (brightest < DARK)
    covered = on_object.reshape(side, 12, side, 12).mean(axis=(1, 3)).flatten()  # (P,)
    return set(numpy.flatnonzero(covered > COVERED).tolist())


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program; returns the shares that it prints.

    Raises:
        LlavaError: a flag, a row, an image or the checkpoint is wrong; the message says what to do.
    """
    args = build_parser().parse_args(argv)
    loaded = load_model(args.model_path, device="cpu")
    if NAME not in loaded.model.extensions.configs:
        raise CheckpointError(f"{args.model_path}: a dense model, which keeps everything; name a sparse one")
    side = math.isqrt(loaded.patches_per_image)
    by_image = {question.images[0]: question for question in read_questions(args.question_file) if question.images}
    patches = objects = kept = kept_objects = 0
    drawn: list[KeptImage] = []
    for name, question in list(by_image.items())[: args.limit]:
        task = make_task(question)
        images = load_images(task, loaded, lambda image, where: load_image(args.image_folder, image, row=where))
        prompt = make_prompt("0", task, loaded, args.conv_mode)
        with torch.no_grad(), record_decisions(loaded.model) as log:
            loaded.model(input_ids=prompt.input_ids[None], **image_arguments([images], loaded), logits_to_keep=1)
        image = load_image(args.image_folder, name, row=question.where)
        chosen, shown = log.prompts[0].images(0)[0].tolist(), object_patches(image, side)
        patches, objects = patches + side**2, objects + len(shown)
        kept, kept_objects = kept + len(chosen), kept_objects + len(shown.intersection(chosen))
        if len(drawn) < DRAWN:
            drawn.append(KeptImage(image, (side, side), chosen))
    shares = {
        "patches with an object": objects / patches,
        "kept patches": kept / patches,
        "kept patches with an object, of those kept": kept_objects / kept,
        "kept patches with an object, of those with one": kept_objects / objects,
    }
    for title, share in shares.items():
        print(f"{title}: {100 * share:.1f} %")
    if args.figure is not None:
        with replacing(args.figure) as partial:
            draw_sheet(drawn, [], side=200).save(partial)
    return shares


if __name__ == "__main__":
    run_program(main)
