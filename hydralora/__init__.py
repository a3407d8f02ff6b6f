"""HydraLoRA: low-rank experts with one shared A, several B and a router (NeurIPS 2024, arXiv 2404.19245).

`tuner/` is HydraLoRA as a method of PEFT, for any linear layer; importing this package registers it, and needs torch,
transformers and PEFT alone. The rest is its LLaVA variant, routed blocks in place of the decoder's MLPs and HydraLoRA
on attention layers: `layer.py` holds the mathematics, `config.py` what can be varied, `block.py` and `gated.py` the
routed MLP, `model.py` and `linears.py` how blocks and updates enter a model, `flags.py` and `extension.py` how they
plug into llava, `convert.py`, `original.py` and `moe_args.py` published checkpoints in and out, `patch.py` the way into
a model of upstream's class.

With a PEFT older than 0.21, as upstream's LLaVA has it, the method of PEFT is absent and the rest works. A program of
this package (`python -m hydralora.NAME`) imports the names below when they are first used, and answers `--help` before.
"""

import importlib
import logging
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

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

MODULES = {
    "RoutedMLP": "hydralora.block",
    "RoutingCallback": "hydralora.callback",
    "RoutedMLPConfig": "hydralora.config",
    "Routing": "hydralora.layer",
    "expert_balance_loss": "hydralora.layer",
    "added_parameters": "hydralora.model",
    "attach": "hydralora.model",
    "record_routing": "hydralora.model",
    "routed_blocks": "hydralora.model",
    "LlavaPatch": "hydralora.patch",
    "patch_llava": "hydralora.patch",
}
"""Where each name of the LLaVA variant is defined; the others of `__all__` are the method of PEFT, in `tuner/`."""

_located = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)].removeprefix("-m") if sys.argv[:1] == ["-m"] else ""

PROGRAM = _located.partition(".")[0] == "hydralora"
"""Whether Python is locating a program of this package (`python -m hydralora.NAME`), the first to import it."""


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

if TYPE_CHECKING or not PROGRAM:
    from hydralora.block import RoutedMLP
    from hydralora.callback import RoutingCallback
    from hydralora.config import RoutedMLPConfig
    from hydralora.layer import Routing, expert_balance_loss
    from hydralora.model import added_parameters, attach, record_routing, routed_blocks
    from hydralora.patch import LlavaPatch, patch_llava

if TYPE_CHECKING or not (PROGRAM or _old_peft()):
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


def __getattr__(name: str) -> Any:
    """A public name that is not there yet: of a program, or of a method that PEFT is too old for."""
    if name not in __all__:
        raise AttributeError(f"module 'hydralora' has no attribute '{name}'")
    if name not in MODULES and _old_peft():
        raise ImportError(f"hydralora.{name} is a method of PEFT >= 0.21; {_old_peft()}")
    return getattr(importlib.import_module(MODULES.get(name, "hydralora.tuner")), name)


def __dir__() -> list[str]:
    """What the module has, names that are not there yet included."""
    return sorted({*globals(), *__all__})
