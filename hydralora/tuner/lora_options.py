"""Options of PEFT's LoRA that HydraLoRA does not have: who passes one to `HydraLoraConfig` reads why."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

from hydralora.tuner.fields import RefusedValueError

_INITIAL = (
    "it replaces the base's weights or A and B by values of its own. Not carried over to a shared A with several B"
)
_PLAIN = "it is a variant of PEFT's LoRA layer with one B. Use peft.LoraConfig for it"

REFUSED: dict[str, str] = {
    "fan_in_fan_out": "the shape of a stored weight is told by the class of its layer. Leave it out",
    "megatron_config": "it is for the parallel layers of Megatron, whose weights are parts of a matrix. Shard with "
    "FSDP or DeepSpeed instead",
    "megatron_core": "it is for the parallel layers of Megatron. Shard with FSDP or DeepSpeed instead",
    "loftq_config": _INITIAL,
    "eva_config": _INITIAL,
    "corda_config": _INITIAL,
    "lora_ga_config": _INITIAL,
    "use_dora": "it scales each row of the merged weight to a learned length, and with weights of the experts that "
    "follow the token there is no merged weight. Use peft.LoraConfig for it",
    "velora_config": _PLAIN,
    "alora_invocation_tokens": _PLAIN,
    "use_qalora": _PLAIN,
    "qalora_group_size": _PLAIN,
    "monteclora_config": _PLAIN,
    "use_bdlora": _PLAIN,
    "kasa_config": _PLAIN,
    "arrow_config": "it routes among several LoRA adapters by their own directions. HydraLoRA has a router of its own",
    "runtime_config": "its options are those of DoRA and of LoRA on offloaded weights",
    "lora_bias": "a bias of B would be one vector for all experts, outside of what the router weights",
    "target_parameters": "a parameter is changed before its module reads it, once for all tokens, but the experts are "
    "weighted for each token. The experts of a mixture that are kept in one tensor can be adapted by peft.LoraConfig",
    "layer_replication": "it changes the depth of the base. Call peft.tuners.tuners_utils.replicate_layers on the base "
    "before it gets its adapter",
    "ensure_weight_tying": "HydraLoRA adapts no embedding, so two tied layers never have one adapter each. Name tied "
    "embeddings in modules_to_save",
}
"""Why not, and what instead, by the name of the option."""

Config = TypeVar("Config", bound=type)


class RefusedOptionError(RefusedValueError, TypeError):
    """An option that another method of PEFT has; also a TypeError, as of any argument that is not there."""


def explains_refused(config: Config) -> Config:
    """Class decorator for a configuration: its options that are in `REFUSED` are refused with the reason.

    Raises (the decorated class):
        RefusedOptionError: names every such option that was given, whatever its value.
    """
    made = config.__init__  # type: ignore[misc]
    own = {item.name for item in dataclasses.fields(config)}

    @functools.wraps(made)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        refused = [f"{name}: {REFUSED[name]}" for name in kwargs if name in REFUSED and name not in own]
        if refused:
            raise RefusedOptionError(f"{config.__name__} does not have these options of LoRA. {'; '.join(refused)}")
        made(self, *args, **kwargs)

    config.__init__ = checked  # type: ignore[misc]
    return config
