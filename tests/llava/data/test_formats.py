"""The same conversations in every format give the same samples, sizes and errors; sources with weights."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava.data.check import main as check
from llava.data.formats import table
from llava.data.formats.conversations import to_llava
from llava.data.rows import drawn_rows, open_rows
from llava.errors import BadImageError, BadSampleError, FlagError
from llava.runtime import unchanged
from llava.runtime.places import split_weight
from llava.runtime.unchanged import fingerprints, hub_sources
from tests.golden import golden_dir
from tests.llava.data.test_dataset import FOLDER, make_dataset

datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")

NAMES = ["im0.png", "im1.png", "im3.png"]
STORED = [{"bytes": (FOLDER / "images" / name).read_bytes(), "path": name} for name in NAMES]
QUESTION, ANSWER, SECOND, LAST = "What is it?", "A bus.", "And what color?", "It is red."


def _turns(question: str, speakers: tuple[str, str], who: str, what: str) -> list[dict[str, str]]:
    texts = (question, ANSWER, SECOND, LAST)
    return [{who: speakers[number % 2], what: text} for number, text in enumerate(texts)]


LLAVA_ROWS = [
    {"id": "0", "image": NAMES[0], "conversations": _turns(f"<image>\n{QUESTION}", ("human", "gpt"), "from", "value")},
    {
        "id": "1",
        "image": NAMES[1:],
        "conversations": _turns(f"<image>\n<image>\n{QUESTION}", ("human", "gpt"), "from", "value"),
    },
    {"id": "2", "conversations": _turns(QUESTION, ("human", "gpt"), "from", "value")},
]
IMAGES = [[0], [1, 2], []]


def _messages(number: int, image_part: Callable[[int], dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The conversation of a row as messages; with parts if an image part is given."""
    messages: list[dict[str, Any]] = _turns(QUESTION, ("user", "assistant"), "role", "content")
    if image_part is None:
        return messages
    parts = [*map(image_part, IMAGES[number]), {"type": "text", "text": QUESTION}]
    rest = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages[1:]]
    return [{"role": "user", "content": parts}, *rest]


def _address(number: int) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(STORED[number]['bytes']).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _named(number: int) -> list[str]:
    return [NAMES[image] for image in IMAGES[number]]


def _addresses(number: int) -> list[str]:
    return [_address(image)["image_url"]["url"] for image in IMAGES[number]]


def _file_address(name: str) -> str:
    return f"file://{FOLDER / 'images'}/./{name.replace('0', '%30')}"


def _stored(number: int) -> list[dict[str, Any]]:
    return [STORED[image] for image in IMAGES[number]]


