"""`docs/seed_commands.md`: what the original READMEs name is in it, and what it says of each command and file is true.

`seed_commands.json` lists the commands and files that the four READMEs name: the first line of each command, without
its environment, and every name with an ending. The blocks of the document, which have the long command lines with all
their flags, are handed to the real parsers by `tests/test_commands.py`, as those of every document.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from llava.train.arguments import build_parser as llava_parser
from mma.lavin.train import build_parser as lavin_parser
from tests import command_lines
from tests.command_lines import ROOT, our_call
from tests.test_commands import parse

DOCUMENT = ROOT / "docs" / "seed_commands.md"
NAMED: dict[str, dict[str, list[str]]] = json.loads((ROOT / "tests" / "seed_commands.json").read_text("utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SAME, PLACE = "the same", "the same place"
LONG = "the same, with all flags: below"


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def table(text: str) -> dict[str, str]:
    """From what the README says to what it is here."""
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", text, re.MULTILINE)
    assert len(dict(rows)) == len(rows), "something is listed twice"
    return dict(rows)


SECTIONS = sections()
ROWS = [(name, left, right) for name, text in SECTIONS.items() for left, right in table(text).items()]


def plain(word: str) -> str:
    return word.removeprefix("./")


def python_versions() -> tuple[tuple[int, ...], tuple[int, ...]]:
    low, high = re.findall(r"(\d+)\.(\d+)", PROJECT["requires-python"])
    return tuple(map(int, low)), tuple(map(int, high))


# What the READMEs name


def test_the_sections_are_the_four_readmes() -> None:
    assert list(SECTIONS) == list(NAMED) == ["MLLM-HydraLoRA", "HydraLoRA", "Dynamic-LLaVA", "LaVIN"]
    assert sum(len(names) for lists in NAMED.values() for names in lists.values()) == 120
    assert len(ROWS) > 110


@pytest.mark.parametrize("section", NAMED)
def test_every_command_has_an_entry(section: str) -> None:
    lefts = table(SECTIONS[section])
    commands = NAMED[section]["commands"]
    assert not [command for command in commands if not any(left.startswith(command) for left in lefts)]


@pytest.mark.parametrize("section", NAMED)
def test_every_file_has_an_entry(section: str) -> None:
    words = {plain(word.strip("\"'")) for left in table(SECTIONS[section]) for word in left.split()}
    assert not [name for name in NAMED[section]["files"] if plain(name) not in words]


@pytest.mark.parametrize("section", SECTIONS)
def test_long_commands_are_in_a_block(section: str) -> None:
    block = "".join(re.findall(r"^```bash\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL))
    long = [left for left, right in table(SECTIONS[section]).items() if right.startswith(LONG)]
    starts = [line.split(" \\")[0] for line in block.splitlines() if not line.startswith(" ")]
    assert [re.sub(r"^\w+=\S+ ", "", start) for start in starts] == sorted(long, key=block.index)
    assert bool(long) == (section in ("MLLM-HydraLoRA", "Dynamic-LLaVA"))


# What the document says of them


def check_python(command: str) -> None:
    """A program of ours that is there; its arguments are accepted by its parser."""
    call = our_call(shlex.split(command))
    assert call is not None, f"{command}: starts no program of ours"
    path = ROOT.joinpath(*call.module.split("."))
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), command
    if call.arguments:
        parse(call)


def check_pip(command: str) -> None:
    """`pip install` of files that exist and of extras that the package has."""
    words = shlex.split(command)
    assert words[:2] == ["pip", "install"]
    for flag, value in itertools.pairwise(words):
        if flag in ("-r", "-c"):
            assert (ROOT / value).is_file(), command
        if flag == "-e":
            extras = re.findall(r"[\w-]+", value.partition("[")[2])
            assert value[0] == ".", command
            assert set(extras) <= set(PROJECT["optional-dependencies"]), command
    files = [word for word in words[2:] if word.endswith(".txt")]
    assert all(words[words.index(file) - 1] == "-r" for file in files), f"{command}: lacks -r"


def check_conda(command: str, section: str) -> None:
    """A Python that the package admits; the name of an environment that a command of the section creates."""
    words = shlex.split(command)
    if words[1] == "activate":
        created = [right for left, right in table(SECTIONS[section]).items() if left.startswith("conda create")]
        assert any(f"-n {words[2]} " in right for right in created), command
    elif words[1] == "env":
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    else:
        low, high = python_versions()
        (version,) = [word.partition("=")[2] for word in words if word.startswith("python=")]
        assert low <= tuple(map(int, version.split("."))) < high, command


def check_option(option: str, section: str) -> None:
    """An option of the training program of LaVIN, or of LLaVA, and its value."""
    flag, *values = option.split()
    parser = lavin_parser() if section == "LaVIN" else llava_parser({})
    actions = {name: action for action in parser._actions for name in action.option_strings}
    assert flag in actions, option
    for value in values:
        convert = actions[flag].type
        assert callable(convert)
        assert actions[flag].choices is None or convert(value) in actions[flag].choices, option
        convert(value)


def check(code: str, section: str) -> None:
    """Whether a command or path of this project is what the document says: there, and accepted."""
    first = code.split()[0]
    if code.startswith("--"):
        check_option(code, section)
    elif first == "bash":
        assert (ROOT / plain(code.split()[1])).is_file(), code
    elif first in ("python", "torchrun", "deepspeed"):
        check_python(code)
    elif first == "pip":
        check_pip(code)
    elif first == "conda":
        check_conda(code, section)
    else:
        assert (ROOT / plain(code)).exists(), f"{code}: is not here"


def is_ours(code: str) -> bool:
    """Whether a code span names a command or path, not a file of the user's data."""
    first = code.split()[0]
    return " " in code or "/" in first or first.startswith("--")


