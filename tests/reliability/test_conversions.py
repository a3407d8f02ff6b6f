"""Programs that write another folder from damaged ones: what they write is the same model, or an error names the file.

`LLAVA_FUZZ=all` tries every damage, a seeded choice runs otherwise (see `choice.py`). Nothing is written when refused.
"""

from __future__ import annotations

import json
import operator
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava.convert.hf import from_hf, to_hf
from llava.convert.hf_format import SETTINGS_KEY
from llava.errors import LlavaError
from llava.model.delta import combine
from llava.model.full_weights import write_full_weights
from tests.reliability.choice import chosen
from tests.reliability.damage import Damage, damages
from tests.reliability.loading import LLAVA, PROMPT, SUBJECTS, Subject, image, numbers, verdict
from tests.reliability.test_loading import matters, undetectable

FULL, BASE, CLIP = (LLAVA / name for name in ("tiny-llava-v1.5", "tiny-vicuna", "tiny-clip"))
HF, DELTA, OUTPUT = "hf", "delta", "output"
Numbers = dict[str, Tensor]


@torch.no_grad()
def hf_numbers(folder: Path) -> Numbers:
    """What plain transformers computes from a converted folder."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    inputs = AutoProcessor.from_pretrained(folder)(text=PROMPT, images=[image()], return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    found = {"ids": inputs.input_ids, "pixels": inputs.pixel_values, "tokens": tokens}
    return found | {"logits": model(**inputs).logits}


def our_numbers(folder: Path) -> Numbers:
    """What a written folder computes here."""
    return numbers(folder.parent, Subject((), folder.name, folder.name))


@dataclass(frozen=True)
class Conversion:
    """A program on one of the folders that it reads.

    Attributes:
        prepare: writes the folders next to each other.
        damaged: the one that is spoiled.
        run: the program, given where the folders are.
        result: numbers of the folder that it wrote.
    """

    prepare: Callable[[Path], object]
    damaged: str
    run: Callable[[Path], object]
    result: Callable[[Path], Numbers]


def of_checkpoint(subject: Subject, program: Callable[..., object], result: Callable[[Path], Numbers]) -> Conversion:
    """A program that reads whatever `load_pretrained_model` does."""
    return Conversion(
        subject.copy,
        subject.damaged,
        lambda folder: program(
            folder / subject.model, folder / OUTPUT, model_base=subject.base and str(folder / subject.base)
        ),
        result,
    )


def prepare_hf(folder: Path) -> None:
    for part in (FULL, CLIP):
        shutil.copytree(part, folder / "source" / part.name)
    to_hf(folder / "source" / FULL.name, folder / HF)


def prepare_foreign_hf(folder: Path) -> None:
    """As another program writes it: nothing of ours is recorded, and images are treated as an older file says."""
    prepare_hf(folder)
    path = folder / HF / "config.json"
    content = json.loads(path.read_text())
    del content[SETTINGS_KEY]
    path.write_text(json.dumps(content))
    path = folder / HF / "processor_config.json"
    content = json.loads(path.read_text())
    (path.parent / "preprocessor_config.json").write_text(json.dumps(content.pop("image_processor")))
    path.write_text(json.dumps(content))


def prepare_delta(folder: Path) -> None:
    for part in (FULL, BASE, CLIP):
        shutil.copytree(part, folder / part.name)
    combine(folder / BASE.name, folder / FULL.name, folder / DELTA, operator.sub)


def apply(folder: Path) -> None:
    combine(folder / BASE.name, folder / DELTA, folder / OUTPUT, operator.add)


def make(folder: Path) -> None:
    combine(folder / BASE.name, folder / FULL.name, folder / OUTPUT, operator.sub)


def sums(folder: Path) -> Numbers:
    """Of a difference: numbers of the LLaVA that the whole base makes of it."""
    try:
        combine(BASE, folder, folder.parent / "sum", operator.add)
        return our_numbers(folder.parent / "sum")
    finally:
        shutil.rmtree(folder.parent / "sum", ignore_errors=True)


CONVERSIONS: dict[str, Conversion] = {
    **{f"to-hf, {name}": of_checkpoint(subject, to_hf, hf_numbers) for name, subject in SUBJECTS.items()},
    **{f"full, {name}": of_checkpoint(subject, write_full_weights, our_numbers) for name, subject in SUBJECTS.items()},
    "from-hf": Conversion(prepare_hf, HF, lambda folder: from_hf(folder / HF, folder / OUTPUT), our_numbers),
    "from-hf, foreign": Conversion(
        prepare_foreign_hf, HF, lambda folder: from_hf(folder / HF, folder / OUTPUT), our_numbers
    ),
    "apply_delta, difference": Conversion(prepare_delta, DELTA, apply, our_numbers),
    "apply_delta, base": Conversion(prepare_delta, BASE.name, apply, our_numbers),
    "make_delta, LLaVA": Conversion(prepare_delta, FULL.name, make, sums),
    "make_delta, base": Conversion(prepare_delta, BASE.name, make, sums),
}
"""`full` is what `consolidate` and `merge_lora_weights` do."""


def converted(conversion: Conversion, folder: Path) -> Numbers:
    """Numbers of what the program wrote. An error about that is a fault, whatever its kind."""
    try:
        conversion.run(folder)
        try:
            return conversion.result(folder / OUTPUT)
        except LlavaError as error:
            raise RuntimeError(f"what was written does not load: {error}") from error
    finally:
        shutil.rmtree(folder / OUTPUT, ignore_errors=True)


def left_out(damage: Damage) -> bool:
    """What transformers' format leaves out where it equals a default: a missing value there is that default.

    Published folders are written so, and those of earlier versions have no `do_pad`.
    """
    inner = damage.file == "config.json" and damage.kind.startswith(("text_config.", "vision_config."))
    return (inner or "do_pad" in damage.kind) and damage.kind.endswith(" removed")


def corpus(conversion: Conversion, folder: Path) -> list[Damage]:
    """Every damage that a reader of the folder can tell."""
    used = matters if "clip" in conversion.damaged else lambda name: True
    found = [damage for damage in damages(folder / conversion.damaged, used) if not undetectable(damage)]
    return [damage for damage in found if conversion.damaged != HF or not left_out(damage)]


def judge(conversion: Conversion, damage: Damage, folder: Path, whole: Numbers) -> str:
    """Spoil one file, run the program, and put the file back."""
    path = folder / conversion.damaged / damage.file
    kept, before = path.read_bytes(), sorted(folder.iterdir())
    try:
        damage.apply(path)
        found = verdict(lambda: converted(conversion, folder), damage, whole)
        return found if sorted(folder.iterdir()) == before else "FAULT: leaves something behind"
    finally:
        path.write_bytes(kept)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_damaged_folders(name: str, tmp_path: Path) -> None:
    """The corpus."""
    conversion = CONVERSIONS[name]
    conversion.prepare(tmp_path)
    whole = converted(conversion, tmp_path)
    tried = chosen(corpus(conversion, tmp_path), 6)
    verdicts = {damage.name: judge(conversion, damage, tmp_path, whole) for damage in tried}
    faults = [f"{damage}: {found}" for damage, found in verdicts.items() if found.startswith("FAULT")]
    assert not faults, "\n".join(faults)
    assert len(verdicts) > 5
