"""Merging a routed adapter approximately, and saying how far off that is.

With fixed weights w_e the update `s * sum_e w_e B_e A` is one matrix. Which w_e is right depends on the input; here it
is the same for all, and the report compares the outputs before and after on inputs that the caller chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hydralora.model import RoutingRecorder, of_text
from hydralora.tuner.bases import refuse_merging
from hydralora.tuner.linear import HydraLoraLayer

KINDS = ("uniform", "mean-routing")


@dataclass(frozen=True)
class MergeReport:
    """How the outputs on some inputs moved when an adapter was merged.

    Attributes:
        weights: kind of the fixed weights.
        tokens: valid tokens that were compared.
        relative_error: distance of the logits, relative to their size.
        divergence: Kullback-Leibler divergence of the next-token distributions, before from after, nats per token.
        agreement: share of tokens whose most likely next token stayed the same.
        experts: the weights of the experts, by layer.
    """

    weights: str
    tokens: int
    relative_error: float
    divergence: float
    agreement: float
    experts: dict[str, list[float]]


def merge(
    model: nn.Module,
    layers: Mapping[str, HydraLoraLayer],
    weights: str,
    inputs: Sequence[Mapping[str, Tensor]],
    adapter_name: str,
) -> MergeReport:
    """Merge `adapter_name` into the frozen weights of `layers`; arguments and errors as of `HydraLoraModel.merge`."""
    chosen = {name: layer for name, layer in layers.items() if adapter_name in layer.lora_A}
    if weights not in KINDS:
        raise ValueError(f"weights is '{weights}', expected one of {KINDS}")
    if not inputs:
        raise ValueError("give inputs: the error of an approximation is measured on them")
    if not chosen:
        raise ValueError(f"there is no adapter '{adapter_name}'")
    if any(layer.merged for layer in layers.values()):
        raise ValueError("an adapter is merged already; call unmerge_adapter() first")
    if any(layer.disable_adapters for layer in layers.values()):
        raise ValueError("adapters are disabled, and a merged one would be taken out again; enable them first")
    refuse_merging(model, chosen)
    with in_use(model, adapter_name):
        before, means = _run(model, chosen, inputs)
        unseen = sorted(chosen.keys() - means.keys())
        if weights != "uniform" and unseen:
            raise ValueError(f"mean-routing: layers {unseen} do not see the tokens of the inputs; merge by 'uniform'")
        for name, layer in chosen.items():
            count = layer.experts[adapter_name]
            layer.merge_weights[adapter_name] = torch.full((count,), 1 / count) if weights == "uniform" else means[name]
            layer.merge(adapter_names=[adapter_name])
        after, _ = _run(model, {}, inputs)
    experts = {name: layer.merge_weights[adapter_name].tolist() for name, layer in chosen.items()}
    return report(weights, before, after, experts)


@contextmanager
def in_use(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """The model in evaluation, with one adapter active; it trains and has the same ones active as before afterwards."""
    modules = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    was_training, active = model.training, [module._active_adapter for module in modules]
    model.eval()
    for module in modules:
        module._active_adapter = [adapter_name]  # `set_adapter` would change what is trained
    try:
        yield
    finally:
        for module, names in zip(modules, active, strict=True):
            module._active_adapter = names
        model.train(was_training)


@torch.no_grad()
def _run(
    model: nn.Module, layers: Mapping[str, HydraLoraLayer], inputs: Sequence[Mapping[str, Any]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (tokens, V) of all valid tokens, and the mean routing (E,) of each layer over them."""
    logits: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    count = 0
    recorder = RoutingRecorder(layers)
    for batch in inputs:
        recorder.start()
        try:
            output = model(**batch).logits.float()  # (B, T, V)
        finally:
            recorded = recorder.stop()
        mask = batch.get("attention_mask")
        valid = torch.ones(output.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
        logits.append(output.cpu()[valid])
        count += int(valid.sum())
        for name, routing in of_text(recorded, output.shape[:2]).items():
            total = routing.probabilities.cpu()[valid].sum(dim=0)  # (E,)
            sums[name] = sums.get(name, torch.zeros_like(total)) + total
    return torch.cat(logits), {name: total / count for name, total in sums.items()}


def report(weights: str, before: Tensor, after: Tensor, experts: dict[str, list[float]]) -> MergeReport:
    """The report on logits (tokens, V) `before` and `after`, with these weights of the experts by layer."""
    log_before, log_after = before.log_softmax(-1), after.log_softmax(-1)
    divergence = (log_before.exp() * (log_before - log_after)).sum(-1).mean()
    return MergeReport(
        weights=weights,
        tokens=len(before),
        relative_error=float((after - before).norm() / before.norm()),
        divergence=float(divergence),
        agreement=float((before.argmax(-1) == after.argmax(-1)).float().mean()),
        experts=experts,
    )
