"""`save_as_lora`: the routed layers of a model in memory as folders of plain LoRA, with the error that it makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hydralora.block import KINDS
from hydralora.choices import MEAN, Weights
from hydralora.linears import CHILD, routed_updates
from hydralora.model import routed_blocks
from hydralora.split import refuse_split
from hydralora.tuner.bases import is_transposed
from hydralora.tuner.export import folder as files
from hydralora.tuner.export.constant import PlainLora, RoutedPart, plain_lora, vectors
from hydralora.tuner.export.rows import Rows, measured_rows, rows_of, similar_rows
from hydralora.tuner.linear import HydraLoraLayer
from hydralora.tuner.merging import MergeReport, in_use, report
from hydralora.tuner.routing.acting import fixed_weights
from hydralora.tuner.routing.given import Given

Batches = Sequence[Mapping[str, Any]]


SPLIT = ("the adapter cannot be written as LoRA", "Save it whole, load it in one process, and write it there")
"""What `refuse_split` says where a process holds only a part of the weights."""


@dataclass(frozen=True)
class LoraExport:
    """One folder that was written.

    Attributes:
        folder: of PEFT's LoRA.
        experts: weights of the experts, by router.
        report: how far the outputs on the inputs are from those of the routed model; None: without inputs.
        members: numbers of the rows of the inputs, in order, for which these weights are meant.
    """

    folder: Path
    experts: dict[str, list[float]]
    report: MergeReport | None
    members: tuple[int, ...] = ()


def save_as_lora(
    model: nn.Module,
    folder: str | Path,
    weights: Weights = None,
    *,
    inputs: Batches | None = None,
    adapter_name: str | None = None,
) -> LoraExport:
    """Write the routed layers of a model as one plain LoRA of PEFT, in the dtype of the adapter.

    Exact for one expert, and for weights that hold for every token of what it will be asked: those that calls force, or
    of routing by sequence for that one prompt. Plain LoRA layers next to routed blocks are written along.

    Args:
        model: of PEFT with a HydraLoRA adapter, or with routed blocks or updates of a LLaVA.
        folder: to create.
        weights: see `Weights`; `mean-routing` takes the mean over the tokens of `inputs`, router by router.
        inputs: batches, as keyword arguments of the model, to measure means and error on.
        adapter_name: of a HydraLoRA adapter; None: the active one.

    Returns:
        The folder, the weights, and with `inputs` the error against the routed model.

    Raises:
        ValueError: there are several experts and no weights, or weights that do not fit; no inputs for a mean; what
            was trained is more than a LoRA can hold; the adapter is merged or disabled; weights are offloaded.
        FileExistsError: `folder` exists.
    """
    with files.new_folder(folder) as made:
        source = _Source(model, adapter_name)
        found = source.write(made, Path(folder), weights, list(inputs or ()))
    return found


def save_tasks_as_lora(
    model: nn.Module,
    folder: str | Path,
    weights: Mapping[str, Weights] | None = None,
    *,
    inputs: Mapping[str, Batches] | None = None,
    adapter_name: str | None = None,
) -> dict[str, LoraExport]:
    """Write one plain LoRA for each task, `folder`/<task>.

    An adapter with `routing="task"` has learned weights for each of its tasks; these are written exactly.

    Args:
        model: as of `save_as_lora`.
        folder: to create.
        weights: by task; None: those that the adapter has learned for its tasks, or for another kind of routing the
            mean routing over the inputs of each task.
        inputs: batches by task, to measure the error on; those of a task that the adapter has need no `tasks`.
        adapter_name: as of `save_as_lora`.

    Returns:
        What was written, by task.

    Raises:
        ValueError: neither weights nor inputs are given, and the adapter has no tasks; tasks differ between weights and
            inputs, or are not those of the adapter; or as of `save_as_lora`.
        FileExistsError: `folder` exists.
    """
    if weights and inputs and weights.keys() != inputs.keys():
        raise ValueError(f"weights are for the tasks {sorted(weights)}, inputs for {sorted(inputs)}")
    batches = {task: list(given) for task, given in (inputs or {}).items()}
    with files.new_folder(folder) as made:
        source = _Source(model, adapter_name)
        learned = source.learned()
        choices = weights or _choices(learned, batches)
        found = {}
        for task, choice in choices.items():
            part = made / files.check_name(task)
            part.mkdir()
            rows = [{"tasks": task, **batch} if task in learned else batch for batch in batches.get(task, ())]
            found[task] = source.write(part, Path(folder) / task, choice, rows)
    return found


def _choices(
    learned: Mapping[str, Mapping[str, Sequence[float]]], inputs: Mapping[str, Batches]
) -> Mapping[str, Weights]:
    """Weights by task where none are given: those that were learned, or the mean over the inputs of each."""
    if not learned and not inputs:
        raise ValueError(
            "give weights by task, or inputs by task, whose mean routing is taken: the adapter has not learned weights "
            'by task (routing="task")'
        )
    unknown = sorted(inputs.keys() - learned.keys())
    if learned and unknown:
        raise ValueError(f"inputs are for the tasks {unknown}, which the adapter has not learned; known: {[*learned]}")
    return learned or dict.fromkeys(inputs, MEAN)


def save_clusters_as_lora(
    model: nn.Module,
    folder: str | Path,
    clusters: int,
    inputs: Batches,
    *,
    adapter_name: str | None = None,
    seed: int = 0,
) -> list[LoraExport]:
    """Cluster prompts by how they are routed (k-means), and write the mean routing of each cluster: `folder`/0, 1, ...

    Args:
        model: as of `save_as_lora`.
        folder: to create.
        clusters: number of clusters, at most that of the rows of `inputs`.
        inputs: batches; each row is a prompt.
        adapter_name: as of `save_as_lora`.
        seed: of k-means.

    Returns:
        What was written; `members` says which rows, counted over all batches, are in the cluster.

    Raises:
        ValueError: too few rows, or as of `save_as_lora`.
        ImportError: scikit-learn is missing.
        FileExistsError: `folder` exists.
    """
    singles = [row for batch in inputs for row in rows_of(batch)]
    if not 1 <= clusters <= len(singles):
        raise ValueError(f"{clusters} clusters of {len(singles)} prompts; expected 1 to {len(singles)}")
    with files.new_folder(folder) as made:
        source = _Source(model, adapter_name)
        found = []
        for number, members in enumerate(similar_rows(source.measure(singles).means(), clusters, seed)):
            part = made / str(number)
            part.mkdir()
            one = source.write(part, Path(folder) / str(number), MEAN, [singles[member] for member in members])
            found.append(dataclasses.replace(one, members=tuple(members)))
    return found


class _Source:
    """What is written: the routed layers of a model, checked.

    Args:
        model: as of `save_as_lora`.
        adapter_name: the same.
    """

    def __init__(self, model: Any, adapter_name: str | None) -> None:
        self.model = model
        self.bare: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.adapter = _one_adapter(model, self.bare, adapter_name)
        self.parts = [*_of_tuner(self.bare, self.adapter), *_of_blocks(self.bare), *_of_updates(self.bare)]
        if not self.parts:
            raise ValueError(f"this {type(self.bare).__name__} has no HydraLoRA layers, so there is nothing to write")
        self.parts += _of_lora(self.bare)
        refuse_split((weight for part in self.parts for weight in (part.shared_a, part.experts_b)), *SPLIT)
        offloaded = [part.name for part in self.parts if part.shared_a.is_meta or part.experts_b.is_meta]
        if offloaded:
            raise ValueError(f"weights of {len(offloaded)} layers are offloaded {offloaded[:2]}; load the model whole")
        self.experts = {part.router: part.experts for part in self.parts}

    def measure(self, inputs: Batches) -> Rows:
        """Logits and weights of each row of the inputs, with this adapter alone."""
        with in_use(self.model, self.adapter) if self.adapter else _evaluating(self.model):
            return measured_rows(self.model, self.bare, set(self.experts), inputs)

    def learned(self) -> dict[str, dict[str, list[float]]]:
        """Weights of the experts by router, by task of an adapter that routes by task; of others empty."""
        layers = {
            name: layer
            for name, layer in self.bare.named_modules()
            if isinstance(layer, HydraLoraLayer) and self.adapter is not None and self.adapter in layer.lora_A
        }
        tasks = next((layer.rules[self.adapter].tasks for layer in layers.values()), ())
        rest = {part.router: [1.0] for part in self.parts if part.experts == 1}
        return {
            task: rest
            | {name: fixed_weights(layer, self.adapter, Given(tasks=task)).tolist() for name, layer in layers.items()}
            for task in tasks
        }

    def write(self, made: Path, target: Path, choice: Weights, inputs: Batches) -> LoraExport:
        """Write one folder, `made`, that gets the name `target`."""
        if choice == MEAN and not inputs:
            raise ValueError(f"'{MEAN}' needs inputs, over whose tokens the weights are averaged")
        before = self.measure(inputs) if inputs else None
        averaged = before.mean(self.experts) if choice == MEAN and before is not None else None
        chosen = vectors(choice, self.experts) if averaged is None else averaged
        kind = choice if isinstance(choice, str) else "given"
        experts = {router: weights.tolist() for router, weights in chosen.items()}
        found = None
        if before is not None:
            with _constant(self.parts, chosen):
                after = self.measure(inputs)
            found = report(kind, before.logits, after.logits, experts)
        lora = plain_lora(self.parts, chosen)
        error = None if found is None else {k: v for k, v in dataclasses.asdict(found).items() if k != "experts"}
        record = {"weights": kind, "experts": experts, "error": error}
        files.write(made, lora, self._config(lora), record)
        return LoraExport(target, experts, found)

    def _config(self, lora: PlainLora) -> dict[str, Any]:
        config = getattr(self.model, "peft_config", {}).get(self.adapter or "default")
        modules = {_plain_name(name): module for name, module in self.bare.named_modules()}  # the innermost of a name
        base = getattr(config, "base_model_name_or_path", None) or getattr(self.bare, "name_or_path", None) or None
        task = getattr(config, "task_type", None)
        targets = files.target_names(lora.layers, modules)
        transposed = all(is_transposed(modules[name]) for name in lora.layers)
        return files.config_values(
            lora, targets, base, None if task is None else getattr(task, "value", task), transposed
        )


def _one_adapter(model: Any, bare: nn.Module, adapter_name: str | None) -> str | None:
    """Name of the HydraLoRA adapter to write; None for a model without the tuner's layers."""
    layers = [module for module in bare.modules() if isinstance(module, HydraLoraLayer)]
    if not layers:
        return None
    active = layers[0].active_adapters
    names = active if adapter_name is None else [adapter_name]
    if len(names) != 1:
        raise ValueError(f"{len(names)} adapters are active ({names}); name the one to write by adapter_name")
    name = names[0]
    known = sorted({name for layer in layers for name in layer.lora_A})
    if name not in known:
        raise ValueError(f"there is no adapter '{name}'; known: {known}")
    if any(layer.merged for layer in layers):
        raise ValueError("an adapter is merged; call unmerge_adapter() first")
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("adapters are disabled; enable them first")
    config: Any = getattr(model, "peft_config", {}).get(name)
    more = {
        option: value
        for option in ("modules_to_save", "trainable_token_indices")
        if (value := getattr(config, option, None))
    }
    if getattr(config, "bias", "none") != "none":
        more["bias"] = config.bias
    if more:
        raise ValueError(f"adapter '{name}' trained {more} too, which servers of LoRA do not load")
    return name


