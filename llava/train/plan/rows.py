"""The rows of a plan: one image and an answer that fills the planned length, prepared and collated as rows of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from llava.data.dataset import LazySupervisedDataset
from llava.data.tiling import parse_grid_pinpoints
from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.train.build import build_dataset
from llava.train.options import RunArguments

QUESTION, WORD = "<image>\nWhat is in the image?", "house "


def planned_rows(args: RunArguments, tokenizer: Any, llava: LlavaForCausalLM, copies: int = 1) -> LazySupervisedDataset:
    """Rows of the longest length, all of whose answer is trained: the most that a row can take.

    They are written into the output folder, a temporary one. With `anyres` the image has as many tiles as the settings
    allow; without a tower the rows are text.
    """
    folder = Path(args.training.output_dir) / "rows"
    folder.mkdir(parents=True)
    question, row = QUESTION, {"id": "0"}
    if llava.get_vision_tower() is None:
        question = QUESTION.removeprefix("<image>\n")
    else:
        Image.new("RGB", _size(args, llava), (127, 127, 127)).save(folder / "image.png")
        row["image"] = "image.png"
    turns = [
        {"from": "human", "value": question},
        {"from": "gpt", "value": WORD * (args.training.model_max_length + 8)},
    ]
    (folder / "rows.json").write_text(json.dumps([row | {"conversations": turns}]), encoding="utf-8")
    args.data.data_path, args.data.image_folder, args.data.streaming = (
        [f"{folder / 'rows.json'}@{copies}"],
        str(folder),
        False,
    )
    return build_dataset(args, tokenizer, llava)


def _size(args: RunArguments, llava: LlavaForCausalLM) -> tuple[int, int]:
    """Width and height of the image."""
    side = llava.get_vision_tower().image_size
    if args.data.image_aspect_ratio != "anyres":
        return side, side
    return max(parse_grid_pinpoints(args.data.image_grid_pinpoints), key=lambda size: size[0] * size[1])
