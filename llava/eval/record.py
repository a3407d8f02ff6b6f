"""What has to be known to repeat an evaluation: package versions and which weights were used."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("llava-extensions", "torch", "torchvision", "transformers", "peft", "tokenizers", "pillow")
"""Distributions that can change an answer."""

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pth"})
WEIGHT_FOLDERS = ("*", "extensions/*/*", "vision_tower/*")
"""Where a checkpoint folder keeps weights; `checkpoint-N` below it are checkpoints of their own."""

SAMPLE_BYTES = 1 << 20


def package_versions() -> dict[str, str]:
    """Versions of Python and of `PACKAGES`; a package that runs from its sources only is called `not installed`."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def weights_fingerprint(folder: str | Path | None) -> str | None:
    """A digest that changes when the weights in a checkpoint folder change; copies of a folder share it.

    Reads the size, the first and the last MiB of each weight file, so that it is instant for a model of any size.

    Returns:
        16 hexadecimal digits, or None if `folder` is no local folder (the name of a model on a hub).
    """
    if folder is None or not Path(folder).is_dir():
        return None
    digest = hashlib.sha256()
    found = {path for pattern in WEIGHT_FOLDERS for path in Path(folder).glob(pattern)}
    for path in sorted(path for path in found if path.suffix in WEIGHT_SUFFIXES and path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(SAMPLE_BYTES, size - SAMPLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]
