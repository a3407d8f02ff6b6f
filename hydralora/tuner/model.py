"""How HydraLoRA enters any model through PEFT: injection, batches of several adapters, and what merging may do."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, _freeze_adapter
from torch import Tensor, nn

from hydralora.log import give_to_trainers
from hydralora.split import refuse_split
from hydralora.tuner import combining, merging
from hydralora.tuner.balance.auxiliary import AuxiliaryLosses
from hydralora.tuner.balance.terms import AdapterTerms
from hydralora.tuner.balance.trainer import AdapterCallback
from hydralora.tuner.bases import refusal, refuse_merging
from hydralora.tuner.calls.rows import adapters_by_row
from hydralora.tuner.config import HydraLoraConfig, RoutingUnit
from hydralora.tuner.linear import BASE, HydraLoraLayer, Linear
from hydralora.tuner.passes import Passes
from hydralora.tuner.registration import PREFIX
from hydralora.tuner.routing.calls import asked_routing
from hydralora.tuner.routing.rule import check_patterns
from hydralora.tuner.stored import from_earlier, without_lone_routers
from hydralora.tuner.trained_tokens import refuse_other_tying
from hydralora.tuner.versions import warn_of_untested


def hydralora_layers(model: nn.Module) -> dict[str, HydraLoraLayer]:
    """The adapted layers of a model by name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HydraLoraLayer)}


def passes_of(model: nn.Module) -> Passes:
    """The passes of a model, which its layers share even where each adapter was injected by itself."""
    return next((layer.passes for layer in hydralora_layers(model).values()), None) or Passes()


