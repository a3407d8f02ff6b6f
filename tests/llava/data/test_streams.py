"""Streams: every row once a pass over all processes and workers, from any position, in an order that the seed says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from llava.conversation import conv_templates
from llava.data.samples import Item
from llava.data.skipped import read_skipped
from llava.data.streams import sources
from llava.data.streams.dataset import StreamedDataset, may_have_image, stream_loader
from llava.data.streams.sources import Share, Source, StreamRow, open_sources, streamed_values
from llava.data.streams.stream import LookAhead, RowStream
from llava.errors import BadSampleError, FlagError

datasets = pytest.importorskip("datasets")

WHOLE = Share(0, 1)


def rows_of(count: int, start: int = 0) -> list[dict[str, Any]]:
    said = [("human", "What is it?"), ("gpt", "A cat.")]
    return [
        {"id": number, "conversations": [{"from": who, "value": text} for who, text in said]}
        for number in range(start, start + count)
    ]


def as_list(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "list.json"
    path.write_text(json.dumps(rows))
    return path


def as_lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "lines.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    return path


def as_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "rows.parquet"))
    return folder / "rows.parquet"


def as_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return folder / "saved"


FORMATS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "list": as_list,
    "lines": as_lines,
    "parquet": as_parquet,
    "folder": as_folder,
}


def stream_of(*names: Any, share: Share = WHOLE, seed: int = 5, buffer: int = 4) -> RowStream:
    return RowStream(open_sources([str(name) for name in names]), share, seed, buffer)


def ids(rows: Any) -> list[int]:
    return [row.row()["id"] for row in rows]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_row_once_a_pass(kind: str, processes: int, tmp_path: Path) -> None:
    path = FORMATS[kind](tmp_path, rows_of(11))
    parts = [ids(stream_of(path, share=Share(number, processes)).one_pass(0)) for number in range(processes)]
    assert sorted(chain(*parts)) == list(range(11))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    again = [ids(stream_of(path, share=Share(number, processes)).one_pass(1)) for number in range(processes)]
    assert sorted(chain(*again)) == list(range(11))
    assert again != parts


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("files", [1, 2])
def test_a_streamed_data_set(files: int, processes: int, tmp_path: Path) -> None:
    """What `datasets` gives for an id of the hub: whole files where their number divides, else every n-th row."""
    for number in range(files):
        table = datasets.Dataset.from_list(rows_of(7, start=7 * number))
        table.to_parquet(str(tmp_path / f"part-{number}.parquet"))

    def values(process: int) -> list[int]:
        found = sorted(map(str, tmp_path.glob("*.parquet")))
        stream = datasets.load_dataset("parquet", data_files=found, split="train", streaming=True)
        return [row["id"] for row in streamed_values(stream, "owner/name", Share(process, processes))]

    parts = [values(process) for process in range(processes)]
    assert sorted(chain(*parts)) == list(range(7 * files))
    if files == processes == 2:
        assert parts == [list(range(7)), list(range(7, 14))]


def test_an_id_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are numbered within the part of a process, and say so, since two parts have the same numbers."""
    path = as_parquet(tmp_path, rows_of(5))

    def load(name: str, **options: Any) -> Any:
        assert (name, options) == ("owner/name", {"streaming": True})
        return datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)

    monkeypatch.setattr(sources, "load_hub", load)
    stream = stream_of("owner/name", buffer=0)
    stream.check()
    assert [row.name for row in stream.one_pass(0)] == [f"owner/name, row {number}" for number in range(5)]
    second = list(stream_of("owner/name", share=Share(1, 2), buffer=0).one_pass(0))
    assert ids(second) == [1, 3]
    assert [row.name for row in second] == [f"owner/name (part 2 of 2), row {number}" for number in range(2)]


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_images_stay_bytes(kind: str, tmp_path: Path) -> None:
    image = {"bytes": b"\x89PNG not decoded", "path": None}
    features = datasets.Features({"id": datasets.Value("int64"), "image": datasets.Image(decode=False)})
    table = datasets.Dataset.from_list([{"id": 0, "image": image}], features=features)
    path = tmp_path / kind
    table.to_parquet(str(path)) if kind == "parquet" else table.save_to_disk(str(path))
    assert next(stream_of(path).rows()).value["image"]["bytes"] == image["bytes"]


