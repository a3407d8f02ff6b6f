"""`python -m llava` lists every program once, and each former name of a program does what the program does."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from llava.__main__ import PROGRAMS, file_of, main, sentence, work_of
from llava.errors import LlavaError
from tests.structure import MODULES, ROOT, module_name

LISTED = [program for group in PROGRAMS.values() for program in group]
GROUPS = "train data eval serve convert weights hydralora dynamic mma moe_patch scripts"


def is_program(path: Path) -> bool:
    """Whether a file does something when it is run: `if __name__ == "__main__"` at its end."""
    tests = [node.test for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
    return "__name__ == '__main__'" in map(ast.unparse, tests)


def typed(path: Path) -> str:
    """The name after `python -m`."""
    return module_name(path).removesuffix(".__main__")


STARTED = {
    typed(path): path
    for path in MODULES
    if path.relative_to(ROOT).parts[0] != "playground" and is_program(path) and typed(path) != "llava"
}
"""The file of every program in the packages, doors included."""


@dataclass(frozen=True)
class Door:
    """A former or an original name of a program.

    Attributes:
        program: what it stands for, with a command of that program, if it has commands and the door is one of them.
        wrong: words of a command line that cannot be carried out.
        message: how that ends.
    """

    program: str
    wrong: tuple[str, ...]
    message: str


QUESTIONS = ("--model-path", "absent", "--question-file", "absent.json", "--answers-file", "out.jsonl")
ONE_IMAGE = ("--model-path", "absent", "--image-file", "absent.png", "--query", "?")
LENGTHS = ("--max_seq_len", "64", "--max_batch_size", "1")
LAVIN = ("--adapter_path", "absent.pth", "--ckpt_dir", "absent", *LENGTHS)
NO_FILE, NO_FOLDER = "error: absent.json: no such file", "error: absent: no such checkpoint folder"
NO_BASE = "error: absent/7B: holds neither Meta's params.json"
POPE = ("--annotation-dir", "absent", "--question-file", "absent.json", "--result-file", "absent.json")
SCIENCE = ("--base-dir", "absent", "--result-file", "a.jsonl", "--output-file", "b.jsonl", "--output-result", "c.json")

DOORS = {
    "llava.model.export": Door("llava.convert to-original", ("absent", "out"), NO_FOLDER),
    "llava.model.convert_hf": Door("llava.convert", ("to-hf", "absent", "out"), NO_FOLDER),
    "llava.dynamic_eval.eval_pope": Door("llava.eval.eval_pope", POPE, NO_FILE),
    "llava.dynamic_eval.eval_science_qa": Door("llava.eval.eval_science_qa", SCIENCE, "error: absent/pid_splits.json"),
    "llava.dynamic_eval.eval_textvqa": Door(
        "llava.eval.eval_textvqa", ("--annotation-file", "absent.json"), "error: give --result-file or --result-dir"
    ),
    "llava.dynamic_eval.model_vqa": Door("llava.eval.model_vqa", QUESTIONS, NO_FILE),
    "llava.dynamic_eval.model_vqa_loader": Door("llava.eval.model_vqa_loader", QUESTIONS, NO_FILE),
    "llava.dynamic_eval.model_vqa_mmbench": Door("llava.eval.model_vqa_mmbench", QUESTIONS, NO_FILE),
    "llava.dynamic_eval.model_vqa_qbench": Door(
        "llava.eval.model_vqa_qbench", ("--model-path", "absent", "--questions-file", "absent.json"), NO_FILE
    ),
    "llava.dynamic_eval.model_vqa_science": Door("llava.eval.model_vqa_science", QUESTIONS, NO_FILE),
    "llava.dynamic_eval.run_dynamic_llava": Door("llava.eval.run_llava", ONE_IMAGE, NO_FOLDER),
    "llava.dynamic_eval.visualize": Door("dynamic.visualize", ONE_IMAGE, NO_FOLDER),
    "llava.data.check": Door(
        "llava.train.data_check",
        ("absent.json", "--model_name_or_path", "absent", "--image_folder", "absent"),
        "error: --image_folder absent: no such folder",
    ),
    "llava.serve.gradio_web_server": Door(
        "llava.serve.web", ("--controller", "http://localhost:10000", "--share"), "error: --share: is not supported"
    ),
    "mma.train": Door(
        "mma.lavin.train",
        ("--llama_model_path", "absent", "--data_root", "data", "--output_dir", "out", "--device", "cpu"),
        "error: data/pid_splits.json: no problems in split 'train'",
    ),
    "mma.eval": Door("mma.lavin.eval", (*LAVIN, "--data_root", "absent"), "error: "),
    "mma.eval_mme": Door("mma.lavin.eval_mme", LAVIN, "error: "),
    "mma.demo": Door("mma.lavin.demo", ("--ckpt_dir", "absent", "--llm_model", "7B"), NO_BASE),
    "mma.merge": Door("mma.lavin.merge", ("absent", "out", "--modality", "text"), NO_FOLDER),
    "mma.weights": Door("mma.lavin.weights", ("--llama_model_path", "absent", "--llm_model", "7B"), NO_BASE),
    "mma.convert": Door("mma.lavin.convert", ("export", "absent", "out.pth"), NO_FOLDER),
    "mma.original": Door(
        "mma.lavin.convert",
        ("import", "absent.pth", "out", "--base", "absent"),
        "error: absent.pth: cannot be read (No such file or directory)",
    ),
    "mma.data.mixture": Door(
        "mma.lavin.data.mixture", ("--data_root", "absent"), "error: absent/alpaca_data.json: no such file"
    ),
    "demo": Door("mma.lavin.demo", ("--ckpt_dir", "absent", "--llm_model", "7B"), NO_BASE),
}
OTHER_DOORS = ("llava.export", "llava.model.export", "mma.original")
"""Doors with more than the `main` of another module. That of `llava.export`, which has a command line of its own, is
tested in `tests/llava/convert/test_program.py`."""


# The list


def test_every_program_is_listed_once() -> None:
    """Under one of its names: a door stands for the program whose `main` it hands on."""
    assert " ".join(PROGRAMS) == GROUPS
    listed = [work_of(program)[0] for program in LISTED]
    assert len(set(listed)) == len(LISTED)
    of_packages = {path for name, path in STARTED.items() if work_of(name)[0] == path and name not in OTHER_DOORS}
    assert set(listed) == of_packages | set((ROOT / "scripts").glob("*.py"))
    assert len(LISTED) > 50


def test_every_door_is_in_the_table() -> None:
    doors = {name for name, path in STARTED.items() if work_of(name)[0] != path}
    assert {*doors, *OTHER_DOORS, "demo"} == {*DOORS, "llava.export"}
    listed = {work_of(program)[0] for program in LISTED}
    assert {work_of(door.program.split()[0])[0] for door in DOORS.values()} <= listed


@pytest.mark.parametrize("program", LISTED)
def test_the_line_of_a_program_is_its_docstring(program: str) -> None:
    text = sentence(program)
    assert text.endswith((".", "?"))
    assert len(text) > 20
    assert "the program is" not in text, "the line of a door in place of the program's"
    path = work_of(program)[0]
    code = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert " ".join(code.split()).startswith(text)


OTHER_PARSERS = (
    "llava.train.train_mem",
    "llava.train.train",
    "llava.train.train_sparse",
    "llava.train.train_xformers",
    "hydralora.evaluate",
)
"""Their parsers are transformers' and the harness's, which name the file."""


@pytest.mark.parametrize("program", [name for name in LISTED if name not in OTHER_PARSERS])
def test_help_says_what_a_user_types(program: str) -> None:
    if program.endswith(".py"):
        parser = runpy.run_path(str(ROOT / program))["build_parser"]()
        assert parser.prog == f"python {program}"
        return
    found = importlib.import_module(program)
    module = importlib.import_module(f"{program}.__main__") if hasattr(found, "__path__") else found
    assert module.build_parser().prog == f"python -m {program}"


SLOW_TO_START = (
    *("llava.train.train_mem", "llava.train.train", "llava.train.train_sparse", "llava.train.train_xformers"),
    *("hydralora.finetune", "mma.train"),
)
"""Training programs: their options are transformers' own, which cannot be listed without it."""

