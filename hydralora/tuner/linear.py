"""The HydraLoRA layer of the PEFT tuner: a frozen linear layer with one shared A, E matrices B and a router.

HydraLoRA (Tian et al., NeurIPS 2024, arXiv 2404.19245, section 3); `Linear` in `HydraLoRA/peft/tuners/lora.py` of the
original. `parts.py` holds its modules and `hydralora/layer.py` their mathematics; here they meet PEFT's rules for tuner
layers.

Shape letters: B batch, T tokens, r rank, E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from hydralora.layer import RoutedModule, in_forward_mode
from hydralora.tuner.balance.auxiliary import AuxiliaryLosses
from hydralora.tuner.bases import features, in_stored_form, quantization
from hydralora.tuner.config import HydraLoraConfig, RoutingUnit
from hydralora.tuner.decoding import one_token
from hydralora.tuner.head_dropout import HeadDropout
from hydralora.tuner.initialization import Initialization
from hydralora.tuner.parts import Experts, Router, SharedA
from hydralora.tuner.passes import Passes
from hydralora.tuner.routing.acting import acting_weights, leaves_out
from hydralora.tuner.routing.rule import Rule, rule_of
from hydralora.tuner.routing.tasks import TaskTable
from hydralora.tuner.scaling import ScaledLayer

BASE = "__base__"
"""PEFT's name, in `adapter_names`, for a row that no adapter changes."""


