"""Is everything there that a run needs to continue exactly, whole and from the same run?

transformers continues without an optimizer, schedule or random state that is missing, as another run and in silence.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from llava.errors import CheckpointError
from llava.runtime.files import check_torch_file, read_json, reading, refuse_pointers
from llava.runtime.partition import local_part
from llava.runtime.places import RUN_FILE
from llava.runtime.weights.completeness import check_file_list, require
from llava.runtime.weights.run_file import latest
from llava.runtime.weights.settings import Rule, check_settings
from llava.runtime.weights.tensors import is_finite
from llava.runtime.weights.torch_files import load_plain, random_state_classes

TRAINER_STATE = {
    "global_step": Rule("int", 1, 2**40, required=True),
    "max_steps": Rule("int", 1, 2**40, required=True),
    "epoch": Rule("float", 0, 1e9, required=True),
    "num_train_epochs": Rule("float", 0, 2**63, required=True),  # of a stream, as many as there are numbers
    "train_batch_size": Rule("int", 1, 2**20),
    "total_flos": Rule("float", 0, 1e40, required=True),
    "num_input_tokens_seen": Rule("int", 0, 2**60),
    "best_metric": Rule("float"),
    "best_global_step": Rule("int", 0, 2**40),
    **{name: Rule("float", 0, 1e12) for name in ("eval_steps", "logging_steps", "save_steps")},
    **{name: Rule("bool") for name in ("is_local_process_zero", "is_hyper_param_search")},
    "stateful_callbacks": Rule("dict", required=True),
    "is_world_process_zero": Rule("bool"),
    "best_model_checkpoint": Rule("str"),
}
"""`trainer_state.json`."""

RANDOM_STATES = {"python", "numpy", "cpu"}


def check_has_state(folder: Path) -> None:
    """Refuse weights without the state of an optimizer, from which a run would start a new schedule.

    `--save_only_model True` writes such checkpoints, and the output folder of a run is one.

    Raises:
        CheckpointError: says what the folder is, and from where a run could continue.
    """
    state, optimizer = folder / TRAINER_STATE_NAME, folder / OPTIMIZER_NAME
    if not state.is_file() or optimizer.is_file() or any(folder.glob("global_step*")):
        return
    last = get_last_checkpoint(folder)
    if last is not None:
        what, instead = "is the output folder of a run, whose state is in its checkpoints", f"resume from {last}"
    elif _saved_weights_alone(folder):
        what, instead = "was written with --save_only_model", "choose another --output_dir to start again"
    elif folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        return  # a part of a checkpoint is missing, which `check_resumable` names
    else:
        what, instead = "is not a checkpoint-N of a run", "start a new run, in another --output_dir"
    raise CheckpointError(
        f"{folder}: {what}; {optimizer.name} is missing, and without the optimizer's state a run could not continue "
        f"but would start a new schedule. See {folder / RUN_FILE}; {instead}"
    )


def _saved_weights_alone(folder: Path) -> bool:
    record = folder / RUN_FILE
    if not record.is_file():
        return False
    content = latest(read_json(record))
    sections = content.get("arguments") or content
    training = sections.get("training") if isinstance(sections, dict) else None
    return isinstance(training, dict) and bool(training.get("save_only_model"))


def check_resumable(folder: Path, training: TrainingArguments) -> None:
    """Refuse a checkpoint that lacks a part of the state of its run.

    Args:
        folder: `checkpoint-N`.
        training: of the run that is to continue.

    Raises:
        CheckpointError: names the part that is missing, damaged or from another update.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    refuse_pointers(folder)
    check_file_list(folder, resume=True)
    state = folder / TRAINER_STATE_NAME
    step = _check_trainer_state(state, folder)
    needed = [SCHEDULER_NAME] if training.deepspeed else [OPTIMIZER_NAME, SCHEDULER_NAME]
    for name in needed:
        require(folder / name, state, "describes a run to continue, which needs it")
        check_torch_file(folder / name)
    _check_random_state(folder, training, state)
    _check_scheduler(folder / SCHEDULER_NAME, step)
    for path in sorted(folder.glob("scaler.pt")):
        check_torch_file(path)


def _check_trainer_state(path: Path, folder: Path) -> int:
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing, so {folder} is not a checkpoint that a run could continue from")
    content = read_json(path)
    check_settings(content, TRAINER_STATE, path)
    history = content.get("log_history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise CheckpointError(f"{path}: 'log_history' is not a list of objects")
    step, (prefix, _, number) = content["global_step"], folder.name.rpartition("-")
    if prefix == PREFIX_CHECKPOINT_DIR and number.isdecimal() and int(number) != step:
        raise CheckpointError(f"{path}: 'global_step' is {step}, but the folder is {folder.name}")
    if step > content["max_steps"]:
        raise CheckpointError(f"{path}: 'global_step' is {step}, more than 'max_steps' {content['max_steps']}")
    return step


def _check_random_state(folder: Path, training: TrainingArguments, named_by: Path) -> None:
    """The random streams of this process, if as many processes wrote the checkpoint; others draw afresh."""
    path, numbers = folder / "rng_state.pth", [path.stem.rpartition("_")[2] for path in folder.glob("rng_state_*.pth")]
    if numbers:
        writers = 1 + max(int(number) for number in numbers if number.isdecimal())
        if training.world_size == 1 or training.process_index >= writers:
            return
        path = folder / f"rng_state_{training.process_index}.pth"
    require(path, named_by, "describes a run to continue, which needs it")
    content = _load(path)
    lacking = sorted(RANDOM_STATES - content.keys())
    if lacking:
        raise CheckpointError(f"{path}: lacks the random states {lacking}")
    with reading(path, "does not contain the states of random generators"):
        random.Random().setstate(content["python"])
        np.random.RandomState().set_state(content["numpy"])
        torch.Generator().set_state(content["cpu"])


def _check_scheduler(path: Path, step: int) -> None:
    content = _load(path)
    if not _all_finite(content):
        raise CheckpointError(f"{path}: contains NaN or infinite values")
    reached = content.get("last_epoch")
    if reached is not None and reached != step:
        raise CheckpointError(f"{path}: is at update {reached}, but {TRAINER_STATE_NAME} says {step}")


def _load(path: Path) -> dict[str, Any]:
    content = load_plain(path, random_state_classes())
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a table")
    return content


def _all_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_all_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def check_optimizer(optimizer: Any, path: Path) -> None:
    """Refuse the state of an optimizer, just read, whose numbers are not finite or do not fit its parameters.

    Raises:
        CheckpointError: names the file and the state.
    """
    state: Mapping[Any, Any] = optimizer.state
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        if not _all_finite(settings):
            raise CheckpointError(f"{path}: a group of parameters has settings that are NaN or infinite: {settings}")
        for weight in group["params"]:
            for name, value in (state.get(weight) or {}).items():
                if not isinstance(value, torch.Tensor):
                    continue
                if value.dim() == weight.dim() > 0 and name.startswith("exp_avg") and value.shape != weight.shape:
                    raise CheckpointError(
                        f"{path}: '{name}' has shape {tuple(value.shape)} for a weight of shape {tuple(weight.shape)}"
                    )
                if value.is_floating_point() and not is_finite(local_part(value)):
                    raise CheckpointError(f"{path}: '{name}' of a weight contains NaN or infinite values")
