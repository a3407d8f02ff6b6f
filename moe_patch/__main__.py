"""Put extensions into a checkout of upstream's LLaVA, and take them out: `python -m moe_patch COMMAND LLAVA_DIR`.

Exit status: 0 if all is well, 1 if the patch does not fit, was refused or drifted, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_patch import operations
from moe_patch.checkout import Checkout
from moe_patch.errors import PatchError
from moe_patch.extensions import EXTENSIONS, Extension, chosen
from moe_patch.plan import Plan, make_plan

DEFAULT = "hydralora"


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_patch",
        description="Put extensions into an untouched checkout of upstream's LLaVA (haotian-liu/LLaVA), and take them "
        "out again. Only files inside that folder are changed.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("apply", "put the extensions in; renews an earlier version; keeps those that are in already"),
        ("check", "say whether apply would succeed, and where the edits would go; changes nothing"),
        ("revert", "restore every byte of the checkout"),
        ("status", "say whether the checkout is clean, applied or drifted (changed after the patch)"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument(
            "llava_dir",
            type=Path,
            metavar="LLAVA_DIR",
            nargs="?",
            default=Path(),
            help="folder of the LLaVA checkout (default: the current directory)",
        )
        if name in ("apply", "check"):
            command.add_argument(
                "--extensions",
                metavar="NAMES",
                help=f"what to put in, comma-separated: {', '.join(EXTENSIONS)} (default: what is in already, else "
                f"{DEFAULT})",
            )
            command.add_argument("--only", action="store_true", help="take out the extensions that are not named")
        if name in ("apply", "revert"):
            command.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
        if name != "status":
            help_text = {
                "revert": "restore files too that were changed after the patch; a copy of each is kept",
            }.get(name, "edit files with uncommitted changes too; revert brings these back with the changes")
            command.add_argument("--force", action="store_true", help=help_text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        checkout = Checkout(args.llava_dir)
        if args.command == "status":
            state, lines = operations.state(checkout)
            print("\n  ".join([f"{state}: {checkout.root}", *lines]))
            return int(state == "drifted")
        if args.command == "revert":
            return _revert(checkout, args)
        return _apply(checkout, _wanted(checkout, args), args)
    except BrokenPipeError:  # the reader of the output has seen enough, as in `apply ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (PatchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _wanted(checkout: Checkout, args: argparse.Namespace) -> list[Extension]:
    """The extensions that the checkout is to have.

    Raises:
        PatchError: a name is unknown, or `--only` stands without names.
    """
    names = [] if args.extensions is None else [name.strip() for name in args.extensions.split(",")]
    if args.only and not names:
        raise PatchError("--only takes out what --extensions does not name; pass --extensions too")
    if names:
        chosen(names)
    return chosen(names) if args.only else operations.with_applied(checkout, names, DEFAULT)


def _apply(checkout: Checkout, extensions: list[Extension], args: argparse.Namespace) -> int:
    if args.command == "check" or args.dry_run:
        plan = make_plan(checkout, extensions, args.force)
        print("applied already" if plan.is_applied else "would be applied; every anchor fits exactly once", end="")
        print(f": {checkout.root} at commit {plan.manifest.commit}")
        _print_plan(plan)
        return 0
    plan = operations.apply(checkout, extensions, args.force)
    done = "was applied already, nothing was changed" if plan.is_applied else "applied"
    print(f"{done}: {', '.join(plan.manifest.extensions)} on {checkout.root} at commit {plan.manifest.commit}")
    if not plan.is_applied:
        _print_plan(plan)
        switches = " or ".join(extension.switch for extension in extensions)
        print(f"next: train there with {switches}, see docs/moe_patch.md; undo: python -m moe_patch revert LLAVA_DIR")
    return 0


def _print_plan(plan: Plan) -> None:
    """Where the edits go, by file and line of the original, and how many files come in."""
    for place in plan.located:
        print(f"  {place.edit.file}:{place.line}: {place.edit.place} '{place.edit.anchor}'")
    print(f"  {len(plan.added)} files in {next(iter(plan.added)).rpartition('/')[0]}/")


def _revert(checkout: Checkout, args: argparse.Namespace) -> int:
    if args.dry_run:
        state, lines = operations.state(checkout)
        print("\n  ".join([f"revert would start from the state '{state}': {checkout.root}", *lines]))
        return 0
    was_clean = operations.state(checkout)[0] == "clean"
    kept = operations.revert(checkout, args.force)
    print(f"{'was clean already' if was_clean else 'reverted'}: {checkout.root}")
    for name in kept:
        print(f"  your changed file is kept as {name}")
    return 0


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):  # paths and anchors print on a terminal of any encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
