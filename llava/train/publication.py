"""What is published of a finished LLaVA: its card's facts, and its vision tower where only this machine has it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError
from llava.model.formats import CheckpointContents, inspect_checkpoint
from llava.model.multimodal_encoder import open_clip_encoder
from llava.model.multimodal_encoder.builder import tower_at
from llava.model.multimodal_encoder.identity import DIGEST, TRAINED_FROM, weights_digest
from llava.runtime.files import read_json
from llava.runtime.publishing.access import Destination
from llava.runtime.publishing.card import Kind, Score, adapter_words
from llava.runtime.publishing.publish import publish
from llava.runtime.publishing.staging import ADAPTER_CONFIG, link_files, replace_json
from llava.runtime.weights.completeness import TOWER_FOLDER

CONFIG_FILE = "config.json"


def publish_llava(folder: Path, destination: Destination, scores: Sequence[Score] = ()) -> str:
    """Publish a finished LLaVA; arguments, result and errors as of `llava.runtime.publishing.publish.publish`."""
    return publish(folder, destination, llava_kind(inspect_checkpoint(folder)), carry_tower, scores)


def llava_kind(contents: CheckpointContents) -> Kind:
    """What a checkpoint of a LLaVA is, for its card."""
    sees = read_json(contents.folder / CONFIG_FILE).get("mm_vision_tower") is not None
    base = "" if contents.weights is not None else ', model_base="{base}"'
    usage = (
        "from llava.model.builder import load_pretrained_model\n\n"
        f'tokenizer, model, image_processor, _ = load_pretrained_model("{{repository}}"{base})'
    )
    tags = ("llava", *contents.extensions)
    return Kind("image-text-to-text" if sees else "text-generation", tags, _method(contents), usage)


def _method(contents: CheckpointContents) -> str:
    """What was trained, as the files say it."""
    parts = []
    if contents.weights is not None:
        parts.append("the language model in full")
    if contents.adapter is not None:
        parts.append(adapter_words(read_json(contents.folder / ADAPTER_CONFIG)))
    parts += [f"the extension `{name}`" for name in contents.extensions]
    if contents.projector is not None:
        parts.append("the projector")
    if contents.tower is not None:
        parts.append("the vision tower")
    return f"Fine-tuned with llava-extensions. Trained or carried: {', '.join(parts)}."


def carry_tower(folder: Path, staged: Path) -> None:
    """Put a tower that `config.json` names by a local path into the publication; others are left as they are named.

    Args:
        folder: of the checkpoint.
        staged: what is published, with its `config.json`.

    Raises:
        CheckpointError: there is no tower at that path.
    """
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    name = config.get("mm_vision_tower")
    if not isinstance(name, str) or (folder / TOWER_FOLDER).is_dir():
        _forget_places(folder, staged, config)
        return
    if name.startswith(open_clip_encoder.PREFIX):
        parts = open_clip_encoder.parse_name(name)
        if not parts.is_file:
            return
        source = Path(parts.pretrained)
        link_files(source.parent, [source.name], staged)
        config["mm_vision_tower"] = f"{open_clip_encoder.PREFIX}{parts.architecture}/{source.name}"
    elif Path(name).is_absolute() or Path(name).exists():
        if not Path(name).is_dir():
            raise CheckpointError(f"{folder / CONFIG_FILE}: names the vision tower {name}, which is not there")
        if _is_the_one(name, config):
            link_files(Path(name), _tower_files(Path(name)), staged / TOWER_FOLDER)
            config["mm_vision_tower"] = TOWER_FOLDER
        else:  # the base has other weights for it, in its own folder
            config["mm_vision_tower"] = Path(name).name
    _forget_places(folder, staged, config)


def _forget_places(folder: Path, staged: Path, config: dict[str, Any]) -> None:
    """Write `config.json` without what is only true on this machine."""
    for key in ("_name_or_path", TRAINED_FROM):
        if isinstance(config.get(key), str) and Path(config[key]).is_absolute():
            config[key] = Path(config[key]).name
    if config and config != read_json(folder / CONFIG_FILE):
        replace_json(staged / CONFIG_FILE, config)


def _is_the_one(name: str, config: dict[str, Any]) -> bool:
    """Whether the weights of a tower are those that the checkpoint was trained with, as far as it recorded them."""
    expected = config.get(DIGEST)
    if expected is None:
        return True
    tower = tower_at(name, argparse.Namespace(**config))
    tower.load_model()
    return weights_digest(tower.loaded(), tower.optional_weights(tower.loaded())) == expected


def _tower_files(folder: Path) -> list[str]:
    """The settings and weights in the folder of a tower; safetensors where there are both kinds."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    weights = [name for name in names if name.endswith(".safetensors")]
    weights = weights or [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    return [*(name for name in names if name.endswith(".json")), *weights]
