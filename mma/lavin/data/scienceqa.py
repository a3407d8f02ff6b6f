"""ScienceQA: `problems.json`, `pid_splits.json`, captions and images, as rows that llava's data set takes.

data_root/problems.json, pid_splits.json, images/<split>/<id>/image.png         caption_file: {"captions": {id: ...}}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.data.rows import MemoryRows, Row, RowFiles
from llava.errors import BadSampleError, FlagError
from llava.eval.answering.questions import read_json
from mma.lavin.data.prompts import FORMATS, OPTIONS, Problem, build_prompt

PROBLEMS_FILE, SPLITS_FILE = "problems.json", "pid_splits.json"
IMAGES_FOLDER = "images"
IMAGE_NAME = "image.png"

TEXTS = ("question", "hint", "lecture", "solution", "grade", "subject")
"""Entries of a problem that are texts."""


@dataclass(frozen=True)
class ScienceQA:
    """One split.

    Attributes:
        path: `problems.json`.
        image_folder: folder that image names are relative to: that of the split, if it has one.
        ids: problems of the split, in its order.
        problems: all problems by id.
        captions: captions by id; None where they are not used.
    """

    path: Path
    image_folder: Path
    ids: Sequence[str]
    problems: dict[str, Any]
    captions: dict[str, str] | None

    def __len__(self) -> int:
        return len(self.ids)

    def problem(self, number: int) -> Problem:
        """A problem whose form was checked.

        Raises:
            BadSampleError: it is not there, or malformed.
        """
        return check_problem(self.problems.get(self.ids[number]), self.where(number))

    def where(self, number: int) -> str:
        """What to call a problem in a message."""
        return f"{self.path}, problem {self.ids[number]!r}"

    def image(self, number: int) -> str | None:
        """Name of its image in the image folder; None if it has none."""
        problem = self.problem(number)
        if problem.get("image") is None:
            return None
        name = f"{self.ids[number]}/{IMAGE_NAME}"
        return name if self.image_folder.name != IMAGES_FOLDER else f"{problem.get('split')}/{name}"

    def caption(self, number: int) -> str | None:
        """Caption of its image; None where captions are not used."""
        return None if self.captions is None else self.captions.get(self.ids[number], "")

    def prompt_and_answer(self, number: int, prompt_format: str, options: Sequence[str] = OPTIONS) -> tuple[str, str]:
        """See `build_prompt`.

        Raises:
            BadSampleError: the problem is malformed, or has more choices than there are letters.
        """
        problem = self.problem(number)
        if len(problem["choices"]) > len(options):
            raise BadSampleError(
                f"{self.where(number)}: {len(problem['choices'])} choices, but only the letters {''.join(options)}; "
                "give more by --options"
            )
        return build_prompt(problem, prompt_format, caption=self.caption(number), options=options)


def check_problem(problem: Any, where: str) -> Problem:
    """Refuse an entry that is no problem of ScienceQA.

    Raises:
        BadSampleError: it is missing, a text is none, or the answer names no choice.
    """
    if not isinstance(problem, dict):
        raise BadSampleError(f"{where}: there is no such problem")
    wrong = [key for key in TEXTS if not isinstance(problem.get(key), str)]
    choices, answer = problem.get("choices"), problem.get("answer")
    if wrong or not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise BadSampleError(f"{where}: {', '.join(wrong) or 'choices'} must be text; the entry has {sorted(problem)}")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise BadSampleError(f"{where}: the answer is {answer!r}, but there are {len(choices)} choices, from 0")
    return problem


def check_prompt_format(prompt_format: str) -> None:
    """Refuse an unknown format.

    Raises:
        FlagError: lists the known ones.
    """
    if prompt_format not in FORMATS:
        raise FlagError(f"--prompt_format {prompt_format}: not known; known are {', '.join(FORMATS)}")


def read_captions(path: str | Path) -> dict[str, str]:
    """Captions by the id of the problem.

    Raises:
        BadSampleError: the file is missing or holds no captions.
    """
    captions = read_json(path, dict).get("captions")
    if not isinstance(captions, dict):
        raise BadSampleError(f"{path}: has no table 'captions'")
    return captions


def read_split(data_root: str | Path, split: str, caption_file: str | Path | None = None) -> ScienceQA:
    """The problems of one split.

    Args:
        data_root: folder with the files above.
        split: a list in `pid_splits.json`.
        caption_file: captions to use; None uses none.

    Raises:
        BadSampleError: a file is missing or malformed, or the split is unknown or empty.
    """
    root = Path(data_root)
    images = root / IMAGES_FOLDER
    splits = read_json(root / SPLITS_FILE, dict)
    if not splits.get(split):
        raise BadSampleError(f"{root / SPLITS_FILE}: no problems in split '{split}'; it has {sorted(splits)}")
    return ScienceQA(
        path=root / PROBLEMS_FILE,
        # `minitest` and `trainval` have no folder of their own; their problems say where they belong.
        image_folder=images / split if (images / split).is_dir() else images,
        ids=[str(pid) for pid in splits[split]],
        problems=read_json(root / PROBLEMS_FILE, dict),
        captions=None if caption_file is None else read_captions(caption_file),
    )


def conversation_row(sample_id: str, prompt: str, answer: str, image: str | None) -> Row:
    """A sample in the form of llava's data files."""
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
    return {"id": sample_id, "conversations": turns} | ({} if image is None else {"image": image})


def training_rows(data: ScienceQA, prompt_format: str, options: Sequence[str] = OPTIONS) -> RowFiles:
    """All problems of a split as rows, each with its subject as its task.

    Raises:
        BadSampleError: a problem is malformed.
        FlagError: the format is unknown.
    """
    check_prompt_format(prompt_format)
    rows = []
    for number, sample_id in enumerate(data.ids):
        prompt, answer = data.prompt_and_answer(number, prompt_format, options)
        row = conversation_row(sample_id, prompt, answer, data.image(number))
        rows.append(row | {"task": data.problem(number)["subject"]})
    return RowFiles([MemoryRows(data.path, rows)])
