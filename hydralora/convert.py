"""Checkpoints of MLLM-HydraLoRA in and out: `non_lora_trainables.bin` and `moe_args.pth`.

The original stores each expert's B as a tensor of its own and, in `moe_args.pth`, the whole `TrainingArguments` object
as a pickle. That pickle is read here without running any code of it: classes and functions are replaced by
inert stand-ins, so it needs neither the packages it names (transformers, accelerate, deepspeed) nor their versions.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydralora.config import RoutedMLPConfig

WEIGHTS_FILE = "non_lora_trainables.bin"
ARGUMENTS_FILE = "moe_args.pth"

_PEFT_PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<block>.+)\."
    r"(?:shared_LoRA_A_(?P<shared>gate|up|down)|moe_(?P<stacked>gate|up|down)\.(?P<expert>\d+)\.LoRA_B"
    r"|(?P<router>router\.(?:weight|bias)))"
)
_MAX_PICKLE_BYTES = 16 * 2**20  # the golden file has 4 KB; a zip can claim any size
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


def is_original_key(key: str) -> bool:
    """True if `key` of a `non_lora_trainables.bin` belongs to a routed MLP block."""
    return _KEY.fullmatch(key) is not None


def from_original(tensors: Mapping[str, Tensor], config: RoutedMLPConfig, path: Path) -> dict[str, Tensor]:
    """The blocks' tensors under our names, the experts' B stacked.

    Args:
        tensors: content of `non_lora_trainables.bin`; keys of other parts are left alone.
        config: expected number of experts and rank.
        path: of the file, for messages.

    Returns:
        Tensors by their name in the model, for example `model.layers.0.mlp.experts_B_gate`, (E, M, r).

    Raises:
        ValueError: a block lacks a tensor or has one too many, or a shape does not fit; file and key are named.
    """
    blocks: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        if (match := _KEY.fullmatch(key)) is not None:
            part = key[match.end("block") + 1 :]
            blocks.setdefault(match["block"], {})[part] = (key, tensor)
    converted: dict[str, Tensor] = {}
    for block, parts in blocks.items():
        _check_block(block, parts, config, path)
        for kind in ("gate", "up", "down"):
            converted[f"{block}.shared_A_{kind}"] = parts[f"shared_LoRA_A_{kind}"][1]
            experts = [parts[f"moe_{kind}.{expert}.LoRA_B"][1] for expert in range(config.experts)]
            converted[f"{block}.experts_B_{kind}"] = torch.stack(experts)  # (E, out, r)
        for name in ("router.weight", "router.bias"):
            converted[f"{block}.{name}"] = parts[name][1]
    return converted


def _check_block(block: str, parts: Mapping[str, tuple[str, Tensor]], config: RoutedMLPConfig, path: Path) -> None:
    """Raise unless `parts` are exactly the tensors of one block of `config`, with shapes that fit one another."""
    shapes = _original_shapes(parts, config)
    missing, extra = sorted(set(shapes) - set(parts)), sorted(set(parts) - set(shapes))
    if missing or extra:
        raise ValueError(
            f"{path}: block '{block}' with {config.experts} experts (per {ARGUMENTS_FILE}): missing {missing}, "
            f"unexpected {extra}"
        )
    for part, shape in shapes.items():
        key, tensor = parts[part]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{path}: '{key}' has shape {tuple(tensor.shape)}, expected {shape}")


def _original_shapes(parts: Mapping[str, tuple[str, Tensor]], config: RoutedMLPConfig) -> dict[str, tuple[int, ...]]:
    """Expected shape of each tensor of a block; D and M are taken from the two A that tell them."""
    E, r = config.experts, config.rank
    D, M = (parts[name][1].shape[-1] if name in parts else 0 for name in ("shared_LoRA_A_gate", "shared_LoRA_A_down"))
    shapes: dict[str, tuple[int, ...]] = {"router.weight": (E, D), "router.bias": (E,)}
    for kind, inputs, outputs in (("gate", D, M), ("up", D, M), ("down", M, D)):
        shapes[f"shared_LoRA_A_{kind}"] = (r, inputs)
        shapes |= {f"moe_{kind}.{expert}.LoRA_B": (outputs, r) for expert in range(E)}
    return shapes


def to_original(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse of `from_original`, with the prefix of the original's PEFT wrapper; tensors are copied to the CPU.

    Args:
        parameters: what `hydralora.model.added_parameters` yields.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in parameters:
        values = tensor.detach().cpu()
        block, marker, kind = name.rpartition(".experts_B_")
        if marker:
            for expert, matrix in enumerate(values):
                converted[f"{_PEFT_PREFIX}{block}.moe_{kind}.{expert}.LoRA_B"] = matrix.clone()
        else:
            converted[_PEFT_PREFIX + name.replace(".shared_A_", ".shared_LoRA_A_")] = values.clone()
    return converted


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
