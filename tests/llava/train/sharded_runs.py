"""Runs whose model `fully_shard` splits over processes on the CPU, where accelerate by itself would not (`fsdp.py`).

Takes what `several_runs.py` takes. Everything from there on is the product's: wrapping, training, saving, resuming.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor, Shard

from llava.runtime.resumable_trainer import ResumableTrainer

create = transformers.Trainer.create_accelerator_and_postprocess
prepare = ResumableTrainer._prepare_for_training


def create_sharding(self: transformers.Trainer) -> None:
    """As `--fsdp` on GPUs: transformers makes the plugin of these settings."""
    create(self)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
    )
    shared: dict[str, Any] = AcceleratorState._shared_state
    shared |= {"fsdp_plugin": plugin, "distributed_type": DistributedType.FSDP}
    self.is_fsdp_enabled = True


def check_split(trainer: transformers.Trainer) -> None:
    """Every parameter and every moment of the optimizer is split, and no layer is left to the root."""
    parameters = dict(trainer.model.named_parameters())
    whole = [name for name, weight in parameters.items() if not isinstance(weight, DTensor)]
    assert not whole, whole[:3]
    assert all(weight.placements == (Shard(0),) for weight in parameters.values())
    state = trainer.optimizer.state
    moments = [value for each in state.values() for name, value in each.items() if name.startswith("exp_avg")]
    assert all(isinstance(value, DTensor) for value in moments)
    wrapped = {type(module).__name__ for module in trainer.model.modules() if "FSDP" in type(module).__name__}
    print(f"split: {len(parameters)} parameters, {len(moments)} moments, {sorted(wrapped)}", flush=True)


def prepare_and_check(self: ResumableTrainer, *args: Any, **kwargs: Any) -> Any:
    prepared = prepare(self, *args, **kwargs)
    check_split(self)
    return prepared


if __name__ == "__main__":
    transformers.Trainer.create_accelerator_and_postprocess = create_sharding  # type: ignore[method-assign]
    ResumableTrainer._prepare_for_training = prepare_and_check  # type: ignore[method-assign]
    runpy.run_path(str(Path(__file__).with_name("several_runs.py")), run_name="__main__")
    sys.exit(0)
