"""The model: tower, projector, decoder, checkpoints (upstream `llava/model`).

Importing it makes its classes known to transformers' Auto classes. A program of this package
(`python -m llava.model.NAME`) imports them when they are first used, and answers `--help` before.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

__all__ = [
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "LlavaQwen2Config",
    "LlavaQwen2ForCausalLM",
    "LlavaQwen3Config",
    "LlavaQwen3ForCausalLM",
]

# What stands behind -m, while Python locates it.
_located = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)].removeprefix("-m") if sys.argv[:1] == ["-m"] else ""

if TYPE_CHECKING or not f"{_located}.".startswith("llava.model."):
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
    from llava.model.language_model.llava_qwen2 import LlavaQwen2Config, LlavaQwen2ForCausalLM
    from llava.model.language_model.llava_qwen3 import LlavaQwen3Config, LlavaQwen3ForCausalLM

MODULES = ("llava_llama", "llava_mistral", "llava_qwen2", "llava_qwen3")


def __getattr__(name: str) -> Any:
    """A public name, in a program of this package; all classes are made known together."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = [importlib.import_module(f"llava.model.language_model.{module}") for module in MODULES]
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def __dir__() -> list[str]:
    """What the module has, names that are not there yet included."""
    return sorted({*globals(), *__all__})
