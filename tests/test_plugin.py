"""An extension that lives in another package plugs in through its entry point alone (`tests/plugin/`).

The package is really installed, into a folder of the test, and used by processes that have that folder on their path:
nothing in `llava` is told about it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from safetensors.torch import load_file

if TYPE_CHECKING:
    from playground.tiny import TinyFolders

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "tests" / "plugin"
pytestmark = pytest.mark.slow  # two processes that import everything and train
WEIGHT = "model.example_scale.weight"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder into which the example package is installed, without network."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # a copy: building writes into the source folder
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--offline", "--no-deps", "--no-build-isolation", "--python", sys.executable]
    command = [sys.executable, "-m", "uv", "pip", "install", *options, "--target", str(folder / "site"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with four one-colour images and a conversation about each."""
    folder = tmp_path_factory.mktemp("data")
    rows: list[dict[str, Any]] = []
    for index, colour in enumerate(["red", "green", "blue", "white"]):
        Image.new("RGB", (32, 32), colour).save(folder / f"{index}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhich colour is it?"},
            {"from": "gpt", "value": colour},
        ]
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def flags(output: Path, data: Path, models: TinyFolders) -> list[str]:
    """A run of two steps with LoRA and the projector."""
    values = {
        "model_name_or_path": models.language_model,
        "vision_tower": models.tower,
        "version": "v1",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_patch_token": False,
        "lora_enable": True,
        "lora_r": 2,
        "data_path": data / "train.json",
        "image_folder": data,
        "output_dir": output,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
    }
    return [word for flag, value in values.items() for word in (f"--{flag}", str(value))]


def train(folder: Path, runs: dict[str, list[str]], site: Path | None) -> dict[str, Any]:
    """Reports of `train_and_reload.py` by run, made in one process that has `site` on its path.

    Raises:
        AssertionError: the process failed.
    """
    runs_file, reports_file = folder / "runs.json", folder / "reports.json"
    runs_file.write_text(json.dumps(runs), encoding="utf-8")
    command = [sys.executable, str(PLUGIN / "train_and_reload.py"), str(runs_file), str(reports_file)]
    path = os.pathsep.join(map(str, filter(None, [site, ROOT])))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(reports_file.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Reports:
    """What happened with the package installed (by run) and without it, and where the checkpoints are."""

    installed: dict[str, Any]
    absent: dict[str, Any]
    folder: Path


# Words after the common flags; the names follow upstream's convention for LoRA checkpoints.
VARIANTS = {
    "llava-off-lora": [],
    "llava-on-lora": ["--scale_layer", "1"],
    "llava-still-lora": ["--scale_layer", "1", "--scale_lr", "0"],
    "llava-wrong-lora": ["--scale_layer", "7"],
}


@pytest.fixture(scope="module")
def reports(
    tmp_path_factory: pytest.TempPathFactory, data: Path, tiny_folders: TinyFolders, installed: Path
) -> Reports:
    with_plugin, without = tmp_path_factory.mktemp("with"), tmp_path_factory.mktemp("without")
    runs = {name: flags(with_plugin / name, data, tiny_folders) + words for name, words in VARIANTS.items()}
    absent = {"absent": flags(without / "llava-off-lora", data, tiny_folders)}
    return Reports(train(with_plugin, runs, installed), train(without, absent, None)["absent"], with_plugin)


def test_it_is_found_by_its_entry_point(reports: Reports) -> None:
    assert "example_scale" in reports.installed["llava-off-lora"]["installed"]
    assert "example_scale" not in reports.absent["installed"]


def test_installed_but_off_it_changes_nothing(reports: Reports) -> None:
    off = reports.installed["llava-off-lora"]
    assert {**off, "installed": reports.absent["installed"]} == reports.absent
    assert not (reports.folder / "llava-off-lora" / "extensions").exists()


def test_on_it_is_trained_saved_and_loaded(reports: Reports) -> None:
    on, off = reports.installed["llava-on-lora"], reports.installed["llava-off-lora"]
    saved = reports.folder / "llava-on-lora" / "extensions" / "example_scale"
    assert json.loads((saved / "config.json").read_text(encoding="utf-8"))["layer"] == 1
    (weight,) = load_file(saved / "model.safetensors").values()
    assert on["attached"] == {"example_scale": {"layer": 1, "penalty": 0.1}}
    assert on["added"] == {WEIGHT: weight.tolist()}
    assert set(weight.tolist()) != {1.0}, "two steps at learning rate 0.01 left the scale where it started"
    assert set(on["parameters"]) - set(off["parameters"]) == {WEIGHT}
    assert on["logits"] != off["logits"]


def test_its_losses_and_metrics_are_logged(reports: Reports) -> None:
    logged = set(reports.installed["llava-on-lora"]["logged"])
    expected = {"loss/example_scale/penalty", "example_scale/largest", "learning_rate/example_scale"}
    assert {key for key in logged if "example_scale" in key} == expected


def test_its_learning_rate_is_its_own(reports: Reports) -> None:
    assert set(reports.installed["llava-still-lora"]["added"][WEIGHT]) == {1.0}


def test_its_errors_reach_the_command_line(reports: Reports) -> None:
    message = reports.installed["llava-wrong-lora"]["error"]
    assert "--scale_layer 7 does not exist; the model has 3 layers" in message
