"""JSON lists and lines by the places of their rows: what `json.load` gives and says; tables kept from run to run."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import random
import shutil
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava.data.formats import json_scan, kept_index
from llava.data.formats.json_file import JsonRows
from llava.data.formats.json_scan import ListError, scan_list
from llava.data.formats.kept_index import INDEX, SUFFIX, places
from llava.data.rows import open_rows
from llava.data.sizes import IMAGE_LENGTH, UNCOUNTED
from llava.errors import BadSampleError, FlagError
from tests.llava.data.test_dataset import make_dataset


def _value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return draw.choice([1, -2.5e10, 10**29, float("inf"), True, None])
    if kind < 6:
        return "".join(draw.choice('ab "\\\n\u00e9\u4e2d\U0001f600{}[],:\t') for _ in range(draw.randrange(40)))
    if kind == 6:
        return [_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {str(draw.randrange(99)): _value(draw, depth + 1) for _ in range(draw.randrange(4))}


def _damaged(draw: random.Random, content: bytes) -> bytes:
    place, kind = draw.randrange(len(content)), draw.randrange(4)
    if kind == 0:
        return content[:place] + content[place + 1 :]
    if kind == 1:
        return content[:place] + bytes([draw.choice(b'[]{},:"\\ 1e-.tuN\n\x01')]) + content[place:]
    return content[:place] if kind == 2 else content + content[place : place + 3]


def _whole(content: bytes) -> tuple[Any, str | None]:
    """What the standard library reads in one go, or what it says."""
    try:
        return json.loads(content.decode("utf-8-sig")), None
    except UnicodeDecodeError:
        return None, "UTF-8"
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("chunk", [1, 17, 61, 1 << 20])
def test_rows_and_errors_are_those_of_the_standard_library(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_scan, "CHUNK", chunk)
    draw = random.Random(chunk)
    damaged = 0
    for _ in range(300):
        rows = [_value(draw) for _ in range(draw.randrange(6))]
        content = json.dumps(rows, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1])).encode()
        content = _damaged(draw, content) if draw.random() < 0.7 else content
        if not content.lstrip(b" \t\n\r").startswith(b"["):
            continue
        content = b"\xef\xbb\xbf" * (draw.random() < 0.2) + content
        wanted, problem = _whole(content)
        found, said = [], None
        try:
            for start, length, value in scan_list(io.BytesIO(content)):
                assert repr(json.loads(content[start : start + length])) == repr(value)
                found.append(value)
        except ListError as error:
            said = str(error)
        if problem is None:
            assert (repr(found), said) == (repr(wanted), None)
        else:
            damaged += 1
            assert said is not None
            assert problem in said
    assert 110 < damaged < 300


def test_a_damaged_list_names_the_row_and_the_place(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"a": 1},\n {"a": 2},\n {"a": x}]')
    with pytest.raises(FlagError, match=r"data.json: .*row 2: Expecting value: line 3 column 8 \(char 29\)"):
        open_rows(path)
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(FlagError, match=r"data.json: .*byte 8 is not UTF-8"):
        open_rows(path)


def _conversation(number: int) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": "<image>\nWhich of them?"},
        {"from": "gpt", "value": f"caf\u00e9 {number} " * 3},
    ]
    return {"id": number, "image": f"{number}.png", "conversations": turns} if number % 3 else {
        "id": number, "conversations": turns[1:]
    }  # fmt: skip


ROWS = [_conversation(number) for number in range(40)]
SIZES = [(10, 1) if number % 3 else (6, 0) for number in range(40)]


def _write(path: Path, as_list: bool, rows: list[Any] = ROWS) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("[" + ",\n".join(lines) + "]" if as_list else "\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "lines"])
def test_rows_and_sizes(as_list: bool, tmp_path: Path) -> None:
    rows = JsonRows(_write(tmp_path / "data.json", as_list, [*ROWS, 7, {"id": 1}]))
    assert [rows[index] for index in range(40)] == ROWS
    with pytest.raises(BadSampleError, match=r"data\.json, row 40 is no JSON object but 7"):
        rows[40]
    assert [(words, images) for words, images in rows.sizes[:40].tolist()] == SIZES
    assert rows.sizes["words"][40:].tolist() == [UNCOUNTED] * 2
    assert [rows.size(40), rows.size(3)] == [None, SIZES[3]]


def test_lengths_open_no_image(tmp_path: Path) -> None:
    dataset = make_dataset(_write(tmp_path / "data.json", True), image_folder=tmp_path / "there are no images")
    assert dataset.lengths == [words + IMAGE_LENGTH * images for words, images in SIZES]
    assert dataset.modality_lengths == [words if images else -words for words, images in SIZES]


def test_a_list_is_indexed_in_constant_memory(tmp_path: Path) -> None:
    """A list of 12 MB: the parser of the whole file keeps more than its size, the index a few bytes a row."""
    row = {"conversations": [{"from": "human", "value": "a b " * 50}, {"from": "gpt", "value": "c " * 100}]}
    path = _write(tmp_path / "data.json", True, [row] * 25_000)
    size = path.stat().st_size
    assert size > 11e6

    def grown(action: Callable[[], Any]) -> tuple[int, int]:
        tracemalloc.start()
        kept = action()
        current, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(kept) == 25_000
        return current, peak

    current, _ = grown(lambda: json.loads(path.read_text()))
    assert current > size
    current, peak = grown(lambda: JsonRows(path))
    assert current < 25_000 * INDEX.itemsize + 1e5
    assert peak < 8 * json_scan.CHUNK + 25_000 * INDEX.itemsize


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data file whose table is kept, and a cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return _write(tmp_path / "data" / "data.json", True)


def _open(path: Path) -> JsonRows:
    rows = JsonRows(path, kept_from=1)
    assert [tuple(size) for size in rows.sizes.tolist()] == SIZES[: len(rows)]
    assert [rows[index] for index in range(len(rows))] == json.loads(path.read_text(encoding="utf-8"))
    return rows


def _scans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each scan of a file."""
    scans: list[int] = []
    scan = json_scan.scan_list
    monkeypatch.setattr("llava.data.formats.json_file.scan_list", lambda file: scans.append(1) or scan(file))
    return scans


