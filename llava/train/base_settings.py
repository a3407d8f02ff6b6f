"""What the base of a run says about images in its `config.json`: it holds unless a flag is given.

What is trained should see the features that the base was made for. Upstream replaces the base's settings by the
defaults of flags that nobody gave. A flag that is given wins; where it differs from the base, the log says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.pixels import PLAIN_ASPECT_RATIOS
from llava.data.tiling import parse_grid_pinpoints
from llava.errors import CheckpointError, FlagError
from llava.extension import RunOptions
from llava.model.formats import TOWER_FOLDER, projector_file
from llava.model.multimodal_encoder.identity import DIGEST
from llava.runtime.files import read_json
from llava.runtime.hub import local_folder
from llava.runtime.weights.completeness import RUN_FILE
from llava.train.base_tower import choose_tower

CONFIG_FILE = "config.json"


class Setting(NamedTuple):
    """A flag whose value a LLaVA records under the same name.

    Attributes:
        part: of `RunArguments` where the flag is.
        absent: what a LLaVA does whose `config.json` lacks it; that is how it is evaluated.
    """

    part: str
    absent: Any


SETTINGS = {
    "mm_vision_select_layer": Setting("model", None),
    "mm_vision_select_feature": Setting("model", "patch"),
    "mm_image_normalization": Setting("model", "tower"),
    "mm_projector_type": Setting("model", "linear"),
    "mm_patch_merge_type": Setting("model", "flat"),
    "mm_use_im_start_end": Setting("model", False),
    "mm_use_im_patch_token": Setting("model", False),
    "image_aspect_ratio": Setting("data", "square"),
    "image_grid_pinpoints": Setting("data", None),
}


@dataclass(frozen=True)
class BaseSettings:
    """What a base, or the projector of stage 1, was trained with.

    Attributes:
        source: the folder or hub id; None for a plain language model.
        values: by the names of `SETTINGS`; empty for a plain language model.
        tower: `mm_vision_tower` as it is recorded there; None without one.
        digest: of that tower's weights, if it is recorded.
        remark: on a `--vision_tower` that was given, for the log.
    """

    source: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    tower: str | None = None
    digest: str | None = None
    remark: str | None = None


def read_config(name: str | Path, cache_dir: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Folder and `config.json` of a folder or hub id; empty if there is none, which whoever reads the weights reports.

    A tower inside a model on a hub is fetched along.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        folder = local_folder(name, (CONFIG_FILE, RUN_FILE, f"{TOWER_FOLDER}/*"), cache_dir=cache_dir)
    except CheckpointError:  # neither here nor on the hub: said where the weights are read
        return Path(name), {}
    path = folder / CONFIG_FILE
    return folder, read_json(path) if path.is_file() else {}


def settings_of(config: Mapping[str, Any], source: str | Path) -> BaseSettings:
    """The settings in a `config.json`; those that it lacks have the value by which such a LLaVA is evaluated."""
    if config.get("mm_vision_tower") is None:
        return BaseSettings()
    values = {name: config.get(name) for name in SETTINGS}
    values = {name: SETTINGS[name].absent if value is None else value for name, value in values.items()}
    return BaseSettings(str(source), values, config["mm_vision_tower"], config.get(DIGEST))


def base_settings(args: RunOptions) -> BaseSettings:
    """The settings of `--model_name_or_path`; of a plain language model those that its projector was trained with.

    Sets `--vision_tower` to the tower that the run uses.

    Raises:
        CheckpointError: a `config.json` is damaged, or there is no tower of the name that was given.
        FlagError: see `choose_tower`.
    """
    model = args.model
    base = str(model.model_name_or_path or "")
    folder, config = read_config(base, args.training.cache_dir)
    found = replace(settings_of(config, base), remark=choose_tower(args, folder, config))
    if found.source is None and model.pretrain_mm_mlp_adapter:
        try:
            folder = projector_file(model.pretrain_mm_mlp_adapter).parent
        except CheckpointError:  # said by `checks.py`
            return found
        found = settings_of(read_config(folder)[1], folder)
        return BaseSettings(found.source, found.values)  # the tower is frozen in stage 1, so the flag decides
    return found


def take_settings(args: RunOptions) -> None:
    """Give options that were not given the values of the base, and note these in `args.base`.

    Args:
        args: before any extension has looked at them.

    Raises:
        CheckpointError, FlagError: see `base_settings`.
    """
    args.base = base_settings(args)
    if args.model.vision_tower is None:  # nothing is trained on images
        args.base = replace(args.base, values={})
    for name, value in args.base.values.items():
        setting = SETTINGS[name]
        if name in args.given or value is None:
            continue
        if name == "image_grid_pinpoints":
            if args.data.image_aspect_ratio != "anyres":  # another way was asked for, which has no resolutions
                continue
            value = value if isinstance(value, str) else str([tuple(size) for size in value])
        setattr(getattr(args, setting.part), name, value)


def _same(name: str, one: Any, other: Any) -> bool:
    """True if two values of a setting mean the same."""
    if name == "image_aspect_ratio":
        return one == other or {one, other} <= set(PLAIN_ASPECT_RATIOS)
    if name == "image_grid_pinpoints" and one and other:
        try:
            return parse_grid_pinpoints(one) == parse_grid_pinpoints(other)
        except FlagError:  # said by `checks.py`
            return False
    return one == other


def changed_settings(args: RunOptions) -> list[str]:
    """Settings of a run that are not those of its base, a line each."""
    lines = [] if args.base.remark is None else [args.base.remark]
    for name, value in args.base.values.items():
        now = getattr(getattr(args, SETTINGS[name].part), name)
        if value is not None and not _same(name, value, now):
            lines.append(f"--{name} {now}: {args.base.source} was trained with {value}")
    return lines


def kept_settings(args: RunOptions) -> dict[str, Any]:
    """Settings that were taken from the base and that are not the defaults of their options."""
    kept = {}
    for name, value in args.base.values.items():
        part = getattr(args, SETTINGS[name].part)
        now, default = getattr(part, name), next(item.default for item in fields(part) if item.name == name)
        if name not in args.given and now != default and _same(name, value, now):
            kept[name] = now
    return kept
