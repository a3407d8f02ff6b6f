"""The losses on the routing in a compiled training step: one graph, with the numbers of a step that is not compiled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.func import functional_call, grad

from hydralora import set_gradient_scale, set_step
from hydralora.tuner.balance.auxiliary import losses_of
from hydralora.tuner.balance.operations import moving_shares, numbered
from tests.hydralora.tuner.models import IDS, MASK, adapted, tiny_llama
from tests.hydralora.tuner.test_packing import IDS as PACKED
from tests.hydralora.tuner.test_packing import LABELS, POSITIONS

WEIGHT = 0.7
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100), "use_cache": False}
OTHER = {name: value.flip(1) if isinstance(value, Tensor) else value for name, value in BATCH.items()}
TEXTS = {"input_ids": PACKED, "labels": LABELS, "position_ids": POSITIONS, "use_cache": False}

FORMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "samples": ({}, [BATCH, OTHER, BATCH]),
    "best of other numbers": (
        {"experts_pattern": {"q_proj": 5}, "top_k": 2, "information_weight": 0.3},
        [BATCH, OTHER],
    ),
    "means in warm-up": ({"balance": "batch", "balance_ema": 0.5, "balance_warmup": 3}, [BATCH, OTHER, BATCH, OTHER]),
    "by sequence": ({"routing": "sequence", "balance": "batch", "information_weight": 0.3}, [BATCH, OTHER]),
    "packed samples": ({}, [TEXTS, TEXTS]),
    "packed by sequence": ({"routing": "sequence", "balance": "batch", "information_weight": 0.3}, [TEXTS, TEXTS]),
}


def build(weight: float = WEIGHT, **changes: Any) -> PeftModel:
    base = tiny_llama(num_hidden_layers=1, attn_implementation="eager")  # which sees packed texts apart
    return adapted(base=base, balance_weight=weight, **{"target_modules": ["q_proj", "down_proj"]} | changes).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Measured: 4e-9 apart."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-7, msg=lambda text, of=name: f"{of}: {text}")


def router_difference(ours: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((ours[name] - other[name]).abs().max()) for name in other if ".lora_router." in name)


@pytest.mark.parametrize("form", FORMS)
def test_one_graph_with_the_same_numbers(form: str) -> None:
    """For all updates, whose number, scale and running means differ: nothing is compiled twice, or in two parts."""
    torch._dynamo.reset()
    changes, batches = FORMS[form]
    plain, model = build(**changes), build(**changes)
    without = build(**changes | {"weight": 0.0, "information_weight": 0.0})
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step, batch in enumerate(batches):
        for each in (plain, model):
            set_step(each, step)
            set_gradient_scale(each, micro_batches=step + 1)
        for call in (plain, compiled, without):
            (call(**batch).loss / (step + 1)).backward()
        expected, found = gradients(plain), gradients(model)
        assert_same(found, expected)
        values = losses_of(plain)[0].pop()
        assert losses_of(model)[0].pop() == pytest.approx(values, rel=1e-5)
        acts = step or "balance_warmup" not in changes
        assert (router_difference(expected, gradients(without)) > 1e-4) == bool(acts)
        assert bool(values) == bool(acts)
    assert counter.frame_count == 1


def test_whatever_output_a_loss_begins_with() -> None:
    """The losses on the routing count once: with the model's own loss, with one on its logits, and with both."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    plain, model = build(), build()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for parts in (("loss",), ("logits",), ("loss", "logits")):
        for call in (plain, compiled):
            output = call(**BATCH)
            sum(output[part].square().mean() for part in parts).backward()
        assert_same(gradients(model), gradients(plain))
    assert counter.frame_count == 1


def test_a_decoder_that_is_called_by_itself() -> None:
    """As by trainers that compute the logits themselves."""
    torch._dynamo.reset()
    plain, model = (build().get_base_model().model for _ in range(2))
    inputs = {name: value for name, value in BATCH.items() if name != "labels"}
    for call in (plain, torch.compile(model, backend="eager", fullgraph=True)):
        call(**inputs).last_hidden_state.square().mean().backward()
    assert_same(gradients(model), gradients(plain))


def test_without_gradients_and_in_evaluation() -> None:
    torch._dynamo.reset()
    model = build()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**BATCH).logits, model(**BATCH).logits)
    model.eval()
    compiled(**BATCH).loss.backward()
    assert_same(gradients(model), by_itself(build(weight=0.0)))
    assert losses_of(model)[0].pop() == {}


def by_itself(model: nn.Module) -> dict[str, Tensor]:
    model(**BATCH).loss.backward()
    return gradients(model)


def test_checkpointed_layers_are_compiled_apart() -> None:
    """What a checkpoint recomputes keeps nothing for the pass: the graph breaks, and the numbers are the same."""
    torch._dynamo.reset()
    model = build()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    counter = CompileCounter()
    torch.compile(model, backend=counter)(**BATCH).loss.backward()
    assert_same(gradients(model), by_itself(build()))
    assert counter.frame_count > 1


def test_layers_that_are_compiled_alone() -> None:
    torch._dynamo.reset()
    model = build()
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="eager")
    assert_same(by_itself(model), by_itself(build()))


def test_gradients_by_a_transform_that_is_compiled() -> None:
    """`torch.func` alone refuses these losses; in a compiled function they are part of the graph."""
    torch._dynamo.reset()
    model = build()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, values, (), BATCH).loss

    assert_same(torch.compile(grad(loss), backend="eager")(trained), by_itself(build()))
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        grad(loss)(trained)


def test_a_copy_is_found_by_a_number_of_its_own() -> None:
    model = build()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        losses = losses_of(each)[0]
        assert numbered(losses.number) is losses
    assert losses_of(model)[0].number != losses_of(twin)[0].number


def test_a_running_mean_keeps_nothing_of_the_graph() -> None:
    """Whose memory a compiler uses again: with TorchInductor the second update was wrong when it was kept."""
    losses = losses_of(build(balance="batch", balance_ema=0.5))[0]
    shares = torch.tensor([0.5, 0.25, 0.25])
    first = moving_shares(shares, losses.number, "default", "layer")
    shares.copy_(torch.tensor([1.0, 0.0, 0.0]))
    first.zero_()
    second = moving_shares(shares, losses.number, "default", "layer")
    torch.testing.assert_close(second, torch.tensor([0.75, 0.125, 0.125]))
