"""Losses of a layer over a batch, as adapters are trained with them: their gradients are those added by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hydralora import set_step
from hydralora.model import RoutingRecorder
from hydralora.tuner import hydralora_layers
from hydralora.tuner.balance import trainer
from hydralora.tuner.balance.auxiliary import losses_of
from hydralora.tuner.balance.losses import batch_balance, information, of_prompts
from hydralora.tuner.balance.trainer import AdapterCallback
from hydralora.tuner.batch import prompt_tokens
from tests.hydralora.tuner.models import IDS, MASK, adapted

LABELS = torch.tensor([[-100, -100, -100, 7, 60, 2], [-100, -100, 44, 12, -100, -100], [1, 22, 70, -100, -100, -100]])
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "use_cache": False}
WEIGHT = 0.7


def build(**changes: Any) -> PeftModel:
    return adapted(**{"balance": "batch"} | changes).train()


def gradients(model: PeftModel) -> dict[str, Tensor]:
    """Of the model's own loss."""
    model.zero_grad()
    model(**BATCH).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model: PeftModel, loss: Any, sequence: bool = False) -> dict[str, Tensor]:
    """Of the model's loss plus the mean over its layers of `loss` of probabilities and mask; it has none of its own."""
    recorder = RoutingRecorder(hydralora_layers(model))
    recorder.start()
    model.zero_grad()
    total = model(**BATCH).loss
    found = [passes[-1].learned for passes in recorder.stop().values()]
    assert len(found) == 8
    if sequence:
        terms = [loss(of_prompts(each, prompt_tokens(MASK, LABELS)), torch.ones(len(IDS))) for each in found]
    else:
        terms = [loss(each, MASK) for each in found]
    (total + WEIGHT * sum(terms) / len(terms)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, of=name: f"{of}: {text}")


def differs(ours: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any((ours[name] - other[name]).abs().max() > 1e-4 for name in other if ".lora_router." in name)


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_balance_of_each_layer_over_the_batch(routing: str) -> None:
    """Routing by sequence is balanced over the prompts; the pooled form has other gradients."""
    ours = gradients(build(balance_weight=WEIGHT, routing=routing))
    plain = build(routing=routing)
    assert_same(ours, by_hand(plain, batch_balance, routing == "sequence"))
    assert differs(ours, gradients(plain))
    assert differs(ours, gradients(build(balance="sample", balance_weight=WEIGHT, routing=routing)))


def test_information_loss() -> None:
    ours = gradients(build(information_weight=WEIGHT))
    assert_same(ours, by_hand(build(), lambda p, mask: -information(p, mask)))
    assert differs(ours, gradients(build()))


def test_a_running_mean_belongs_to_one_model() -> None:
    """The second batch meets the shares of both; a copy made before it does not."""
    model = build(balance_weight=WEIGHT, balance_ema=0.5)
    first = gradients(model)
    assert_same(first, by_hand(build(), batch_balance))
    early = copy.deepcopy(model)
    assert_same(gradients(model), first)  # equal batches have equal shares, so the mean stays
    assert_same(gradients(early), first)
    other = {**BATCH, "input_ids": IDS.flip(1), "attention_mask": MASK.flip(1)}
    model(**other).loss.backward()
    assert differs(gradients(model), first), "the negative control: a batch of other shares stays in the mean"
    assert_same(gradients(early), first)


def test_the_weight_grows_with_the_updates() -> None:
    """No update made: none of it. Nobody said how many: an error, since it would stay without effect."""
    model, plain = build(balance_weight=WEIGHT, balance_warmup=4), build()
    with pytest.raises(RuntimeError, match=r"balance_warmup=4.*hydralora.set_step"):
        gradients(model)
    set_step(model, 0)
    assert_same(gradients(model), gradients(plain))
    set_step(model, 2)
    assert_same(gradients(model), by_hand(plain, lambda p, mask: batch_balance(p, mask) / 2))
    set_step(model, 40)
    assert_same(gradients(model), by_hand(plain, batch_balance))


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of token ids."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": IDS[index % 3], "labels": IDS[index % 3]}


