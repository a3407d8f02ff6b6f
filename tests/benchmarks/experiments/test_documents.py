"""The README of every experiment: its order, its commands against the recipe, its summaries against single seeds.

`docs/experiments.md` is the page above them: one line for each question, with numbers that are those of a README.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from benchmarks.experiments.common.report import command_block

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "benchmarks" / "experiments"
PAGE = ROOT / "docs" / "experiments.md"
LONGEST_PAGE = 60
"""Lines of docs/experiments.md."""
EXPERIMENTS = ("modality", "nlvr", "nlvr_methods", "sparse", "text")
PLACES = {
    "nlvr": ("nlvr table", "nlvr seeds", "nlvr commands"),
    "nlvr_methods": ("nlvr methods table", "nlvr methods seeds", "nlvr methods commands"),
    "text": ("text table", "text seeds", "text comparison", "text commands"),
    "sparse": ("sparse table", "sparse seeds", "sparse commands"),
    "modality": ("modality table", "modality seeds", "modality routing", "modality commands"),
}
"""What the program of an experiment fills in: summary and single seeds first, commands last."""
HEADINGS = ["Question", "Setup", "Command", "Expected result", "Result", "Commands of the runs"]
MEAN_AND_RANGE = r"(-?[\d.]+) \((-?[\d.]+) - (-?[\d.]+)\)"
ROUNDED = 0.1001
"""How far a mean of rounded numbers may be from the rounded mean."""

each = pytest.mark.parametrize("name", EXPERIMENTS)


def table_of(name: str) -> Any:
    """The program that fills the README of an experiment."""
    return import_module(f"benchmarks.experiments.{name}.table")


def readme(name: str) -> str:
    return (FOLDER / name / "README.md").read_text(encoding="utf-8")


def filled(name: str, place: str) -> str:
    """What is between the marks of a place.

    Raises:
        AssertionError: the marks are not there exactly once, in this order.
    """
    begin, end = f"<!-- {place} begin -->", f"<!-- {place} end -->"
    text = readme(name)
    assert text.count(begin) == text.count(end) == 1
    return text.partition(begin)[2].partition(end)[0].strip()


def rows_of(table: str) -> list[dict[str, str]]:
    """Lines of a Markdown table as cells by column."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    head, _, *rows = lines
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_list_of_experiments_is_complete() -> None:
    assert tuple(sorted(path.parent.name for path in FOLDER.glob("*/table.py"))) == EXPERIMENTS == tuple(sorted(PLACES))


@each
def test_the_program_fills_the_readme_of_its_folder(name: str) -> None:
    assert FOLDER / name / "README.md" == table_of(name).DOCUMENT
    assert all(filled(name, place) for place in PLACES[name])
    assert set(re.findall(r"<!-- (.+) begin -->", readme(name))) == set(PLACES[name])


@each
def test_every_readme_has_the_same_order(name: str) -> None:
    found = re.findall(r"^## (.+)$", readme(name), re.MULTILINE)
    assert found == [heading for heading in HEADINGS if heading in found]
    assert set(HEADINGS) - set(found) <= {"Expected result"}  # left out where nothing was recorded before the runs


@each
def test_documented_commands_are_those_of_the_recipe(name: str) -> None:
    program = table_of(name)
    commands = program.documented_commands(program.Recipe())
    assert commands
    assert filled(name, PLACES[name][-1]) == command_block(commands)


