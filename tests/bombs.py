"""Pickles that create a file when they are run, in every container that a library may unpickle."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Bomb:
    """Creates `marker` as soon as its pickle is loaded by an unpickler that runs what it is told."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def zip_archive(content: Any) -> bytes:
    """As `torch.save` writes today."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def old_format(content: Any) -> bytes:
    """As `torch.save` wrote before 1.6."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def bare_pickle(content: Any) -> bytes:
    """As `pickle.dump`, `joblib.dump` and the first cache files wrote."""
    return pickle.dumps(content)


def tar_archive(content: Any) -> bytes:
    """As torch wrote in its first months."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(content if name == "pickle" else 0)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


CONTAINERS: dict[str, Callable[[Any], bytes]] = {
    "zip": zip_archive,
    "old": old_format,
    "bare": bare_pickle,
    "tar": tar_archive,
}


def inside(marker: Path) -> dict[str, Any]:
    """A bomb behind what the programs look for first: a table of tensors."""
    return {"weight": torch.zeros(2, 3), "state": {"lr": 0.1, "code": Bomb(marker)}}
