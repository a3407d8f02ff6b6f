"""`moe_args.pth` of MLLM-HydraLoRA: the original's whole `TrainingArguments` object, as a pickle in a zip archive.

It is the only file of such a checkpoint that tells how the blocks are wired. It is read here without running any code
of it: classes and functions are replaced by inert stand-ins, so it needs neither the packages that it names
(transformers, accelerate, deepspeed) nor their versions.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydralora.config import HydraLoraOptions, RoutedMLPConfig

ARGUMENTS_FILE = "moe_args.pth"

_MAX_PICKLE_BYTES = 16 * 2**20  # the files seen hold 4 KB; a zip archive can claim any size
_TRAINING_ARGUMENTS = "llava.train.train", "TrainingArguments"
_ORIGINAL_DROPOUT = 0.05  # fixed in the original's code; its --lora_dropout reaches the attention LoRA alone


class StandIn:
    """Takes the place of every class and function that a pickle names; it only keeps what it is given."""

    reference = ""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    contents: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        """Keep the arguments of a call or construction."""
        self = super().__new__(cls)
        self.args, self.kwargs, self.state, self.contents = args, kwargs, None, []
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `__new__` kept the arguments, and unpickling does not always come here."""

    def __setstate__(self, state: Any) -> None:
        """Keep the state instead of applying it."""
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep an item of what was a dict."""
        self.contents.append((key, value))

    def append(self, value: Any) -> None:
        """Keep an element of what was a list."""
        self.contents.append(value)


class _InertUnpickler(pickle.Unpickler):
    """Unpickler that knows no class and no function: whatever it meets becomes a `StandIn`."""

    def find_class(self, module: str, name: str) -> type[StandIn]:
        return type("StandIn", (StandIn,), {"reference": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> StandIn:
        return StandIn(pid)


def read_training_arguments(path: Path) -> dict[str, Any]:
    """Attributes of the `TrainingArguments` object in a file that `torch.save` wrote, without running pickled code.

    Numbers, strings, booleans, None, lists and dicts come as they are; objects (enums, devices, plug-ins) as `StandIn`.

    Raises:
        ValueError: the file is no zip archive of `torch.save`, or holds something else.
    """
    content = io.BytesIO(_pickle_in_archive(path))
    try:
        found = _InertUnpickler(content).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: cannot be unpickled ({type(error).__name__}: {error})") from error
    state = getattr(found, "state", None)
    if not isinstance(state, dict) or not str(getattr(found, "reference", "")).endswith(".TrainingArguments"):
        raise ValueError(f"{path}: holds {getattr(found, 'reference', type(found).__name__)}, not TrainingArguments")
    return state


def _pickle_in_archive(path: Path) -> bytes:
    """The pickle inside a zip archive that `torch.save` wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{path}: {len(pickles)} entries 'data.pkl', expected 1: not a file of torch.save")
            if pickles[0].file_size > _MAX_PICKLE_BYTES:
                raise ValueError(
                    f"{path}: pickle of {pickles[0].file_size} bytes, expected at most {_MAX_PICKLE_BYTES}"
                )
            return archive.read(pickles[0])
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: no zip archive of torch.save ({error})") from error


def config_from_arguments(arguments: Mapping[str, Any], path: Path) -> RoutedMLPConfig:
    """Configuration of the blocks from the attributes in `moe_args.pth` (`path` is for messages).

    Raises:
        ValueError: an attribute is missing or of the wrong type.
    """
    names = {
        "experts": "llm_moe_num_experts",
        "rank": "lora_rank",
        "alpha": "lora_alpha",
        "dense": "dense_moe",
        "balance_weight": "moe_balance_w",
    }
    missing = sorted(original for original in names.values() if original not in arguments)
    if missing:
        raise ValueError(
            f"{path}: the saved TrainingArguments lack {missing}: not written by MLLM-HydraLoRA's train.py"
        )
    try:
        return RoutedMLPConfig(dropout=_ORIGINAL_DROPOUT, **{ours: arguments[theirs] for ours, theirs in names.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def arguments_of_config(config: RoutedMLPConfig, adapter_config: Path, module_names: Iterable[str]) -> dict[str, Any]:
    """The inverse of `config_from_arguments`: attributes that the original's loader reads, and its other LoRA flags.

    Args:
        config: of the blocks.
        adapter_config: `adapter_config.json` of the attention LoRA; need not exist.
        module_names: names of all modules of the model, to resolve a target given as a pattern.

    Raises:
        ValueError: the attention LoRA has another rank or alpha than the experts; the original has one for both.
    """
    attention: dict[str, Any] = {}
    if adapter_config.is_file():
        attention = json.loads(adapter_config.read_text(encoding="utf-8"))
        differing = [
            f"{name} {attention[name]} and {ours}"
            for name, ours in (("r", config.rank), ("lora_alpha", config.alpha))
            if attention[name] != ours
        ]
        if differing:
            raise ValueError(
                f"{adapter_config}: attention and experts differ ({', '.join(differing)}), and the original stores one "
                "value for both"
            )
    targets = attention.get("target_modules", HydraLoraOptions().lora_modules.split(","))
    if isinstance(targets, str):  # PEFT takes a list of last names or one pattern over full names
        targets = {name.rpartition(".")[2] for name in module_names if re.fullmatch(targets, name)}
    return {
        "use_lora": True,
        "lora_rank": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": attention.get("lora_dropout", config.dropout),
        "lora_bias": attention.get("bias", "none"),
        "lora_modules": ",".join(sorted(targets)),
        "llm_moe": True,
        "dense_moe": config.dense,
        "llm_moe_num_experts": config.experts,
        "moe_balance_w": config.balance_weight,
        "vit_trainable": "",
    }


def write_training_arguments(path: Path, attributes: Mapping[str, Any]) -> None:
    """Write `moe_args.pth` as the original's loader expects it: a `TrainingArguments` of its `llava.train.train`.

    The pickle is put together by hand, since pickling such an object would need the original's class. It names that
    class, sets its `__dict__` and nothing else.

    Args:
        path: file to write.
        attributes: plain JSON values.
    """
    fields = pickle.dumps(dict(attributes), protocol=2)[2:-1]  # without the protocol in front and the stop behind
    module, name = _TRAINING_ARGUMENTS
    content = b"".join(
        [
            pickle.PROTO + bytes([2]),
            pickle.GLOBAL + f"{module}\n{name}\n".encode(),
            pickle.EMPTY_TUPLE + pickle.NEWOBJ,  # cls.__new__(cls): __init__ is not run
            fields + pickle.BUILD,  # __dict__.update(fields)
            pickle.STOP,
        ]
    )
    folder = path.stem  # torch.load wants all entries in one folder
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{folder}/data.pkl", content)
        archive.writestr(f"{folder}/byteorder", "little")
        archive.writestr(f"{folder}/version", "3\n")
