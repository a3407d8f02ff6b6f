"""One LLaVA of random weights in both formats for `benchmarks/peers.py`: ours, and transformers' own.

Images have the size that the tower takes, so both processors give the same pixels; what a comparison measures is
therefore without resizing.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from benchmarks.llava_models import Shape, question, write_image, write_llava
from llava.convert.hf import to_hf
from llava.errors import FlagError
from llava.eval.answering.answers import Task
from llava.eval.answering.loading import LoadedModel, load_model


@dataclass(frozen=True)
class Pair:
    """The folders of one model.

    Attributes:
        ours, theirs: the model in both formats.
        tower: of ours.
        images: drawn images, `0.png` and so on.
        shape: sizes.
    """

    ours: Path
    theirs: Path
    tower: Path
    images: Path
    shape: Shape


def build_pair(folder: Path, shape: Shape, images: int) -> Pair:
    """Write the model in float32 and `images` images of noise into `folder`."""
    written = write_llava(folder, shape, torch.float32)
    with contextlib.redirect_stdout(io.StringIO()):
        to_hf(written.llava, folder / "hf")
    drawn = folder / "images"
    drawn.mkdir()
    random = Random(1)
    for number in range(images):
        write_image(drawn / f"{number}.png", shape.image, random)
    return Pair(written.llava, folder / "hf", written.tower, drawn, shape)


def tasks_of(pair: Pair, count: int) -> list[Task]:
    """Questions, each about an image of its own."""
    random = Random(2)
    return [Task(number, question(random), "", (f"{number}.png",), f"question {number}") for number in range(count)]


def load_ours(pair: Pair) -> LoadedModel:
    """Our model as the evaluation programs load it."""
    return load_model(str(pair.ours), device="cpu", torch_dtype="float32")


def load_theirs(pair: Pair) -> tuple[Any, Any]:
    """Transformers' model and its processor, which pads on the left."""
    model: Any = LlavaForConditionalGeneration.from_pretrained(pair.theirs, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(pair.theirs)
    processor.tokenizer.padding_side = "left"
    return model.eval(), processor


def check_equal(what: str, ours: Sequence[Any], theirs: Sequence[Any], tolerance: float = 0.0) -> None:
    """Refuse to compare the time of what is not the same work.

    Args:
        what: for the message.
        ours: numbers or texts.
        theirs: the same of the peer.
        tolerance: of numbers, relative.

    Raises:
        FlagError: they differ; says where.
    """
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        same = one == other if not tolerance else abs(one - other) <= tolerance * max(abs(one), abs(other))
        if not same:
            raise FlagError(f"{what}: number {place} is {one!r} here and {other!r} there; nothing is timed")
