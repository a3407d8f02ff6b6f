"""What a layer knows of its forward pass is of that pass alone: recomputed, traced, in threads, in several models."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hydralora.tuner.calls.checkpoints import BoundCheckpoint
from tests.checkpointed import checkpoint_layers
from tests.hydralora.tuner.models import IDS, MASK, TARGETS, adapted, logits, tiny_llama, tiny_opt

LABELS = torch.tensor([[-100] * 3 + [7, 60, 2], [-100, -100, 44, 12, -100, -100], [-100, 22, 70] + [-100] * 3])
FIRST = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "use_cache": False}
SECOND_LABELS = torch.tensor([[-100, 3, 4, 5, 6], [-100, -100, -100, -100, 9]])
SECOND = {"input_ids": IDS[:2, :5].flip(1), "labels": SECOND_LABELS, "use_cache": False}

ROUTINGS = pytest.mark.parametrize("routing", ["token", "sequence"])


def checkpointed(model: PeftModel, use_reentrant: bool) -> PeftModel:
    checkpoint_layers(model, {"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


def by_hand(model: PeftModel, **options: Any) -> PeftModel:
    """Layers that the caller checkpoints himself."""

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(original, **kwargs), *args, **options)

    for layer in model.get_base_model().model.layers:
        layer.forward = partial(forward, layer.forward)
    model.enable_input_require_grads()
    return model


def gradients(model: PeftModel, orders: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Of the first batch and of the second, whose forward passes have both begun before a backward pass does."""
    losses = [model(**batch).loss for batch in orders]
    found = []
    for loss in losses:
        model.zero_grad()
        loss.backward()
        trained = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        found.append({name: gradient.clone() for name, gradient in trained.items()})
    return found


@ROUTINGS
@pytest.mark.parametrize("base", ["llama", "opt"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_sees_its_own_pass(routing: str, base: str, use_reentrant: bool) -> None:
    """Forward A, forward B, backward A, backward B: the same gradients as without checkpointing."""
    make = {"llama": partial(adapted, base=None), "opt": lambda **options: adapted(base=tiny_opt(), **options)}[base]
    targets = TARGETS if base == "llama" else ["fc1", "v_proj"]
    plain, spared = (make(routing=routing, target_modules=targets).train() for _ in range(2))
    spared = checkpointed(spared, use_reentrant)
    for expected, found in zip(gradients(plain, [FIRST, SECOND]), gradients(spared, [FIRST, SECOND]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
        assert any(gradient.any() for gradient in found.values())


@ROUTINGS
def test_checkpoints_that_the_caller_makes(routing: str) -> None:
    """With the contexts of the tuner they are right, without them refused; by token nothing is needed."""
    plain, spared, unbound = (adapted(routing=routing).train() for _ in range(3))
    spared = by_hand(spared, use_reentrant=False, context_fn=spared.base_model.hydralora_passes.checkpoint_contexts)
    expected = gradients(plain, [FIRST, SECOND])
    torch.testing.assert_close(gradients(spared, [FIRST, SECOND]), expected, rtol=1e-5, atol=1e-8)
    unbound = by_hand(unbound, use_reentrant=True)
    if routing == "token":
        torch.testing.assert_close(gradients(unbound, [FIRST, SECOND]), expected, rtol=1e-5, atol=1e-8)
        return
    with pytest.raises(RuntimeError, match=r"does not say which forward pass.*context_fn=.*checkpoint_contexts"):
        gradients(unbound, [FIRST])


def test_the_wrapper_of_torch_for_layers_that_are_checkpointed() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    plain, spared = (adapted(routing="sequence").train() for _ in range(2))
    kind = type(spared.get_base_model().model.layers[0])
    apply_activation_checkpointing(spared, check_fn=lambda module: isinstance(module, kind))
    for expected, found in zip(gradients(plain, [FIRST, SECOND]), gradients(spared, [FIRST, SECOND]), strict=True):
        found = {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in found.items()}
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_nothing_stays_on_a_host_that_is_unloaded() -> None:
    model = checkpointed(adapted(routing="sequence").train(), False)
    model(**FIRST)
    functions = lambda host: [getattr(m, "_gradient_checkpointing_func", None) for m in host.modules()]  # noqa: E731
    assert any(isinstance(function, BoundCheckpoint) for function in functions(model))
    assert not any(isinstance(function, BoundCheckpoint) for function in functions(model.unload()))


@ROUTINGS
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled(routing: str, fullgraph: bool) -> None:
    """Two different batches through one compiled model, and the gradients of a loss."""
    torch._dynamo.reset()
    model = adapted(routing=routing)
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    for batch in (FIRST, {**FIRST, "input_ids": IDS.flip(1)}, {**FIRST, "labels": LABELS.flip(1)}):
        expected, found = model(**batch), compiled(**batch)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
        wanted, got = (
            torch.autograd.grad(output.loss, [w for w in model.parameters() if w.requires_grad])
            for output in (expected, found)
        )
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


@ROUTINGS
def test_compiled_layer_by_layer(routing: str) -> None:
    """The pass begins outside of what is compiled."""
    torch._dynamo.reset()
    model, compiled = (adapted(routing=routing) for _ in range(2))
    for layer in compiled.get_base_model().model.layers:
        layer.compile(backend="eager")
    for mask in (MASK, torch.tensor([[0, 0, 1, 1, 1, 1]] * 3)):
        torch.testing.assert_close(logits(compiled, IDS, mask), logits(model, IDS, mask), rtol=0, atol=1e-5)


@ROUTINGS
@pytest.mark.parametrize("strict", [False, True])
def test_exported(routing: str, strict: bool) -> None:
    model = adapted(routing=routing)
    batch = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    program = torch.export.export(model, (), batch, strict=strict).module()
    for mask in (MASK, torch.tensor([[0, 0, 1, 1, 1, 1]] * 3)):
        found = program(**{**batch, "attention_mask": mask}).logits[mask.bool()]
        torch.testing.assert_close(found, logits(model, IDS, mask), rtol=0, atol=1e-5)
    assert model.base_model.hydralora_passes.note.prompt is None


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """Results of jobs that run at the same time."""
    results: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda n=n, job=job: results.update({n: job()})) for n, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(jobs))]


@pytest.mark.parametrize("names", [None, ["default", "__base__", "default"]])
def test_threads_do_not_disturb_each_other(names: list[str] | None) -> None:
    """Two passes of one model meet inside of it; each has its own prompt and its own adapter names."""
    model = adapted(routing="sequence")
    options = {} if names is None else {"adapter_names": names}
    other = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    expected = logits(model, **options), logits(model, IDS, other)
    meeting = threading.Barrier(2, timeout=60)

    def meet(module: nn.Module, args: tuple[Any, ...]) -> None:
        meeting.wait()

    handle = model.get_base_model().model.layers[0].register_forward_pre_hook(meet)
    found = in_threads(lambda: logits(model, **options), lambda: logits(model, IDS, other))
    handle.remove()
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-6)
    assert not torch.allclose(expected[0][:3], expected[1][:3], atol=1e-4), "the negative control"


