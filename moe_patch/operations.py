"""Applying a plan and taking it back, so that an interruption at any moment can be mended.

Order of `apply`: copies of the originals, a manifest that says "unfinished" with every hash, then the files one by one,
each in one step, and the manifest that says "finished". An error on the way puts the originals back at once; after a
power cut, `apply` or `revert` find every file in a state that the manifest knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moe_patch import manifest as manifests
from moe_patch.checkout import Checkout, digest
from moe_patch.errors import PatchError
from moe_patch.extensions import EXTENSIONS, Extension, chosen
from moe_patch.manifest import EditedFile, Manifest
from moe_patch.plan import Plan, drift, is_upstream, known_state, make_plan, version_now

KEPT = ".moe_patch-kept"
"""Ending of the copy of a changed file that a forced `revert` replaces."""


def apply(checkout: Checkout, extensions: Sequence[Extension], force: bool = False) -> Plan:
    """Put the extensions in, or renew them; does nothing if they are there already.

    Raises:
        PatchError: see `make_plan`; nothing was changed then.
        OSError: a file cannot be written; the originals were put back.
    """
    plan = make_plan(checkout, extensions, force)
    if plan.is_applied:
        return plan
    earlier = manifests.read(checkout)
    for name, content in plan.originals.items():
        if checkout.read(manifests.backup(name)) != content:
            checkout.write(manifests.backup(name), content)
    manifests.write(checkout, _unfinished(plan, earlier))
    try:
        for name, content in {**plan.added, **plan.edited}.items():
            if checkout.read(name) != content:
                checkout.write(name, content)
        for name in plan.obsolete:
            checkout.remove(name)
        for name in plan.originals:
            if name not in plan.manifest.edited:
                checkout.remove(manifests.backup(name))
        manifests.write(checkout, plan.manifest)
    except BaseException:
        revert(checkout)
        raise
    return plan


def revert(checkout: Checkout, force: bool = False) -> list[str]:
    """Restore every byte of the checkout; does nothing if there is no patch.

    Args:
        checkout: of the user.
        force: replace files that were changed after the patch too; a copy of each stays beside it.

    Returns:
        The copies that were kept.

    Raises:
        PatchError: a file was changed after the patch, or a copy of an original is gone; nothing was changed then.
    """
    manifest = manifests.read(checkout)
    if manifest is None:
        return []
    contents = {name: checkout.read(name) for name in manifest.edited}
    edited = {n: h for n, h in manifest.edited.items() if not is_upstream(checkout, n, contents[n])}
    originals = {name: manifests.original(checkout, name, hashes.before) for name, hashes in edited.items()}
    changed = [name for name, hashes in edited.items() if not known_state(contents[name], hashes)]
    if manifest.finished:
        added = {name: checkout.read(name) for name in manifest.added}
        changed += [name for name, content in added.items() if content and digest(content) != manifest.added[name]]
        contents.update(added)
    if changed and not force:
        raise PatchError(
            f"{checkout.root}: nothing was changed\n  "
            + "\n  ".join(f"{name}: was changed after the patch" for name in changed)
            + f"\npass --force to restore the original all the same; a copy is kept as FILE{KEPT}"
        )
    kept = [f"{name}{KEPT}" for name in changed if contents[name] is not None]
    for name in changed:
        if (content := contents[name]) is not None:
            checkout.write(f"{name}{KEPT}", content)
    manifests.write(checkout, dataclasses.replace(manifest, finished=False))
    for name, content in originals.items():
        if checkout.read(name) != content:
            checkout.write(name, content)
    for name in [*manifest.added, *map(manifests.backup, manifest.edited), manifests.FILE]:
        checkout.remove(name)
    return kept


def state(checkout: Checkout) -> tuple[str, list[str]]:
    """`clean`, `applied` or `drifted`, and what is to be said about it."""
    manifest = manifests.read(checkout)
    if manifest is None:
        return "clean", [f"commit {checkout.commit()}"]
    found = drift(checkout, manifest)
    about = [f"{', '.join(manifest.extensions)}; version {manifest.version} of the patch, on commit {manifest.commit}"]
    if set(manifest.extensions) <= set(EXTENSIONS):
        version = version_now(chosen(manifest.extensions))
        if version != manifest.version:
            about.append(f"this moe_patch would put in version {version}; apply renews it")
    return ("drifted", [*about, *found]) if found else ("applied", about)


def _unfinished(plan: Plan, earlier: Manifest | None) -> Manifest:
    """The manifest while files are being written: it knows every state that a file may be in."""
    edited = {}
    for name, content in plan.originals.items():
        known = earlier.edited.get(name) if earlier else None
        states = [] if known is None else [known.after, *known.earlier]
        after = digest(plan.edited[name])
        edited[name] = EditedFile(digest(content), after, states)
    added = {**(earlier.added if earlier else {}), **plan.manifest.added}
    return dataclasses.replace(plan.manifest, edited=edited, added=added, finished=False)