def _of_tuner(bare: nn.Module, adapter: str | None) -> Iterator[RoutedPart]:
    for name, layer in bare.named_modules():
        if isinstance(layer, HydraLoraLayer) and adapter is not None and adapter in layer.lora_A:
            matrix: Any = layer.lora_A[adapter].weight
            refuse_split([matrix, layer.lora_B[adapter].weight], *SPLIT)
            yield RoutedPart(name, name, matrix, layer.expert_matrices(adapter).detach(), float(layer.scaling[adapter]))


def _of_blocks(bare: nn.Module) -> Iterator[RoutedPart]:
    for name, block in routed_blocks(bare).items():
        for linear, kind in KINDS.items():
            a, b = getattr(block, f"shared_A_{kind}"), getattr(block, f"experts_B_{kind}")
            yield RoutedPart(f"{name}.{linear}", name, a, b.detach(), block.alpha / block.rank)


def _of_updates(bare: nn.Module) -> Iterator[RoutedPart]:
    for name, update in routed_updates(bare).items():
        linear = name.removesuffix(f".{CHILD}")
        yield RoutedPart(linear, name, update.shared_A, update.experts_B.detach(), update.alpha / update.rank)


def _of_lora(bare: nn.Module) -> Iterator[RoutedPart]:
    """Layers of PEFT's LoRA, as one expert each.

    Raises:
        ValueError: one of them is more than A and B.
    """
    for name, layer in bare.named_modules():
        if isinstance(layer, LoraLayer):
            for adapter in layer.active_adapters:
                if adapter not in layer.lora_A or layer.lora_variant.get(adapter) or layer.lora_bias.get(adapter):
                    raise ValueError(f"'{name}' has a LoRA that is more than A and B of a linear layer")
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                yield RoutedPart(name, name, a, b.detach()[None], layer.scaling[adapter])


def _plain_name(name: str) -> str:
    return name.removesuffix(".base_layer")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _constant(parts: Sequence[RoutedPart], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Every expert of a layer is the mixed one, so that it makes no difference how a router weights them."""
    before = [part.experts_b.detach().clone() for part in parts]
    try:
        with torch.no_grad():
            for part in parts:
                part.experts_b.copy_(part.mixed(weights[part.router]).expand_as(part.experts_b))
        yield
    finally:
        with torch.no_grad():
            for part, matrices in zip(parts, before, strict=True):
                part.experts_b.copy_(matrices)
