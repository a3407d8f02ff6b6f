"""What `RoutingCallback` logs and warns of, for every kind of layer with a router, under transformers' Trainer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hydralora import RoutedMLPConfig, RoutingCallback, added_parameters, attach, record_routing
from hydralora.callback import PREFIX
from hydralora.config import RoutedLinearConfig
from hydralora.diagnostics import mean_cosine, routing_numbers
from hydralora.linears import add_updates
from hydralora.model import decoder_layers, routed_modules
from llava.runtime import checkpointing
from tests.hydralora.tuner.models import IDS, MASK, adapted, tiny_llama

NUMBERS = {"balance", "sharpness", "effective", "dead", "cosine", "moved"}


def blocks(depth: int = 2) -> nn.Module:
    model = tiny_llama(num_hidden_layers=depth)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in attach(model, RoutedMLPConfig(experts=3, rank=2, alpha=4, dropout=0.0)).values():
        block.reset_parameters(identity=False)
    return model


def updates() -> nn.Module:
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = RoutedLinearConfig(["attention.q_proj", "attention.v_proj"], 3, rank=2, dropout=0.0)
    add_updates({"attention": decoder_layers(model)}, config)
    return model


BUILD: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "blocks": (blocks, ["model.layers.0.mlp", "model.layers.1.mlp"]),
    "updates": (updates, [f"model.layers.{i}.self_attn.{n}_proj.routed" for i in (0, 1) for n in "qv"]),
    "adapter": (
        lambda: adapted(target_modules=["q_proj", "up_proj"]),
        [f"model.layers.{i}.{n}_proj" for i in (0, 1) for n in ("self_attn.q", "mlp.up")],
    ),
}
each_kind = pytest.mark.parametrize("kind", BUILD)

ROWS = [
    {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    for ids, mask in zip(IDS, MASK, strict=True)
] * 4


class Logger(TrainerCallback):
    """Stands for a logger among the Trainer's own, which come before the user's callbacks."""

    seen: list[dict[str, float]]

    def __init__(self) -> None:
        self.seen = []

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def train(model: nn.Module, folder: Path, callback: RoutingCallback, **options: Any) -> tuple[Trainer, Logger]:
    settings: dict[str, Any] = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": len(ROWS)}
    settings |= {"learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True} | options
    arguments = TrainingArguments(output_dir=str(folder), save_strategy="no", **settings)
    logger = Logger()
    trainer = Trainer(model, arguments, train_dataset=ROWS, callbacks=[logger, callback])
    trainer.train()
    return trainer, logger


def by_hand(model: nn.Module, names: list[str]) -> dict[str, float]:
    """The routing's numbers of one batch in evaluation, from what is recorded of it."""
    with record_routing(model) as routing, torch.no_grad():
        model.eval()(input_ids=IDS, attention_mask=MASK)
    found: dict[str, float] = {}
    for name, (recorded,) in routing.items():
        short = name.removeprefix("base_model.model.")
        rows = recorded[MASK.bool()]
        mean = rows.mean(dim=0)
        found[f"{short}/balance"] = -(mean * mean.log()).sum().item()
        found[f"{short}/sharpness"] = -(rows * rows.log()).sum(dim=-1).mean().item()
        found[f"{short}/effective"] = 1 / mean.square().sum().item()
    assert {key.rpartition("/")[0] for key in found} == set(names)
    return found


@pytest.mark.versions
@each_kind
def test_every_layer_is_logged(kind: str, tmp_path: Path) -> None:
    """Against numbers by hand: every batch has all rows, and the learning rate 0 keeps the weights."""
    build, names = BUILD[kind]
    model = build()
    expected = by_hand(model, names)
    observers = [len(module.observers) for module in routed_modules(model).values()]
    trainer, logger = train(model, tmp_path, RoutingCallback(), learning_rate=0.0)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    assert {f"{PREFIX}{name}/{number}" for name in names for number in NUMBERS} <= lines[0].keys()
    for key, value in expected.items():
        assert lines[1][PREFIX + key] == pytest.approx(value, abs=1e-4), key
    for number in NUMBERS:
        mean = sum(lines[0][f"{PREFIX}{name}/{number}"] for name in names) / len(names)
        assert lines[0][PREFIX + number] == pytest.approx(mean, abs=1e-6)
    assert lines[0][PREFIX + "moved"] == 0
    seen = [line for line in logger.seen if "loss" in line]
    assert all(seen[0][key] == value for key, value in lines[0].items() if key.startswith(PREFIX)), "loggers see them"
    assert [len(module.observers) for module in routed_modules(model).values()] == observers, "nothing is left behind"
    assert not any(module._forward_pre_hooks for module in model.modules() if kind != "adapter")


