"""What was done to a checkout: `.moe_patch/manifest.json` with the hash of every file, and the originals beside it.

The originals are copied before anything is changed and stay the same however often the patch is renewed, so `revert`
always finds the bytes of the untouched checkout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_patch.checkout import Checkout, digest
from moe_patch.errors import PatchError

FOLDER = ".moe_patch"
FILE = f"{FOLDER}/manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class EditedFile:
    """Hashes of one of upstream's files: `before` of the original, `after` of what the patch made of it.

    `earlier` are those that an unfinished renewal may still find there.
    """

    before: str
    after: str
    earlier: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """Content of the file.

    Attributes:
        version: of the patch, a hash over everything it puts into a checkout.
        commit: that was checked out.
        extensions: that were put in.
        edited: upstream's files by path.
        added: hash of our files by path.
        finished: False while files are being changed.
    """

    version: str
    commit: str
    extensions: list[str]
    edited: dict[str, EditedFile]
    added: dict[str, str]
    finished: bool = True


def backup(name: str) -> str:
    """Where the original of a file lies in the checkout."""
    return f"{FOLDER}/original/{name}"


def read(checkout: Checkout) -> Manifest | None:
    """The manifest of a checkout; None if it has none.

    Raises:
        PatchError: it cannot be understood.
    """
    content = checkout.read(FILE)
    if content is None:
        return None
    path = checkout.root / FILE
    try:
        values: dict[str, Any] = json.loads(content)
        if values.pop("format") != FORMAT:
            raise PatchError(f"{path}: was written by a later moe_patch; use that one")
        edited = {name: EditedFile(**hashes) for name, hashes in values.pop("edited").items()}
        return Manifest(edited=edited, **values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PatchError(f"{path}: is damaged ({error}); the originals lie in {FOLDER}/original") from error


def write(checkout: Checkout, manifest: Manifest) -> None:
    """Write it, in one step."""
    values = {"format": FORMAT, **asdict(manifest)}
    checkout.write(FILE, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def original(checkout: Checkout, name: str, before: str) -> bytes:
    """The original of an edited file.

    Raises:
        PatchError: the copy is gone or damaged.
    """
    content = checkout.read(backup(name))
    if content is None or digest(content) != before:
        raise PatchError(
            f"{checkout.root / backup(name)}: the copy of the original is {'gone' if content is None else 'damaged'}; "
            f"get the file back with: git checkout -- {name}"
        )
    return content


def version_of(files: Mapping[str, bytes], edits: Mapping[str, list[str]]) -> str:
    """Twelve digits that change with any byte that the patch puts into a checkout."""
    parts = [f"{name}\0{digest(content)}" for name, content in sorted(files.items())]
    parts += [f"{name}\0{text}" for name, texts in sorted(edits.items()) for text in texts]
    return digest("\n".join(parts).encode())[:12]
