"""`--peft_config FILE.json`: an adapter of any method of PEFT that adapts layers, on the decoder.

What the file leaves out has PEFT's default; without `target_modules` every linear layer of the decoder is adapted.
The layers are stored as one pattern over the decoder's layers, so that the tower's layers of the same names stay as
they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from llava.errors import FlagError
from llava.extension import installed_extensions
from llava.model.components import Component, components
from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.train.lora import decoder_linears

FLAG = "--peft_config"

UNSUPPORTED = {
    "ADALORA": "changes its ranks after every update, for which nothing calls it here",
    "POLY": "needs the number of a task with every row",
    "SHADOW": "runs a second decoder next to the base",
    "TRAINABLE_TOKENS": "adapts the embedding, not the decoder's layers",
    "XLORA": "mixes adapters that exist already",
}
"""Methods of PEFT that adapt layers and that cannot be trained here, with the reason."""

OF_THE_RUN = ("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping")
"""Keys that an `adapter_config.json` has and that the run sets itself."""

NOT_OF_THE_DECODER = {
    "modules_to_save": "the projector is trained by this program's own flags, other modules are not",
    "trainable_token_indices": "rows of the embedding are trained by --mm_use_im_start_end alone",
    "layer_replication": "the decoder keeps its layers",
    "alora_invocation_tokens": "adapters that switch on at a token are not supported",
    "arrow_config": "mixes adapters that exist already",
    "megatron_config": "the decoder is not Megatron's",
    "target_parameters": "layers are named by target_modules",
}
"""Keys whose value must be empty, with the reason."""

INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "pissa", "olora")
"""Values of `init_lora_weights` that give the same start when the adapter is loaded as when it was trained."""


def read_file(path: str) -> dict[str, Any]:
    """The content of the file, checked as far as that needs no model.

    Raises:
        FlagError: it cannot be read, or asks for what cannot be trained here.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FlagError(f"{FLAG} {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not isinstance(values, dict):
        raise FlagError(f"{FLAG} {path}: is not a JSON object with the settings of an adapter")
    problem = _problem(values)
    if problem is not None:
        raise FlagError(f"{FLAG} {path}: {problem}")
    return values


def file_problems(path: str | None, given: Collection[str], lora: bool) -> list[str]:
    """What is wrong with the option, one line each.

    Args:
        path: its value.
        given: names of the options that were written down.
        lora: LoRA is on, by its own flag or that of an extension.
    """
    if path is None:
        return []
    flags = sorted(f"--{name}" for name in given if name.startswith("lora_") and name != "lora_enable")
    problems = []
    if lora or flags:
        flags = (["--lora_enable, or --use_lora"] if lora else []) + flags
        problems.append(f"{FLAG} {path} and {', '.join(flags)}: the file describes the whole adapter; give one of them")
    try:
        read_file(path)
    except FlagError as error:
        problems.append(str(error))
    return problems


def _methods() -> list[str]:
    """Names of the methods that adapt layers, those of installed packages included."""
    installed_extensions()
    return sorted(
        kind.value
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if issubclass(tuner, BaseTuner) and kind.value not in UNSUPPORTED
    )


def _problem(values: Mapping[str, Any]) -> str | None:
    method = values.get("peft_type")
    known = _methods()
    if method in UNSUPPORTED:
        return f"{method} {UNSUPPORTED[method]}"
    if method not in known:
        return f"peft_type {method!r}: known methods that adapt layers are {', '.join(known)}"
    names = {item.name for item in fields(PEFT_TYPE_TO_CONFIG_MAPPING[method])}
    unknown = sorted(set(values) - names)
    if unknown:
        return f"{method} has no {unknown}; it has {sorted(names - set(OF_THE_RUN))}"
    for name, reason in NOT_OF_THE_DECODER.items():
        if values.get(name):
            return f"{name}: {reason}; leave it out"
    if values.get("bias", "none") not in ("none", False):
        return f"bias {values['bias']!r}: biases of the decoder are not trained; only 'none' is possible"
    if "init_lora_weights" in values and values["init_lora_weights"] not in INITIALIZATIONS:
        return (
            f"init_lora_weights {values['init_lora_weights']!r}: needs data, or draws numbers that loading the adapter "
            f"would draw again; possible are {[each for each in INITIALIZATIONS if each is not None]}"
        )
    return None


def add_adapter(model: LlavaForCausalLM, path: str) -> PeftModel:
    """Put the adapter that a file describes onto the decoder.

    Args:
        model: bare model, extensions attached.
        path: of the file.

    Raises:
        FlagError: the settings contradict each other or the decoder, or the method keeps what it trains elsewhere.
    """
    values = read_file(path)
    method = values["peft_type"]
    settings = {name: value for name, value in values.items() if name not in OF_THE_RUN}
    settings["target_modules"] = _pattern(model, settings, path)
    for name in ("layers_to_transform", "layers_pattern"):  # in the pattern already
        settings.pop(name, None)
    try:
        config: PeftConfig = PEFT_TYPE_TO_CONFIG_MAPPING[method](**settings, task_type="CAUSAL_LM")
        host = get_peft_model(model, config)
    except (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise FlagError(f"{FLAG} {path}: {method} cannot be put onto this decoder ({lines[0]})") from error
    _check_kept(host, method, path)
    return host


def _pattern(model: LlavaForCausalLM, settings: Mapping[str, Any], path: str) -> str:
    """A pattern of the full names of the adapted modules, all of them in the decoder's layers.

    Raises:
        FlagError: a target does not exist there.
    """
    targets = settings.get("target_modules")
    added = {id(weight) for weight in model.extensions.named_parameters(model).values()}
    available = {
        name: f"model.layers.{name}"
        for name, module in model.get_model().layers.named_modules()
        if name and not any(id(weight) in added for weight in module.parameters())
    }
    if isinstance(targets, str) and targets != "all-linear":
        matched = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
        elsewhere = sorted(set(matched) - set(available.values()))
        if not matched or elsewhere:
            raise FlagError(
                f"{FLAG} {path}: the pattern {targets!r} matches {elsewhere[:3] or 'nothing'}; it has to match full "
                "names in the decoder's layers alone, as model.layers.0.self_attn.q_proj"
            )
        return targets
    linears = {name.removeprefix("model.layers.") for name in decoder_linears(model)}
    wanted = None if targets in (None, "all-linear") else list(targets or [])
    chosen: set[str] = set()
    for name in available:
        layer, _, inside = name.partition(".")
        layers = settings.get("layers_to_transform")
        if layers is not None and int(layer) not in ([layers] if isinstance(layers, int) else layers):
            continue
        if (wanted is None and name in linears) or (wanted and any(_ends(name, each) for each in wanted)):
            chosen.add(name)
    unknown = [each for each in wanted or () if not any(_ends(name, each) for name in chosen)]
    if unknown or not chosen:
        last = sorted({name.rpartition(".")[2] for name in linears})
        raise FlagError(f"{FLAG} {path}: target_modules {unknown or '(none)'}: the decoder's linear layers are {last}")
    numbers = sorted({name.partition(".")[0] for name in chosen}, key=int)
    inside = sorted({name.partition(".")[2] for name in chosen})
    layers = r"\d+" if len(numbers) == len(model.get_model().layers) else f"({'|'.join(numbers)})"
    return rf"model\.layers\.{layers}\.({'|'.join(map(re.escape, inside))})"


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check_kept(host: PeftModel, method: str, path: str) -> None:
    """Refuse a method whose weights a checkpoint would lose.

    Raises:
        FlagError: it trains something outside of its layers, or what it saves are not floating-point numbers.
    """
    adapter = {id(weight) for weight in components(host)[Component.ADAPTER].values()}
    lost = [name for name, weight in host.named_parameters() if weight.requires_grad and id(weight) not in adapter]
    saved = get_peft_model_state_dict(host, save_embedding_layers=False)
    strange = [name for name, tensor in saved.items() if not tensor.is_floating_point()]
    if lost or strange:
        raise FlagError(f"{FLAG} {path}: {method} keeps {(lost + strange)[:3]}, which checkpoints here do not store")
