"""HydraLoRA: low-rank experts with one shared A, several B and a router (NeurIPS 2024, arXiv 2404.19245).

`tuner/` is HydraLoRA as a method of PEFT, for any linear layer; importing this package registers it, and needs torch,
transformers and PEFT alone. The rest is its LLaVA variant, routed blocks in place of the decoder's MLPs and HydraLoRA
on attention layers: `layer.py` holds the mathematics, `config.py` what can be varied, `block.py` and `gated.py` the
routed MLP, `model.py` and `linears.py` how blocks and updates enter a model, `flags.py` and `extension.py` how they
plug into llava, `convert.py`, `original.py` and `moe_args.py` published checkpoints in and out, `patch.py` the way into
a model of upstream's class.

With a PEFT older than 0.21, as upstream's LLaVA has it, the method of PEFT is absent and the rest works.
"""

import logging
from importlib import metadata

from hydralora.block import RoutedMLP
from hydralora.callback import RoutingCallback
from hydralora.config import RoutedMLPConfig
from hydralora.layer import Routing, expert_balance_loss
from hydralora.model import added_parameters, attach, record_routing, routed_blocks
from hydralora.patch import LlavaPatch, patch_llava

__all__ = [
    "HydraLoraConfig",
    "HydraLoraLayer",
    "HydraLoraModel",
    "LlavaPatch",
    "RoutedMLP",
    "RoutedMLPConfig",
    "Routing",
    "RoutingCallback",
    "ablate_experts",
    "added_parameters",
    "attach",
    "expert_balance_loss",
    "forced_routing",
    "from_loras",
    "parameter_groups",
    "patch_llava",
    "record_routing",
    "rescale",
    "routed_blocks",
    "save_as_lora",
    "save_clusters_as_lora",
    "save_tasks_as_lora",
    "set_gradient_scale",
    "set_step",
]


def _old_peft() -> str:
    """Version of a PEFT that `tuner/` does not support, or that there is none; empty if it does."""
    try:
        installed = metadata.version("peft")
    except metadata.PackageNotFoundError:
        return "none is installed"
    return f"installed is {installed}" if tuple(map(int, installed.split(".")[:2])) < (0, 21) else ""


# PEFT imports bitsandbytes, which says on CPUs with AVX512-BF16 that an optional kernel of quantised models is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")
)

if not _old_peft():
    from hydralora.tuner import (
        HydraLoraConfig,
        HydraLoraLayer,
        HydraLoraModel,
        ablate_experts,
        forced_routing,
        from_loras,
        parameter_groups,
        rescale,
        save_as_lora,
        save_clusters_as_lora,
        save_tasks_as_lora,
        set_gradient_scale,
        set_step,
    )


def __getattr__(name: str) -> object:
    if name in __all__:  # found above, unless PEFT is too old
        raise ImportError(f"hydralora.{name} is a method of PEFT >= 0.21; {_old_peft()}")
    raise AttributeError(f"module 'hydralora' has no attribute '{name}'")