class Pair(nn.Module):
    """A model inside of which another one runs, between two of its layers."""

    def __init__(self, outer: PeftModel, inner: PeftModel) -> None:
        super().__init__()
        self.outer, self.inner = outer, inner
        outer.get_base_model().model.layers[1].register_forward_pre_hook(lambda *_: self.run_inner())

    def run_inner(self) -> None:
        with torch.no_grad():
            self.inner(input_ids=IDS[:1, :4])


def test_two_models_do_not_disturb_each_other() -> None:
    """As with a reference model; a part of a model that is called directly takes nothing from an earlier pass."""
    model = adapted(routing="sequence")
    expected = logits(model)
    torch.testing.assert_close(logits(Pair(model, adapted(seed=1, routing="sequence")).outer), expected)
    decoder = adapted(routing="sequence").get_base_model().model
    fresh = decoder(input_ids=IDS[:1]).last_hidden_state
    again = copy.deepcopy(model)
    again(input_ids=IDS[:1], attention_mask=torch.tensor([[1, 0, 0, 0, 0, 0]]))
    torch.testing.assert_close(again.get_base_model().model(input_ids=IDS[:1]).last_hidden_state, fresh)
    with pytest.raises(ValueError, match="must specify exactly one"):
        again(attention_mask=MASK[:1])
    torch.testing.assert_close(again.get_base_model().model(input_ids=IDS[:1]).last_hidden_state, fresh)


def test_a_model_is_copied_and_stored_whole(tmp_path: Any) -> None:
    model = adapted(base=tiny_llama(), routing="sequence").train()
    expected = gradients(model, [FIRST, SECOND])
    torch.save(model, tmp_path / "whole.pt")
    stored = torch.load(tmp_path / "whole.pt", weights_only=False)
    gradients(checkpointed(model, False), [FIRST])
    for again in (stored, copy.deepcopy(model)):
        assert again.base_model.hydralora_passes is not model.base_model.hydralora_passes
        for found, wanted in zip(gradients(again, [FIRST, SECOND]), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
