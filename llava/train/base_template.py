"""The conversation template that the base of a run was trained with: it holds unless `--version` is given.

A model that is trained further is asked as it was before. Upstream has v1 in place of a flag that nobody gave.
"""

from __future__ import annotations

from dataclasses import fields

from llava.data.trained_template import (
    SMALL_FILES,
    conv_mode_of_version,
    same_template,
    trained_template,
    version_of_conv_mode,
)
from llava.errors import CheckpointError
from llava.runtime.hub import local_folder
from llava.train.options import RunArguments


def take_template(args: RunArguments) -> None:
    """Give `--version`, where it was not given, the template of the base, and note that in `args.base_template`.

    Args:
        args: a program with another default of `--version` keeps it.

    Raises:
        CheckpointError: the base names a template that does not exist.
    """
    model = args.model
    try:
        folder = local_folder(model.model_name_or_path or "", SMALL_FILES, cache_dir=args.training.cache_dir)
    except CheckpointError:  # neither here nor on the hub: said where the weights are read
        return
    if not folder.is_dir():
        return
    trained = trained_template(folder)
    if trained is None:
        return
    args.base_template = trained.name
    default = next(item.default for item in fields(model) if item.name == "version")
    if "version" not in args.given and model.version == default and not _holds(args):
        model.version = version_of_conv_mode(trained.name)


def _holds(args: RunArguments) -> bool:
    version, base = args.model.version, args.base_template
    return version is not None and base is not None and same_template(conv_mode_of_version(version), base)


def template_line(args: RunArguments) -> str | None:
    """What the log says of the template of the base: kept without a flag, or replaced; None where there is no news."""
    model = args.model
    if args.base_template is None or args.program:
        return None
    if not _holds(args):
        return f"--version {model.version}: {model.model_name_or_path} was trained with {args.base_template}"
    if "version" in args.given or args.base_template == "v1":
        return None
    return f"of {model.model_name_or_path}: version {args.base_template}"
