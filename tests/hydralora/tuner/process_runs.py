"""Started by torchrun: two updates of adapted models over two processes, one model after another.

Usage: `process_runs.py RUNS.json`, a list of objects: `name` of the case in `test_processes.py`, `library` that splits
the model or its batch, and `folder` for `NAME LIBRARY.pt`, the trained weights, whole, by name.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hydralora import HydraLoraConfig, parameter_groups, save_as_lora
from tests.hydralora.tuner.test_processes import CASES, LR, SEVERAL, batch_of, build

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
ZERO3: dict[str, Any] = {
    "train_batch_size": 2 * SEVERAL,
    "train_micro_batch_size_per_gpu": SEVERAL,
    # Otherwise ZeRO-3 keeps parameters whole that are as small as all of this model's.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
Trained = dict[str, Tensor]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameter_groups(model, router_lr=LR), lr=LR)


def updates(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    for _ in range(2):
        model(**batch_of(rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_ddp(model: PeftModel, rank: int, folder: Path) -> Trained:
    updates(DistributedDataParallel(model), sgd(model), rank)
    return dict(model.named_parameters())


def by_fsdp1(model: PeftModel, rank: int, folder: Path) -> Trained:
    layers = ModuleWrapPolicy({type(model.get_base_model().model.layers[0])})
    optimised: Any = FullyShardedDataParallel(
        model, auto_wrap_policy=layers, use_orig_params=True, device_id=torch.device("cpu")
    )
    updates(optimised, torch.optim.SGD(optimised.parameters(), lr=LR), rank)
    with FullyShardedDataParallel.summon_full_params(optimised):
        return {
            name.replace("_fsdp_wrapped_module.", ""): weight.detach().clone()
            for name, weight in optimised.named_parameters()
        }


def by_fsdp2(model: PeftModel, rank: int, folder: Path) -> Trained:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    updates(model, sgd(model), rank)
    for message, call in refused(model, folder).items():
        refuses(message, call)
    whole = get_model_state_dict(model, options=WHOLE)
    if rank == 0:
        model.save_pretrained(folder / "adapter", state_dict=whole)
    return {name: weight.full_tensor() for name, weight in model.named_parameters()}


def refused(model: PeftModel, folder: Path) -> dict[str, Callable[[], Any]]:
    return {
        "adapter 'second' cannot be added": lambda: model.add_adapter("second", HydraLoraConfig(target_modules="all")),
        "cannot be merged": lambda: model.base_model.merge("uniform", [batch_of(0)]),
        "cannot be written as LoRA": lambda: save_as_lora(model, folder / "lora", weights="uniform"),
    }


def refuses(message: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except ValueError as error:
        text = str(error)
    else:
        text = "nothing"
    assert message in text, text
    assert "split over processes" in text, text


def by_zero3(model: PeftModel, rank: int, folder: Path) -> Trained:
    os.environ.setdefault("LOCAL_RANK", str(rank))
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=ZERO3)
    for _ in range(2):
        engine.backward(engine(**batch_of(rank)).loss)
        engine.step()
    trained = {name: weight for name, weight in engine.module.named_parameters() if weight.requires_grad}
    assert not any(weight.numel() for weight in trained.values()), "split"
    refuses("cannot be merged", lambda: model.base_model.merge("uniform", [batch_of(0)]))
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {name: weight.detach().clone() for name, weight in trained.items()}


LIBRARIES = {"ddp": by_ddp, "fsdp1": by_fsdp1, "fsdp2": by_fsdp2, "zero3": by_zero3}


def main(path: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for run in json.loads(path.read_text(encoding="utf-8")):
        folder = Path(run["folder"])
        model = build(**CASES[run["name"]])
        names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        found = LIBRARIES[run["library"]](model, rank, folder)
        if rank == 0:
            trained = {name: found[name].detach().clone() for name in names}
            torch.save(trained, folder / f"{run['name']} {run['library']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
