"""A damaged checkpoint: the run continues with the numbers of the undamaged one, or an error names the file.

A part that is missing is never replaced by a fresh one, in none of the three training programs. `LLAVA_FUZZ=all` tries
every damage, otherwise a seeded choice.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava.errors import CheckpointError, LlavaError
from tests.reliability.choice import chosen
from tests.reliability.damage import Damage, damages
from tests.reliability.loading import verdict
from tests.reliability.programs import PARTS, Whole

UNREAD = ("training_args.bin", "README.md")


@pytest.fixture
def whole(program: str, runs: Callable[[str], Whole]) -> Whole:
    """The finished run of the program that a test is about."""
    return runs(program)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "no record"])
@pytest.mark.parametrize(("program", "part"), [(name, part) for name, parts in PARTS.items() for part in parts])
def test_missing_parts(part: str, recorded: bool, whole: Whole, tmp_path: Path) -> None:
    """Also in a folder of an earlier version, whose parts its other files name."""
    path = whole.copy(tmp_path, recorded) / part
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(LlavaError, match=path.name):
        whole.program.run(tmp_path)
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("program", PARTS)
def test_a_folder_without_a_record_continues(whole: Whole, tmp_path: Path) -> None:
    whole.copy(tmp_path, recorded=False)
    expected, found = whole.trained, whole.program.run(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("program", PARTS)
def test_weights_without_an_optimizer(whole: Whole, tmp_path: Path) -> None:
    whole.program.run(tmp_path, save_only_model=True)
    shutil.rmtree(tmp_path / whole.last.name)
    with pytest.raises(CheckpointError, match=r"--save_only_model.*another --output_dir"):
        whole.program.run(tmp_path, save_only_model=True)


@pytest.mark.parametrize("program", PARTS)
def test_damaged_checkpoints(whole: Whole, tmp_path: Path) -> None:
    """The corpus."""
    all_of_them = damages(whole.folder / "checkpoint-2", unread=UNREAD)
    faults = []
    for number, damage in enumerate(chosen(all_of_them, 8)):
        output = tmp_path / str(number)
        damage.apply(whole.copy(output) / damage.file)
        found = verdict(lambda output=output: whole.program.run(output), damage, whole.trained)
        if found.startswith("FAULT"):
            faults.append(f"{damage.name}: {found}")
        shutil.rmtree(output)
    assert not faults, "\n".join(faults)


FOUND = [
    *("trainer_state.json: save_steps null", "trainer_state.json: train_batch_size null"),
    *("trainer_state.json: total_flos a string", "trainer_state.json: total_flos null"),
    *("run.json: JSON []", "run.json: text"),
]
"""Damages that once ended in a traceback."""


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("program", PARTS)
def test_damages_that_were_found(name: str, whole: Whole, tmp_path: Path) -> None:
    (damage,) = [each for each in damages(whole.folder / "checkpoint-2", unread=UNREAD) if each.name == name]
    damage.apply(whole.copy(tmp_path, recorded=False) / damage.file)
    assert verdict(lambda: whole.program.run(tmp_path), damage, whole.trained) == "refused"


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("program", PARTS)
def test_an_optimizer_that_is_not_finite(name: str, whole: Whole, tmp_path: Path) -> None:
    path = whole.copy(tmp_path, recorded=False) / "optimizer.pt"
    content = torch.load(path, weights_only=True)
    content["state"][0][name].view(-1)[0] = float("nan")
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"optimizer\.pt: '{name}' of a weight contains NaN"):
        whole.program.run(tmp_path)


@pytest.mark.parametrize("program", PARTS)
def test_states_of_another_update(whole: Whole, tmp_path: Path) -> None:
    folder, last = whole.copy(tmp_path, recorded=False), whole.last
    shutil.copyfile(last / "scheduler.pt", folder / "scheduler.pt")
    with pytest.raises(CheckpointError, match=rf"scheduler\.pt: is at update {last.name[-1]}.*says 2"):
        whole.program.run(tmp_path)
    shutil.copyfile(last / "trainer_state.json", folder / "trainer_state.json")
    with pytest.raises(LlavaError, match=r"checkpoint-2.*trainer_state\.json"):
        whole.program.run(tmp_path)


@pytest.mark.parametrize("program", PARTS)
def test_names_of_damages_are_unique(whole: Whole) -> None:
    """So that a fault can be repeated by its name."""
    found = damages(whole.folder / "checkpoint-2", unread=UNREAD)
    names = [damage.name for damage in found]
    assert len(set(names)) == len(names) > 300
    assert isinstance(found[0], Damage)
