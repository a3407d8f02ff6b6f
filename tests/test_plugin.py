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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from safetensors.torch import load_file

if TYPE_CHECKING:
    from playground.tiny import TinyFolders

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "tests" / "plugin"
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
    """Folder with four one-colour pictures and a conversation about each."""
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


class Runs:
    """Trains with and without the example's flag; every run is done once."""

    def __init__(self, folder: Path, data: Path, models: TinyFolders, site: Path) -> None:
        self.folder, self.data, self.models, self.site = folder, data, models, site
        self.answers: dict[str, dict[str, Any]] = {}

    def flags(self, name: str) -> list[str]:
        """A run of two steps with LoRA and the projector."""
        values = {
            "model_name_or_path": self.models.language_model,
            "vision_tower": self.models.tower,
            "version": "v1",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_use_im_patch_token": False,
            "lora_enable": True,
            "lora_r": 2,
            "data_path": self.data / "train.json",
            "image_folder": self.data,
            "output_dir": self.output(name),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
        }
        return [word for flag, value in values.items() for word in (f"--{flag}", str(value))]

    def output(self, name: str) -> Path:
        """Checkpoint of the run `name`; the words follow upstream's convention for LoRA checkpoints."""
        return self.folder / f"llava-{name}-lora"

    def run(self, name: str, *flags: str, with_plugin: bool = True) -> dict[str, Any]:
        """What `train_and_reload.py` reports for a run.

        Raises:
            AssertionError: the process failed.
        """
        if name not in self.answers:
            answer = self.folder / f"{name}.json"
            command = [sys.executable, str(PLUGIN / "train_and_reload.py"), str(answer), *self.flags(name), *flags]
            path = [str(self.site)] if with_plugin else []
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT)]), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, cwd=self.folder, check=False
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            self.answers[name] = json.loads(answer.read_text(encoding="utf-8"))
        return self.answers[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path, tiny_folders: TinyFolders, installed: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), data, tiny_folders, installed)


def test_it_is_found_by_its_entry_point(runs: Runs) -> None:
    assert "example_scale" in runs.run("off")["installed"]
    assert "example_scale" not in runs.run("absent", with_plugin=False)["installed"]


def test_installed_but_off_it_changes_nothing(runs: Runs) -> None:
    off, absent = runs.run("off"), runs.run("absent", with_plugin=False)
    assert {**off, "installed": absent["installed"]} == absent
    assert not (runs.output("off") / "extensions" / "example_scale").exists()


def test_on_it_is_trained_saved_and_loaded(runs: Runs) -> None:
    on, off = runs.run("on", "--scale_layer", "1"), runs.run("off")
    saved = runs.output("on") / "extensions" / "example_scale"
    assert json.loads((saved / "config.json").read_text(encoding="utf-8"))["layer"] == 1
    (weight,) = load_file(saved / "model.safetensors").values()
    assert on["attached"]["example_scale"] == {"layer": 1, "penalty": 0.1}
    assert on["added"] == {WEIGHT: weight.tolist()}
    assert set(weight.tolist()) != {1.0}, "two steps at learning rate 0.01 left the scale where it started"
    assert on["parameters"] == off["parameters"] + 1
    assert on["logits"] != off["logits"]


def test_its_losses_and_metrics_are_logged(runs: Runs) -> None:
    new = set(runs.run("on", "--scale_layer", "1")["logged"]) - set(runs.run("off")["logged"])
    assert {key for key in new if "example_scale" in key} == {"example_scale/penalty", "example_scale/largest"}


def test_its_learning_rate_is_its_own(runs: Runs) -> None:
    still = runs.run("still", "--scale_layer", "1", "--scale_lr", "0")
    assert set(still["added"][WEIGHT]) == {1.0}


def test_its_errors_reach_the_command_line(runs: Runs) -> None:
    with pytest.raises(AssertionError, match="--scale_layer 7 does not exist; the model has 3 layers"):
        runs.run("wrong", "--scale_layer", "7")
