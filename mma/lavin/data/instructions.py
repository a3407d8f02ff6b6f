"""The chatbot mixture `all_data.json` (`mma/lavin/data/mixture.py` makes it), as rows that llava's data set takes.

data_root/all_data.json, images/train2014/COCO_train2014_<name> (COCO), images/train/<id>/image.png (ScienceQA)
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llava.data.rows import MemoryRows, Row, RowFiles
from llava.errors import BadSampleError
from llava.eval.answering.questions import read_json
from mma.lavin.data.scienceqa import IMAGE_NAME, IMAGES_FOLDER, conversation_row

MIXTURE_FILE = "all_data.json"
COCO, SCIENCEQA = "mscoco", "sqa"
"""Values of `image_source`."""

COCO_FOLDER, COCO_PREFIX = "train2014", "COCO_train2014_"


def image_name(item: dict[str, Any], present: Collection[str], where: str) -> str | None:
    """Name of an item's image in the image folder; None if it has none.

    COCO's own file names begin with `COCO_train2014_`; files without that are found too.

    Args:
        item: of the mixture.
        present: names of the files in COCO's folder.
        where: for messages.

    Raises:
        BadSampleError: the source of the image is unknown.
    """
    name, source = item.get("image"), item.get("image_source")
    if name is None:
        return None
    if source == SCIENCEQA:
        return f"train/{item['qid']}/{IMAGE_NAME}"
    if source != COCO:
        raise BadSampleError(f"{where}: the image is from {source!r}; known are {COCO!r} and {SCIENCEQA!r}")
    return f"{COCO_FOLDER}/{name if name in present else COCO_PREFIX + name}"


def _row(item: Any, present: Collection[str], where: str) -> Row:
    keys = ("instruction", "answer", "qid")
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in keys):
        raise BadSampleError(f"{where}: expected an object with the texts {', '.join(keys)}, found {item!r:.80}")
    return conversation_row(item["qid"], item["instruction"], item["answer"], image_name(item, present, where))


def read_mixture(data_root: str | Path) -> tuple[RowFiles, Path]:
    """The rows of the mixture, and the folder that their image names are relative to: COCO's, if all are there.

    Raises:
        BadSampleError: the file is missing or malformed.
    """
    path, images = Path(data_root) / MIXTURE_FILE, Path(data_root) / IMAGES_FOLDER
    items = read_json(path, dict).get("all")
    if not isinstance(items, list) or not items:
        raise BadSampleError(f"{path}: has no list 'all'; python -m mma.data.mixture writes the file")
    coco = images / COCO_FOLDER
    present = frozenset(os.listdir(coco) if coco.is_dir() else ())  # asking for each file would take minutes
    rows = [_row(item, present, f"{path}, row {number}") for number, item in enumerate(items)]
    names = [row["image"] for row in rows if "image" in row]
    if names and all(name.startswith(f"{COCO_FOLDER}/") for name in names):  # COCO often lies behind a link
        images = coco
        for row in rows:
            if "image" in row:
                row["image"] = row["image"].removeprefix(f"{COCO_FOLDER}/")
    return RowFiles([MemoryRows(path, rows)]), images
