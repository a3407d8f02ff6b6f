"""DeepSpeed ZeRO: reading its settings file (`--deepspeed scripts/zero3.json`) and preparing a model for it.

Optimizer, parameter groups and learning-rate schedule are this project's in every case; DeepSpeed shards them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava.errors import CheckpointError, FlagError
from llava.runtime.files import refuse_pointer
from llava.runtime.output import claim, discard
from llava.runtime.partition import is_split
from llava.runtime.saving import STAGING_PREFIX
from llava.runtime.weights.torch_files import check_training_state

if TYPE_CHECKING:
    from transformers import TrainingArguments

LAUNCHERS = "deepspeed, torchrun or accelerate launch (for one process: torchrun --standalone --nproc_per_node 1)"


def zero_settings(training: TrainingArguments) -> dict[str, Any] | None:
    """DeepSpeed's settings for a run, or None if it runs without.

    They come from `--deepspeed`, or from `accelerate launch --use_deepspeed --deepspeed_config_file FILE`. Sections
    for optimizer and schedule that leave every value to this program are dropped with a printed word: an optimizer
    made by DeepSpeed would lose the learning rates of projector, tower and extensions.

    Raises:
        FlagError: the file is missing or damaged, DeepSpeed is not installed, or the file sets an optimizer or a
            schedule of its own.
    """
    given = training.deepspeed
    if not given and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        given = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if given in (None, "", "none"):
            raise FlagError("accelerate launch --use_deepspeed: give a settings file too, by --deepspeed FILE")
    if not given:
        return None
    if importlib.util.find_spec("deepspeed") is None:
        raise FlagError("--deepspeed: DeepSpeed is not installed; pip install 'llava-extensions[train]'")
    settings = dict(given) if isinstance(given, dict) else _read(given)
    for section, instead in {"optimizer": "--optim", "scheduler": "--lr_scheduler_type"}.items():
        if section in settings:
            _check_automatic(settings.pop(section), section, instead)
    settings.setdefault("gradient_clipping", "auto")  # without this, DeepSpeed ignores --max_grad_norm
    if training.use_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, which would choose a GPU if there is one
    return settings


def _read(given: str) -> dict[str, Any]:
    is_json = given.lstrip().startswith("{")
    if not is_json:
        refuse_pointer(given, FlagError)
    try:
        settings = json.loads(given if is_json else Path(given).read_text(encoding="utf-8"))
    except OSError as error:
        raise FlagError(f"--deepspeed {given}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise FlagError(f"--deepspeed {given}: is no valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise FlagError(f"--deepspeed {given}: holds a {type(settings).__name__} where a JSON object is expected")
    return settings


def _check_automatic(section: dict[str, Any], name: str, instead: str) -> None:
    fixed = {key: value for key, value in section.get("params", {}).items() if value != "auto"}
    if fixed:
        raise FlagError(f"--deepspeed: its section '{name}' sets {fixed}; delete the section and use {instead}")
    print(f"--deepspeed: its section '{name}' ({section.get('type')}) is ignored; {instead} and its values decide")


def zero_stage(training: TrainingArguments) -> int | None:
    """Stage of ZeRO, 0 to 3; None for a run without DeepSpeed."""
    return training.hf_deepspeed_config.get_value("zero_optimization.stage", 0) if training.deepspeed else None


def join_processes(training: TrainingArguments) -> None:
    """Tell DeepSpeed of the process group, before a model is built; does nothing without `--deepspeed`.

    Raises:
        FlagError: the program was started without a launcher, so that there is no group.
    """
    if not training.deepspeed:
        return
    if "LOCAL_RANK" not in os.environ:
        raise FlagError(f"--deepspeed: start this program with {LAUNCHERS}")
    import deepspeed

    if training.use_cpu:
        # Of use in inference alone. Compiling it needs a compiler, and a run that is killed meanwhile leaves a lock
        # behind on which all later runs would wait for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=training.distributed_state.backend, auto_mpi_discovery=False)


@contextlib.contextmanager
def same_draws(training: TrainingArguments) -> Iterator[None]:
    """Keep torch's random stream the same on all processes while weights are read under ZeRO-3.

    Only process 0 initialises what a checkpoint lacks, which would leave its stream ahead of the others'.
    """
    with torch.random.fork_rng(devices=[], enabled=zero_stage(training) == 3):
        yield


@contextlib.contextmanager
def read_whole() -> Iterator[None]:
    """Let transformers read models as without DeepSpeed: neither split over the processes nor rounded."""
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            integration.set_hf_deepspeed_config(config)


def set_precision(model: nn.Module, training: TrainingArguments) -> None:
    """Trained weights in fp32; under DeepSpeed all weights in the one dtype that it computes in.

    DeepSpeed's optimizer keeps fp32 copies of what is trained. Parameters that are split already were read in its
    dtype.
    """
    for weight in model.parameters():
        if not training.deepspeed and weight.requires_grad:
            weight.data = weight.data.float()
        elif training.deepspeed and not is_split(weight) and weight.is_floating_point():
            weight.data = weight.data.to(training.hf_deepspeed_config.dtype())


def saved_processes(folder: Path) -> int | None:
    """Number of processes that wrote DeepSpeed's part of a checkpoint; None if there is no such part."""
    return len(list(folder.glob("global_step*/*_optim_states.pt"))) or None


