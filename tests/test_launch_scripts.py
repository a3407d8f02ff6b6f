"""`python -m llava.scripts`: what it writes, what it refuses, and that the result runs in any folder."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.errors import FlagError, LlavaError
from llava.scripts.__main__ import main, write_scripts
from llava.scripts.files import FOLDERS, INSTALLED, launch_files, source
from tests import command_lines
from tests.command_lines import ROOT

EVALUATIONS = sorted(path.stem for path in (ROOT / "scripts" / "v1_5" / "eval").glob("*.sh"))
TRAININGS = ("scripts/v1_5/finetune.sh", "scripts/pretrain.sh", "run/train_dynamic_llava_7b.sh")
TEXT = "scripts/hydralora/fine-tuning_dp.sh"


def test_all_files_with_content_and_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path / "mine")])
    written = {path.relative_to(tmp_path / "mine") for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    assert written == set(launch_files(ROOT))
    assert {path.parts[0] for path in written} == set(FOLDERS)
    assert {Path("scripts/common.bash"), Path("scripts/zero3.json"), Path("scripts/convert_gqa_for_eval.py")} <= written
    for path in written:
        assert (tmp_path / "mine" / path).read_bytes() == (ROOT / path).read_bytes()
        assert os.access(tmp_path / "mine" / path, os.X_OK) == os.access(ROOT / path, os.X_OK)
    assert any(os.access(ROOT / path, os.X_OK) for path in written)
    assert f"{len(written)} files" in capsys.readouterr().out


def _a_folder(place: Path) -> None:
    place.mkdir()


def _a_file(place: Path) -> None:
    place.write_text("mine")


def _a_dangling_link(place: Path) -> None:
    place.symlink_to(place.with_name("nowhere"))


@pytest.mark.parametrize("make", [_a_folder, _a_file, _a_dangling_link])
@pytest.mark.parametrize("name", FOLDERS)
def test_nothing_is_overwritten(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(FlagError, match=f"{name}: already exists"):
        write_scripts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write_scripts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "run", "scripts"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []

    def full(original: Path, target: Path) -> None:
        copied.append(target)
        if len(copied) > 3:
            raise OSError(28, "No space left on device", str(target))
        shutil.copyfile(original, target)

    monkeypatch.setattr("llava.scripts.__main__.shutil.copy", full)
    with pytest.raises(FlagError, match="No space left"):
        write_scripts(tmp_path)
    assert len(copied) == 4
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FlagError, match="file"):
        write_scripts(tmp_path / "file")


def test_where_the_scripts_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel's own come first; without any, the error says so."""
    package = tmp_path / "site-packages" / "llava" / "scripts"
    package.mkdir(parents=True)
    assert source(package) is None
    shutil.copytree(ROOT / "scripts", package / INSTALLED / "scripts")
    assert source(package) is None
    shutil.copytree(ROOT / "run", package / INSTALLED / "run")
    assert source(package) == package / INSTALLED
    assert source() == ROOT
    monkeypatch.setattr("llava.scripts.__main__.source", lambda: None)
    with pytest.raises(LlavaError, match="install llava-extensions again"):
        write_scripts(tmp_path / "out")


def test_the_program_starts_without_torch(tmp_path: Path) -> None:
    code = "import sys; from llava.scripts.__main__ import main; main(['out']); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0


def run_elsewhere(script: str, folder: Path, environment: str = "") -> list[list[str]]:
    """Run a written script from a folder that is not its own; the programs that it starts."""
    write_scripts(folder / "launch files")
    programs, notes, work = folder / "programs", folder / "notes", folder / "work"
    for path in (programs, notes, work):
        path.mkdir()
    for name in command_lines.LAUNCHERS:
        (programs / name).write_text(command_lines.NOTE_THE_CALL, encoding="utf-8")
        (programs / name).chmod(0o755)
    variables = {"PATH": f"{programs}:{os.defpath}", "COMMAND_LINES": str(notes), "CUDA_VISIBLE_DEVICES": "0"}
    command = f"{environment} bash {shlex.quote(str(folder / 'launch files' / script))}"
    done = subprocess.run(["bash", "-c", command], cwd=work, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [path.read_text(encoding="utf-8").split("\0")[:-1] for path in notes.iterdir()]


@pytest.mark.parametrize("script", [*TRAININGS, TEXT])
def test_training_in_another_folder(script: str, tmp_path: Path) -> None:
    """The program is a module, and the settings of DeepSpeed are found."""
    (command,) = run_elsewhere(script, tmp_path)
    call = command_lines.our_call(command)
    assert call is not None
    assert call.module.startswith(("llava.train.train_", "hydralora.finetune"))
    assert not any(word.endswith(".py") for word in command)
    settings = (tmp_path / "work" / call.arguments[call.arguments.index("--deepspeed") + 1]).resolve()
    assert settings.is_file()
    assert settings.is_relative_to(tmp_path / "launch files" / "scripts")


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_in_another_folder(name: str, tmp_path: Path) -> None:
    """Programs are modules, or files next to the script."""
    commands = run_elsewhere(f"scripts/v1_5/eval/{name}.sh", tmp_path)
    assert commands
    for command in commands:
        files = [word for word in command if word.endswith(".py")]
        assert all((tmp_path / "work" / file).is_file() for file in files), command


def test_a_job_of_slurm_runs_a_copy(tmp_path: Path) -> None:
    """The scheduler copies the script away; the job starts where it was submitted."""
    write_scripts(tmp_path)
    spool = tmp_path / "spool"
    spool.mkdir()
    shutil.copy(tmp_path / "scripts" / "slurm_finetune.sh", spool / "slurm_script")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "torchrun").write_text(command_lines.NOTE_THE_CALL, encoding="utf-8")
    (programs / "torchrun").chmod(0o755)
    notes = tmp_path / "notes"
    notes.mkdir()
    variables = {"PATH": f"{programs}:{os.defpath}", "COMMAND_LINES": str(notes)}
    done = subprocess.run(
        ["bash", str(spool / "slurm_script")], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (note,) = notes.iterdir()
    assert "llava.train.train_mem" in note.read_text().split("\0")