def test_the_order_is_that_of_seed_and_pass(tmp_path: Path) -> None:
    path = as_lines(tmp_path, rows_of(30))
    order = ids(stream_of(path).one_pass(0))
    assert order == ids(stream_of(path).one_pass(0)) != list(range(30))
    assert order != ids(stream_of(path, seed=6).one_pass(0))
    assert order != ids(stream_of(path, buffer=5).one_pass(0))
    # A row comes at most as much earlier as the buffer is large.
    assert all(place >= number - 4 for place, number in enumerate(order))
    assert ids(stream_of(path, buffer=0).one_pass(3)) == list(range(30))


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    first, second = as_list(tmp_path, rows_of(40)), as_lines(tmp_path, rows_of(400, start=1000))
    found = Counter(ids(stream_of(f"{first}@2", f"{second}@0.5", buffer=0).one_pass(0)))
    assert all(found[number] == 2 for number in range(40))
    drawn = {number for number in found if number >= 1000}
    assert 160 < len(drawn) < 240
    assert {number for number in ids(stream_of(f"{first}@2", f"{second}@0.5").one_pass(1)) if number >= 1000} == drawn
    order = ids(stream_of(first, second, buffer=0).one_pass(0))
    assert sorted(order) == [*range(40), *range(1000, 1400)]
    assert [number for number in order if number < 40] == list(range(40))  # each source in its order
    assert 20 < sum(number >= 1000 for number in order[: order.index(39)]) < 70  # and the two side by side


@pytest.mark.parametrize("buffer", [0, 1, 4, 100])
def test_from_any_position(buffer: int, tmp_path: Path) -> None:
    """Also after several passes, of two sources that are not equally long."""
    first, second = as_list(tmp_path, rows_of(5)), as_lines(tmp_path, rows_of(8, start=100))
    stream = stream_of(first, f"{second}@1.5", buffer=buffer)
    length = len(list(stream.one_pass(0)))
    whole = ids(islice(stream.rows(), 4 * length))
    assert len({tuple(whole[length * number : length * (number + 1)]) for number in range(4)}) == 4
    for start in range(3 * length + 2):
        assert ids(islice(stream.rows(start), length - 2)) == whole[start : start + length - 2], start
    ahead = LookAhead(stream, 3)
    assert ids([ahead[5], ahead[3]]) == [whole[5], whole[3]]
    ahead.forget_before(length + 1)
    assert ids([ahead[length + 1]]) == [whole[length + 1]]


def test_passes_that_are_over_are_not_read_again(tmp_path: Path) -> None:
    read: list[int] = []

    def values(share: Share) -> Any:
        for number, row in enumerate(rows_of(10)):
            read.append(number)
            yield number, row

    stream = RowStream([Source("rows", 1.0, values)], WHOLE, 0, 3)
    assert next(stream.rows(10_004)).row()["id"] in range(10)
    assert len(read) < 30


class Named(StreamedDataset):
    """Items that say which row they are of; a row whose id is in `bad` cannot be trained on."""

    bad: frozenset[int] = frozenset()

    def prepare(self, row: dict[str, Any], name: str) -> Item:
        if row["id"] in self.bad:
            raise BadSampleError(f"{name}: is bad")
        return {"id": row["id"]}


def named(stream: RowStream, folder: Path, bad: frozenset[int] = frozenset()) -> Named:
    dataset = Named(
        stream,
        None,
        None,
        batch_size=3,
        template=conv_templates["v1"],
        image_folder=None,
        image_aspect_ratio="pad",
        is_multimodal=False,
        mm_use_im_start_end=False,
        model_max_length=99,
        on_bad_sample="skip" if bad else "stop",
        skipped_file=folder / "skipped.jsonl",
    )
    dataset.bad = bad
    return dataset