class HydraLoraModel(BaseTuner):
    """A model whose linear layers carry HydraLoRA adapters; made by `peft.get_peft_model(model, HydraLoraConfig())`."""

    prefix = PREFIX
    tuner_layer_cls = HydraLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # what is added to LoRA's holds here too

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        """PEFT's check for LoRA: fused kernels of Mamba read the weights of some layers and never call them."""
        super()._check_target_module_compatiblity(LoraConfig(), model, target_name)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, for the first adapter of a model and for every other; arguments and errors as of PEFT's."""
        config = self.peft_config[adapter_name]
        warn_of_untested()
        config.check()  # its values may have been set after it was made
        refuse_split(
            (weight for weight in model.parameters() if hasattr(weight, "full_tensor")),  # not those of ZeRO-3
            f"adapter '{adapter_name}' cannot be added",
            "Its own weights would be whole, and train apart in each process. Add adapters first, then split the model",
        )
        check_patterns(config, model)
        refuse_other_tying(model, adapter_name, config.trainable_token_indices)
        if "hydralora_passes" not in self.__dict__:
            self.hydralora_passes = passes_of(model)
            layers = hydralora_layers(model).values()  # of adapters that were each injected by itself
            self.hydralora_losses = next((layer.auxiliary for layer in layers if layer.auxiliary), AuxiliaryLosses())
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.hydralora_losses.forget(adapter_name)  # of an adapter of this name that is replaced
        self.hydralora_passes.guard(model)
        self.hydralora_losses.adapters[adapter_name] = AdapterTerms(config)
        self._warn_of_absent_layers(model, config, adapter_name)
        if RoutingUnit(config.routing) is RoutingUnit.SEQUENCE:
            self.hydralora_passes.watch(model)
        self.attach_losses()

    def attach_losses(self) -> None:
        """Let the losses on the routing act that the configurations of the adapters ask for, such as `balance_weight`.

        Called with every new adapter; call it after such a weight was set in the configuration of an existing one.
        """
        adapters = self.hydralora_losses.adapters.values()
        for idle in (terms.idle for terms in adapters if not terms.config.inference_mode):
            if idle is not None:
                warnings.warn(idle, stacklevel=2)
        if any(terms.at_all or terms.config.head_dropout_start for terms in adapters):
            give_to_trainers(AdapterCallback)
        if any(terms.at_all for terms in adapters):
            self.hydralora_losses.watch(self.model, hydralora_layers(self.model))
        else:
            self.hydralora_losses.unwatch(self.model)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and whatever followed the forward passes for it; errors as of PEFT's."""
        super().delete_adapter(adapter_name)
        self.attach_losses()
        units = {unit for layer in hydralora_layers(self.model).values() for unit in layer.routing.values()}
        if RoutingUnit.SEQUENCE not in units:
            self.hydralora_passes.unwatch(self.model)
            if units:
                self.hydralora_passes.guard(self.model)

    def _warn_of_absent_layers(self, model: nn.Module, config: HydraLoraConfig, adapter_name: str) -> None:
        """Name numbers in `layers_to_transform` by which no layer was adapted."""
        chosen = config.layers_to_transform
        wanted = {chosen} if isinstance(chosen, int) else set(chosen or ())
        names = [name for name, layer in hydralora_layers(model).items() if adapter_name in layer.lora_A]
        absent = [
            number
            for number in sorted(wanted)
            if not any(
                check_target_module_exists(dataclasses.replace(config, layers_to_transform=number), name)
                for name in names
            )
        ]
        if absent:
            warnings.warn(f"layers_to_transform {absent}: no layer of this number was adapted", stacklevel=2)

    def _create_and_replace(
        self,
        peft_config: HydraLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        layer_config = peft_config.for_layer(current_key)
        if isinstance(target, HydraLoraLayer):
            target.update_layer(adapter_name, layer_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        reason = refusal(base, parent)
        if reason is not None:
            raise ValueError(f"target module '{current_key}' {reason}.")
        new = Linear(target, adapter_name, layer_config, self.hydralora_passes)
        new.auxiliary = self.hydralora_losses
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As of PEFT; a module that is unloaded is whole, and the weight that wraps it may be computed (tokens)."""
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's names in the model of a file's tensors, those of earlier versions included."""
        today = without_lone_routers(from_earlier(state_dict))
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, today)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around a forward pass or a generation: note its prompt, and hand on what it asks for.

        These are `adapter_names`, one per row of the batch, and `routing_weights`, `expert` or `tasks`
        (`routing/given.py`). Nothing stays behind, even after an error.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            by_row: AbstractContextManager[None] = nullcontext()
        else:
            by_row = adapters_by_row(self.model, self._checked_names(adapter_names), args, kwargs)
        passes = self.hydralora_passes
        asked = asked_routing(self.model, passes, adapter_names or self.active_adapters, args, kwargs)
        with passes.one_call(), asked, by_row:
            yield

    def _checked_names(self, adapter_names: Sequence[str]) -> list[str]:
        if self.training:
            raise ValueError("adapter_names is for inference; call model.eval() first")
        known = {name for layer in hydralora_layers(self.model).values() for name in layer.lora_A}
        unknown = sorted(set(adapter_names) - known - {BASE})
        if unknown:
            raise ValueError(f"there is no adapter {unknown}; known: {sorted(known)}, and '{BASE}' for none")
        if len(known) > 1 or BASE in adapter_names:
            trained = {name: bias for name in known if (bias := self.peft_config[name].bias) != "none"}
            if trained:
                raise ValueError(
                    f"adapters {trained} (name: bias) have trained biases of the base, which every row of the batch "
                    "would get; run the rows of each adapter in a batch of their own, with set_adapter"
                )
        return list(adapter_names)

    def _refuse_routed(self, adapter_names: Sequence[str] | None) -> None:
        """Stop before any weight is touched if one of the adapters cannot be merged exactly.

        Raises:
            ValueError: says why, and what can be done.
        """
        names = list(adapter_names) if adapter_names else self.active_adapters
        refuse_merging(self.model, {n: m for n, m in hydralora_layers(self.model).items() if set(names) & set(m.r)})
        routed = {
            name: layer.experts[name]
            for layer in hydralora_layers(self.model).values()
            for name in names
            if layer.experts.get(name, 1) > 1 and name not in layer.merged_adapters
        }
        if routed:
            raise ValueError(
                f"adapters {routed} (name: experts) cannot be merged: the router weights the experts for every "
                "token, so no single weight matrix gives the same outputs. Keep the adapter beside the base, or take "
                "an approximation explicitly: model.merge('uniform' or 'mean-routing', inputs) reports its error."
            )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters of one expert each; see `merge` for others.

        Raises:
            ValueError: an adapter has several experts; no weight has been touched then.
        """
        self._refuse_routed(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = True,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._refuse_routed(adapter_names)
        self.hydralora_passes.unwatch(self.model)
        self.hydralora_losses.unwatch(self.model)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def merge(
        self,
        weights: str,
        inputs: Sequence[Mapping[str, Tensor]],
        adapter_name: str | None = None,
    ) -> merging.MergeReport:
        """Merge an adapter approximately, with the same weights of the experts for every input.

        `unmerge_adapter()` undoes it; `unload()` afterwards gives the plain model with the merged weights.

        Args:
            weights: `uniform`, 1/E each; `mean-routing`, the mean of the router over the tokens of `inputs`, layer by
                layer.
            inputs: batches, as keyword arguments of the model, to measure the error on.
            adapter_name: None: the active one. Otherwise it may be inactive, and stays so: only while the error is
                measured is it the active one, with its `modules_to_save`.

        Returns:
            How far the outputs on `inputs` moved from those with this adapter alone.

        Raises:
            ValueError: unknown `weights`, no inputs, no such adapter, something is merged already, adapters are
                disabled, or a layer whose mean routing is wanted does not see the tokens of the inputs.
        """
        return merging.merge(self.model, hydralora_layers(self.model), weights, inputs, self._one_name(adapter_name))

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add an inactive, frozen adapter that computes the weighted sum of the updates of others, exactly.

        Its rank is the sum of their ranks. Where all routers agree, or there are none, it has their number of experts;
        otherwise the product of the numbers, see `combining.py`.

        Args:
            adapters: names.
            weights: a number for each.
            adapter_name: of the new adapter.
            combination_type: `cat`, the exact one of LoRA.

        Raises:
            TypeError: a weight is not a number.
            ValueError: `adapter_name` exists, an adapter does not, there is not one finite weight for each, another
                combination is wanted, or the sum would not be exact: adapters with modules to save or biases, merged
                ones, ones that route by different rules, or have different numbers of experts in their layers.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"there already is an adapter '{adapter_name}'; choose another name")
        layers = hydralora_layers(self.model)
        configs: Any = self.peft_config
        total = combining.combination(layers, configs, adapters, weights, combination_type)
        self.peft_config[adapter_name] = total.config
        self.inject_adapter(self.model, adapter_name)
        _freeze_adapter(self.model, adapter_name)
        for name, summands in total.summands.items():
            combining.fill(layers[name], adapter_name, combining.joined(summands, total.common))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True for an adapter of one expert; `hydralora.save_as_lora` takes weights for several."""
        return all(layer.supports_lora_conversion(adapter_name) for layer in hydralora_layers(self.model).values())

    def _one_name(self, adapter_name: str | None) -> str:
        names = self.active_adapters if adapter_name is None else [adapter_name]
        if len(names) != 1:
            raise ValueError(f"{len(names)} adapters are active ({names}); name the one to merge by adapter_name")
        return names[0]