@each
def test_paths_are_required(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        table_of(name).build_parser().parse_args([])
    wanted = {"--output-dir"} if name == "text" else {"--data", "--output-dir"}
    message = capsys.readouterr().err
    assert set(re.findall(r"--[a-z-]+", message.rpartition("required:")[2])) == wanted


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "sparse"])
def test_summaries_are_those_of_the_seeds(name: str) -> None:
    """Mean, lowest and highest of every cell."""
    summary, seeds = (rows_of(filled(name, place)) for place in PLACES[name][:2])
    described = {}
    for row in summary:
        label, _, count = row[""].partition(" (")
        if not re.fullmatch(r"\d+ seeds\)", count):
            continue  # a reference line
        runs = [one for one in seeds if one["run"] == label]
        assert len(runs) == int(count.split()[0])
        matches = {column: re.fullmatch(MEAN_AND_RANGE, cell) for column, cell in row.items()}
        described[label] = [column for column, match in matches.items() if match]
        for column, match in matches.items():
            if match:
                check_cell([float(one[column]) for one in runs], match, f"{label}, {column}")
    assert list(described) == titles(name)
    assert set(described) == {one["run"] for one in seeds}
    assert all(len(columns) >= 4 for columns in described.values())


def test_summaries_of_dropping_are_those_of_the_seeds() -> None:
    found: dict[tuple[str, str, float], str] = {}
    for table in filled("sparse", "sparse table").split("\n\n"):
        title = table.splitlines()[0].split("|")[1].strip().strip("*")
        for row in rows_of(table):
            way = row[f"**{title}**"]
            found |= {(title, way, float(rate)): row[rate] for rate in ("1.0", "0.5", "0.2", "0.1") if row[rate] != "-"}
    seeds = rows_of(filled("sparse", "sparse seeds"))
    keys = {(f"{one['model']}: {one['task']}", one["dropping"], float(one["keep rate"])) for one in seeds}
    assert keys == set(found)
    settings = import_module("benchmarks.experiments.sparse.recipe").SETTINGS
    assert {title for title, _, _ in found} == {f"{one.title}: {group}" for one in settings for group in one.groups}
    for one in seeds:
        key = (f"{one['model']}: {one['task']}", one["dropping"], float(one["keep rate"]))
        match = re.fullmatch(MEAN_AND_RANGE, found[key])
        assert match, found[key]
        check_cell([float(value) for value in one["seeds 0, 1, 2"].split(", ")], match, str(key))


def titles(name: str) -> list[str]:
    """The lines of a summary that are trained models, in order."""
    program = table_of(name)
    if name == "nlvr":
        return [program.report.NAMES[method] for method in program.METHODS]
    return [method.title for method in program.Recipe().methods]


def check_cell(values: list[float], cell: re.Match[str], where: str) -> None:
    """`cell` is mean, lowest and highest of `values`."""
    middle, lowest, highest = map(float, cell.groups())
    assert (lowest, highest) == (min(values), max(values)), where
    assert abs(middle - mean(values)) <= ROUNDED, where


def test_a_wrong_cell_is_seen() -> None:
    """The negative control of the two tests above."""
    for cell in ("2.2 (1.0 - 3.0)", "2.0 (1.1 - 3.0)", "2.0 (1.0 - 2.9)"):
        match = re.fullmatch(MEAN_AND_RANGE, cell)
        assert match
        with pytest.raises(AssertionError, match="here"):
            check_cell([1.0, 2.0, 3.0], match, "here")


def answers() -> list[tuple[str, str]]:
    """Name of the experiment and answer, for each question of the page."""
    link = r"^\| \[.+\]\(\.\./benchmarks/experiments/(\w+)/README\.md(?:#[\w-]+)?\) \| (.+) \|$"
    return re.findall(link, PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_one_page_answers_every_experiment() -> None:
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= LONGEST_PAGE
    assert {name for name, _ in answers()} == set(EXPERIMENTS)
    assert "<!--" not in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "answer"), answers(), ids=[f"{n}-{name}" for n, (name, _) in enumerate(answers())])
def test_numbers_of_the_page_are_those_of_the_readme(name: str, answer: str) -> None:
    numbers = re.findall(r"(?<![\w.])-?\d+\.\d+", answer)
    assert numbers
    text = readme(name)
    missing = [number for number in numbers if not re.search(rf"(?<![\w.-]){re.escape(number)}(?![\d.]\d)", text)]
    assert not missing