def batches(dataset: Named, workers: int, count: int = 10) -> list[Any]:
    def collate(items: Any) -> list[int]:
        return [item["id"] for item in items]

    return list(islice(iter(stream_loader(dataset, collate, num_workers=workers)), count))


@pytest.mark.parametrize("bad", [frozenset(), frozenset({2, 3, 7})], ids=["all good", "some bad"])
def test_workers_change_nothing(bad: frozenset[int], tmp_path: Path) -> None:
    stream = stream_of(as_lines(tmp_path, rows_of(11)))
    alone = batches(named(stream, tmp_path, bad), 0)
    assert batches(named(stream, tmp_path, bad), 2) == alone
    assert not bad & {number for batch in alone for number in batch}
    for workers in (0, 2):
        resumed = named(stream, tmp_path, bad)
        resumed.passed = 4
        found = batches(resumed, workers)
        assert found == [{"passed": True}] * 4 + alone[4:]
    if bad:
        assert [entry["row"] for entry in read_skipped(tmp_path / "skipped.jsonl")] == sorted(bad)


class WithoutWorkers(IterableDataset[int]):
    """A stream whose worker processes do not know of each other."""

    def __init__(self, stream: RowStream) -> None:
        self.stream = stream

    def __iter__(self) -> Any:
        return iter(ids(self.stream.one_pass(0)))


def test_workers_have_to_be_told(tmp_path: Path) -> None:
    """What `test_workers_change_nothing` would see if every worker read all rows."""
    stream = stream_of(as_lines(tmp_path, rows_of(11)))
    found = Counter(row for batch in DataLoader(WithoutWorkers(stream), 3, num_workers=2) for row in batch.tolist())
    assert set(found.values()) == {2}


def test_a_bad_row_takes_the_next_good_one(tmp_path: Path) -> None:
    stream = stream_of(as_list(tmp_path, rows_of(9)), buffer=0)
    assert batches(named(stream, tmp_path, frozenset({1, 2})), 0, 2) == [[0, 3, 3], [3, 4, 5]]
    stopping = named(stream, tmp_path)
    stopping.bad = frozenset({1})
    with pytest.raises(BadSampleError, match=r"list\.json, row 1: is bad"):
        batches(stopping, 0)
    with pytest.raises(BadSampleError, match="of the next 1000 rows none without image can be trained on"):
        batches(named(stream, tmp_path, frozenset(range(9))), 0)


def test_rows_that_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 0, "conversations": []}\nnot JSON\n[1]\n')
    _, second, third = islice(stream_of(path, buffer=0).rows(), 3)
    for found, number in ((second, 1), (third, 2)):
        with pytest.raises(BadSampleError, match=rf"rows\.jsonl, row {number} is no JSON object"):
            found.row()
        assert may_have_image(found)
    assert not may_have_image(StreamRow("rows", 0, rows_of(1)[0]))


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    with pytest.raises(FlagError, match=r"empty\.json: the file holds no rows"):
        stream_of(empty).check()
    one = as_list(tmp_path, rows_of(1))
    stream_of(one).check()
    with pytest.raises(FlagError, match="holds no rows for process 2 of 2"):
        stream_of(one, share=Share(1, 2)).check()
    with pytest.raises(FlagError, match="no row is left to train on"):
        RowStream(open_sources([str(one)]), WHOLE, 0, 1, may_have_image).check()
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(rows_of(3))[:-30])
    with pytest.raises(FlagError, match="begins like a JSON list but is none: row 2"):
        list(stream_of(damaged).one_pass(0))
    with pytest.raises(FlagError, match="no such file"):
        stream_of(tmp_path / "missing.json")
    with pytest.raises(FlagError, match="as the id of a data set on the hub it cannot be read"):
        stream_of("owner/there-is-no-such-data-set").check()
