"""A damaged checkpoint: the run continues with the numbers of the undamaged one, or an error names the file.

A part that is missing is never replaced by a fresh one. `LLAVA_FUZZ=all` tries every damage, otherwise a seeded choice.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.errors import CheckpointError, LlavaError
from llava.model.completeness import RECORD_FILE
from llava.model.formats import read_tensors
from llava.train.train import main
from tests.reliability.choice import chosen
from tests.reliability.damage import Damage, damages
from tests.reliability.loading import verdict
from tests.train.test_training import HYDRA, command_line

RUN: dict[str, Any] = HYDRA | {"max_steps": 3, "save_steps": 2, "save_total_limit": 9, "mm_use_im_start_end": True}
UNREAD = ("training_args.bin", "README.md")
STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def trained(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a finished run."""
    files = [
        path for path in sorted(folder.rglob("*.safetensors")) if "checkpoint-" not in str(path.relative_to(folder))
    ]
    found = {
        f"{path.relative_to(folder)}:{name}": value for path in files for name, value in read_tensors(path).items()
    }
    assert found
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    main(command_line(folder, **RUN))
    return folder


def resumed(output: Path) -> dict[str, Tensor]:
    main(command_line(output, **RUN))
    return trained(output)


def copy(whole: Path, output: Path, recorded: bool = True) -> Path:
    """An output folder with the second update's checkpoint alone; returns the checkpoint."""
    folder = shutil.copytree(whole / "checkpoint-2", output / "checkpoint-2")
    if not recorded:
        (folder / RECORD_FILE).unlink()
    return folder


PARTS = ["extensions/hydralora/model.safetensors", "extensions/hydralora/config.json", "adapter_model.safetensors"]
PARTS += ["adapter_config.json", "mm_projector.safetensors", "image_tokens.safetensors", "config.json", *STATE]


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "no record"])
@pytest.mark.parametrize("part", [*PARTS, "extensions/hydralora", "extensions"])
def test_missing_parts(part: str, recorded: bool, whole: Path, tmp_path: Path) -> None:
    """Also in a folder of an earlier version, whose parts its other files name."""
    path = copy(whole, tmp_path, recorded) / part
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(LlavaError, match=path.name):
        main(command_line(tmp_path, **RUN))
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_folder_without_a_record_continues(whole: Path, tmp_path: Path) -> None:
    copy(whole, tmp_path, recorded=False)
    expected, found = trained(whole), resumed(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_without_an_optimizer(tmp_path: Path) -> None:
    main(command_line(tmp_path, **RUN, save_only_model=True))
    shutil.rmtree(tmp_path / "checkpoint-3")
    with pytest.raises(CheckpointError, match=r"--save_only_model.*another --output_dir"):
        main(command_line(tmp_path, **RUN, save_only_model=True))


def test_damaged_checkpoints(whole: Path, tmp_path: Path) -> None:
    """The corpus."""
    all_of_them = [each for each in damages(whole / "checkpoint-2") if each.file not in UNREAD]
    expected, faults = trained(whole), []
    for number, damage in enumerate(chosen(all_of_them, 12)):
        output = tmp_path / str(number)
        damage.apply(copy(whole, output) / damage.file)
        found = verdict(lambda output=output: resumed(output), damage, expected)
        if found.startswith("FAULT"):
            faults.append(f"{damage.name}: {found}")
        shutil.rmtree(output)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_an_optimizer_that_is_not_finite(name: str, whole: Path, tmp_path: Path) -> None:
    path = copy(whole, tmp_path, recorded=False) / "optimizer.pt"
    content = torch.load(path, weights_only=True)
    content["state"][0][name].view(-1)[0] = float("nan")
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"optimizer\.pt: '{name}' of a weight contains NaN"):
        main(command_line(tmp_path, **RUN))


def test_states_of_another_update(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path, recorded=False)
    shutil.copyfile(whole / "checkpoint-3" / "scheduler.pt", folder / "scheduler.pt")
    with pytest.raises(CheckpointError, match=r"scheduler\.pt: is at update 3.*says 2"):
        main(command_line(tmp_path, **RUN))
    shutil.copyfile(whole / "checkpoint-3" / "trainer_state.json", folder / "trainer_state.json")
    with pytest.raises(LlavaError, match=r"checkpoint-2.*trainer_state\.json"):
        main(command_line(tmp_path, **RUN))


def test_names_of_damages_are_unique(whole: Path) -> None:
    """So that a fault can be repeated by its name."""
    names = [damage.name for damage in damages(whole / "checkpoint-2")]
    assert len(set(names)) == len(names) > 300
    assert isinstance(damages(whole / "checkpoint-2")[0], Damage)
