"""`python -m llava.convert` and its former names: equal files from every command line, what is printed and refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.convert.__main__ import build_parser, main
from llava.convert.hf import from_hf, to_hf
from llava.convert.original import export_original
from llava.errors import CheckpointError, FlagError
from llava.model.builder import load_pretrained_model
from llava.runtime.tokenizer import load_tokenizer
from tests.golden import golden_dir
from tests.llava.train.test_training import BASE

ROUTED = golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle"


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the library writes for each command."""
    folder = tmp_path_factory.mktemp("library")
    return {
        "to-hf": to_hf(BASE, folder / "hf"),
        "to-hf, half": to_hf(BASE, folder / "half", dtype="bfloat16", conv_mode="v1"),
        "from-hf": from_hf(folder / "hf", folder / "back"),
        "from-hf, resized": from_hf(folder / "hf", folder / "resized", "resize"),
        "to-original": export_original(ROUTED, folder / "original", str(BASE)),
    }


HALF = ("--dtype", "bfloat16", "--conv-mode", "v1")
RESIZED = ("--image_aspect_ratio", "resize")
MODEL_BASE = ("--model-base", str(BASE))

COMMAND_LINES: dict[str, tuple[str, str, Callable[[str, str], list[str]]]] = {
    "to-hf": ("llava.convert.__main__", "to-hf", lambda one, out: ["to-hf", one, out]),
    "to-hf with options": ("llava.convert.__main__", "to-hf, half", lambda one, out: ["to-hf", one, out, *HALF]),
    "from-hf": ("llava.convert.__main__", "from-hf", lambda one, out: ["from-hf", one, out]),
    "from-hf with an option": (
        "llava.convert.__main__",
        "from-hf, resized",
        lambda one, out: ["from-hf", one, out, *RESIZED],
    ),
    "to-original": (
        "llava.convert.__main__",
        "to-original",
        lambda one, out: ["to-original", one, out, *MODEL_BASE],
    ),
    "llava.export": ("llava.export", "to-hf", lambda one, out: ["--model-path", one, "--out", out]),
    "llava.export with options": (
        "llava.export",
        "to-hf, half",
        lambda one, out: ["--model-path", one, "--out", out, *HALF],
    ),
    "llava.model.convert_hf to-hf": ("llava.model.convert_hf", "to-hf", lambda one, out: ["to-hf", one, out]),
    "llava.model.convert_hf from-hf": (
        "llava.model.convert_hf",
        "from-hf, resized",
        lambda one, out: ["from-hf", one, out, *RESIZED],
    ),
    "llava.model.export": ("llava.model.export", "to-original", lambda one, out: [one, out, *MODEL_BASE]),
}
"""The module, the library's folder, and the words for an input and an output."""


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_every_command_line_writes_the_same_files(
    name: str, written: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, wanted, words = COMMAND_LINES[name]
    command = wanted.partition(",")[0]
    source = {"to-hf": BASE, "from-hf": written["to-hf"], "to-original": ROUTED}[command]
    output = importlib.import_module(module).main(words(str(source), str(tmp_path / "out")))
    assert output == tmp_path / "out"
    assert files(output) == files(written[wanted])
    printed = capsys.readouterr().out
    assert f"written: {output}\n" in printed
    assert (f"vllm serve {output}\n" in printed) == (command == "to-hf")
    assert (f"sglang.launch_server --model-path {output}\n" in printed) == (command == "to-hf")


def test_the_options_matter(written: dict[str, Path]) -> None:
    """The negative control: an option that a command line loses would change files."""
    assert files(written["to-hf"]) != files(written["to-hf, half"])
    assert files(written["from-hf"]) != files(written["from-hf, resized"])


def test_there_and_back(written: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"python -m llava\.convert from-hf FOLDER OUTPUT"):
        load_pretrained_model(str(written["to-hf"]), device="cpu")
    assert load_tokenizer(written["from-hf"]).pad_token == "<unk>"


@pytest.mark.parametrize("name", [name for name in COMMAND_LINES if COMMAND_LINES[name][1] == "to-hf"])
def test_extensions_are_refused(name: str, tmp_path: Path) -> None:
    module, _, words = COMMAND_LINES[name]
    with pytest.raises(FlagError, match="hydralora"):
        importlib.import_module(module).main([*words(str(ROUTED), str(tmp_path / "none")), *MODEL_BASE])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("to-vllm", "a", "b"),
        ("to-hf", "a"),
        ("to-hf", "a", "b", "--dtype", "int8"),
        ("from-hf", "a", "b", "--model-base", "c"),
        ("to-original", "a", "b", "--dtype", "float32"),
    ],
    ids=" ".join,
)
def test_wrong_command_lines(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m llava.convert")


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("llava.export", ("build_parser", "main", "to_hf")),
        ("llava.model.export", ("build_parser", "export_original", "main")),
        ("llava.model.convert_hf", ("build_parser", "from_hf", "main", "to_hf")),
    ],
)
def test_former_names_keep_the_functions(module: str, names: tuple[str, ...]) -> None:
    door = importlib.import_module(module)
    library = {"to_hf": to_hf, "from_hf": from_hf, "export_original": export_original}
    for name in names:
        assert getattr(door, name) is library.get(name, getattr(door, name))
    assert set(names) == set(door.__all__)


def test_parsers_of_one_command() -> None:
    args = build_parser("to-original").parse_args(["one", "two"])
    assert (args.checkpoint, args.output, args.model_base) == ("one", "two", None)