def saved_stage(folder: Path) -> int:
    """3, or 2 for the stages that keep the weights whole."""
    return 3 if any(folder.glob("global_step*/zero_pp_rank_*_model_states.pt")) else 2


def prepare_resume(training: TrainingArguments, folder: Path) -> None:
    """Refuse a checkpoint whose optimizer state this run cannot read or must not open, before a model is built.

    Where another number of processes wrote it, DeepSpeed is told that it will get the universal format.

    Raises:
        CheckpointError: it was written with DeepSpeed and the run is without, or the other way round, or by another
            stage; or a file in it is damaged or could run code.
    """
    processes = saved_processes(folder)
    if processes is None and training.deepspeed:
        raise CheckpointError(f"{folder}: was written without DeepSpeed; resume it without --deepspeed")
    if processes is not None and not training.deepspeed:
        raise CheckpointError(f"{folder}: was written with DeepSpeed; resume it with --deepspeed")
    if processes is not None and (saved_stage(folder) == 3) != (zero_stage(training) == 3):
        raise CheckpointError(
            f"{folder}: was written under ZeRO-{saved_stage(folder)}, the run uses ZeRO-{zero_stage(training)}; give "
            "the settings file that it was written with"
        )
    check_training_state(folder, deepspeed=processes is not None)
    if processes not in (None, training.world_size):
        training.hf_deepspeed_config.config.setdefault("checkpoint", {})["load_universal"] = True


def load_zero_state(engine: Any, folder: Path, training: TrainingArguments) -> None:
    """Weights and optimizer of a checkpoint into DeepSpeed's engine, whatever number of processes wrote it.

    For another number, process 0 converts the checkpoint into DeepSpeed's universal format, in a folder beside it that
    is removed afterwards and that all processes must be able to see.

    Raises:
        CheckpointError: DeepSpeed does not find what it needs in the folder.
    """
    if saved_processes(folder) == training.world_size:
        _load(engine, folder)
        return
    universal = Path(training.output_dir) / f"{STAGING_PREFIX}universal"
    if training.process_index == 0:
        _convert(folder, universal)
    training.distributed_state.wait_for_everyone()
    groups = engine.optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    _load(engine, universal)
    # ZeRO-3 has now given all groups the learning rate and weight decay of the first one, and one step counter.
    for group, kept in zip(groups, settings, strict=True):
        group.update(kept)
    for state in engine.optimizer.state.values():
        state["step"] = copy.deepcopy(state["step"])
    training.distributed_state.wait_for_everyone()
    if training.process_index == 0:
        discard(universal)


def _load(engine: Any, folder: Path) -> None:
    path, _ = engine.load_checkpoint(str(folder), load_module_strict=False)
    if path is None:
        raise CheckpointError(f"{folder}: DeepSpeed found no state in it")


def _convert(folder: Path, universal: Path) -> None:
    """Write the universal form of a checkpoint."""
    from deepspeed.checkpoint import ds_to_universal

    source = folder / (folder / "latest").read_text(encoding="utf-8").strip()
    discard(universal)
    claim(universal)
    options = {
        "input_folder": str(source),
        "output_folder": str(universal / source.name),
        "num_extract_workers": 1,
        "num_merge_workers": 1,
        "keep_temp_folder": False,
        "strict": True,
        "inject_missing_state": True,
    }
    ds_to_universal.main(argparse.Namespace(**options))