def _texts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _json(rows: list[Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "data.json"
        path.write_text(json.dumps(rows))
        return path

    return write


def _parquet(rows: list[Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "data.parquet"
        datasets.Dataset.from_list(rows).to_parquet(str(path))
        return path

    return write


def _saved(rows: list[Any], column: str, feature: Any, splits: bool = False) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        saved = datasets.Dataset.from_list(rows).cast_column(column, feature)
        saved = datasets.DatasetDict({"train": saved, "test": saved.select([0])}) if splits else saved
        saved.save_to_disk(str(folder / "saved"))
        return folder / "saved"

    return write


SHAREGPT = [
    {
        "images": _named(n),
        "conversations": _turns(row["conversations"][0]["value"], ("user", "assistant"), "from", "value"),
    }
    for n, row in enumerate(LLAVA_ROWS)
]
TRL = [{"messages": _messages(n, lambda _: {"type": "image"}), "images": _stored(n)} for n in range(3)]
PLAIN = [{"messages": _messages(n), "images": _stored(n)} for n in range(3)]
ONE_BY_ONE = [{"messages": _messages(n), "images": _named(n)} for n in range(3)]

FORMATS: dict[str, Callable[[Path], Path]] = {
    "LLaVA": _json(LLAVA_ROWS),
    "LLaVA, addresses": _json([{**row, "image": _addresses(number)} for number, row in enumerate(LLAVA_ROWS)]),
    "LLaVA, files by address": _json(
        [{**row, "image": [_file_address(name) for name in _named(number)]} for number, row in enumerate(LLAVA_ROWS)]
    ),
    "ShareGPT": _json(SHAREGPT),
    "OpenAI": _json([{"messages": _messages(number, _address)} for number in range(3)]),
    "TRL, names": _json([{"messages": row["messages"], "images": _named(n)} for n, row in enumerate(TRL)]),
    "messages and names": _json(ONE_BY_ONE),
    "prompt and completion": _json(
        [
            {"prompt": row["messages"][:3], "completion": row["messages"][3:], "images": row["images"]}
            for row in ONE_BY_ONE
        ]
    ),
    "parts that name files": _json(
        [{"messages": _messages(n, lambda i: {"type": "image", "path": NAMES[i]})} for n in range(3)]
    ),
    "Parquet, LLaVA": _parquet([{**row, "image": _named(number)} for number, row in enumerate(LLAVA_ROWS)]),
    "Parquet, TRL with bytes": _parquet(TRL),
    "Parquet, bytes in parts": _parquet(
        [{"messages": _messages(n, lambda i: {"type": "image", "image": STORED[i]})} for n in range(2)]
        + [{"messages": [{**each, "content": _texts(each["content"])} for each in _messages(2)]}]
    ),
    "image and images": _json(
        [{"messages": row["messages"], "image": _named(n), "images": _named(n)} for n, row in enumerate(TRL)]
    ),
    "saved, images": _saved(TRL, "images", [datasets.Image()]),
    "saved with splits": _saved(PLAIN, "images", [datasets.Image()], splits=True),
}  # fmt: skip


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_same_samples(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "own").mkdir()
    own, other = make_dataset(_json(LLAVA_ROWS)(tmp_path / "own")), make_dataset(write(tmp_path))
    assert len(other) == len(own) == 3
    assert other.lengths == own.lengths
    assert other.modality_lengths == own.modality_lengths
    for index in range(3):
        expected, item = own[index], other[index]
        assert sorted(item) == sorted(expected)
        for key, value in expected.items():
            assert torch.equal(item[key], value), (index, key)
    assert other[0]["image"].any()


@pytest.mark.parametrize("name", ["OpenAI", "Parquet, TRL with bytes", "saved, images"])
def test_the_check_knows_every_format(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = FORMATS[name](tmp_path)
    base = ["--model_name_or_path", str(golden_dir("llava") / "tiny-llava-v1.5"), "--num_workers", "0"]
    page = tmp_path / "check.html"
    assert check([str(path), *base, "--html", str(page), "--json", str(tmp_path / "check.json")]) == 0
    found = json.loads((tmp_path / "check.json").read_text())
    assert (found["rows"], found["rows_with_image"]) == (3, 2)
    assert page.read_text().count("data:image/jpeg;base64") == 3


BAD_ROWS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an address": (
        {"messages": _messages(0, lambda _: {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}})},
        BadSampleError,
        "nothing is fetched",
    ),
    "a tool": ({"messages": [{"role": "tool", "content": "x"}]}, BadSampleError, "message 0 is of 'tool'"),
    "a video": ({"messages": _messages(0, lambda _: {"type": "video"})}, BadSampleError, "not a text or an image"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, BadSampleError, "must be a text or a list"),
    "too few images": ({"messages": TRL[1]["messages"], "images": [NAMES[0]]}, BadSampleError, "2 image parts"),
    "broken base64": (
        {"messages": _messages(0, lambda _: {"type": "image_url", "image_url": "data:image/png;base64,%%"})},
        BadSampleError,
        "not valid base64",
    ),
    "late system": (
        {"messages": [*_messages(2), {"role": "system", "content": "x"}]},
        BadSampleError,
        "message 4 is of the system",
    ),
    "outside": ({"messages": _messages(0), "images": ["../finetune.json"]}, BadImageError, "outside the image folder"),
    "file outside": (
        {"messages": _messages(0), "images": ["file:///etc/passwd"]},
        BadImageError,
        "outside the image folder",
    ),
    "two lists of images": (
        {"messages": _messages(0), "image": NAMES[0], "images": NAMES[1]},
        BadSampleError,
        "write one of them",
    ),
    "a file outside by its address": (
        {**LLAVA_ROWS[0], "image": f"file://{FOLDER}/images/%2e%2e/finetune.json"},
        BadImageError,
        "outside the image folder",
    ),
    "an address of the web in LLaVA's form": (
        {**LLAVA_ROWS[0], "image": "HTTPS://x.org/a.png"},
        BadSampleError,
        "nothing is fetched",
    ),
    "bytes of no image": (
        {"messages": _messages(0), "images": ["data:image/png;base64,AAAA"]},
        BadImageError,
        "no known image format",
    ),
}


@pytest.mark.parametrize(("row", "kind", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_named(row: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path) -> None:
    dataset = make_dataset(_json([LLAVA_ROWS[0], row])(tmp_path))
    assert dataset[0]["image"].any()
    with pytest.raises(kind, match=rf"(?s)data\.json, row 1.*{message}"):
        dataset[1]


def test_the_size_of_stored_images_is_bounded(tmp_path: Path) -> None:
    """As that of files: a strip of which padding would make a huge square."""
    content = io.BytesIO()
    Image.new("L", (15_000, 80)).save(content, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    dataset = make_dataset(_json([{"messages": _messages(0), "images": [address]}])(tmp_path))
    with pytest.raises(BadImageError, match="the limit is"):
        dataset[0]


def test_a_system_message_takes_the_place_of_that_of_the_template(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "system", "content": "Answer in French."}, *_messages(2)]}, LLAVA_ROWS[2]]
    dataset = make_dataset(_json(rows)(tmp_path))
    first, second = (dataset.tokenizer.decode(dataset[index]["input_ids"]) for index in range(2))
    assert "Answer in French." in first
    assert "Answer in French." not in second
    own = dataset.template.system
    assert dataset.tokenizer.decode(dataset.tokenizer(own)["input_ids"], skip_special_tokens=True) in second
    plain = make_dataset(_json(rows)(tmp_path), template=dataset.template.__class__(
        "", ("", ""), sep_style=dataset.template.sep_style.PLAIN, sep="\n", version="plain"
    ))  # fmt: skip
    with pytest.raises(BadSampleError, match="row 0"):
        plain[0]


def test_rows_in_llavas_form_are_left_as_they_are() -> None:
    for row in LLAVA_ROWS:
        assert to_llava(row) is row


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FORMATS["Parquet, LLaVA"](tmp_path)
    monkeypatch.setattr(table, "PACKAGE", "no_such_package_here")
    with pytest.raises(FlagError, match=r"data\.parquet: needs the package .*llava-extensions\[data\]"):
        open_rows(path)


def test_a_damaged_parquet_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = FORMATS["Parquet, LLaVA"](tmp_path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(FlagError, match=r"data\.parquet: cannot be read"):
        open_rows(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/no-such-data-set", "without a network only data sets in the hub's cache"),
        ("folder/absent.json", "no such file"),
        (".", "is a folder that `save_to_disk`"),
        ("data.json@0", "a weight must be greater than 0"),
    ],
)
def test_what_is_not_there_is_named(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FlagError, match=message):
        open_rows(name)


# Weights


def _numbered(path: Path, count: int, first: int = 0) -> Path:
    path.write_text(json.dumps([{"id": first + number} for number in range(count)]))
    return path


def test_weights_repeat_rows_and_draw_the_rest(tmp_path: Path) -> None:
    one, other = _numbered(tmp_path / "a.json", 10), _numbered(tmp_path / "b.json", 20, 100)
    rows = open_rows([f"{one}@2", f"{other}@0.25"], seed=3)
    ids = [row["id"] for row in rows]
    assert ids[:20] == [*range(10)] * 2
    assert len(set(ids[20:])) == 5
    assert all(100 <= each < 120 for each in ids[20:])
    assert [row["id"] for row in open_rows([f"{one}@2", f"{other}@0.25"], seed=3)] == ids
    assert [row["id"] for row in open_rows([f"{one}@2", f"{other}@0.25"], seed=4)] != ids
    assert rows.name(15) == f"{one}, row 5"
    assert len(rows.sizes) == 25


@pytest.mark.parametrize(("weight", "expected"), [(1, 8), (0.5, 4), (2.25, 18), (3, 24), (0.01, 0)])
def test_a_weight_gives_so_many_rows(weight: float, expected: int) -> None:
    drawn = drawn_rows(8, weight, 0)
    counts = np.bincount(drawn, minlength=8)
    assert len(drawn) == expected
    assert counts.max() - counts.min() <= 1


def test_an_existing_file_of_the_whole_name_wins(tmp_path: Path) -> None:
    _numbered(tmp_path / "a.json", 3)
    both = _numbered(tmp_path / "a.json@2", 4)
    assert split_weight(str(both)) == (str(both), 1.0)
    assert len(open_rows(str(both))) == 4
    assert split_weight("a@b.json") == ("a@b.json", 1.0)


def test_a_weight_that_leaves_no_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="no row is left"):
        open_rows(f"{_numbered(tmp_path / 'a.json', 3)}@0.1")


def test_the_record_of_a_run_sees_content_and_weight(tmp_path: Path) -> None:
    path = _numbered(tmp_path / "a.json", 3)
    prints = [fingerprints({"data_path": [f"{path}{weight}"]})["data_path"] for weight in ("", "@1", "@2")]
    assert prints[0] == prints[1] != prints[2]
    _numbered(path, 4)
    assert fingerprints({"data_path": [f"{path}@2"]})["data_path"] != prints[2]


def test_the_record_sees_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of `datasets`, a data set of the hub and a file: a change of one is seen next to the others."""
    revisions = iter(["aa", "aa", "bb", "bb", None])
    monkeypatch.setattr(unchanged, "data_set_revision", lambda name: next(revisions))
    folder = FORMATS["saved, images"](tmp_path)
    file = _numbered(tmp_path / "a.json", 3)
    options = {"data_path": [str(file), "owner/set@0.5", str(folder)]}
    first = fingerprints(options)["data_path"].split()
    assert fingerprints(options)["data_path"].split() == first
    assert first[1] == "owner/set:aa@0.5"
    assert hub_sources(" ".join(first)) == ["owner/set"]
    assert fingerprints(options)["data_path"].split() == [first[0], "owner/set:bb@0.5", first[2]]
    _numbered(file, 4)
    changed = fingerprints(options)["data_path"].split()
    assert changed[0] != first[0]
    assert changed[2] == first[2]
    datasets.Dataset.from_list([{**row, "id": "other"} for row in PLAIN]).save_to_disk(str(folder))
    unread = fingerprints(options)["data_path"].split()
    assert unread[2] != first[2]
    assert hub_sources(" ".join(unread)) == []  # not to be found: by its name alone


def test_a_changed_file_next_to_an_unread_source_is_a_difference(tmp_path: Path) -> None:
    options = {"data_path": [str(_numbered(tmp_path / "a.json", 3)), "nobody/no-such-data-set"]}
    records = []
    for count in (3, 4):
        _numbered(tmp_path / "a.json", count)
        records.append({"arguments": {"data": options}, "fingerprints": fingerprints(options)})
    (line,) = unchanged.differences(*records)
    assert "the same path, other content" in line
    assert unchanged.differences(records[0], records[0]) == []


def test_only_data_of_a_folder_decides_what_a_run_trains_on(tmp_path: Path) -> None:
    _numbered(tmp_path / "a.json", 3)
    before = fingerprints({"dataset_dir": str(tmp_path)})
    (tmp_path / "a.json.rows.npy").write_bytes(b"kept")
    assert fingerprints({"dataset_dir": str(tmp_path)}) == before
    _numbered(tmp_path / "b.jsonl", 1)
    assert fingerprints({"dataset_dir": str(tmp_path)}) != before


def test_sizes_are_found_without_the_bytes_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a column, and those in the parts of messages."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    counted: list[Any] = []
    monkeypatch.setattr(table, "count_value", lambda row: counted.append(row))
    for name in ("Parquet, bytes in parts", "Parquet, TRL with bytes", "saved, images"):
        assert len(open_rows(FORMATS[name](tmp_path)).sizes) == 3
    assert len(counted) == 9
    assert "bytes" not in {type(each).__name__ for row in counted for each in _leaves(row)}


def _leaves(value: Any) -> list[Any]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if items is None else [leaf for each in items for leaf in _leaves(each)]
