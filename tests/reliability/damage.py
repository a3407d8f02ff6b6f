"""Systematic damage to the files of a checkpoint folder: every file in every way of a table.

`damages(folder)` lists them in a fixed order; each is a name and a function that spoils one file of a copy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_pt_utils import safe_globals

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9976634558\n"
TENSOR_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
FLIPS = (0, 1, 2, 4, 7, 8, 9, 12, 20, 33, 50, 77, 120, 200)
"""Positions of flipped bytes, all in what describes a file's content."""


@dataclass(frozen=True)
class Damage:
    """One way to spoil one file.

    Attributes:
        file: relative to the folder.
        kind: what is done to it.
        apply: does it, given the path of the file.
    """

    file: str
    kind: str
    apply: Callable[[Path], None]

    @property
    def name(self) -> str:
        """For messages and as the id of a test."""
        return f"{self.file}: {self.kind}"


def _write(content: bytes) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(content), None)[1]


def _cut(length: int) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(path.read_bytes()[:length]), None)[1]


def _flip(position: int, mask: int) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= mask
        path.write_bytes(bytes(content))

    return apply


def _of_bytes(path: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """What can happen to any file."""
    size = path.stat().st_size
    yield "removed", lambda file: file.unlink()
    yield "emptied", _write(b"")
    for length in sorted({1, 8, size // 4, size // 2, size - 2} & set(range(1, size - 1))):
        yield f"cut to {length} of {size} bytes", _cut(length)
    yield "a Git LFS pointer", _write(POINTER.encode())
    yield "text", _write(b"This file is not here.\n")
    for value in ([], {}, "text", 3, None):
        yield f"JSON {json.dumps(value)}", _write(json.dumps(value).encode())
    if path.suffix in (*TENSOR_SUFFIXES, ".model"):
        for position in FLIPS:
            if position < size:
                yield f"byte {position} flipped", _flip(position, 0x01)
                yield f"byte {position} inverted", _flip(position, 0xFF)


REMOVED = object()


def _wrong(value: Any) -> Iterator[tuple[str, Any]]:
    """Values that no writer would put in the place of `value`."""
    yield "removed", REMOVED
    yield "null", None
    if isinstance(value, bool):
        yield "a string", "maybe"
        yield "a number", 3.5
    elif isinstance(value, int | float):
        yield "a string", "many"
        yield "a list", [value]
        yield "huge", 10**18 if isinstance(value, int) else 1e300
        yield "negative", -abs(value) * 1000 - 1000
        yield "NaN", math.nan
    elif isinstance(value, str):
        yield "a number", 7
        yield "a list", [value]
        yield "another string", "no-such-thing"
    elif isinstance(value, list):
        yield "a number", 7
        yield "an object", {"a": 1}
        yield "a list of other things", [{"a": 1}]
    elif isinstance(value, dict):
        yield "a number", 7
        yield "a list", [1]
        yield "a string", "text"


def _keys(content: Any, depth: int) -> Iterator[tuple[str, ...]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield (key,)
            if depth > 1:
                yield from ((key, *rest) for rest in _keys(value, depth - 1))


def _set(keys: tuple[str, ...], value: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        if value is REMOVED:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value
        path.write_text(json.dumps(content), encoding="utf-8")

    return apply


def _of_json(path: Path, depth: int = 3) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """What can happen to each key of a JSON file that holds settings; tables with many keys are sampled."""
    content = json.loads(path.read_text(encoding="utf-8"))
    keys = list(_keys(content, depth))
    for key in keys if len(keys) < 150 else keys[:: len(keys) // 75]:
        inner = content
        for part in key:
            inner = inner[part]
        for what, value in _wrong(inner):
            yield f"{'.'.join(key)} {what}", _set(key, value)


def read(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file; None if it contains something else."""
    if path.suffix == ".safetensors":
        return load_file(path)
    with safe_globals():  # random states contain arrays
        content = torch.load(path, map_location="cpu", weights_only=True)
    is_table = isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())
    return content if is_table else None


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors in the format of the file's name."""
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, {"format": "pt"})
    else:
        torch.save(tensors, path)


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        return changed

    return change


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "with a NaN": _filled(math.nan),
    "with an infinity": _filled(math.inf),
    "with a negative infinity": _filled(-math.inf),
    "as int64": lambda tensor: tensor.long(),
    "as int8": lambda tensor: tensor.to(torch.int8),
    "as bool": lambda tensor: tensor.bool(),
    "as complex64": lambda tensor: tensor.to(torch.complex64),
    "flat": lambda tensor: tensor.reshape(-1) if tensor.dim() > 1 else tensor.reshape(1, -1),
    "one row short": lambda tensor: tensor[:-1].clone(),
    "one row long": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "empty": lambda tensor: tensor[:0].clone(),
}


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = read(path)
        assert tensors is not None
        write(path, tensors | {name: change(tensors[name])})

    return apply


def _without(name: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = read(path)
        assert tensors is not None
        write(path, {key: value for key, value in tensors.items() if key != name})

    return apply


def _with_another(path: Path) -> None:
    tensors = read(path)
    assert tensors is not None
    write(path, tensors | {"model.surplus.weight": torch.ones(3, 3)})


def _of_tensors(path: Path, used: Callable[[str], bool]) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """What can happen to the tensors of a file: the first, the middle and the last one that a model uses."""
    tensors = read(path)
    if not tensors:
        return
    names = sorted(name for name, value in tensors.items() if value.is_floating_point() and value.dim() and used(name))
    for name in dict.fromkeys([names[0], names[len(names) // 2], names[-1]]):
        yield f"{name} missing", _without(name)
        for what, change in CHANGES.items():
            yield f"{name} {what}", _changed(name, change)
    yield "a tensor too many", _with_another


def damages(
    folder: Path, used: Callable[[str], bool] = lambda name: True, unread: Collection[str] = ()
) -> list[Damage]:
    """Every damage to every file of a folder, in a fixed order.

    Args:
        folder: complete, with whatever is below it.
        used: tells of a tensor's name whether the model depends on it.
        unread: names of files that nobody reads, which are left out.
    """
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in unread):
        ways = list(_of_bytes(path))
        if path.suffix == ".json":
            ways += _of_json(path)
        elif path.suffix in TENSOR_SUFFIXES:
            ways += _of_tensors(path, used)
        found += [Damage(path.relative_to(folder).as_posix(), kind, apply) for kind, apply in ways]
    return found