HEAVY = "torch torchvision transformers peft pandas matplotlib"

LISTS_OPTIONS = f"""
import importlib, sys
words, sys.argv = sys.argv[1:], ["-m"]  # what Python has there while it locates `python -m PROGRAM`

def check(program):
    loaded = sorted(set("{HEAVY}".split()) & set(sys.modules))
    if loaded: sys.exit(f"{{program}} imports {{loaded[0]}}")

for program in words:
    sys.orig_argv = ["python", "-m", program]
    found = importlib.import_module(program)
    module = importlib.import_module(f"{{program}}.__main__") if hasattr(found, "__path__") else found
    check(program)
    module.build_parser().format_help()
    check(program)
"""


def listing(*names: str) -> str:
    """What is wrong with listing the options of some programs, in a process of its own."""
    command = [sys.executable, "-c", LISTS_OPTIONS, *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stderr


def test_options_are_listed_without_the_model_stack() -> None:
    """`--help` and a mistyped option are answered at once by every program but those that train."""
    fast = [name for name in LISTED if name not in SLOW_TO_START and not name.endswith(".py")]
    assert len(fast) > 50
    assert listing(*fast, *(name for name in DOORS if name not in {"mma.original", "mma.train", "demo"})) == ""
    assert "mma.modality imports torch" in listing("mma.modality")


@pytest.mark.parametrize("name", ["llava.model.consolidate", "hydralora.convert"])
def test_a_program_in_a_package_of_models_starts_without_them(name: str) -> None:
    """Both packages import their models, unless Python is locating one of their programs."""
    words = [sys.executable, "-X", "importtime", "-m", name, "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.stdout.startswith(f"usage: python -m {name}")
    assert "argparse" in imported
    assert not imported & set(HEAVY.split())


LATE = """
import importlib, pickle, sys
name, sys.argv = sys.argv[1], ["-m"]
package = importlib.import_module(name)
assert "torch" not in sys.modules and set(package.__all__) <= set(dir(package))
for each in package.__all__:
    found = getattr(package, each)
    assert pickle.loads(pickle.dumps(found)) is found and found.__name__ == each
from transformers import AutoConfig
print("llava_llama" in AutoConfig.for_model.__globals__["CONFIG_MAPPING"], "hydralora.tuner" in sys.modules)
"""


@pytest.mark.parametrize(("package", "known"), [("llava.model", "True False"), ("hydralora", "False True")])
def test_a_program_finds_the_names_of_its_package(package: str, known: str) -> None:
    """Imported when they are used, as the same objects; what is made known to transformers and PEFT is then."""
    done = subprocess.run([sys.executable, "-c", LATE, package], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == (known, 0), done.stderr


def test_a_program_of_another_package_finds_everything_made_known(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import hydralora, llava.model\n")
    (tmp_path / "other" / "train.py").write_text(
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known\n"
        "from transformers import AutoConfig\n"
        "print('HYDRALORA' in known, AutoConfig.for_model('llava_llama').model_type)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "other.train", "hydralora.x"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert (done.stdout.strip(), done.returncode) == ("True llava_llama", 0), done.stderr


def test_the_list_is_printed_at_once_without_torch(tmp_path: Path) -> None:
    """In a process of its own, in another folder; the time is that of the processor, whatever else is running."""
    code = (
        "import time; start = time.process_time()\n"
        "import sys, llava.__main__ as program\n"
        "program.main([])\n"
        "print(time.process_time() - start, file=sys.stderr)\n"
        "print({'torch', 'transformers', 'numpy', 'mma', 'dynamic', 'hydralora'} & set(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    seconds, modules = done.stderr.splitlines()
    assert float(seconds) < 0.5
    assert modules == "set()"
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == LISTED
    assert all(said == sentence(name) for name, said in lines)
    groups = [line for line in done.stdout.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups == [f"{name}:" for name in PROGRAMS]


def test_the_list_as_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "llava"], cwd=ROOT, capture_output=True, text=True, check=True)
    main([])
    assert done.stdout == capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["train"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m llava")


@pytest.mark.parametrize("name", ["llava.absent", "scripts/absent.py"])
def test_a_damaged_installation_is_named(name: str) -> None:
    with pytest.raises(LlavaError, match=r"absent(\.py)?: is not there; install"):
        file_of(name)


# Doors


def outcome(module: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[object, str, str]:
    """Status or last message, output and errors of `python -m MODULE WORDS`, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{module.rpartition('.')[2]}.py", *words])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return ended.value.code, out.getvalue(), err.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, but for the names of LaVIN's data."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    for name in ("problems.json", "pid_splits.json"):
        (tmp_path / "data" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", DOORS)
def test_a_door_is_the_program(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Help, an option that does not exist, and a command that cannot be carried out: all as of the program itself."""
    door = DOORS[name]
    program, *command = door.program.split()

    status, help_text, errors = outcome(name, ("--help",), monkeypatch)
    assert (status, errors) == (0, "")
    assert help_text.startswith("usage: ")
    assert (status, help_text, errors) == outcome(program, (*command, "--help"), monkeypatch)

    unknown = (*door.wrong, "--no-such-option")
    status, output, errors = outcome(name, unknown, monkeypatch)
    if name == "mma.train":  # transformers' parser
        assert str(status).startswith("error: unknown options ['--no_such_option']")
    else:
        assert status == 2
        assert "--no-such-option" in errors
    assert (status, output, errors) == outcome(program, (*command, *unknown), monkeypatch)

    status, output, errors = outcome(name, door.wrong, monkeypatch)
    assert str(status).startswith(door.message)
    assert (status, output, errors) == outcome(program, (*command, *door.wrong), monkeypatch)
    assert sorted(path.name for path in folder.iterdir()) == ["data"]


def test_the_former_program_of_adapters_does_not_end_in_silence(tmp_path: Path) -> None:
    """`mma.original` is a library now; started as a program, in a process of its own, it is still the program."""
    words = ("import", "absent.pth", "out", "--base", "absent")
    done = subprocess.run(
        [sys.executable, "-m", "mma.original", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "error: absent.pth: cannot be read (No such file or directory)\n"
