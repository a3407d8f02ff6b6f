"""The diagram in `docs/architecture.md` is that of the imports: rooms, arrows, and the files that it names."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.structure import (
    MODULES,
    PROGRAMS,
    ROOT,
    circle,
    import_graph,
    imported_modules,
    is_door,
    module_name,
    replaced_by_hand,
)

TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ALIASES = {"llava.constants": "llava.errors"}
OUTSIDE = (
    "llava.utils",
    "llava.mm_utils",
    "llava.export",
    "llava.__main__",
    "llava.dynamic_eval",
    "llava.scripts",
    "playground",
)
APPLICATIONS = ("mma.lavin", "dynamic.visualize")
Arrows = dict[str, set[str]]


def room(module: str) -> str | None:
    """The part of the diagram that a module is in; None: it is left out."""
    for name in APPLICATIONS:
        if module == name or module.startswith(f"{name}."):
            return name
    if any(module == name or module.startswith(f"{name}.") for name in OUTSIDE) or module == "llava":
        return None
    parts = module.split(".")
    name = ".".join(parts[:2]) if parts[0] == "llava" else parts[0]
    return ALIASES.get(name, name)


def measured() -> Arrows:
    arrows: Arrows = {}
    for path in MODULES:
        start = room(module_name(path))
        if start is None or (path.name != "__init__.py" and is_door(path)):
            continue
        ends = {room(name) for name in imported_modules(path) if name.partition(".")[0] in PACKAGES}
        arrows.setdefault(start, set()).update(end for end in ends if end not in (None, start))
    return arrows


PACKAGES = {module_name(path).partition(".")[0] for path in MODULES}


def reached(arrows: Arrows, start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for end in arrows.get(waiting.pop(), set()) - found:
            found.add(end)
            waiting.append(end)
    return found


def closure(arrows: Arrows) -> Arrows:
    return {start: reached(arrows, start) for start in arrows}


def drawn() -> Arrows:
    diagram = TEXT.partition("```mermaid\n")[2].partition("```")[0]
    arrows: Arrows = {}
    for start, end in re.findall(r"^ +(\S+) --> (\S+)$", diagram, re.MULTILINE):
        arrows.setdefault(start, set()).add(end)
    return arrows


def test_the_diagram_is_that_of_the_code() -> None:
    found = closure(measured())
    assert {start: ends for start, ends in closure(drawn()).items() if ends} == {s: e for s, e in found.items() if e}


def test_no_arrow_is_drawn_that_a_longer_path_explains() -> None:
    arrows = drawn()
    for start, ends in arrows.items():
        for end in ends:
            without = arrows | {start: ends - {end}}
            assert end not in reached(without, start), f"{start} --> {end}"


def test_no_room_reaches_itself() -> None:
    assert not [start for start, ends in closure(measured()).items() if start in ends]
    assert reached({"a": {"b"}, "b": {"a"}}, "a") == {"a", "b"}


NAMED = re.compile(r"`((?:llava|hydralora|dynamic|mma|moe_patch|benchmarks|tests|scripts)/[\w/]+(?:\.\w+)?/?)")


@pytest.mark.parametrize("path", sorted(set(NAMED.findall(TEXT))))
def test_what_the_document_names_exists(path: str) -> None:
    assert (ROOT / path).exists(), f"docs/architecture.md names {path}"


def test_a_reader_opens_ten_files() -> None:
    """The way from a command to a checkpoint, each file there and imported by another of them, or the first."""
    table = TEXT.partition("## From a command to a checkpoint: ten files")[2].partition("\n\nWhat they stand on")[0]
    files = [row for row in re.findall(r"\| `(llava/[\w/]+\.py)`", table)]
    assert len(files) == 10
    assert all((ROOT / file).is_file() for file in files)
    names = {module_name(ROOT / file) for file in files}
    assert names - {"llava.train.train"} <= reached_modules("llava.train.train")


def reached_modules(start: str) -> set[str]:
    graph = {module_name(path): imported_modules(path) for path in MODULES}
    return reached(graph, start)


def test_the_numbers_are_those_of_the_code() -> None:
    """The table of counts; `tests/test_repository.py` holds the limits."""
    table = TEXT.partition("## In numbers")[2].partition("##")[0]
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \|$", table, re.MULTILINE)
    written = [int(now) for _, now, _ in rows]
    folders = Counter(path.parent for path in MODULES)
    fullest, most = folders.most_common(1)[0]
    up = sum(start in ends for start, ends in closure(measured()).items())
    scripts = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "scripts").rglob("*.py"))
    by_hand = [
        path for path in MODULES + PROGRAMS if "tests" not in path.parts and replaced_by_hand(path.read_text("utf-8"))
    ]
    counted = [len(circle(import_graph())), up, most, folders[ROOT / "llava" / "eval"], 10, len(by_hand), scripts]
    assert written == counted, f"docs/architecture.md, 'In numbers': {counted}"
    assert f"`{fullest.relative_to(ROOT).as_posix()}`" in rows[2][0]
    assert all(int(now) <= int(limit) for _, now, limit in rows)


@pytest.mark.parametrize("package", ["hydralora", "dynamic", "mma"])
def test_the_table_of_files_in_a_readme_is_that_of_the_folder(package: str) -> None:
    """Each row of `| file | answers |` begins with files of the package, or folders of it."""
    text = (ROOT / package / "README.md").read_text(encoding="utf-8")
    table = text.partition("| file | answers |\n")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines()[1:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(named) > 10
    assert not [name for name in named if not (ROOT / package / name).exists()]
