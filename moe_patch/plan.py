"""What `apply` would make of a checkout, without touching it: every file before and after, or all reasons why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_patch import manifest as manifests
from moe_patch import recovery, sources
from moe_patch.checkout import Checkout, digest
from moe_patch.edits import MARK, Located, insert, locate
from moe_patch.errors import PatchError
from moe_patch.extensions import Extension, edits_of, modules_of
from moe_patch.manifest import EditedFile, Manifest


@dataclass(frozen=True)
class Plan:
    """What is to be written.

    Attributes:
        manifest: that will be in the checkout.
        originals: untouched content of every file that is edited, or was by an earlier version, by path.
        edited: their content with the edits.
        added: our files by path.
        located: the places of the edits, in the order of files and lines.
        obsolete: our files of an earlier version that this one no longer has.
        is_applied: nothing is left to do.
    """

    manifest: Manifest
    originals: dict[str, bytes]
    edited: dict[str, bytes]
    added: dict[str, bytes]
    # All problems are collected and reported together: whoever has to adapt the patch sees the whole of it.
    located: list[Located]
    obsolete: list[str]
    is_applied: bool


def make_plan(checkout: Checkout, extensions: Sequence[Extension], force: bool = False) -> Plan:
    """Work out all that `apply` would write.

    Args:
        checkout: of the user.
        extensions: to put in; others that are there go.
        force: edit files with uncommitted changes too; `revert` brings them back with these changes.

    Raises:
        PatchError: an anchor does not fit, a file has changes of the user's, or the patch drifted; all are named.
    """
    # Everything is read and decided before anything is written: a plan that fails leaves the checkout alone.
    commit = checkout.commit()
    earlier = manifests.read(checkout)
    edits = edits_of(extensions)
    added = sources.files(modules_of(extensions))
    # Files of an earlier run are included: those that are not edited any more get their original content back.
    originals = _originals(checkout, sorted({*edits, *(earlier.edited if earlier else ())}), earlier, force)
    _refuse_foreign_files(checkout, added, earlier)

    located: list[Located] = []
    problems: list[str] = []
    edited = {name: originals[name] for name in originals if name not in edits}
    for name, wanted in edits.items():
        found, missing = locate(wanted, originals[name], name)
        problems += missing
        # The order in the file, which is that of the printed plan.
        located += sorted(found, key=lambda place: place.offset)
        if not missing:
            edited[name] = insert(found, originals[name], name)
    if problems:
        raise PatchError(
            f"{checkout.root} at commit {commit}: nothing was changed\n  " + "\n  ".join(problems) + "\n"
            "docs/moe_patch.md lists the versions of LLaVA that the patch fits"
        )
    # Digests of both states: by them `revert` tells the edits made here from those of the user.
    manifest = Manifest(
        version=version_now(extensions),
        commit=commit,
        extensions=[extension.name for extension in extensions],
        edited={name: EditedFile(digest(originals[name]), digest(edited[name])) for name in edits},
        added={name: digest(content) for name, content in added.items()},
    )
    obsolete = [name for name in (earlier.added if earlier else ()) if name not in added]
    # Only content counts: a checkout in which one byte differs gets written again.
    is_applied = (
        earlier is not None
        and earlier.finished
        and earlier.version == manifest.version
        and not obsolete
        and all(checkout.read(name) == content for name, content in {**edited, **added}.items())
    )
    return Plan(manifest, originals, edited, added, located, obsolete, is_applied)


def version_now(extensions: Sequence[Extension]) -> str:
    """Version of the patch that `apply` would put in for these extensions."""
    edits = {name: [repr((e.place, e.text)) for e in found] for name, found in edits_of(extensions).items()}
    return manifests.version_of(sources.files(modules_of(extensions)), edits)


def drift(checkout: Checkout, manifest: Manifest) -> list[str]:
    """How the checkout differs from what the patch wrote, one line per file; empty if it does not."""
    lines = [] if manifest.finished else ["an earlier run was interrupted; apply or revert again"]
    for name, hashes in manifest.edited.items():
        content = checkout.read(name)
        if content is None:
            lines.append(f"{name}: gone")
        elif digest(content) == hashes.before or is_upstream(checkout, name, content):
            lines.append(f"{name}: as upstream has it, without the edits")
        elif digest(content) != hashes.after and (manifest.finished or digest(content) not in hashes.earlier):
            lines.append(f"{name}: changed after the patch")
    for name, expected in manifest.added.items():
        content = checkout.read(name)
        if content is None:
            lines.append(f"{name}: gone")
        elif digest(content) != expected and digest(content) not in manifest.replaced.get(name, []):
            lines.append(f"{name}: changed after the patch")
    return lines


def known_state(content: bytes | None, hashes: EditedFile) -> bool:
    """True if an edited file is as the patch found it or as it left it."""
    return content is not None and digest(content) in {hashes.before, hashes.after, *hashes.earlier}


def is_upstream(checkout: Checkout, name: str, content: bytes | None) -> bool:
    """True if git brought another version of the file since, which has no edits: there is nothing to take back."""
    return content is not None and MARK.encode() not in content and checkout.is_committed(name)


def _originals(checkout: Checkout, names: Sequence[str], earlier: Manifest | None, force: bool) -> dict[str, bytes]:
    """The files as they were before any patch.

    Raises:
        PatchError: a file is missing, or has changes that neither upstream nor the patch made.
    """
    found: dict[str, bytes] = {}
    fresh: list[str] = []
    problems: list[str] = []
    for name in names:
        content = checkout.read(name)
        hashes = earlier.edited.get(name) if earlier else None
        if hashes is not None:
            if known_state(content, hashes):
                found[name] = manifests.original(checkout, name, hashes.before)
            elif content is not None and is_upstream(checkout, name, content):
                found[name] = content
            else:
                problems.append(f"{name}: was changed after the patch; python -m moe_patch revert says what to do")
        elif content is None:
            problems.append(f"{name}: is missing; the patch does not know this LLaVA")
        elif MARK.encode() in content:
            # A second edit on top could not be taken back: without a manifest the original has to be certain.
            before = recovery.certain_original(checkout, name, content)
            if before is None:
                problems.append(
                    f"{name}: contains edits of moe_patch, but {manifests.FILE} is gone and the file is not the "
                    f"commit's with these edits; take them out with: python -m moe_patch revert --force"
                )
            else:
                found[name] = before
        else:
            found[name] = content
            fresh.append(name)
    changed = checkout.changed_by_user(fresh) if fresh and not force else []
    problems += [f"{name}: has uncommitted changes; commit or stash them, or pass --force" for name in changed]
    if problems:
        raise PatchError(f"{checkout.root}: nothing was changed\n  " + "\n  ".join(problems))
    return found


def _refuse_foreign_files(checkout: Checkout, added: dict[str, bytes], earlier: Manifest | None) -> None:
    """Our files may not replace any that we did not write."""
    foreign = [
        name
        for name in added
        if (content := checkout.read(name)) is not None
        and content != added[name]
        and not (earlier and digest(content) in earlier.known_hashes(name))
    ]
    if foreign:
        reason = "was changed after the patch" if earlier else "is there already and not from this patch"
        raise PatchError(f"{checkout.root}: nothing was changed\n  " + "\n  ".join(f"{n}: {reason}" for n in foreign))
