"""Tensors in files: reading them, and refusing those that are not numbers a model can compute with.

A sum shows whether all values of a tensor are finite: one pass at the speed of memory, seconds for 13 GB.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, safe_open
from torch import Tensor

from llava.errors import CheckpointError
from llava.runtime.files import read_errors, refuse_pointer
from llava.runtime.weights.torch_files import load_plain

SAFETENSORS_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool},
}
MAX_HEADER = 100 * 2**20
"""Longest table of contents that the safetensors format allows."""


@dataclass(frozen=True)
class Entry:
    """A tensor as its file describes it, values not read.

    Attributes:
        path: the file.
        dtype: None if torch has no such type.
        shape: its shape.
    """

    path: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    def read(self, name: str) -> Tensor:
        """The tensor itself, on the CPU."""
        if self.path.suffix == ".safetensors":
            with safe_open(self.path, "pt") as file:
                return file.get_tensor(name)
        return _load(self.path, mapped=True)[name]


def is_safetensors(path: Path) -> bool:
    """True for a safetensors file, by its first bytes and not by its name."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:9] == b"{"


def _load(path: Path, mapped: bool = False, inner: str | None = None) -> dict[str, Tensor]:
    """The table in a file of `torch.save`."""
    content = load_plain(path, mapped=mapped)
    if inner is not None and isinstance(content, dict) and isinstance(content.get(inner), dict):
        content = content[inner]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds something else than a table of named tensors")
    return content


def read_tensors(path: Path, inner: str | None = None) -> dict[str, Tensor]:
    """Tensors of one file, safetensors or torch's format, told apart by their first bytes.

    Args:
        path: the file.
        inner: if the file holds a table under this name, that one is read.

    Raises:
        CheckpointError: the file is missing, damaged, a Git LFS pointer, or holds anything else than named tensors.
    """
    refuse_pointer(path)
    try:
        if is_safetensors(path):
            return load_file(path)
        return _load(path, inner=inner)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except Exception as error:  # damaged files surface as many kinds of error, all meaning the same here
        raise CheckpointError(f"{path}: is damaged or no file of tensors ({error})") from error


def read_entries(entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The tensors of entries by their names in the files, on the CPU; each file is opened once.

    Raises:
        CheckpointError: a file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for path in dict.fromkeys(entry.path for entry in entries.values()):
        names = [name for name, entry in entries.items() if entry.path == path]
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt") as file:
                    tensors |= {name: file.get_tensor(name) for name in names}
            except read_errors() as error:
                raise CheckpointError(f"{path}: is damaged or was cut off ({error})") from error
        else:
            content = _load(path, mapped=True)
            tensors |= {name: content[name] for name in names}
    return {name: tensors[name] for name in entries}


def describe(files: Iterable[Path]) -> dict[str, Entry]:
    """What files of weights say about their tensors; values are not read.

    Raises:
        CheckpointError: a file is damaged, or two of them contain the same tensor.
    """
    entries: dict[str, Entry] = {}
    for path in files:
        found = _safetensors_entries(path) if path.suffix == ".safetensors" else _torch_entries(path)
        twice = sorted(entries.keys() & found.keys())
        if twice:
            raise CheckpointError(f"{path}: contains '{twice[0]}', which {entries[twice[0]].path.name} has already")
        entries |= found
    return entries


def _safetensors_entries(path: Path) -> dict[str, Entry]:
    refuse_pointer(path)
    try:
        with safe_open(path, "pt"), path.open("rb") as file:  # checks that offsets, shapes and length agree
            (length,) = struct.unpack("<Q", file.read(8))
            table = json.loads(file.read(min(length, MAX_HEADER)))
        return {
            name: Entry(path, SAFETENSORS_DTYPES.get(each["dtype"]), tuple(each["shape"]))
            for name, each in table.items()
            if name != "__metadata__"
        }
    except read_errors() as error:
        raise CheckpointError(f"{path}: is damaged or was cut off ({error})") from error


def _torch_entries(path: Path) -> dict[str, Entry]:
    tensors = _load(path, mapped=True)
    return {name: Entry(path, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def is_finite(tensor: Tensor) -> bool:
    """True if a floating-point tensor has no NaN or infinite value; one without storage counts as such."""
    if tensor.is_meta or not tensor.numel():
        return True
    values = tensor.detach()
    if values.element_size() == 1:  # torch does not add 8-bit floats
        values = values.float()
    if bool(torch.isfinite(values.sum())):  # NaN and infinity survive any sum
        return True
    return all(bool(torch.isfinite(value)) for value in torch.aminmax(values))  # or the sum was too large


def check_numbers(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse tensors that are not numbers to compute with.

    Args:
        tensors: by name; all of them are weights.
        source: file that they were read from.

    Raises:
        CheckpointError: one is of an integer, bool or complex type, or contains NaN or infinite values; named.
    """
    for name, tensor in tensors.items():
        check_dtype(name, tensor.dtype, source)
        check_finite(name, tensor, source)


def check_dtype(name: str, dtype: torch.dtype | None, source: str | Path) -> None:
    """Refuse a weight that is not of a floating-point type.

    Raises:
        CheckpointError: names it.
    """
    if dtype is None or not dtype.is_floating_point:
        raise CheckpointError(f"{source}: '{name}' is {dtype or 'of an unknown type'}, expected floating-point weights")


def check_finite(name: str, tensor: Tensor, source: str | Path) -> None:
    """Refuse a weight with NaN or infinite values.

    Raises:
        CheckpointError: names it.
    """
    if not is_finite(tensor):
        raise CheckpointError(f"{source}: '{name}' contains NaN or infinite values ({tensor.dtype}); it cannot be used")
