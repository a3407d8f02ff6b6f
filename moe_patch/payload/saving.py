"""Checkpoints of a run: each `checkpoint-N` gets what PEFT leaves out, and a resumed run reads it back.

Upstream writes projector and other new parameters at the end of the run only, so its `checkpoint-N` can neither be
evaluated nor resumed when an extension is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from moe_patch.payload.extension import Extension, State
from moe_patch.payload.folders import NON_LORA_FILE, read_bin

Collect = Callable[[Any], State]


def bare_model(model: Any) -> Any:
    """The model without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def saved_state(extensions: Sequence[Extension], model: Any, state: State) -> State:
    """The tensors of `non_lora_trainables.bin` under the names of the original layouts."""
    for extension in extensions:
        state = extension.to_saved(bare_model(model), state)
    return state


class CompleteCheckpoints(TrainerCallback):
    """Writes what is trained beside LoRA into every `checkpoint-N`, and reads it when the run goes on from there.

    Args:
        extensions: that the checkout carries.
        collect: upstream's `get_peft_state_non_lora_maybe_zero_3`, which gathers split parameters.
    """

    def __init__(self, extensions: Sequence[Extension], collect: Collect) -> None:
        self._extensions, self._collect = extensions, collect

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by every process after the Trainer has written its part."""
        weights = saved_state(self._extensions, model, self._collect(model.named_parameters()))
        if args.should_save:
            folder = _folder(args, state)
            torch.save(weights, folder / NON_LORA_FILE)
            bare_model(model).config.save_pretrained(folder)
            for extension in self._extensions:
                extension.write_settings(bare_model(model), args, folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Read the checkpoint's part; DeepSpeed has read all parameters by itself."""
        if not state.global_step or args.deepspeed:
            return
        path = _folder(args, state) / NON_LORA_FILE
        if not path.is_file():
            raise ValueError(f"{path}: is missing, so the run cannot go on from there; delete the folder to start anew")
        weights = read_bin(path)
        for extension in self._extensions:
            weights = extension.from_saved(bare_model(model), weights)
        copy_tensors(model, weights, path)


class NumbersOfExtensions(TrainerCallback):
    """Adds what the extensions have to say to the log line.

    Args:
        extensions: that the checkout carries.
    """

    def __init__(self, extensions: Sequence[Extension]) -> None:
        self._extensions = extensions

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        """Called by every process, before the callbacks that print and after the history was written."""
        if logs is None or "loss" not in logs:
            return
        for extension in self._extensions:
            numbers = extension.metrics(bare_model(model))
            logs.update(numbers)
            state.log_history[-1].update(numbers)


def let_frozen_be_missing(model: Any) -> None:
    """Let a model read a checkpoint without its frozen parameters, which come from the base in every run.

    DeepSpeed leaves them out of the checkpoints of a model with LoRA; transformers 4.37 has it read such a checkpoint
    as if they were there. Any other difference is an error as before.

    Args:
        model: wrapped by PEFT, before DeepSpeed has wrapped it.
    """
    load = model.load_state_dict

    def load_state_dict(state_dict: dict[str, Tensor], strict: bool = True, **options: Any) -> Any:
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        result = load(state_dict, strict=False, **options)
        lost, unknown = sorted(set(result.missing_keys) - frozen), sorted(result.unexpected_keys)
        if strict and (lost or unknown):
            raise ValueError(
                f"the checkpoint does not fit the model: it lacks {len(lost)} trained tensors, first {lost[:3]}, and "
                f"has {len(unknown)} unknown ones, first {unknown[:3]}"
            )
        return result

    model.load_state_dict = load_state_dict


def copy_tensors(model: Any, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy tensors into the parameters of these names.

    Raises:
        ValueError: a name is unknown or a shape differs; nothing was copied then.
    """
    parameters = dict(model.named_parameters())
    wrong = [name for name, t in tensors.items() if name not in parameters or parameters[name].shape != t.shape]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} of {len(tensors)} tensors do not fit the model, first {wrong[:3]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
