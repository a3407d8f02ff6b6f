"""A training sample compared with transformers' own processors: computing time from file and turns to tensors.

    python -m benchmarks.preprocessing --output benchmarks/results/preprocessing-cpu.json

Each case is one photograph (a JPEG of 640 x 480 pixels) or one conversation of three rounds. Ours gives labels too; the
processors of transformers do not. The time is that of the process: tokenizers works in a thread of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    LlavaImageProcessor,
    LlavaImageProcessorPil,
    LlavaNextImageProcessor,
    LlavaNextImageProcessorPil,
    LlavaProcessor,
)

from benchmarks.measuring import Clock, take_turns
from benchmarks.record import ROOT, check_run, provenance, show_and_write
from llava.data.dataset import LazySupervisedDataset
from llava.data.images import ImageTransform, load_image
from llava.data.labels import tokenize_conversation
from llava.data.templates import select_template
from llava.data.tiling import ImageLength
from llava.runtime.program import run_program
from llava.runtime.tokenizer import load_tokenizer

PROGRAM = "benchmarks.preprocessing"
SIDE, PATCHES, PIECES = 336, 576, 4000
PINPOINTS = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
WAYS = ("ours", "pillow", "torchvision")
"""Columns; the last two are processors of transformers, by what they scale with."""

Run = Callable[[], Any]


def write_photograph(path: Path) -> None:
    """A JPEG with large shapes and fine grain, as cameras make them."""
    generator = np.random.default_rng(0)
    shapes = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480))
    grain = np.asarray(shapes).astype(np.int64) + generator.integers(-8, 9, (480, 640, 3))
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def write_tokenizer(folder: Path, text: str) -> None:
    """A tokenizer of Llama's kind with pieces of `text`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in text.splitlines() if line.strip()),
        model_writer=model,
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "model_max_length": 2048}
    config |= {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def turns_of(text: str) -> list[dict[str, str]]:
    """Three rounds of a question of 12 words and an answer of 60."""
    words = re.findall(r"[A-Za-z]+[,.]?", text)
    turns = []
    for number in range(3):
        start = 100 * number
        question = " ".join(words[start : start + 12]) + "?"
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": " ".join(words[start + 12 : start + 72])})
    return turns


def cases(folder: Path) -> dict[str, dict[str, Run]]:
    """What is timed, by case and way; each gives what was made."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    write_photograph(folder / "photograph.jpg")
    write_tokenizer(folder, text)
    turns, template = turns_of(text), select_template("v1")
    (folder / "data.json").write_text(json.dumps([{"image": "photograph.jpg", "conversations": turns}]))
    # Both tokenizers read the same pieces; only ours gives the ids that LLaVA was trained with.
    ours, fast = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    fast.add_tokens(["<image>"], special_tokens=True)
    # The same settings for all processors; transformers has one that pads, and one that cuts tiles.
    crop = {"height": SIDE, "width": SIDE}
    clip = {"size": {"shortest_edge": SIDE}, "crop_size": crop}
    pillow, torchvision = CLIPImageProcessorPil(**clip), CLIPImageProcessor(**clip)
    prompt = tokenize_conversation(turns, ours, template, image_count=1).prompt
    peers = {
        "square": (pillow, torchvision),
        "pad": (LlavaImageProcessorPil(**clip, do_pad=True), LlavaImageProcessor(**clip, do_pad=True)),
        "anyres": tuple(
            kind(**clip, image_grid_pinpoints=[[height, width] for width, height in PINPOINTS])
            for kind in (LlavaNextImageProcessorPil, LlavaNextImageProcessor)
        ),
    }
    # From the file to pixel values.
    found: dict[str, dict[str, Run]] = {}
    for aspect_ratio, processors in peers.items():
        transform = ImageTransform(pillow, aspect_ratio, PINPOINTS)
        found[f"image, {aspect_ratio}"] = {"ours": lambda do=transform: do(load_image(folder, "photograph.jpg")).pixels}
        for name, processor in zip(WAYS[1:], processors, strict=True):
            found[f"image, {aspect_ratio}"][name] = lambda do=processor: of_file(do, folder)["pixel_values"][0]
    # From turns to ids and labels, and from the finished prompt to ids.
    found["tokens, three rounds"] = {
        "ours": lambda: tokenize_conversation(turns, ours, template, image_count=1, max_length=2048).input_ids,
        "pillow": lambda: fast(prompt, return_tensors="pt").input_ids[0],
    }
    # Both: an item of the data set, and what a processor makes of the file and the finished prompt.
    data = LazySupervisedDataset(
        folder / "data.json",
        ours,
        pillow,
        template=template,
        image_folder=folder,
        image_aspect_ratio="square",
        is_multimodal=True,
        mm_use_im_start_end=False,
        model_max_length=2048,
        image_length=ImageLength(PATCHES),
    )
    found["sample, square"] = {"ours": lambda: data[0]["image"]}
    for name, processor in zip(WAYS[1:], peers["square"], strict=True):
        whole = LlavaProcessor(processor, fast, 14, "default", num_additional_image_tokens=1)
        found["sample, square"][name] = lambda do=whole: of_file(do, folder, text=prompt)["pixel_values"][0]
    return found


def of_file(processor: Any, folder: Path, **options: Any) -> Any:
    """What a processor makes of the photograph, its file opened as RGB."""
    with Image.open(folder / "photograph.jpg") as image:
        return processor(images=image.convert("RGB"), return_tensors="pt", **options)


def measure(runs: Mapping[str, Run], rounds: int) -> dict[str, Any]:
    """Milliseconds of every way, their ratios, and how far their values differ from ours."""
    made: dict[str, Tensor] = {name: run() for name, run in runs.items()}
    spent = take_turns(runs, Clock("process", time.process_time), rounds, warmup=0)
    others = [name for name in runs if name != "ours"]
    return {
        "milliseconds": {name: 1e3 * statistics.median(each) for name, each in spent.items()},
        "ratio": {
            name: statistics.median(a / b for a, b in zip(spent["ours"], spent[name], strict=True)) for name in others
        },
        "difference": {
            name: (made[name] - made["ours"]).abs().max().item() if made[name].shape == made["ours"].shape else None
            for name in others
        },
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per case."""
    columns = ("", "ours (ms)", "Pillow (ms)", "torchvision (ms)", "ours / Pillow", "ours / torchvision")
    columns += ("difference from Pillow", "from torchvision")
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " --: |" * (len(columns) - 1)]
    for case, result in results.items():
        cells = [case, *(_number(result["milliseconds"].get(name), ".2f") for name in WAYS)]
        cells += [_number(result["ratio"].get(name), ".2f") for name in WAYS[1:]]
        cells += [_number(result["difference"].get(name), ".1g") for name in WAYS[1:]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def document(record: Mapping[str, Any]) -> str:
    """The Markdown file of a record."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return (
        f"# Preprocessing and transformers' processors: {record['machine']['cpu']}, 1 thread\n\n"
        f"{record['date'][:10]}; {versions}; computing time of the process, median of {record['rounds']} rounds; "
        f"{PIECES:,} pieces in the vocabulary; the tokenizer of transformers alone is in the column of Pillow."
        f"\n\n```console\n$ {record['command']}\n```\n\n{table(record['cases'])}\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, show the table and write it.

    Raises:
        FlagError: the output is no .json file.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each case (default %(default)s)")
    parser.add_argument("--output", type=Path, default=None, help="JSON file; the table is written next to it as .md")
    args = parser.parse_args(argv)
    check_run("cpu", args.output)
    words = [*(["--rounds", str(args.rounds)] if args.rounds != 15 else [])]
    words += [] if args.output is None else ["--output", str(args.output)]
    record = provenance(PROGRAM, words, torch.device("cpu")) | {"rounds": args.rounds}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            record["cases"] = {case: measure(runs, args.rounds) for case, runs in cases(Path(folder)).items()}
    finally:
        torch.set_num_threads(threads)
    show_and_write(record, document(record), args.output)


if __name__ == "__main__":
    run_program(main)