class HydraLoraLayer(ScaledLayer, RoutedModule):
    """What a layer holds for each adapter, by the adapter's name.

    Trained are the weights of `lora_A` (r, in_features), of `lora_B` (out_features, E * r), all B side by side, and of
    `lora_router` (E, in_features); see `parts.py`. One expert needs no router, and its names are those of PEFT's LoRA.
    Routing by task has `lora_tasks` (tasks, E) instead of a router.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_router", "lora_tasks")
    other_param_names = (
        "r",
        "experts",
        "scaling",
        "trained_scaling",
        "routing",
        "rules",
        "lora_dropout",
        "merge_weights",
    )
    auxiliary: AuxiliaryLosses | None = None
    """The losses on the routing of the whole model; None for a layer of none."""
    name_in_model: str = ""
    """Its name there."""

    def __init__(self, base_layer: nn.Module, passes: Passes) -> None:
        self.base_layer = base_layer
        self.passes = passes
        self.observers = []
        self.lora_A = nn.ModuleDict({})
        self.lora_B = nn.ModuleDict({})
        self.lora_router = nn.ModuleDict({})
        self.lora_tasks = nn.ModuleDict({})
        self.lora_dropout = nn.ModuleDict({})
        self.r: dict[str, int] = {}
        self.experts: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.trained_scaling: dict[str, float] = {}
        self.routing: dict[str, RoutingUnit] = {}
        self.rules: dict[str, Rule] = {}
        self.merge_weights: dict[str, Tensor] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        linear = self.get_base_layer()
        self.in_features, self.out_features = features(linear)
        self.quantization_backend = quantization(linear)

    def update_layer(self, adapter_name: str, config: HydraLoraConfig) -> None:
        """Add an adapter, or replace the one of this name."""
        self.r[adapter_name], self.experts[adapter_name] = config.r, config.lora_nums
        self.scaling[adapter_name] = self.trained_scaling[adapter_name] = config.scaling
        self.routing[adapter_name] = RoutingUnit(config.routing)
        self.rules[adapter_name] = rule_of(config)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        for parts in (self.lora_router, self.lora_tasks):
            if adapter_name in parts:
                del parts[adapter_name]
        frozen = ("lora_A", "lora_B") if config.frozen_experts else ()
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: frozen}
        # Drawn in the original's order.
        self.lora_A[adapter_name] = SharedA(self.in_features, config.r, config.init_lora_weights == "gaussian")
        even = config.init == Initialization.CENTERED
        if config.lora_nums > 1 and config.tasks:
            self.lora_tasks[adapter_name] = TaskTable(len(config.tasks), config.lora_nums, even)
        elif config.lora_nums > 1:
            self.lora_router[adapter_name] = Router(self.in_features, config.lora_nums, even)
        self.lora_B[adapter_name] = Experts(
            config.r,
            self.out_features,
            config.lora_nums,
            config.starts_as_identity,
            Initialization(config.init),
            HeadDropout(config.head_dropout, config.expert_dropout, config.head_dropout_start),
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and in the last layer that has it its losses on the routing."""
        super().delete_adapter(adapter_name)
        if self.auxiliary is not None:
            self.auxiliary.left(adapter_name)

    def reset_parameters(self, adapter_name: str, identity: bool = True) -> None:
        """Draw A and the router in +-1/sqrt(in_features), as the original; B is 0, or drawn if not identity."""
        self.lora_B[adapter_name].identity = identity
        for parts in (self.lora_A, self.lora_router, self.lora_tasks, self.lora_B):
            if adapter_name in parts:
                parts[adapter_name].reset_parameters()

    def expert_matrices(self, adapter_name: str) -> Tensor:
        """The matrices B of an adapter, (E, out_features, r), as a view of its weight."""
        return self.lora_B[adapter_name].matrices

    def added_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """A, B and router of all adapters, by name."""
        for kind in self.adapter_layer_names:
            for name, parameter in getattr(self, kind).named_parameters():
                yield f"{kind}.{name}", parameter

    def trained_matrices(self) -> tuple[list[Tensor], list[Tensor]]:
        """Routers and B of the adapters that are active and train their router."""
        names = [name for name in self.active_adapters if name in self.lora_router]
        names = [name for name in names if self.lora_router[name].weight.requires_grad]
        return [self.lora_router[name].weight for name in names], [self.expert_matrices(name) for name in names]

    def route(self, adapter_name: str, x: Tensor) -> Tensor:
        """Probabilities (..., E) float32 of the experts for each token of `x` (..., in_features)."""
        routers = self.lora_router
        if adapter_name not in routers:
            return torch.ones(*x.shape[:-1], 1, device=x.device)
        probabilities: Tensor = routers[adapter_name](x, self.rules[adapter_name].temperature)
        return probabilities

    def with_losses(self, adapter_name: str, weights: Tensor, probabilities: Tensor) -> Tensor:
        """`weights` of the experts, in training with the losses on the routing attached.

        These are on the router's `probabilities`, or on the weights of whole sequences.
        """
        if self.auxiliary is None or not self.training or adapter_name not in self.lora_router:
            return weights
        if not self.auxiliary.adapters[adapter_name].at_all:  # `attach` would break a compiled graph
            return weights
        trains = self.lora_router[adapter_name].weight.requires_grad or in_forward_mode()
        if not trains:  # another adapter does
            return weights
        of_prompts = self.auxiliary.adapters[adapter_name].of_prompts
        return self.auxiliary.attach(self, adapter_name, weights, weights if of_prompts else probabilities)

    def update(self, adapter_name: str, x: Tensor, rows: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
        """`onto + s * sum_e w_e B_e A x`, (..., out_features): the output of the frozen layer with the adapter's.

        Args:
            adapter_name: the adapter.
            x: (..., in_features), input of the layer.
            rows: see `acting_weights`.
            onto: (..., out_features); None: what the adapter adds, alone.
        """
        if rows is None and onto is not None and not torch.is_grad_enabled():
            added = one_token(self, adapter_name, x, onto)
            if added is not None:
                return added
        shared_a, experts_b = self.lora_A[adapter_name], self.lora_B[adapter_name]
        dtype = shared_a.weight.dtype
        if x.dtype != dtype:
            x = self._cast_input_dtype(x, dtype)
        several = self.experts[adapter_name] > 1
        weights = acting_weights(self, adapter_name, x, rows) if several or self.observers else None
        module = self.lora_dropout[adapter_name]
        code = shared_a(x, module.p if module.training else 0.0)  # (..., r)
        chosen = several and leaves_out(self, adapter_name)
        return experts_b(code, weights if several else None, self.scaling[adapter_name], onto, chosen)


class Linear(nn.Module, HydraLoraLayer):
    """A frozen linear layer of any kind that `bases.py` admits, with HydraLoRA adapters."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: HydraLoraConfig, passes: Passes) -> None:
        super().__init__()
        HydraLoraLayer.__init__(self, base_layer, passes)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the layer for `x` (..., in_features), (..., out_features) in the dtype of the frozen layer's."""
        adapter_names = kwargs.pop("adapter_names", None)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters or (self.merged_adapters and adapter_names is None):
            return result
        if adapter_names is not None:
            return self._mixed_batch(result, x, adapter_names)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        present = self.lora_A
        for name in self.active_adapters:
            if name in present:
                result = self.update(name, x, onto=result)
        return result

    def _mixed_batch(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Every row of the batch with the adapter of its own; `__base__` and adapters of other layers add nothing."""
        if self.merged:
            raise ValueError("adapter_names cannot be used while an adapter is merged; call unmerge_adapter() first")
        if len(adapter_names) != len(x):
            raise ValueError(f"{len(adapter_names)} adapter names for {len(x)} rows; give one per row")
        result = result.clone()
        for name in dict.fromkeys(adapter_names):
            if name != BASE and name in self.lora_A:
                chosen = [index for index, given in enumerate(adapter_names) if given == name]
                rows = torch.tensor(chosen, device=x.device)
                result[rows] += self.update(name, x[rows], rows).to(result.dtype)
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True for one expert, whose update is one matrix; `hydralora.save_as_lora` takes weights for several."""
        return self.experts.get(adapter_name, 1) == 1

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Change of the weight, in its shape, for fixed weights of the experts.

        Raises:
            ValueError: the weights are not fixed: there are several experts, and `merge` of the model fixed none.
        """
        weights = self.merge_weights.get(adapter)
        if weights is None:
            if self.experts[adapter] > 1:
                raise ValueError(f"adapter '{adapter}' weights {self.experts[adapter]} experts for each input")
            weights = torch.ones(1)
        experts_b = self.expert_matrices(adapter)
        mixed_b = torch.einsum("e,eor->or", weights.to(experts_b), experts_b)  # (out_features, r)
        delta = self.scaling[adapter] * (mixed_b @ self.lora_A[adapter].weight)  # (out_features, in_features)
        return in_stored_form(self.get_base_layer(), delta)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the frozen weight; see `HydraLoraModel.merge` for several experts.

        Raises:
            ValueError: an adapter weights its experts by the input, or (`safe_merge`) the result is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                delta = self.get_delta_weight(name)
                weight = self.get_base_weight()
                merged = weight + delta.to(device=weight.device, dtype=weight.dtype)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(f"merging adapter '{name}' gives numbers that are not finite; it seems broken")
                self.set_base_weight(merged)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged adapters out of the frozen weight again, up to rounding."""
        if not self.merged:
            warnings.warn("nothing is merged", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight = self.get_base_weight()
            delta = self.get_delta_weight(name)
            self.set_base_weight(weight - delta.to(device=weight.device, dtype=weight.dtype))
            self.merge_weights.pop(name, None)

    def __repr__(self) -> str:
        return "hydralora." + super().__repr__()
