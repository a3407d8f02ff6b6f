"""What was done to a checkout: `.moe_patch/manifest.txt` with the hash of every file, and the originals next to it.

An original is copied before its file is changed and stays the same however often the patch is renewed, so `revert`
always finds the bytes of the untouched checkout. The content is JSON; the name does not say so, because upstream's
`.gitignore` would keep `*.json` out of a commit. A manifest comes with a checkout, so whoever made the checkout may
have written it: no name in it is used unless the patch could have put it there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_patch.checkout import FOLDER, UNKNOWN, Checkout, digest, is_inside
from moe_patch.errors import PatchError
from moe_patch.extensions import EDITABLE, PACKAGE

FILE = f"{FOLDER}/manifest.txt"
EARLIER_FILE = f"{FOLDER}/manifest.json"
"""Its name in the first format."""
FORMAT = 2
OURS = PACKAGE.replace(".", "/") + "/"
"""Beginning of the path of every file that comes in."""


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
        replaced: hashes of our files that an unfinished renewal may still find, by path.
    """

    version: str
    commit: str
    extensions: list[str]
    edited: dict[str, EditedFile]
    added: dict[str, str]
    finished: bool = True
    replaced: dict[str, list[str]] = field(default_factory=dict)

    def known_hashes(self, name: str) -> set[str]:
        """What one of our files may be without a change of the user's."""
        return {*([self.added[name]] if name in self.added else []), *self.replaced.get(name, [])}


def backup(name: str) -> str:
    """Where the original of a file is in the checkout."""
    return f"{FOLDER}/original/{name}"


def read(checkout: Checkout) -> Manifest | None:
    """The manifest of a checkout; None if it has none.

    Raises:
        PatchError: it cannot be understood, or names what the patch never touches.
    """
    for name in (FILE, EARLIER_FILE):
        content = checkout.read(name)
        if content is not None:
            return _parsed(content, str(checkout.root / name))
    return None


def write(checkout: Checkout, manifest: Manifest) -> None:
    """Write it, in one step; from then on it holds instead of one in the first format."""
    values = {"format": FORMAT, **asdict(manifest)}
    checkout.write(FILE, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
    checkout.remove(EARLIER_FILE)


def original(checkout: Checkout, name: str, before: str) -> bytes:
    """The original of an edited file.

    Raises:
        PatchError: the copy is gone or damaged.
    """
    for content in (checkout.read(name), checkout.read(backup(name))):
        if content is not None and digest(content) == before:
            return content
    state = "gone" if content is None else "damaged"
    raise PatchError(
        f"{checkout.root / backup(name)}: the copy of the original is {state}; "
        f"get the file back with: git checkout -- {name}"
    )


def version_of(files: Mapping[str, bytes], edits: Mapping[str, list[str]]) -> str:
    """Twelve digits that change with any byte that the patch puts into a checkout."""
    parts = [f"{name}\0{digest(content)}" for name, content in sorted(files.items())]
    parts += [f"{name}\0{text}" for name, texts in sorted(edits.items()) for text in texts]
    return digest("\n".join(parts).encode())[:12]


def _parsed(content: bytes, path: str) -> Manifest:
    try:
        values: dict[str, Any] = json.loads(content)
        if values.pop("format") > FORMAT:
            raise PatchError(f"{path}: was written by a later moe_patch; use that one")
        edited = {name: EditedFile(**hashes) for name, hashes in values.pop("edited").items()}
        manifest = Manifest(edited=edited, **values)
        problems = _problems(manifest)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PatchError(f"{path}: is damaged ({error}); the originals are in {FOLDER}/original") from error
    if problems:
        raise PatchError(f"{path}: was not written by moe_patch, nothing was changed: {'; '.join(problems[:3])}")
    return manifest


def _problems(manifest: Manifest) -> list[str]:
    """What no manifest of the patch contains.

    Raises:
        TypeError: a value is of another type.
    """
    hashes = [h for file in manifest.edited.values() for h in (file.before, file.after, *file.earlier)]
    hashes += [*manifest.added.values(), *(h for found in manifest.replaced.values() for h in found)]
    # One table of what the words have to look like: they are printed, and names are opened.
    wanted = (
        ("version", [manifest.version], r"[0-9a-f]{12}"),
        ("commit", [manifest.commit], rf"[0-9a-f]{{40,64}}|{re.escape(UNKNOWN)}"),
        ("extension", manifest.extensions, r"[a-z][a-z0-9_]*"),
        ("hash", hashes, r"[0-9a-f]{64}"),
    )
    found = [
        f"the {kind} {word!r}" for kind, words, pattern in wanted for word in words if not re.fullmatch(pattern, word)
    ]
    if not isinstance(manifest.finished, bool):
        found.append(f"finished is {manifest.finished!r}")
    found += [f"edits {name!r}, which the patch never does" for name in manifest.edited if name not in EDITABLE]
    found += [
        f"claims {name!r}, which is outside {OURS}"
        for name in {**manifest.added, **manifest.replaced}
        if not (name.startswith(OURS) and name.endswith(".py") and is_inside(name))
    ]
    return found
