"""A patched checkout whose manifest is gone, as after `git clean -fdx`: seeing it, and finding the originals again.

Edits only insert, and what they insert is marked, so the original follows from the edited file. It counts as certain
if the commit, or the copy that the patch made, has the same bytes.
"""

from __future__ import annotations

import ast

from moe_patch import manifest as manifests
from moe_patch import sources
from moe_patch.checkout import Checkout
from moe_patch.commit import is_same
from moe_patch.edits import MARK, without_edits
from moe_patch.extensions import EDITABLE, EXTENSIONS, modules_of

SIGN = b"put here by moe_patch"
"""In the first lines of the package that comes into a checkout."""


def traces(checkout: Checkout) -> list[str]:
    """What the patch has left in a checkout without a manifest, one line per file; empty if nothing."""
    lines = [f"{name}: contains edits of moe_patch" for name in marked(checkout)]
    if files(checkout):
        lines.append(f"{sources.FOLDER}/: contains files of moe_patch")
    reason = f"{manifests.FILE} is gone; revert takes the patch out, apply puts it in again"
    return [*lines, reason] if lines else []


def marked(checkout: Checkout) -> dict[str, bytes]:
    """Upstream's files that contain edits, with their content."""
    contents = {name: checkout.read(name) for name in EDITABLE}
    return {name: content for name, content in contents.items() if content is not None and MARK.encode() in content}


def files(checkout: Checkout) -> dict[str, bytes]:
    """Files of ours that are there, with their content; none if the folder is not from the patch."""
    first = checkout.read(f"{sources.FOLDER}/__init__.py")
    names = known_files()
    found = {name: content for name in names if (content := checkout.read(name)) is not None}
    ours = first is not None and SIGN in first
    return found if ours else {name: content for name, content in found.items() if content == names[name]}


def known_files() -> dict[str, bytes]:
    """Every file that this version puts into a checkout, for all extensions."""
    return sources.files(modules_of(list(EXTENSIONS.values())))


def original(content: bytes) -> bytes | None:
    """What an edited file was before; None if it cannot be told."""
    found = without_edits(content)
    try:
        ast.parse(found)
    except (SyntaxError, ValueError):
        return None
    return None if MARK.encode() in found else found


def certain_original(checkout: Checkout, name: str, content: bytes) -> bytes | None:
    """The same, if the commit or the copy of the original agrees."""
    found = original(content)
    if found is None:
        return None
    copies = (checkout.read(manifests.backup(name)), checkout.committed([name]).get(name))
    return found if any(copy is not None and is_same(found, copy) for copy in copies) else None
