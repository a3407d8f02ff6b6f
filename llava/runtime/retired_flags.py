"""Options of transformers 4 that published scripts use and transformers 5 no longer has.

Each is turned into today's option, dropped with a printed word when it has become meaningless, or refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from llava.errors import FlagError
from llava.runtime import checkpointing

RENAMED = {"evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu", **checkpointing.FLAGS}
"""Same values under another name."""

MEANINGLESS = {
    "overwrite_output_dir": "an output folder with checkpoints is always resumed",
    "half_precision_backend": "PyTorch's own mixed precision is the only one left",
    "fp16_backend": "PyTorch's own mixed precision is the only one left",
    "fp16_opt_level": "it belonged to Apex, which is gone",
    "use_mps_device": "a Mac's GPU is used wherever there is one; --use_cpu True prevents it",
    "jit_mode_eval": "evaluation by TorchScript is gone",
    "use_legacy_prediction_loop": "there is one evaluation loop left",
    "include_inputs_for_metrics": "there is no metric here that would take inputs",
    "past_index": "no model of this project carries a state from batch to batch",
    "no_remove_unused_columns": "columns are never removed here",
    "mp_parameters": "it belonged to SageMaker",
    "ray_scope": "there is no hyper-parameter search here",
    "tpu_num_cores": "TPUs are not supported",
    "tpu_metrics_debug": "TPUs are not supported",
}
"""Dropped, with the reason that is printed."""

REFUSED = {
    "per_gpu_train_batch_size": "use --per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use --per_device_eval_batch_size",
    "fsdp_transformer_layer_cls_to_wrap": "use --fsdp_config",
    "fsdp_min_num_params": "use --fsdp_config",
    "sharded_ddp": "use DeepSpeed ZeRO",
    "use_ipex": "Intel's extension is not supported",
    "torchdynamo": "use --torch_compile",
    "push_to_hub_model_id": "use --hub_model_id",
    "push_to_hub_organization": "use --hub_model_id",
    "push_to_hub_token": "use --hub_token",
}
"""Options whose effect cannot be had under the old name."""


ALL_UPDATES = "0.99999999"
"""As `--warmup_steps`: the share of the updates that is rounded up to all of them."""


def _is_true(value: str | None) -> bool:
    return value is None or value.lower() in ("true", "1", "yes", "y", "t")


def _warmup_ratio(value: str | None) -> list[str]:
    if value is None:
        return []
    try:
        ratio = float(value)
    except ValueError as error:
        raise FlagError(f"--warmup_ratio {value}: is not a number") from error
    if not 0 <= ratio <= 1:
        raise FlagError(f"--warmup_ratio {value}: must be at least 0 and at most 1; --warmup_steps takes updates")
    # transformers 5 reads a number of warm-up steps below 1 as a share of all updates, and 1 as one update.
    return ["--warmup_steps", ALL_UPDATES if ratio == 1 else value] if ratio else []


def _group_by_length(value: str | None) -> list[str]:
    return ["--train_sampling_strategy", "group_by_length"] if _is_true(value) else []


def _save_safetensors(value: str | None) -> list[str]:
    if not _is_true(value):
        raise FlagError("--save_safetensors False: checkpoints are safetensors; export the original layout instead")
    return []


def _logging_dir(value: str | None) -> list[str]:
    # transformers 5 reads the folder of TensorBoard's files from the environment.
    if value is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = value
    return []


def _adafactor(value: str | None) -> list[str]:
    return ["--optim", "adafactor"] if _is_true(value) else []


TRANSLATED: dict[str, Callable[[str | None], list[str]]] = {
    "warmup_ratio": _warmup_ratio,
    "group_by_length": _group_by_length,
    "save_safetensors": _save_safetensors,
    "logging_dir": _logging_dir,
    "adafactor": _adafactor,
}
"""Options whose value changes too."""


def _split(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Options with their values: `--a=1 --b 2 3` gives `("a", ["1"]), ("b", ["2", "3"])`; stray words keep name ""."""
    options: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options.append((name, [value] if equals else []))
        elif options:
            options[-1][1].append(word)
        else:
            options.append(("", [word]))
    return options


def _is_positive(value: str) -> bool:
    """False too for what is not a number, which the parser refuses."""
    try:
        return float(value) > 0
    except ValueError:
        return False


def _joined(flag: str, values: list[str]) -> list[str]:
    """Words of one option; a negative value is joined, as argparse takes `-1e-4` and `-inf` for options otherwise."""
    return [f"{flag}={values[0]}"] if len(values) == 1 and values[0].startswith("-") else [flag, *values]


def translate_retired_flags(argv: list[str]) -> list[str]:
    """`argv` in the options of today's transformers.

    Raises:
        FlagError: an option cannot be carried out any more; the message says what to use.
    """
    options = _split(argv)
    explicit_steps = any(
        name in ("warmup_steps", "warmup-steps") and values and _is_positive(values[0]) for name, values in options
    )
    result: list[str] = []
    for written, values in options:
        name = written.replace("-", "_")  # argparse takes both spellings
        if name in REFUSED:
            raise FlagError(f"--{name} no longer exists: {REFUSED[name]}")
        if name in MEANINGLESS:
            print(f"--{name} is ignored: {MEANINGLESS[name]}")
        elif name == "warmup_ratio" and explicit_steps:
            continue  # as in transformers 4, a number of steps wins over a ratio
        elif name in TRANSLATED:
            result += TRANSLATED[name](values[0] if values else None)
        else:
            result += _joined(f"--{RENAMED.get(name, written)}", values) if written else values
    return result
