"""The balance loss acts from within the layers: its gradients are those of the loss added to the model's by hand."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import delete_adapter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hydralora import HydraLoraConfig, expert_balance_loss, set_gradient_scale, set_step
from hydralora.model import RoutingRecorder, of_text
from hydralora.tuner import hydralora_layers
from hydralora.tuner.balance.auxiliary import losses_of
from hydralora.tuner.balance.gradient_scale import GradientScale
from hydralora.tuner.balance.losses import batch_balance, information, of_prompts
from hydralora.tuner.balance.terms import AdapterTerms, Term
from hydralora.tuner.balance.trainer import micro_batches_of_update
from hydralora.tuner.batch import prompt_tokens
from tests.checkpointed import checkpoint_layers
from tests.hydralora.tuner.models import IDS, MASK, adapted, tiny_llama, tiny_opt

WEIGHT = 0.7
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100), "use_cache": False}
OTHER = {"input_ids": IDS[:2, :5].flip(1), "labels": IDS[:2, :5].flip(1), "use_cache": False}
BASES = {"llama": tiny_llama, "opt": tiny_opt}
OPT = ["q_proj", "v_proj", "fc1", "fc2"]


def build(base: str = "llama", weight: float = WEIGHT, **changes: Any) -> PeftModel:
    if base == "opt":
        changes = {"target_modules": OPT} | changes
    return adapted(base=BASES[base](), balance_weight=weight, **changes).train()


def trained_gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return found


def by_hand(model: PeftModel, *batches: dict[str, Any], weight: float = WEIGHT) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the losses plus the weighted balance loss, by the graph of all layers; and that loss of the last."""
    for batch in batches:
        recorder = RoutingRecorder(hydralora_layers(model))
        recorder.start()
        loss = model(**batch).loss
        routings = list(of_text(recorder.stop(), batch["input_ids"].shape).values())
        balance = weight * expert_balance_loss(routings, batch.get("attention_mask"))
        (loss + balance).backward()
    return trained_gradients(model), balance.detach()


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def logits_loss(model: PeftModel, batch: dict[str, Any]) -> Tensor:
    """The model's own loss, computed outside of it from its inner decoder, as TRL does."""
    inner = model.get_base_model()
    decoder = inner.base_model
    hidden = decoder(**{name: value for name, value in batch.items() if name != "labels"}).last_hidden_state
    logits = inner.lm_head(hidden)[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


def checkpointed(model: PeftModel, use_reentrant: bool) -> PeftModel:
    checkpoint_layers(model, {"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.versions
@pytest.mark.parametrize("routing", ["token", "sequence"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "recomputed", "reentrant"])
def test_gradients_are_those_of_the_loss_added_by_hand(base: str, routing: str, reentrant: bool | None) -> None:
    """All layers' A, B and routers, with padding, by token and by sequence, under both kinds of checkpointing."""
    expected, value = by_hand(build(base, 0.0, routing=routing), BATCH)
    plain, _ = by_hand(build(base, 0.0, routing=routing), BATCH, weight=0.0)
    model = build(base, routing=routing)
    if reentrant is not None:
        model = checkpointed(model, reentrant)
    model(**BATCH).loss.backward()
    assert_same(trained_gradients(model), expected, rtol=1e-4, atol=1e-6)
    assert max((expected[name] - plain[name]).abs().max() for name in plain if "router" in name) > 1e-3
    assert losses_of(model)[0].pop() == pytest.approx({"balance_loss": value.item()}, rel=1e-5)
    assert losses_of(model)[0].pop() == {}


def test_a_loss_that_is_computed_outside_of_the_model() -> None:
    expected, _ = by_hand(build(weight=0.0), BATCH)
    model = build()
    logits_loss(model, BATCH).backward()
    assert_same(trained_gradients(model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [None, True])
def test_two_forward_passes_before_a_backward_pass(reentrant: bool | None) -> None:
    """As a preference loss has them; each keeps its own mask and shares."""
    expected, _ = by_hand(build(weight=0.0), BATCH, OTHER)
    model = build()
    if reentrant is not None:
        model = checkpointed(model, reentrant)
    (model(**BATCH).loss + model(**OTHER).loss).backward()
    assert_same(trained_gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_nothing_is_attached_without_gradients_or_in_evaluation() -> None:
    model = build()
    with torch.no_grad():
        model(**BATCH)
    model.eval()(**BATCH).loss.backward()
    assert_same(trained_gradients(model), by_hand(build(weight=0.0), BATCH, weight=0.0)[0])
    assert losses_of(model)[0].pop() == {}


def test_an_adapter_that_does_not_train_adds_nothing() -> None:
    """Such as a frozen reference, even while it is the active one; the one that trains has its own weight."""
    model = build()
    config = copy.deepcopy(model.peft_config["default"])
    config.balance_weight = 5.0
    model.add_adapter("ref", config)
    model.set_adapter("ref", inference_mode=True)
    assert model(**BATCH).loss.requires_grad is False
    model.set_adapter("default")
    model(**BATCH).loss.backward()
    assert_same(trained_gradients(model), by_hand(build(weight=0.0), BATCH)[0], rtol=1e-4, atol=1e-6)


def test_a_weight_that_is_set_later() -> None:
    model = build(weight=0.0)
    model.peft_config["default"].balance_weight = WEIGHT
    model.base_model.attach_losses()
    model(**BATCH).loss.backward()
    assert_same(trained_gradients(model), by_hand(build(weight=0.0), BATCH)[0], rtol=1e-4, atol=1e-6)
    model.peft_config["default"].balance_weight = 0.0
    model.base_model.attach_losses()
    assert not model.get_base_model()._forward_pre_hooks


def test_a_copy_of_the_model_trains_by_itself() -> None:
    model = build()
    twin = copy.deepcopy(model)
    twin(**BATCH).loss.backward()
    assert not trained_gradients(model)
    assert_same(trained_gradients(twin), by_hand(build(weight=0.0), BATCH)[0], rtol=1e-4, atol=1e-6)
    assert losses_of(model)[0].pop() == {}


def test_scaled_as_a_training_loop_says() -> None:
    """Divided by the micro batches of an update, multiplied by the scaler of float16."""
    model, scaler = build(), torch.amp.GradScaler("cpu", init_scale=8.0)
    set_gradient_scale(model, micro_batches=2, scaler=scaler)
    for batch in (BATCH, OTHER):
        scaler.scale(model(**batch).loss / 2).backward()
    ours = {name: gradient / 8 for name, gradient in trained_gradients(model).items()}
    expected, _ = by_hand(build(weight=0.0), BATCH, OTHER)
    assert_same(ours, {name: gradient / 2 for name, gradient in expected.items()}, rtol=1e-4, atol=1e-6)


def test_float16_without_its_scale_is_refused() -> None:
    model = build()
    with torch.autocast("cpu", torch.float16), pytest.raises(RuntimeError, match="set_gradient_scale"):
        model(**BATCH)
    set_gradient_scale(model, scaler=torch.amp.GradScaler("cpu", enabled=False))
    with torch.autocast("cpu", torch.float16):
        model(**BATCH).loss.backward()
    assert trained_gradients(model)
    with pytest.raises(ValueError, match="micro_batches is 0, expected at least 1"):
        set_gradient_scale(model, 0)
    with pytest.raises(ValueError, match="Linear has no HydraLoRA adapter"):
        set_gradient_scale(nn.Linear(2, 2))


def test_bfloat16_autocast_is_near() -> None:
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        model(**BATCH).loss.backward()
    expected, _ = by_hand(build(weight=0.0), BATCH)
    assert_same(trained_gradients(model), expected, rtol=0.1, atol=0.05)


def test_what_cannot_be_told_is_refused() -> None:
    """Before a number is made: a layer by itself, a mask of four dimensions, tokens that are not the text's."""
    model = build()
    layer = next(iter(hydralora_layers(model).values()))
    with pytest.raises(ValueError, match="outside of a forward pass"):
        layer(torch.randn(1, 3, 32))
    with pytest.raises(ValueError, match="a tensor of 4 dimensions"):
        model(input_ids=IDS, attention_mask=torch.ones(3, 1, 6, 6).bool())
    assert model(**BATCH).loss.requires_grad, "nothing is left of the pass that failed"
    decoder = model.get_base_model().model
    decoder.norm.register_forward_pre_hook(lambda module, args: layer(torch.randn(1, 2, 32)) and None)
    with pytest.raises(ValueError, match="sees tokens of shape"):
        model(**BATCH)


def test_a_reentrant_checkpoint_that_says_nothing_is_refused() -> None:
    model = build()

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(original, **kwargs), *args, use_reentrant=True)

    for layer in model.get_base_model().model.layers:
        layer.forward = partial(forward, layer.forward)
    model.enable_input_require_grads()
    loss = model(**BATCH).loss
    with pytest.raises(RuntimeError, match="does not say which forward pass"):
        loss.backward()


def test_a_loss_of_each_layer() -> None:
    """Any function of probabilities and real tokens; the mean over the layers counts, and its value is reported."""

    class Squares(AdapterTerms):
        at_all = True

        def at(self, step: int) -> list[Term]:
            return [Term("squares", WEIGHT, lambda p, valid, layer: (p.square().sum(-1) * valid).sum() / valid.sum())]

    reference = build(weight=0.0)
    recorder = RoutingRecorder(hydralora_layers(reference))
    recorder.start()
    loss = reference(**BATCH).loss
    values = [
        (routings[0].probabilities.square().sum(-1) * MASK).sum() / MASK.sum() for routings in recorder.stop().values()
    ]
    added = WEIGHT * torch.stack(values).mean()
    (loss + added).backward()
    model = build(weight=0.0)
    losses = losses_of(model)[0]
    losses.adapters["default"] = Squares(model.peft_config["default"])
    model.base_model.attach_losses()
    model(**BATCH).loss.backward()
    assert_same(trained_gradients(model), trained_gradients(reference), rtol=1e-4, atol=1e-6)
    assert losses.pop() == pytest.approx({"squares": added.item()}, rel=1e-5)


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_the_forms_of_the_configuration(routing: str) -> None:
    """`balance='batch'`, its warm-up and the information loss: values and gradients by hand, for each layer."""

    def decided(recorded: Tensor) -> tuple[Tensor, Tensor]:
        if routing == "token":
            return recorded, MASK
        return of_prompts(recorded, prompt_tokens(MASK, BATCH["labels"])), torch.ones(len(MASK))

    reference = build(weight=0.0, routing=routing)
    recorder = RoutingRecorder(hydralora_layers(reference))
    recorder.start()
    loss = reference(**BATCH).loss
    recorded = [decided(routings[0].learned) for routings in recorder.stop().values()]
    balance = WEIGHT / 2 * torch.stack([batch_balance(*of_layer) for of_layer in recorded]).mean()
    gained = 0.3 * torch.stack([information(*of_layer) for of_layer in recorded]).mean()
    (loss + balance - gained).backward()
    model = build(routing=routing, balance="batch", balance_warmup=4, information_weight=0.3)
    set_step(model, 2)
    model(**BATCH).loss.backward()
    assert_same(trained_gradients(model), trained_gradients(reference), rtol=1e-4, atol=1e-6)
    expected = {"balance_loss": balance.item(), "information_loss": -gained.item()}
    assert losses_of(model)[0].pop() == pytest.approx(expected, rel=1e-4)
    set_step(model, 0)
    model(**BATCH).loss.backward()
    assert losses_of(model)[0].pop().keys() == {"information_loss"}


def test_one_expert_has_nothing_to_balance() -> None:
    model = build(lora_nums=1)
    model(**BATCH).loss.backward()
    assert losses_of(model)[0].pop() == {}


def test_any_model_of_torch() -> None:
    """Without ids, mask and decoder: all tokens are real."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    gradients = []
    for weight in (0.0, WEIGHT):
        torch.manual_seed(0)
        targets = ["first", "second"]
        config = HydraLoraConfig(lora_nums=3, target_modules=targets, init_weights=False, balance_weight=weight)
        model = get_peft_model(Net(), config).train()
        x = torch.randn(2, 5, 6)
        recorder = RoutingRecorder(hydralora_layers(model))
        recorder.start()
        loss = model(x).square().mean()
        routings = [routings[0] for routings in recorder.stop().values()]
        (loss if weight else loss + WEIGHT * expert_balance_loss(routings, None)).backward()
        gradients.append(trained_gradients(model))
    assert_same(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("length", "full", "step", "expected"),
    [
        (8, 4, 0, 4),
        (8, 4, 1, 4),
        (10, 4, 1, 4),
        (10, 4, 2, 2),
        (10, 4, 5, 2),
        (3, 4, 0, 3),
        (None, 4, 9, 4),
        (5, 1, 4, 1),
    ],
)
def test_micro_batches_of_an_update(length: int | None, full: int, step: int, expected: int) -> None:
    """The last update of an epoch has what is left."""
    args = type("Args", (), {"gradient_accumulation_steps": full})
    state = type("State", (), {"global_step": step})
    batches = iter(()) if length is None else range(length)
    assert micro_batches_of_update(args, state, batches) == expected


def test_the_scale_of_deepspeed() -> None:
    assert GradientScale(2, None, lambda: 16.0).of(torch.ones(1)).item() == 8
    assert math.isclose(GradientScale().of(torch.ones(1)).item(), 1)


PATTERN = {"q_proj": 5, r"layers\.1\.mlp\.down_proj": 1}


def test_layers_with_other_numbers_of_experts() -> None:
    """Each is balanced among those with as many; one expert has nothing to balance."""
    expected, value = by_hand(build(weight=0.0, experts_pattern=PATTERN), BATCH)
    plain, _ = by_hand(build(weight=0.0, experts_pattern=PATTERN), BATCH, weight=0.0)
    model = build(experts_pattern=PATTERN)
    model(**BATCH).loss.backward()
    assert_same(trained_gradients(model), expected, rtol=1e-4, atol=1e-6)
    assert losses_of(model)[0].pop() == pytest.approx({"balance_loss": value.item()}, rel=1e-5)
    for part in ("q_proj", "v_proj"):
        names = [name for name in plain if part in name and "router" in name]
        assert names
        assert all((expected[name] - plain[name]).abs().max() > 1e-4 for name in names)


def test_a_pattern_alone_may_give_several_experts() -> None:
    model = build(lora_nums=1, experts_pattern={"q_proj": 4})
    model(**BATCH).loss.backward()
    assert losses_of(model)[0].pop().keys() == {"balance_loss"}


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("way", ["model", "layers"])
@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_a_deleted_adapter_leaves_no_loss_behind(routing: str, way: str) -> None:
    """Its hooks and its values are gone, by PEFT's model and by PEFT's function that transformers calls."""
    model = build(routing=routing)
    model.add_adapter("other", HydraLoraConfig(r=4, lora_nums=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model(**BATCH).loss.backward()
    values = losses_of(model)[0].pop().keys()
    model(**BATCH).loss.backward()
    before = hooks_of(model)
    assert before > 0
    assert values
    if way == "model":
        model.delete_adapter("default")
        assert hooks_of(model) == 0
    else:
        first = next(iter(hydralora_layers(model).values()))
        first.delete_adapter("default")  # the others keep it, and its losses
        assert losses_of(model)[0].adapters.keys() == {"default", "other"}
        assert hooks_of(model) == before
        model(**BATCH).loss.backward()
        assert losses_of(model)[0].pop().keys() == values
        model(**BATCH).loss.backward()
        delete_adapter(model.base_model.model, "default", model.base_model.prefix)
        assert hooks_of(model) < before
    losses = losses_of(model)[0]
    assert losses.adapters.keys() == {"other"}
    assert losses.pop() == {}
    model.set_adapter("other")
    model(**BATCH).loss.backward()
    assert losses.pop() == {}


@pytest.mark.parametrize("name", ["balance_weight", "information_weight"])
def test_routing_by_task_says_that_it_has_no_such_loss(name: str) -> None:
    changes: dict[str, Any] = {"routing": "task", "tasks": ["law"]}
    with pytest.warns(UserWarning, match=rf"'{name}': 0.3.* has no effect with routing='task'"):
        adapted(**changes, **{name: 0.3})
    with warnings.catch_warnings(record=True) as said:
        adapted(**changes)
        adapted(**{name: 0.3})
        adapted(**changes, **{name: 0.3}, inference_mode=True)
    assert not [str(each.message) for each in said if "no effect" in str(each.message)]


FORMS: dict[str, dict[str, Any]] = {
    "samples": {},
    "batch": {"balance": "batch"},
    "by sequence": {"routing": "sequence"},
    "batch by sequence": {"routing": "sequence", "balance": "batch", "information_weight": 0.3},
}


@pytest.mark.parametrize("form", FORMS)
def test_packed_texts_are_samples(form: str) -> None:
    """As packing of TRL makes them: gradients and value are those of a row for each text, padded."""
    changes = {"base": tiny_llama(attn_implementation="eager"), "balance_weight": WEIGHT} | FORMS[form]
    labels = BATCH["labels"].clone()
    labels[:, :2] = -100
    loose, packed = adapted(**changes).train(), adapted(**changes | {"base": tiny_llama()}).train()
    loose(**BATCH | {"labels": labels}).loss.backward()
    real = MASK.bool()
    joined = {"input_ids": IDS[real][None], "labels": labels[real][None], "use_cache": False}
    joined["position_ids"] = torch.arange(IDS.shape[1]).expand_as(IDS)[real][None]
    packed(**joined).loss.backward()
    assert_same(trained_gradients(packed), trained_gradients(loose), rtol=1e-4, atol=1e-6)
    assert losses_of(packed)[0].pop() == pytest.approx(losses_of(loose)[0].pop(), rel=1e-5)