@pytest.mark.parametrize(("section", "left", "right"), ROWS)
def test_what_an_entry_says_is_true(section: str, left: str, right: str) -> None:
    spans, links = re.findall(r"`([^`]+)`", right), re.findall(r"\]\(([\w.]+)", right)
    for code in filter(is_ours, spans):
        check(code, section)
    assert all((DOCUMENT.parent / name).is_file() for name in links)
    if right.startswith(PLACE):
        assert links or any(plain(left) in text for text in launch_texts()), f"{left}: nothing reads it there"
    elif right.startswith(SAME):
        check(left, section)
    else:
        assert spans or links or right.startswith("not needed, as"), f"{left}: the entry says nothing that replaces it"


def launch_texts() -> list[str]:
    """The launch scripts, with the defaults of their paths written out, and the document of LaVIN's files."""
    texts = [path.read_text(encoding="utf-8") for name in ("scripts", "run") for path in (ROOT / name).rglob("*.*sh")]
    texts.append((ROOT / "docs" / "lavin.md").read_text(encoding="utf-8"))
    settings = {"EVAL": "./playground/data/eval", "MODEL": "./checkpoints/llava-v1.5-7b"}
    for name, value in settings.items():
        texts = [text.replace(f"${name}/", f"{value}/") for text in texts]
    return texts


@pytest.mark.parametrize(
    "code",
    [
        "bash HydraLoRA/MLLM_HydraLoRA.sh",
        "bash motivation/tesn_lora.sh",
        "pip install requirements.txt",
        'pip install -e ".[no_such_extra]"',
        "conda create -n llava python=3.10 -y",
        "conda activate dynamic_llava",
        "python eval/eval.py --tier testdev_balanced",
        "python -m llava.eval.no_such_program",
        "torchrun --nproc_per_node 1 demo.py --no_such_option 1",
        "--no_such_option",
        "moe.py",
    ],
)
def test_what_is_not_the_same_is_refused(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, SystemExit, ModuleNotFoundError)):
        check(code, "Dynamic-LLaVA")


def test_nothing_is_taken_from_the_machine_of_the_test() -> None:
    """`./checkpoints` and `./playground/data` of a user do not make an entry true."""
    places = [left for _, left, right in ROWS if right.startswith(PLACE)]
    assert len(places) > 20
    assert not any(right == SAME and plain(left).startswith(("checkpoints", "playground")) for _, left, right in ROWS)


# The files of the installation


def test_requirements_are_what_the_package_declares() -> None:
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[0] == "--constraint constraints.txt"
    (extras,) = re.fullmatch(r"--editable \.\[([\w,]+)\]", lines[1]).groups()  # type: ignore[union-attr]
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert len(lines) == 2


def test_the_conda_environment() -> None:
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert content["name"] == "hydralora", "the README of HydraLoRA activates that name"
    *packages, with_pip = content["dependencies"]
    (version,) = [name.partition("=")[2] for name in packages if name.startswith("python=")]
    low, high = python_versions()
    assert low <= tuple(map(int, version.split("."))) < high
    assert "pip" in packages
    (requirement,) = with_pip["pip"]
    assert (ROOT / requirement.removeprefix("-r ")).is_file()


def test_the_document_is_among_those_whose_blocks_are_tried() -> None:
    blocks = [block for block in command_lines.document_blocks() if block.name.startswith("docs/seed_commands.md")]
    assert len(blocks) == 2
    assert Path("docs/seed_commands.md").name in (ROOT / "README.md").read_text(encoding="utf-8")
