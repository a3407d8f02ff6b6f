"""The HydraLoRA layer of the PEFT tuner: a frozen linear layer with one shared A, E matrices B and a router.

HydraLoRA (Tian et al., NeurIPS 2024, arXiv 2404.19245, section 3); `Linear` in `HydraLoRA/peft/tuners/lora.py` of the
original. The mathematics is `low_rank_update` in `hydralora/layer.py`; here it meets PEFT's rules for tuner layers.

Shape letters: B batch, T tokens, r rank, E experts.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from hydralora.layer import RoutedModule, low_rank_update, routing_of
from hydralora.tuner.config import HydraLoraConfig, RoutingUnit
from hydralora.tuner.passes import Passes
from hydralora.tuner.sequence import sequence_weights

BASE = "__base__"
"""PEFT's name, in `adapter_names`, for a row that no adapter changes."""


class HydraLoraLayer(BaseTunerLayer, RoutedModule):
    """What a layer holds for each adapter, by the adapter's name.

    `hydralora_A` (r, in_features), `hydralora_B` (E, out_features, r) and `hydralora_router` (E, in_features) are
    trained. All B of a layer are one parameter, so an adapter loads under any name and one product serves all experts.
    """

    adapter_layer_names = ("hydralora_A", "hydralora_B", "hydralora_router")
    other_param_names = ("r", "experts", "scaling", "routing", "hydralora_dropout", "merge_weights")

    def __init__(self, base_layer: nn.Module, passes: Passes) -> None:
        self.base_layer = base_layer
        self.passes = passes
        self.observers = []
        self.hydralora_A = nn.ParameterDict({})
        self.hydralora_B = nn.ParameterDict({})
        self.hydralora_router = nn.ParameterDict({})
        self.hydralora_dropout = nn.ModuleDict({})
        self.r: dict[str, int] = {}
        self.experts: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.routing: dict[str, RoutingUnit] = {}
        self.merge_weights: dict[str, Tensor] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        linear = self.get_base_layer()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.quantization_backend = resolve_quantization_backend(linear)

    def update_layer(self, adapter_name: str, config: HydraLoraConfig) -> None:
        """Add an adapter, or replace the one of this name."""
        self.r[adapter_name], self.experts[adapter_name] = config.r, config.lora_nums
        self.scaling[adapter_name] = config.lora_alpha / config.r
        self.routing[adapter_name] = RoutingUnit(config.routing)
        self.hydralora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        self.hydralora_A[adapter_name] = nn.Parameter(torch.empty(config.r, self.in_features))
        self.hydralora_B[adapter_name] = nn.Parameter(torch.empty(config.lora_nums, self.out_features, config.r))
        self.hydralora_router[adapter_name] = nn.Parameter(torch.empty(config.lora_nums, self.in_features))
        self.reset_parameters(adapter_name, identity=config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, adapter_name: str, identity: bool = True) -> None:
        """Draw A and the router uniformly in +-1/sqrt(in_features), as the original; B is 0, or drawn if not identity.

        Nothing depends on values, so this is harmless on the meta device.
        """
        nn.init.kaiming_uniform_(self.hydralora_A[adapter_name], a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.hydralora_router[adapter_name], a=math.sqrt(5))
        bound = 0.0 if identity else 1 / math.sqrt(self.r[adapter_name])
        nn.init.uniform_(self.hydralora_B[adapter_name], -bound, bound)

    def route(self, adapter_name: str, x: Tensor) -> Tensor:
        """Probabilities (..., E) float32 of the experts for each token of `x` (..., in_features)."""
        logits = F.linear(x, self.hydralora_router[adapter_name])  # (..., E)
        return torch.softmax(logits, dim=-1, dtype=torch.float32)

    def expert_weights(self, adapter_name: str, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Weights of the experts for `x`, by token or by sequence.

        Args:
            adapter_name: the adapter.
            x: (..., in_features); (B, T, in_features) or (B * T, in_features) for routing by sequence.
            rows: which rows of the batch `x` holds, for routing by sequence in a batch of several adapters.

        Returns:
            (..., E), or (B, 1, E) for routing by sequence of (B, T, in_features).

        Raises:
            ValueError: routing by sequence of an input whose tokens are not those of the batch, or that continues a
                prompt which this adapter has not seen.
        """
        probabilities = self.route(adapter_name, x)  # (..., E)
        if self.observers:
            routing = routing_of(probabilities)
            for observe in self.observers:
                observe(routing)
        if self.routing[adapter_name] is RoutingUnit.TOKEN:
            return probabilities
        return sequence_weights(self.passes.note, (id(self), adapter_name), probabilities, rows)

    def update(self, adapter_name: str, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """`s * sum_e w_e B_e A x`, what the adapter adds to the output of the frozen layer, (..., out_features)."""
        shared_a, experts_b = self.hydralora_A[adapter_name], self.hydralora_B[adapter_name]
        x = self._cast_input_dtype(x, shared_a.dtype)
        weights = self.expert_weights(adapter_name, x, rows)
        module = self.hydralora_dropout[adapter_name]
        dropout = module.p if module.training else 0.0
        return low_rank_update(x, shared_a, experts_b, weights, self.scaling[adapter_name], dropout)


class Linear(nn.Module, HydraLoraLayer):
    """A frozen linear layer, quantised ones included, with HydraLoRA adapters."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: HydraLoraConfig, passes: Passes) -> None:
        super().__init__()
        HydraLoraLayer.__init__(self, base_layer, passes)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the layer for `x` (..., in_features), (..., out_features) in the dtype of the frozen layer's."""
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or (self.merged and adapter_names is None):
            return result
        if adapter_names is not None:
            return self._mixed_batch(result, x, adapter_names)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in self.active_adapters:
            if name in self.hydralora_A:
                result = result + self.update(name, x).to(result.dtype)
        return result

    def _mixed_batch(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Every row of the batch with the adapter of its own; `__base__` and adapters of other layers add nothing."""
        if self.merged:
            raise ValueError("adapter_names cannot be used while an adapter is merged; call unmerge_adapter() first")
        if len(adapter_names) != len(x):
            raise ValueError(f"{len(adapter_names)} adapter names for {len(x)} rows; give one per row")
        result = result.clone()
        for name in dict.fromkeys(adapter_names):
            if name != BASE and name in self.hydralora_A:
                chosen = [index for index, given in enumerate(adapter_names) if given == name]
                rows = torch.tensor(chosen, device=x.device)
                result[rows] += self.update(name, x[rows], rows).to(result.dtype)
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Change of the weight, (out_features, in_features), for fixed weights of the experts.

        Raises:
            ValueError: the weights are not fixed: there are several experts, and `merge` of the model fixed none.
        """
        weights = self.merge_weights.get(adapter)
        if weights is None:
            if self.experts[adapter] > 1:
                raise ValueError(f"adapter '{adapter}' weights {self.experts[adapter]} experts for each input")
            weights = torch.ones(1)
        shared_a, experts_b = self.hydralora_A[adapter], self.hydralora_B[adapter]
        mixed_b = torch.einsum("e,eor->or", weights.to(experts_b), experts_b)  # (out_features, r)
        return self.scaling[adapter] * (mixed_b @ shared_a)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the frozen weight; see `HydraLoraModel.merge` for several experts.

        Raises:
            ValueError: an adapter weights its experts by the input, or (`safe_merge`) the result is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.hydralora_A:
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