def test_what_moves(tmp_path: Path) -> None:
    """B and routers are compared with their own: cosine and distance by hand, and means alone on request."""
    build, names = BUILD["adapter"]
    model = build()
    module = routed_modules(model)["base_model.model." + names[0]]
    start = module.trained_matrices()[0][0].detach().clone()
    trainer, _ = train(model, tmp_path, RoutingCallback())
    line = [line for line in trainer.state.log_history if "loss" in line][-1]
    (router,), (experts,) = module.trained_matrices()
    assert line[f"{PREFIX}{names[0]}/moved"] == pytest.approx((router - start).norm().item(), rel=1e-4)
    rows = experts.flatten(1)
    pairs = [torch.cosine_similarity(rows[a], rows[b], dim=0).item() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert line[f"{PREFIX}{names[0]}/cosine"] == pytest.approx(sum(pairs) / 3, abs=1e-5)
    trainer, _ = train(build(), tmp_path, RoutingCallback(per_module=False))
    line = [line for line in trainer.state.log_history if "loss" in line][-1]
    assert {key for key in line if key.startswith(PREFIX)} == {PREFIX + number for number in NUMBERS}


@pytest.mark.parametrize(
    "options",
    [{}, {checkpointing.SWITCH: True}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}],
    ids=str,
)
def test_only_updates_with_a_line_are_observed(options: dict[str, Any], tmp_path: Path) -> None:
    calls = []

    class Counting(RoutingCallback):
        def _note(self, name: str, routing: Any) -> None:
            calls.append(name)
            super()._note(name, routing)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            calls.append(str(state.global_step))
            kept.append({len(passes) for passes in self._seen.values()})
            super().on_step_end(args, state, control, **kwargs)

    kept: list[set[int]] = []
    model, names = BUILD["adapter"][0](), BUILD["adapter"][1]
    if options.get(checkpointing.SWITCH):
        model.enable_input_require_grads()
    train(model, tmp_path, Counting(), **options)
    assert calls.index("1") == 0, "nothing is observed in the first update"
    passes = options.get("gradient_accumulation_steps", 1)
    assert kept[1] == {passes}, "what is recomputed is not counted"
    assert calls.index("2") >= len(names) * passes


def test_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A dead expert, a collapsed router and one that the optimizer does not have; a healthy adapter gets none."""
    model = BUILD["adapter"][0]()
    layers = list(routed_modules(model).items())
    for index, (_, module) in enumerate(layers):
        router = module.lora_router["default"]
        if index < 2:
            sign = 1000.0 if index else 30.0
            router.register_forward_hook(lambda module, args, out, sign=sign: _without(out, 2 if sign > 100 else 1))
    with caplog.at_level(logging.WARNING, logger="hydralora"):
        train(model, tmp_path, RoutingCallback(warn_after=1), learning_rate=0.0)
    text = caplog.text
    assert "2 of 4 layers have dead experts" in text
    assert "1 of 4 layers have a collapsed router" in text
    assert "4 of 4 layers have a router that has not moved" in text
    assert len([record for record in caplog.records if record.name == "hydralora"]) == 3, "each is said once"
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hydralora"):
        train(BUILD["adapter"][0](), tmp_path, RoutingCallback(warn_after=1))
    assert not [record for record in caplog.records if record.name == "hydralora"]


def _without(probabilities: Tensor, experts: int) -> Tensor:
    """Probabilities of which the last `experts` get nothing."""
    kept = probabilities.clone()
    kept[..., probabilities.shape[-1] - experts :] = 0
    return kept / kept.sum(dim=-1, keepdim=True)


def test_a_model_without_router_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layer with a router"):
        train(tiny_llama(), tmp_path, RoutingCallback())
    with pytest.raises(ValueError, match="no layer with a router"):
        train(adapted(lora_nums=1), tmp_path, RoutingCallback())


def test_the_numbers() -> None:
    even, one = torch.full((4, 4), 0.25), torch.eye(4)
    all_real, real = torch.ones(4), torch.tensor([1.0, 0, 0, 0])
    log4 = math.log(4)
    assert routing_numbers(even, all_real).tolist() == pytest.approx([log4, log4, 4, 0])
    assert routing_numbers(one, all_real).tolist() == pytest.approx([log4, 0, 4, 0])
    assert routing_numbers(one, real).tolist() == pytest.approx([0, 0, 1, 0.75])
    same = torch.ones(3, 2, 2)
    assert mean_cosine([same]).item() == pytest.approx(1)
    assert mean_cosine([torch.zeros(3, 2, 2)]).item() == 0
    assert mean_cosine([torch.eye(4).reshape(4, 2, 2)]).item() == pytest.approx(0)


@each_kind
def test_parameters_and_routing_of_every_kind(kind: str) -> None:
    """`added_parameters` yields what is trained, and `record_routing` sees every layer."""
    build, names = BUILD[kind]
    model = build()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert dict(added_parameters(model)).keys() == trained.keys()
    assert all(trained[name] is p for name, p in added_parameters(model))
    with record_routing(model) as routing, torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK)
    assert {name.removeprefix("base_model.model.") for name in routing} == set(names)
    assert all(recorded[0].shape == (*IDS.shape, 3) for recorded in routing.values())
