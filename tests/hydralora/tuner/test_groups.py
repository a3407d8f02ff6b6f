"""Parameter groups: routers with a rate of their own, every trained parameter once, an empty group refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hydralora import RoutedMLPConfig, attach, parameter_groups
from hydralora.layer import RoutedUpdate
from hydralora.tuner.parts import Router
from tests.hydralora.tuner.models import IDS, adapted, tiny_llama

pytestmark = pytest.mark.versions


def by_name(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    assert all(group["params"] for group in groups)
    return {group["name"]: group for group in groups}


def test_routers_are_apart_and_everything_trained_is_in_once() -> None:
    model = adapted(modules_to_save=["lm_head", "norm"])
    groups = by_name(parameter_groups(model, router_lr=1e-2, lr=1e-3, weight_decay=0.1))
    routers = {id(p) for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    assert {id(p) for p in groups["routers"]["params"]} == routers
    found = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {"routers": (1e-2, 0.1), "others": (1e-3, 0.1), "others_not_decayed": (1e-3, 0.0)}
    assert {p.ndim for p in groups["others_not_decayed"]["params"]} == {1}, "the weight of the last norm"


def test_without_a_rate_the_optimizers_holds() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(parameter_groups(model, router_lr=1e-2), lr=3e-4)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"routers": 1e-2, "others": 3e-4}


@pytest.mark.parametrize("case", ["one expert", "frozen", "no adapter"])
def test_a_rate_that_would_train_nothing_is_refused(case: str) -> None:
    model: nn.Module = tiny_llama() if case == "no adapter" else adapted(lora_nums=1 if case == "one expert" else 3)
    if case == "frozen":
        for module in model.modules():
            if isinstance(module, Router):
                module.requires_grad_(False)
    reason = "all routers are frozen" if case == "frozen" else "there is no router"
    with pytest.raises(ValueError, match=f"router_lr=0.01 would train nothing: {reason}"):
        parameter_groups(model, router_lr=1e-2)


@pytest.mark.parametrize("wrong", [{"router_lr": -1.0}, {"router_lr": 1.0, "lr": -1.0}, {"router_lr": float("nan")}])
def test_rates_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected numbers of at least 0"):
        parameter_groups(adapted(), **wrong)


def test_routed_blocks_of_a_decoder() -> None:
    """Their routers have biases, which do not decay."""
    model = tiny_llama().requires_grad_(False)
    blocks = attach(model, RoutedMLPConfig(experts=3, rank=2, alpha=4))
    groups = by_name(parameter_groups(model, router_lr=1e-2, weight_decay=0.1))
    assert set(groups) == {"routers", "routers_not_decayed", "others"}
    weights = [block.router.weight for block in blocks.values()]
    assert [id(p) for p in groups["routers"]["params"]] == [id(p) for p in weights]
    update = RoutedUpdate(4, 4, experts=2, rank=1, alpha=1)
    assert by_name(parameter_groups(update, router_lr=1.0))["routers"]["params"][0] is update.router


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Four rows of token ids."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": IDS[index % 3], "labels": IDS[index % 3]}


def test_under_transformers_trainer(tmp_path: Path) -> None:
    """The scheduler scales each group's own rate; with rate 0 the routers stay, and with more they move."""
    moved = []
    for router_lr in (0.0, 1e-2):
        model = adapted().train()
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(parameter_groups(model, router_lr=router_lr), lr=1e-2)
        args = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True)
        trainer = Trainer(model, args, train_dataset=Rows(), optimizers=(optimizer, None))
        trainer.train()
        assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [router_lr, 1e-2]
        change = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters() if name in before}
        moved.append(max(value for name, value in change.items() if ".lora_router." in name))
        assert max(value for name, value in change.items() if ".lora_B." in name) > 1e-3
    assert moved[0] == 0
    assert moved[1] > 1e-3
