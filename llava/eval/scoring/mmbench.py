"""MMBench and MMBench-CN: the questions of its TSV file, and the spreadsheet for its server.

Corresponds to upstream `llava/eval/model_vqa_mmbench.py` and `scripts/convert_mmbench_for_submission.py`. Reading and
writing are pandas', as upstream, so that the spreadsheet has the same cells.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llava.errors import BadImageError, BadSampleError, FlagError
from llava.eval.answering.answers import Row, Task, answer_row
from llava.eval.answering.questions import field, read_jsonl
from llava.eval.scoring.matching import Sides, check_fit, id_of
from llava.runtime.files import refuse_pointer
from llava.runtime.output import replacing
from llava.runtime.places import Input, refuse_file
from llava.runtime.recognize import refuse_foreign_bytes

if TYPE_CHECKING:
    from PIL import Image

LETTERS = "ABCD"
SPREADSHEET = b"PK\x03\x04"
"""The first bytes of an .xlsx file."""
TEXT_COLUMNS = ("question", "hint", *LETTERS)
NOT_FOR_UPLOAD = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_COLUMN = 6
INSTRUCTIONS = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
NONE_WORDS = frozenset({"nan", "none"})


def pandas() -> ModuleType:
    """The package.

    Raises:
        FlagError: it is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise FlagError("MMBench needs pandas and openpyxl: pip install 'llava-extensions[eval]'") from error
    return pandas


def is_none(value: Any) -> bool:
    """True for what stands for "nothing" in a cell: None, not a number, and the words nan and none."""
    return value is None or value != value or (isinstance(value, str) and value.lower() in NONE_WORDS)


def get_options(row: dict[str, Any], letters: str = LETTERS) -> list[str]:
    """The option texts of a row, up to the first that is missing."""
    options = []
    for letter in letters:
        if is_none(row.get(letter)):
            break
        options.append(row[letter])
    return options


def read_table(path: str | Path) -> Any:
    """The table of a benchmark file; texts stay texts, also where a whole column looks like numbers.

    Raises:
        BadSampleError: the file is missing or has not the benchmark's columns.
        FlagError: pandas is missing.
    """
    if not Path(path).is_file():
        raise BadSampleError(f"{path}: no such file")
    refuse_pointer(path, BadSampleError)
    table = pandas().read_table(path, dtype=dict.fromkeys(TEXT_COLUMNS, str))
    missing = {"index", "question", "image", "A"} - set(table.columns)
    if missing:
        raise BadSampleError(f"{path}: no columns {sorted(missing)}; it has {list(table.columns)}")
    return table


def read_tasks(
    path: str | Path, *, all_rounds: bool = False, single_pred_prompt: bool = False, lang: str = "en"
) -> list[Task]:
    """The questions of a benchmark file.

    Args:
        path: TSV with index, question, hint, A to D and a base64-coded image.
        all_rounds: ask each question as often as it has options, each time with the texts moved up by one.
        single_pred_prompt: append the instruction to answer with a letter.
        lang: language of the instruction, `en` or `cn`.

    Raises:
        BadSampleError: as `read_table`, or a row has no option.
        FlagError: unknown language.
    """
    if lang not in INSTRUCTIONS:
        raise FlagError(f"--lang {lang}: must be one of {', '.join(INSTRUCTIONS)}")
    instruction = f"\n{INSTRUCTIONS[lang]}" if single_pred_prompt else ""
    tasks = []
    for number, row in enumerate(read_table(path).to_dict("records"), start=2):
        where = f"{path}:{number}"
        options = get_options(row)
        if not options:
            raise BadSampleError(f"{where}: question {row['index']} has no option A")
        hint = [] if is_none(row.get("hint")) else [row["hint"]]
        for round_id, shown in enumerate(_rounds(options) if all_rounds else [options]):
            prompt = "\n".join(
                [*hint, row["question"], *(f"{c}. {text}" for c, text in zip(LETTERS, shown, strict=False))]
            )
            letters = [LETTERS[(round_id + place) % len(options)] for place in range(len(options))]
            extra = {"round_id": round_id, "options": shown, "option_char": letters}
            tasks.append(Task(row["index"], prompt + instruction, prompt, (row["image"],), where, extra))
    return tasks


def _rounds(options: list[str]) -> Iterator[list[str]]:
    return (options[start:] + options[:start] for start in range(len(options)))


def open_image(content: str, where: str) -> Image.Image:
    """An image from its base64 text; RGB.

    Raises:
        BadImageError: it cannot be decoded.
    """
    from llava.data.images import read_rgb

    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, TypeError) as error:
        raise BadImageError(f"{where}: the image is no base64 text: {error}") from error
    return read_rgb(BytesIO(data), f"{where}: image")


def to_row(task: Task, text: str, model_id: str) -> Row:
    """The row of upstream's program."""
    row, extra = answer_row(task, text, model_id), task.extra
    return {
        "question_id": row["question_id"],
        "round_id": extra["round_id"],
        "prompt": row["prompt"],
        "text": row["text"],
        "options": extra["options"],
        "option_char": extra["option_char"],
        "answer_id": row["answer_id"],
        "model_id": row["model_id"],
        "metadata": row["metadata"],
    }


def write_spreadsheet(
    annotation_file: str | Path, answers_file: str | Path, output: str | Path, *, lenient: bool = False
) -> Path:
    """Write the spreadsheet for the server: the benchmark's table with a column of answers, the last of each question.

    Returns:
        the written file.

    Raises:
        BadSampleError: a file is missing or broken, or (without `lenient`) answers and questions do not fit.
        FlagError: pandas or openpyxl is missing.
    """
    refuse_file("the output", output, [Input("the questions", annotation_file), Input("the answers", answers_file)])
    table = read_table(annotation_file)
    rows = [(field(row, "question_id", (int, str), where), where, row) for where, row in read_jsonl(answers_file)]
    answered = [key for key, _, _ in rows]
    sides = Sides(answers_file, annotation_file)
    check_fit(table["index"].tolist(), answered, sides, lenient=lenient, repeats=True)  # a question has several rounds
    table = table.drop(columns=[name for name in NOT_FOR_UPLOAD if name in table.columns])
    # A spreadsheet cannot hold control characters, which a model may well say.
    texts = {id_of(key): CONTROL.sub("", field(row, "text", (str,), where)) for key, where, row in rows}
    table.insert(PREDICTION_COLUMN, "prediction", table["index"].map(lambda index: texts.get(id_of(index))))
    refuse_foreign_bytes(Path(output), SPREADSHEET)
    try:
        with replacing(output) as partial:
            table.to_excel(partial, index=False, engine="openpyxl")
    except ModuleNotFoundError as error:
        raise FlagError("the spreadsheet needs openpyxl: pip install 'llava-extensions[eval]'") from error
    return Path(output)