def test_the_trainer_says_the_number_of_updates_after_a_resumption_too(tmp_path: Path) -> None:
    """An interrupted run that continues ends with the weights of one in one go, dropout that begins late included."""
    ends = []
    for folder, stops in (("whole", [4]), ("parts", [2, 4])):
        for stop in stops:
            model = build(balance_weight=WEIGHT, balance_warmup=3, head_dropout=0.3, head_dropout_start=3)
            args = TrainingArguments(
                str(tmp_path / folder),
                max_steps=stop,
                save_steps=2,
                logging_steps=1,
                lr_scheduler_type="constant",
                learning_rate=1e-2,
                report_to=[],
                use_cpu=True,
                per_device_train_batch_size=1,
            )
            trainer = Trainer(model, args, train_dataset=Rows())
            trainer.train(resume_from_checkpoint=stop > 2 and len(stops) > 1)
        ends.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        logged = [row["balance_loss"] for row in trainer.state.log_history if "balance_loss" in row]
    assert logged[0] < logged[-1], "it grows, and is logged"
    assert_same(ends[1], ends[0])


def trained(folder: Path, stops: list[int], resumes: bool = False) -> dict[str, Tensor]:
    """Weights after runs in one folder, of which each but the first continues up to one more of `stops` updates."""
    for stop in stops:
        model = build(balance_weight=30.0, balance_ema=0.9)
        args = TrainingArguments(
            str(folder),
            max_steps=stop,
            save_steps=2,
            lr_scheduler_type="constant",
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            per_device_train_batch_size=1,
        )
        Trainer(model, args, train_dataset=Rows()).train(resume_from_checkpoint=resumes)
        resumes = True
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_the_running_mean_continues_with_the_run(tmp_path: Path) -> None:
    """A run that resumes ends with exactly the weights of one in one go; without the stored means it would not."""
    whole = trained(tmp_path / "whole", [4])
    parts = trained(tmp_path / "parts", [2, 4])
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=0)
    trained(tmp_path / "lost", [2])
    path = tmp_path / "lost" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert len(state["stateful_callbacks"].pop("AdapterCallback")["attributes"]["balance_means"][0]["default"]) == 8
    path.write_text(json.dumps(state))
    assert differs(trained(tmp_path / "lost", [4], resumes=True), whole), "the negative control"


def test_each_process_continues_its_own_running_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that writes the checkpoint asks all; of another number of processes each takes one of theirs."""
    model = build(balance_weight=WEIGHT, balance_ema=0.5)
    shares = losses_of(model)[0].adapters["default"].shares
    state, start = TrainerState(), TrainerState(global_step=2)
    arguments = [SimpleNamespace(world_size=2, process_index=index) for index in range(3)]
    callback = AdapterCallback()
    callback.on_train_begin(arguments[0], state, TrainerControl(), model=model)
    shares.state = {"layer": [0.25, 0.75]}
    other = {"default": {"layer": [1.0, 0.0]}}
    monkeypatch.setattr(trainer, "gather_object", lambda found: [*found, other])
    callback.on_step_end(arguments[0], state, TrainerControl(should_save=True))
    stored = json.loads(json.dumps(callback.state()))
    callback.on_train_end(arguments[0], state, TrainerControl(), model=model)
    for index, expected in enumerate(([0.25, 0.75], [1.0, 0.0], [0.25, 0.75])):
        start.stateful_callbacks = {"AdapterCallback": stored}
        resumed = AdapterCallback()
        resumed.on_train_begin(arguments[index], start, TrainerControl(), model=model)
        assert shares.state == {"layer": expected}
        resumed.on_train_end(arguments[index], start, TrainerControl(), model=model)
    callback.on_train_begin(arguments[0], TrainerState(), TrainerControl(), model=model)
    assert shares.state == {}, "a new run begins without"
    callback.on_train_end(arguments[0], start, TrainerControl(), model=model)


def test_a_second_adapter_has_losses_and_routing_of_its_own() -> None:
    """PEFT prepares only the first adapter of a model; what another one needs must not depend on that."""
    model, first = adapted().train(), build(balance_weight=WEIGHT, routing="sequence")
    model.add_adapter("second", first.peft_config["default"])
    model.set_adapter("second")
    layers = hydralora_layers(model)
    with torch.no_grad():
        for name, layer in hydralora_layers(first).items():
            for kind in layer.adapter_layer_names:
                if "default" in (parts := getattr(layer, kind)):
                    getattr(layers[name], kind)["second"].weight.copy_(parts["default"].weight)
    expected = gradients(first)
    assert_same(gradients(model), {name.replace(".default.", ".second."): value for name, value in expected.items()})
