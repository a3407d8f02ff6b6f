"""Applying a plan and taking it back, so that the next command fixes an interruption at any moment.

Order of `apply`: a manifest that says "unfinished" with every hash, copies of the originals, then the files one by one,
each in one step, and the manifest that says "finished". An error on the way puts the originals back at once; after a
power cut, `apply` or `revert` find every file in a state that the manifest knows: as it was, in which case no copy is
needed, or changed after its copy was there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from moe_patch import manifest as manifests
from moe_patch import recovery
from moe_patch.checkout import NEXT, Checkout, digest
from moe_patch.errors import PatchError
from moe_patch.extensions import EDITABLE, EXTENSIONS, Extension, chosen
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
        checkout.remove(NEXT)
        return plan
    earlier = manifests.read(checkout)
    try:
        manifests.write(checkout, _unfinished(plan, earlier, checkout))
        for name, content in plan.originals.items():
            if checkout.read(manifests.backup(name)) != content:
                checkout.write(manifests.backup(name), content)
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
        if manifests.read(checkout) == earlier:  # nothing but the record was begun
            checkout.remove(NEXT)
        else:
            revert(checkout)
        raise
    return plan


def revert(checkout: Checkout, force: bool = False) -> list[str]:
    """Restore every byte of the checkout; does nothing if there is no patch.

    Args:
        checkout: of the user.
        force: replace files that were changed after the patch too; a copy of each stays next to it.

    Returns:
        The copies that were kept.

    Raises:
        PatchError: a file was changed after the patch, or a copy of an original is gone; nothing was changed then.
    """
    manifest = manifests.read(checkout)
    if manifest is None:
        return _revert_without_manifest(checkout, force)
    contents = {name: checkout.read(name) for name in {**manifest.edited, **manifest.added}}
    edited = {n: h for n, h in manifest.edited.items() if not is_upstream(checkout, n, contents[n])}
    originals = {name: manifests.original(checkout, name, hashes.before) for name, hashes in edited.items()}
    changed = [name for name, hashes in edited.items() if not known_state(contents[name], hashes)]
    changed += [
        n for n in manifest.added if (c := contents[n]) is not None and digest(c) not in manifest.known_hashes(n)
    ]
    kept = _keep_changed(checkout, {name: contents[name] for name in changed}, force)
    manifests.write(checkout, dataclasses.replace(manifest, finished=False))
    for name, content in originals.items():
        if checkout.read(name) != content:
            checkout.write(name, content)
    for name in manifest.added:
        checkout.remove(name)
    _forget(checkout)
    return kept


def _revert_without_manifest(checkout: Checkout, force: bool) -> list[str]:
    """The same for a checkout whose manifest is gone, or that has nothing but what an interrupted run has left."""
    marked, ours, written = recovery.marked(checkout), recovery.files(checkout), recovery.known_files()
    originals = {name: recovery.original(content) for name, content in marked.items()}
    lost = [name for name, content in originals.items() if content is None]
    if lost:
        raise PatchError(
            f"{checkout.root}: nothing was changed; {manifests.FILE} is gone and the edits in {', '.join(lost)} cannot "
            f"be told from the rest; get the files back with: git checkout -- {' '.join(lost)}"
        )
    changed = {n: c for n, c in marked.items() if recovery.certain_original(checkout, n, c) is None}
    changed |= {name: content for name, content in ours.items() if content != written[name]}
    kept = _keep_changed(checkout, changed, force)
    for name, original in originals.items():
        if original is not None:
            checkout.write(name, original)
    for name in ours:
        checkout.remove(name)
    _forget(checkout)
    return kept


def _keep_changed(checkout: Checkout, changed: Mapping[str, bytes | None], force: bool) -> list[str]:
    """Copy files with changes of the user's before they are replaced; returns the copies.

    Raises:
        PatchError: there are some, and `force` is False.
    """
    if changed and not force:
        raise PatchError(
            f"{checkout.root}: nothing was changed\n  "
            + "\n  ".join(f"{name}: was changed after the patch" for name in changed)
            + f"\npass --force to restore the original all the same; a copy is kept as FILE{KEPT}"
        )
    found = {f"{name}{KEPT}": content for name, content in changed.items() if content is not None}
    for name, content in found.items():
        checkout.write(name, content)
    return list(found)


def _forget(checkout: Checkout) -> None:
    """Remove the record of the patch, its manifest last: until then, `revert` knows what is left to do."""
    for name in (*map(manifests.backup, EDITABLE), NEXT, manifests.EARLIER_FILE, manifests.FILE):
        checkout.remove(name)


def state(checkout: Checkout) -> tuple[str, list[str]]:
    """`clean`, `applied` or `drifted`, and what is to be said about it."""
    manifest = manifests.read(checkout)
    if manifest is None:
        left = recovery.traces(checkout)
        return "drifted" if left else "clean", [f"commit {checkout.commit()}", *left]
    found = drift(checkout, manifest)
    about = [f"{', '.join(manifest.extensions)}; version {manifest.version} of the patch, on commit {manifest.commit}"]
    if set(manifest.extensions) <= set(EXTENSIONS):
        version = version_now(chosen(manifest.extensions))
        if version != manifest.version:
            about.append(f"this moe_patch would put in version {version}; apply renews it")
    return ("drifted", [*about, *found]) if found else ("applied", about)


def with_applied(checkout: Checkout, names: Sequence[str], default: str) -> list[Extension]:
    """The extensions of these names and those that the checkout has already, so that `apply` takes none out.

    Args:
        checkout: of the user.
        names: that are to be put in.
        default: the name of what is put in if there is nothing else.

    Raises:
        PatchError: it has one that this version does not know.
    """
    manifest = manifests.read(checkout)
    applied = manifest.extensions if manifest else []
    unknown = sorted(set(applied) - set(EXTENSIONS))
    if unknown:
        raise PatchError(
            f"{checkout.root}: has the extensions {unknown} of a later moe_patch; use that one, or revert first"
        )
    return chosen([*names, *applied] or [default])


def _unfinished(plan: Plan, earlier: Manifest | None, checkout: Checkout) -> Manifest:
    """The manifest while files are being written: it knows every state that a file may be in."""
    edited = {}
    for name, content in plan.originals.items():
        known = earlier.edited.get(name) if earlier else None
        states = [] if known is None else [known.after, *known.earlier]
        if known is None and (found := checkout.read(name)) is not None:
            states = [digest(found)]  # as it is now: edited, with its manifest gone
        edited[name] = EditedFile(digest(content), digest(plan.edited[name]), states)
    added = {**(earlier.added if earlier else {}), **plan.manifest.added}
    replaced = {name: sorted(earlier.known_hashes(name)) for name in added} if earlier else {}
    return dataclasses.replace(plan.manifest, edited=edited, added=added, replaced=replaced, finished=False)
