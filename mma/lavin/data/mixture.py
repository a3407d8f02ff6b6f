"""The chatbot's training data: Alpaca's instructions and LLaVA's 158k answers about COCO images in one file.

python -m mma.data.mixture --data_root ../data

Reads `alpaca_data.json`, `complex_reasoning_77k.json`, `detail_23k.json` and `conversation_58k.json` and writes
`all_data.json`, the same that the original's `tools/data_processing.py` writes from them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError
from llava.eval.answering.questions import read_json
from llava.runtime.output import replace_text
from llava.runtime.places import Input, refuse_file
from llava.runtime.program import run_program
from mma.lavin.data.instructions import COCO, MIXTURE_FILE
from mma.lavin.data.prompts import instruction_prompt

ALPACA_FILE = "alpaca_data.json"
SINGLE_FILES = ("complex_reasoning_77k.json", "detail_23k.json")
"""Of these only the first question and answer of each conversation are taken."""

CONVERSATION_FILE = "conversation_58k.json"
"""Of this every question and answer, each as an item of its own."""

Item = dict[str, Any]


def alpaca_items(path: Path) -> Iterator[Item]:
    """Text-only items.

    Raises:
        BadSampleError: the file or an entry is malformed.
    """
    for number, entry in enumerate(read_json(path, list)):
        keys = ("instruction", "input", "output")
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
            raise BadSampleError(f"{path}, row {number}: expected the texts {', '.join(keys)}, found {entry!r:.80}")
        yield {
            "instruction": instruction_prompt(f"{entry['instruction']} {entry['input']}"),
            "answer": entry["output"],
            "image": None,
            "options": None,
            "image_source": None,
            "qid": f"alpaca_{number}",
        }


def without_marker(question: str) -> str:
    """A question without the `<image>` that stands beside a line feed; one within a line is left."""
    return question.replace("<image>\n", "").replace("\n<image>", "")


def _pairs(entry: Any, where: str) -> list[tuple[int, str, str]]:
    """Number, question and answer of each pair of turns."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not isinstance(entry.get("image"), str):
        raise BadSampleError(f"{where}: expected an image and at least two turns, found {entry!r:.80}")
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise BadSampleError(f"{where}: a turn has no text 'value'")
    return [(start, turns[start]["value"], turns[start + 1]["value"]) for start in range(0, len(turns) - 1, 2)]


def _image_item(image: str, question: str, answer: str, name: str) -> Item:
    return {
        "instruction": instruction_prompt(without_marker(question)),
        "answer": answer,
        "image": image,
        "image_source": COCO,
        "options": None,
        "qid": name,
    }


def llava_items(folder: Path) -> Iterator[Item]:
    """Items about images.

    Raises:
        BadSampleError: a file or an entry is malformed.
    """
    number = 0
    for name in SINGLE_FILES:
        for row, entry in enumerate(read_json(folder / name, list)):
            _, question, answer = _pairs(entry, f"{folder / name}, row {row}")[0]
            yield _image_item(entry["image"], question, answer, f"gpt4_{number}")
            number += 1
    for row, entry in enumerate(read_json(folder / CONVERSATION_FILE, list)):
        for turn, question, answer in _pairs(entry, f"{folder / CONVERSATION_FILE}, row {row}"):
            yield _image_item(entry["image"], question, answer, f"gpt4_2_{row}_{turn}")


def build_mixture(data_root: Path, llava_root: Path | None = None) -> dict[str, list[Item]]:
    """What `all_data.json` holds.

    Args:
        data_root: folder with Alpaca's file.
        llava_root: folder with LLaVA's three files; None: the same.

    Raises:
        BadSampleError: a file or an entry is malformed.
    """
    return {"all": [*alpaca_items(data_root / ALPACA_FILE), *llava_items(llava_root or data_root)]}


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m mma.data.mixture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_root", type=Path, default=Path("../data"), help=f"folder with {ALPACA_FILE}")
    parser.add_argument("--llava_root", type=Path, default=None, help="folder with LLaVA's files; default: the same")
    parser.add_argument("--output", type=Path, default=None, help=f"file to write; default: {MIXTURE_FILE} beside them")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program.

    Raises:
        BadSampleError: a file or an entry is malformed.
    """
    args = build_parser().parse_args(argv)
    folders = [args.data_root, args.llava_root or args.data_root]
    names = (ALPACA_FILE, *SINGLE_FILES, CONVERSATION_FILE)
    inputs = [Input("the data", folder / name) for folder in folders for name in names]
    if args.output is not None:
        refuse_file("--output", args.output, inputs)
    mixture = build_mixture(args.data_root, args.llava_root)
    output = args.output or args.data_root / MIXTURE_FILE
    replace_text(output, json.dumps(mixture))
    images = sum(item["image"] is not None for item in mixture["all"])
    print(f"written: {output}, {len(mixture['all'])} items, {images} of them about an image")
    print(f"next: python -m mma.train --do_pretrain --data_root {output.parent} --output_dir OUTPUT")
    return output


if __name__ == "__main__":
    run_program(main)
