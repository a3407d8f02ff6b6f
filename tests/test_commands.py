"""Every command in the READMEs, in `docs/`, `run/` and `scripts/` is valid shell and is accepted by the real parser."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

from tests import command_lines
from tests.command_lines import Call, Snippet

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = command_lines.scripts()
BLOCKS = command_lines.document_blocks()
each_snippet = pytest.mark.parametrize("snippet", SCRIPTS + BLOCKS, ids=lambda snippet: snippet.name)

# The published lines are for GPUs with TF32; these two options let the same line pass on a machine without one.
WITHOUT_GPU = ("--use_cpu", "True", "--tf32", "False")

PLAN = "llava.train.plan"
"""Takes the whole command of another program."""

WITH_OWN_PARSER = ("llava.train.publish", PLAN)
"""Programs in `llava/train/` that do not train."""

PASSING_ON = ("benchmarks.experiments.sparse.train",)
"""Programs with options beside those of `llava/train/train.py`."""


def parse(call: Call) -> None:
    """Hand the arguments of `call` to the parser of its program.

    Raises:
        SystemExit: the parser refuses them.
        FlagError: they are contradictory or not carried out.
    """
    module = importlib.import_module(call.module)
    if hasattr(module, "__path__"):  # `python -m package`
        module = importlib.import_module(f"{call.module}.__main__")
    if call.module.startswith("llava.train.") and call.module not in WITH_OWN_PARSER:
        arguments, defaults = [*call.arguments, *WITHOUT_GPU], getattr(module, "DEFAULTS", None)
        importlib.import_module("llava.train.arguments").parse_args(arguments, defaults=defaults)
    elif call.module == PLAN:
        importlib.import_module(f"{PLAN}.command").read_command(call.arguments)
    elif call.module in PASSING_ON:
        others = module.build_parser().parse_known_args(call.arguments)[1]
        parse(Call("llava.train.train", tuple(others)))
    elif call.module in ("hydralora.finetune", "mma.train"):
        module.parse_args([*call.arguments, *WITHOUT_GPU])
    else:
        assert hasattr(module, "build_parser"), f"{call.module} has no build_parser()"
        module.build_parser().parse_args(call.arguments)


def test_there_are_commands_to_check() -> None:
    named = {snippet.name.partition(":")[0] for snippet in BLOCKS}
    assert named >= {"README.md", "hydralora/README.md", "benchmarks/experiments/nlvr/README.md"}
    assert len([snippet for snippet in SCRIPTS if "MLLM_HydraLoRA" in snippet.name]) >= 1


@each_snippet
def test_shell_syntax(snippet: Snippet) -> None:
    done = subprocess.run(["bash", "-n"], input=snippet.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@each_snippet
def test_flags_are_accepted(snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = command_lines.run_with_stand_ins(snippet, tmp_path)
    assert commands, f"{snippet.name} starts no program that this test knows"
    work = tmp_path / "inputs"
    work.mkdir()
    monkeypatch.chdir(work)
    for call in filter(None, map(command_lines.our_call, commands)):
        call = command_lines.with_relative_paths(call)
        command_lines.create_inputs(call, work)
        parse(call)


@pytest.mark.parametrize("snippet", SCRIPTS, ids=lambda snippet: snippet.name)
def test_scripts_start_a_program_of_ours(snippet: Snippet, tmp_path: Path) -> None:
    assert any(map(command_lines.our_call, command_lines.run_with_stand_ins(snippet, tmp_path)))


@each_snippet
def test_make_targets_and_scripts_exist(snippet: Snippet) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", snippet.text, re.MULTILINE)) <= targets
    for name in re.findall(r"(?:bash|sh) ((?:run|scripts)/\S+)", snippet.text):
        assert (ROOT / name).is_file(), f"{snippet.name} calls {name}"


@pytest.mark.parametrize(
    "arguments", [("--no_such_flag", "1"), ("--learning_rate", "fast"), ("--output_dir", "out", "--bits", "3")]
)
def test_wrong_flags_are_refused(arguments: tuple[str, ...]) -> None:
    """The negative control: the test above would see a misspelt or mistyped option."""
    with pytest.raises((SystemExit, ValueError)):
        parse(Call("llava.train.train", arguments))


def test_the_stand_ins_see_what_bash_expands(tmp_path: Path) -> None:
    text = 'N=2\nfor i in 0 1; do\n  python -m llava.eval.x --chunk $i \\\n    --name "a b" &\ndone\nwait\n'
    commands = command_lines.run_with_stand_ins(Snippet("block", text), tmp_path)
    calls = {command_lines.our_call(command) for command in commands}
    assert calls == {Call("llava.eval.x", ("--chunk", chunk, "--name", "a b")) for chunk in "01"}
