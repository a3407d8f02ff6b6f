"""The three training programs as runs of the same shape, for tests that hold for each of them.

A run makes three or four updates, with a checkpoint after the second and one after the last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import hydralora.finetune
import llava.train.train
import mma.lavin.train
from llava.model.formats import read_tensors
from llava.runtime.run_record import run_record
from llava.runtime.weights.completeness import FILE_LIST
from playground.tiny import TinyFolders
from tests.llava.train.test_training import HYDRA, command_line
from tests.mma.lavin.lavin_files import LavinFiles, tiny_words

STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
"""What resuming needs besides weights."""

Words = Callable[[Path, Mapping[str, Any]], list[str]]


@dataclass(frozen=True)
class Program:
    """A training program and its run.

    Attributes:
        name: as in `python -m`.
        words: the command line of a run into a folder, with other options than the usual ones.
        main: the program.
        record: what `run.json` says of a command line.
    """

    name: str
    words: Words
    main: Callable[[list[str]], Path]
    record: Callable[[list[str]], dict[str, Any]]

    def run(self, output: Path, **changes: Any) -> dict[str, Tensor]:
        """Train, or resume, and return every tensor of the result."""
        self.main(self.words(output, changes))
        return trained(output)

    def recorded(self, output: Path, **changes: Any) -> dict[str, Any]:
        """The record of a run, as it comes out of its file."""
        return json.loads(json.dumps(self.record(self.words(output, changes)), default=str))


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


LLAVA_RUN: dict[str, Any] = HYDRA | {
    "max_steps": 3,
    "save_steps": 2,
    "save_total_limit": 9,
    "mm_use_im_start_end": True,
}

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
PARTS: dict[str, tuple[str, ...]] = {
    "llava.train.train": (
        *("extensions/hydralora/model.safetensors", "extensions/hydralora/config.json", "extensions/hydralora"),
        *("extensions", "mm_projector.safetensors", "image_tokens.safetensors", "config.json", *ADAPTER, *STATE),
    ),
    "mma.train": (
        *("extensions/mma/model.safetensors", "extensions/mma/config.json", "extensions/mma", "extensions"),
        *("mm_projector.safetensors", "config.json", *STATE),
    ),
    "hydralora.finetune": (*ADAPTER, *STATE),
}
"""The programs, and files and folders of a checkpoint that a run of each needs to continue."""


def _given(options: Mapping[str, Any]) -> list[str]:
    """Options by name; None leaves one out, an empty text is a switch without a value."""
    given = [(f"--{name}", str(value)) for name, value in options.items() if value is not None]
    return [word for name, value in given for word in (name, value) if word]


def llava_program() -> Program:
    """`llava.train.train` with HydraLoRA, LoRA, projector and image tokens."""

    def words(output: Path, changes: Mapping[str, Any]) -> list[str]:
        options = {name: value for name, value in (LLAVA_RUN | dict(changes)).items() if value is not None}
        return command_line(output, **options)

    return Program(
        "llava.train.train",
        words,
        llava.train.train.main,
        lambda line: run_record(llava.train.train.parse_args(line)),
    )


def mma_program(files: LavinFiles) -> Program:
    """`mma.train` on ScienceQA: four updates in two epochs."""

    def words(output: Path, changes: Mapping[str, Any]) -> list[str]:
        usual = {"save_strategy": "steps", "save_steps": 2, "report_to": "none", "disable_tqdm": True}
        return tiny_words(files, output, *_given(usual | dict(changes)))

    def record(line: list[str]) -> dict[str, Any]:
        args = mma.lavin.train.parse_args(line)
        mma.lavin.train.prepare_base(args)
        args.run.program = mma.lavin.train.own_settings(args.own)
        return run_record(args.run)

    return Program("mma.train", words, mma.lavin.train.main, record)


def finetune_program(tiny: TinyFolders, folder: Path) -> Program:
    """`hydralora.finetune` with dropout; `folder` receives its data."""
    asked = {"what colour is the small circle ?": "red", "what colour is the large square ?": "blue"}
    records = [{"instruction": question, "input": "", "output": answer} for question, answer in asked.items()] * 8
    (folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    usual = {
        **{"model_name_or_path": tiny.language_model, "dataset_dir": folder, "do_train": True, "max_steps": 3},
        **{"save_steps": 2, "per_device_train_batch_size": 2, "max_seq_length": 64, "trainable": "q_proj,v_proj"},
        **{"lora_rank": 4, "lora_alpha": 8, "lora_nums": 2, "lora_dropout": 0.1, "learning_rate": 1e-2},
        **{"logging_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True},
    }
    return Program(
        "hydralora.finetune",
        lambda output, changes: _given(usual | {"output_dir": output} | dict(changes)),
        hydralora.finetune.main,
        lambda line: hydralora.finetune.run_record(hydralora.finetune.parse_args(line)),
    )


def programs(files: LavinFiles, tiny: TinyFolders, folder: Path) -> dict[str, Program]:
    """All of them by name; their inputs must not change while they are used."""
    return {each.name: each for each in (llava_program(), mma_program(files), finetune_program(tiny, folder))}


@dataclass(frozen=True)
class Whole:
    """A finished run.

    Attributes:
        program: what made it.
        folder: its output folder.
        trained: its tensors.
    """

    program: Program
    folder: Path
    trained: dict[str, Tensor]

    @property
    def last(self) -> Path:
        """The checkpoint after the last update."""
        return max(self.folder.glob("checkpoint-*"), key=lambda path: path.name)

    def copy(self, output: Path, recorded: bool = True) -> Path:
        """An output folder with the second update's checkpoint alone; returns the checkpoint."""
        folder = shutil.copytree(self.folder / "checkpoint-2", output / "checkpoint-2")
        if not recorded:
            (folder / FILE_LIST).unlink()
        return folder
