"""`patch_llava` on a model object: the same losses as through the seams, and back to what it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hydralora import patch_llava
from hydralora.config import RoutedMLPConfig
from hydralora.layer import expert_balance_loss
from hydralora.model import RoutingRecorder
from hydralora.patch import ATTRIBUTE, with_losses
from tests.checkpointed import checkpoint_layers

CONFIG = RoutedMLPConfig(experts=3, rank=2, alpha=4, dropout=0.0, balance_weight=0.5)
IDS = torch.arange(1, 13).reshape(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.where(MASK.bool(), -100)}


class ClassThatAddsLosses(LlamaForCausalLM):
    """As moe_patch leaves upstream's class."""

    @with_losses
    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


def make_model(cls: type = LlamaForCausalLM) -> Any:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return cls(config)


def patched(cls: type = LlamaForCausalLM, config: RoutedMLPConfig = CONFIG) -> tuple[Any, Any]:
    """A patched model whose experts act, and its handle."""
    model = make_model(cls)
    patch = patch_llava(model, config)
    for block in patch.blocks.values():
        block.reset_parameters(identity=False)
    return model, patch


each_class = pytest.mark.parametrize("cls", [LlamaForCausalLM, ClassThatAddsLosses])


@each_class
class TestLosses:
    def test_starts_as_the_base_with_the_loss_on_top(self, cls: type) -> None:
        base = make_model()(**BATCH)
        model = make_model(cls)
        patch = patch_llava(model, CONFIG)
        output = model(**BATCH)
        torch.testing.assert_close(output.logits, base.logits, rtol=0, atol=0)
        assert output.loss.item() == pytest.approx(base.loss.item() + patch.balance_loss.item(), abs=1e-6)
        assert patch.balance_loss > 0.5 / 3  # its minimum is weight / experts, for perfect balance

    def test_the_balance_loss_is_that_of_the_layer_with_the_mask_of_the_decoder(self, cls: type) -> None:
        model, patch = patched(cls)
        recorder = RoutingRecorder(patch.blocks)
        recorder.start()
        model(**BATCH)
        routings = [passes[-1] for passes in recorder.stop().values()]
        expected = 0.5 * expert_balance_loss(routings, MASK)
        assert patch.balance_loss.item() == pytest.approx(expected.item(), abs=1e-7)
        assert abs(expected - 0.5 * expert_balance_loss(routings, None)) > 1e-5

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gradients_are_those_of_the_sum(self, cls: type, checkpointing: bool) -> None:
        model, patch = patched(cls)
        recorder = RoutingRecorder(patch.blocks)
        recorder.start()
        logits = model(input_ids=IDS, attention_mask=MASK).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), BATCH["labels"][:, 1:].flatten())
        balance = expert_balance_loss([passes[-1] for passes in recorder.stop().values()], MASK)
        (loss + 0.5 * balance).backward()
        expected = {name: parameter.grad.clone() for name, parameter in patch.parameters()}
        model.zero_grad()
        if checkpointing:
            checkpoint_layers(model)
            model.enable_input_require_grads()
            model.train()
        model(**BATCH).loss.backward()
        for name, parameter in patch.parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)
        assert expected["model.layers.0.mlp.router.weight"].abs().max() > 1e-4

    def test_tuples_and_passes_without_labels(self, cls: type) -> None:
        model, patch = patched(cls)
        whole = model(**BATCH)
        loss, logits, *_ = model(**BATCH, return_dict=False)
        assert loss.item() == pytest.approx(whole.loss.item(), abs=1e-6)
        torch.testing.assert_close(logits, whole.logits, rtol=0, atol=0)
        patch.balance_loss = None
        assert model(IDS).loss is None
        assert patch.balance_loss is None

    @pytest.mark.parametrize("change", [{"balance_weight": 0.0}, {"experts": 1}])
    def test_nothing_to_balance(self, cls: type, change: dict[str, Any]) -> None:
        model = make_model(cls)
        patch_llava(model, RoutedMLPConfig(**({"experts": 3, "rank": 2, "alpha": 4, "dropout": 0.0} | change)))
        assert model(**BATCH).loss.item() == make_model()(**BATCH).loss.item()

    def test_reentrant_checkpointing_is_refused(self, cls: type) -> None:
        model, _ = patched(cls)
        checkpoint_layers(model, {"use_reentrant": True})
        model.enable_input_require_grads()
        with pytest.raises(ValueError, match="re-entrant"):
            model.train()(**BATCH)


class TestRevert:
    @each_class
    def test_gives_the_very_modules_back(self, cls: type) -> None:
        model = make_model(cls)
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
        modules, keys = dict(model.named_modules()), list(model.state_dict())
        required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        attributes, base = set(vars(model)), model(**BATCH)
        patch = patch_llava(model, CONFIG)
        for block in patch.blocks.values():
            block.reset_parameters(identity=False)
        assert (model(**BATCH).logits - base.logits).abs().max() > 1e-3
        patch.revert()
        assert dict(model.named_modules()) == modules
        assert list(model.state_dict()) == keys
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == required
        assert set(vars(model)) == attributes
        again = model(**BATCH)
        torch.testing.assert_close(again.logits, base.logits, rtol=0, atol=0)
        assert again.loss.item() == base.loss.item()
        patch.revert()
        assert getattr(patch_llava(model, CONFIG).model, ATTRIBUTE) is not patch

    def test_a_forward_that_something_wrapped_before_comes_back(self) -> None:
        model = make_model()
        inner = model.forward
        model.forward = wrapped = lambda *args, **kwargs: inner(*args, **kwargs)
        patch = patch_llava(model, CONFIG)
        model(**BATCH)
        patch.revert()
        assert model.forward is wrapped

    def test_a_forward_that_something_wrapped_since_is_refused(self) -> None:
        model, patch = patched()
        model.forward = lambda *args, **kwargs: None
        with pytest.raises(ValueError, match="was replaced after patch_llava"):
            patch.revert()
        assert patch.blocks.keys() <= dict(model.named_modules()).keys()


def test_twice_is_refused() -> None:
    model, _ = patched()
    with pytest.raises(ValueError, match="patched already"):
        patch_llava(model, CONFIG)


def test_inside_peft() -> None:
    wrapped = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    patch = patch_llava(wrapped, CONFIG)
    before = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert {f"base_model.model.{name}" for name, _ in patch.parameters()} <= before
    wrapped(**BATCH).loss.backward()
    assert all(parameter.grad is not None for _, parameter in patch.parameters())
    assert patch.balance_loss is not None


def test_weights_are_loaded_or_refused_as_a_whole() -> None:
    model, patch = patched()
    other, copied = patched()
    weights = {name: torch.randn_like(p) for name, p in patch.parameters()}
    patch.load(weights)
    assert all(parameter.equal(weights[name]) for name, parameter in patch.parameters())
    before = copy.deepcopy(dict(copied.parameters()))
    first = next(iter(weights))
    for wrong in (
        {k: v for k, v in weights.items() if k != first},
        weights | {"model.else": torch.ones(1)},
        weights | {first: torch.ones(1)},
    ):
        with pytest.raises(ValueError, match="weights of 2 routed blocks"):
            copied.load(wrong)
    assert all(parameter.equal(before[name]) for name, parameter in copied.parameters())
    assert (model(IDS).logits - other(IDS).logits).abs().max() > 1e-3