def test_a_kept_table_is_used_by_the_next_run(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _open(large)
    assert sorted(path.name for path in large.parent.iterdir()) == ["data.json", f"data.json{SUFFIX}"]
    scans = _scans(monkeypatch)
    _open(large)
    long_ago = 1_000_000_000
    monkeypatch.setattr(kept_index, "RECENT", -long_ago)  # the file was not changed lately
    monkeypatch.setattr(kept_index.hashlib, "file_digest", lambda *_: pytest.fail("the file is read"))
    _open(large)
    assert scans == []


def test_small_files_leave_nothing_behind(tmp_path: Path) -> None:
    open_rows(_write(tmp_path / "data.json", True))
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


def test_another_content_of_the_same_size_and_time_is_noticed(large: Path, caplog: pytest.LogCaptureFixture) -> None:
    _open(large)
    before = os.stat(large)
    content = large.read_text(encoding="utf-8").replace("Which of them?", "Which ofthem? ")
    large.write_text(content, encoding="utf-8")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(large).st_size == before.st_size
    with caplog.at_level(logging.WARNING):
        rows = JsonRows(large, kept_from=1)
    assert rows.sizes["words"].tolist() == [words - images for words, images in SIZES]
    assert "another content" in caplog.text
    assert json.loads(large.read_text(encoding="utf-8")) == list(rows)


def _flip(place: float) -> Callable[[Path], object]:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 0x10
        path.write_bytes(content)

    return flip


def _cut(share: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was executed",)


def _pickled(path: Path) -> None:
    trap = np.empty(1, dtype=object)
    trap[0] = _Trap()
    with path.open("wb") as file:
        np.lib.format.write_array(file, trap, allow_pickle=True)


def _of_another_file(path: Path) -> None:
    other = _write(path.parent / "other.json", True, ROWS[:7])
    JsonRows(other, kept_from=1)
    shutil.copyfile(f"{other}{SUFFIX}", path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"bit at {place}": _flip(place) for place in (0.0, 0.01, 0.05, 0.3, 0.6, 0.85, 0.9, 0.95, 1.0)},
    **{f"cut to {share}": _cut(share) for share in (0.0, 0.02, 0.5, 0.9, 0.99)},
    "a pickle": _pickled,
    "a bare pickle": lambda path: path.write_bytes(pickle.dumps(_Trap())),
    "another array": lambda path: np.save(path, np.arange(9)),
    "another file's": _of_another_file,
    "a text": lambda path: path.write_text("my notes"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_and_foreign_tables_are_made_again(damage: Callable[[Path], object], large: Path) -> None:
    _open(large)
    damage(large.with_name(f"{large.name}{SUFFIX}"))
    _open(large)
    _open(large)


@pytest.mark.parametrize("name", ["another array", "a text", "a bare pickle"])
def test_what_somebody_else_wrote_is_left_as_it_is(name: str, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, in_cache = places(large)
    DAMAGES[name](place)
    content = place.read_bytes()
    _open(large)
    assert place.read_bytes() == content
    assert in_cache.is_file()
    scans = _scans(monkeypatch)
    _open(large)
    assert scans == []


def test_where_the_folder_takes_no_file_the_cache_folder_does(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, in_cache = places(large)
    if os.geteuid() == 0:  # for whom no folder is read-only
        place.mkdir()
    else:
        large.parent.chmod(0o555)
    _open(large)
    assert in_cache.is_file()
    scans = _scans(monkeypatch)
    _open(large)
    assert scans == []
    large.parent.chmod(0o755)


def test_where_nothing_can_be_kept_the_run_goes_on_and_says_so(large: Path, caplog: pytest.LogCaptureFixture) -> None:
    for place in places(large):
        place.mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        _open(large)
    assert "found again at every start" in caplog.text


def test_a_file_that_changes_while_it_is_read_is_refused(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = json_scan.scan_list

    def changing(file: Any) -> Any:
        yield from scan(file)
        with large.open("a") as other:
            other.write(" ")

    monkeypatch.setattr("llava.data.formats.json_file.scan_list", changing)
    with pytest.raises(FlagError, match=r"data.json: the file changed while it was read"):
        JsonRows(large, kept_from=1)


def _sizes(path: str) -> list[tuple[int, int]]:
    return JsonRows(Path(path), kept_from=1).sizes.tolist()


def test_processes_that_start_together_agree(large: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        assert list(pool.map(_sizes, [str(large)] * 8)) == [SIZES] * 8
    assert sorted(path.name for path in large.parent.iterdir()) == ["data.json", f"data.json{SUFFIX}"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(ROWS).encode("utf-16"), r"text in UTF-16.*iconv -f UTF-16 -t UTF-8"),
        (b"\x1f\x8b" + bytes(30), r"compressed by gzip.*gunzip"),
        (b"PK\x03\x04" + bytes(30), r"a ZIP archive.*unzip"),
    ],
)
def test_other_encodings_are_named_with_the_command(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(FlagError, match=rf"(?s)data.json: is {message}"):
        open_rows(path)


def test_a_user_without_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an unknown number in a container: the place next to the file is the only one."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert kept_index.places(tmp_path / "a.json") == [tmp_path / "a.json.rows.npy"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(kept_index.places(tmp_path / "a.json")) == 2
