"""Complete tiny folders, what a program gets out of them, and the verdict on a damaged one."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.data.pixels import process_images
from llava.errors import LlavaError
from llava.eval.answering.prompts import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from tests.golden import golden_dir
from tests.reliability.damage import Damage

LLAVA = golden_dir("llava")
PROMPT = "A chat. USER: <image>\nWhat is shown in this picture? ASSISTANT:"


@dataclass(frozen=True)
class Subject:
    """A folder that a program reads.

    Attributes:
        parts: folders to copy next to each other.
        damaged: the one that is spoiled.
        model, base: what is loaded.
    """

    parts: tuple[Path, ...]
    damaged: str
    model: str
    base: str | None = None

    def copy(self, folder: Path) -> Path:
        """Copies in `folder`, made where missing; returns the one to spoil."""
        for part in self.parts:
            if not (folder / part.name).exists():
                shutil.copytree(part, folder / part.name)
        return folder / self.damaged


def image() -> Image.Image:
    """Noise, so that every pixel matters."""
    generator = torch.Generator().manual_seed(3)
    return Image.fromarray(torch.randint(256, (40, 50, 3), generator=generator, dtype=torch.uint8).numpy())


@torch.no_grad()
def numbers(folder: Path, subject: Subject) -> dict[str, Tensor]:
    """What a loaded model computes: ids, pixels, logits and greedy tokens."""
    base = None if subject.base is None else str(folder / subject.base)
    tokenizer, model, processor, length = load_pretrained_model(str(folder / subject.model), base, device="cpu")
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
    pixels = process_images([image()], processor, model.config)
    output = model(input_ids=ids, images=pixels)
    tokens = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=4)
    return {"ids": ids, "pixels": pixels, "logits": output.logits, "tokens": tokens, "length": torch.tensor(length)}


def verdict(result: Callable[[], dict[str, Any]], damage: Damage, whole: dict[str, Any]) -> str:
    """`equal` or `refused`, or what is wrong."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = result()
    except LlavaError as error:
        name = Path(damage.file).name
        return "refused" if name in str(error) else f"FAULT: does not name {name}: {str(error)[:300]}"
    except Exception as error:
        return f"FAULT: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    other = [key for key, value in whole.items() if key not in found or not torch.equal(found[key], value)]
    return f"FAULT: other {', '.join(other)}" if other else "equal"


def judge(subject: Subject, damage: Damage, work: Path, whole: dict[str, Any]) -> str:
    """Spoil one file of a copy, load it, and put the file back."""
    folder = subject.copy(work)
    path = folder / damage.file
    kept = path.read_bytes()
    try:
        damage.apply(path)
        return verdict(lambda: numbers(work, subject), damage, whole)
    finally:
        path.write_bytes(kept)


SUBJECTS: dict[str, Subject] = {
    "full weights": Subject((LLAVA / "tiny-llava-v1.5", LLAVA / "tiny-clip"), "tiny-llava-v1.5", "tiny-llava-v1.5"),
    "tower": Subject((LLAVA / "tiny-llava-v1.5", LLAVA / "tiny-clip"), "tiny-clip", "tiny-llava-v1.5"),
    "LoRA": Subject(
        (LLAVA / "tiny-llava-lora", LLAVA / "tiny-vicuna", LLAVA / "tiny-clip"),
        "tiny-llava-lora",
        "tiny-llava-lora",
        "tiny-vicuna",
    ),
    "base": Subject(
        (LLAVA / "tiny-llava-lora", LLAVA / "tiny-vicuna", LLAVA / "tiny-clip"),
        "tiny-vicuna",
        "tiny-llava-lora",
        "tiny-vicuna",
    ),
    "projector": Subject(
        (LLAVA / "tiny-llava-pretrain", LLAVA / "tiny-vicuna", LLAVA / "tiny-clip"),
        "tiny-llava-pretrain",
        "tiny-llava-pretrain",
        "tiny-vicuna",
    ),
}
