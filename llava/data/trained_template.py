"""The conversation template that a checkpoint was trained with: written into its `config.json`, and read from there.

Folders that were written before `config.json` had it say it in `run.json` (`--version`). What upstream writes says
nothing; how such a model is asked follows from its name (`llava/eval/answering/conv_mode.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.conversation import TOKENIZER_VERSION, conv_templates
from llava.data.markers import user_marker_ids
from llava.data.templates import VERSIONS_WITHOUT_TEMPLATE, template_of_mode
from llava.errors import CheckpointError
from llava.runtime.files import read_json, reading
from llava.runtime.hub import local_folder
from llava.runtime.weights.completeness import RUN_FILE
from llava.runtime.weights.run_file import latest

TEMPLATE_KEY = "conversation_template"
"""Key of the template's name in `config.json`: a value of `--conv-mode`."""

CHAT_TEMPLATE_KEY = "conversation_chat_template"
"""Key of the text of the tokenizer's own chat template (Jinja), where that is the template."""

SMALL_FILES = ("config.json", RUN_FILE)
"""All that has to be fetched of a model on a hub to know its template."""


@dataclass(frozen=True)
class TrainedTemplate:
    """How a model was trained to be asked.

    Attributes:
        name: value of `--conv-mode`.
        chat_template: Jinja text, where the name is `tokenizer`; None: that of the tokenizer in the folder.
        source: the file that says so.
    """

    name: str
    chat_template: str | None
    source: Path


def conv_mode_of_version(version: str) -> str:
    """The `--conv-mode` that writes the prompts of a `--version`: `v0` and `v0.5` mean the default template there."""
    return "v1" if version in VERSIONS_WITHOUT_TEMPLATE else version


def version_of_conv_mode(conv_mode: str) -> str:
    """The `--version` that trains on the prompts of a `--conv-mode`: the template named `v0` is `default` as well."""
    return "default" if conv_mode in VERSIONS_WITHOUT_TEMPLATE else conv_mode


def same_template(one: str, other: str) -> bool:
    """True if two values of `--conv-mode` name one template, as `v1` and `vicuna_v1` do."""
    return one == other or (one in conv_templates and conv_templates.get(other) == conv_templates[one])


def record_template(config: Any, version: str | None, tokenizer: Any) -> None:
    """Write the template of a training into the configuration of its model, or remove that of its base.

    Args:
        config: of the model.
        version: value of `--version`; None where no template of ours writes the prompts.
        tokenizer: whose chat template is meant by the version `tokenizer`.
    """
    for key in (TEMPLATE_KEY, CHAT_TEMPLATE_KEY):
        if hasattr(config, key):
            delattr(config, key)
    if version is None:
        return
    name = conv_mode_of_version(version)
    setattr(config, TEMPLATE_KEY, name)
    if name == TOKENIZER_VERSION:
        setattr(config, CHAT_TEMPLATE_KEY, tokenizer.get_chat_template())


def take_trained_template(config: Any, tokenizer: Any, folder: Path) -> None:
    """Have a loaded model know the template that it was trained with, wherever its folder says it.

    Args:
        config: of the model; what it says then is written by merging and converting. Without `user_marker_ids` it gets
            those of the template, or of v1 where the folder does not say.
        tokenizer: gets the chat template of the training, if that is the template.
        folder: of the checkpoint.

    Raises:
        CheckpointError: the folder names a template that does not exist.
    """
    trained = trained_template(folder)
    if trained is not None:
        if trained.chat_template is not None:
            _take_chat_template(tokenizer, trained.chat_template, trained.source)
        setattr(config, TEMPLATE_KEY, trained.name)
        if trained.name == TOKENIZER_VERSION and tokenizer.chat_template:
            setattr(config, CHAT_TEMPLATE_KEY, tokenizer.get_chat_template())
    if getattr(config, "user_marker_ids", None) is None:
        name = "v1" if trained is None else trained.name
        config.user_marker_ids = user_marker_ids(template_of_mode(name, tokenizer), tokenizer)


def _take_chat_template(tokenizer: Any, text: str, source: Path) -> None:
    own = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if text == own:
        return
    tokenizer.chat_template = text
    if own is not None:
        print(
            f"[WARNING] {tokenizer.name_or_path}: this tokenizer has another chat template than the model was trained "
            f"with; using that of {source}"
        )


def trained_template(model: str | Path, cache_dir: str | None = None) -> TrainedTemplate | None:
    """The template that a model was trained with; None if its folder does not say, or does not exist.

    Args:
        model: folder, or id on a model hub.
        cache_dir: where files from the hub are kept.

    Raises:
        CheckpointError: the folder names a template that does not exist; or the hub cannot be asked.
    """
    folder = local_folder(model, SMALL_FILES, cache_dir=cache_dir)
    config, record = (folder / name for name in SMALL_FILES)
    found = _in_config(config) if config.is_file() else None
    return _in_record(record) if found is None and record.is_file() else found


def template_settings(folder: Path) -> dict[str, str]:
    """What the `config.json` of a copy of a folder has to say of its template; empty if the folder does not say.

    Raises:
        CheckpointError: the folder names a template that does not exist.
    """
    trained = trained_template(folder)
    if trained is None:
        return {}
    text = {} if trained.chat_template is None else {CHAT_TEMPLATE_KEY: trained.chat_template}
    return {TEMPLATE_KEY: trained.name, **text}


def _in_config(path: Path) -> TrainedTemplate | None:
    content = read_json(path)
    name, text = content.get(TEMPLATE_KEY), content.get(CHAT_TEMPLATE_KEY)
    if name is None:
        return None
    if not isinstance(text, str | None):
        raise CheckpointError(f"{path}: its '{CHAT_TEMPLATE_KEY}' is {text!r:.60}; expected the text of a template")
    return TrainedTemplate(_known(name, TEMPLATE_KEY, path), text, path)


def _in_record(path: Path) -> TrainedTemplate | None:
    """By the options of the run. A program around the training (LaVIN's) writes prompts of its own."""
    arguments = latest(read_json(path)).get("arguments")
    model = arguments.get("model") if isinstance(arguments, Mapping) else None
    version = model.get("version") if isinstance(model, Mapping) else None
    if version is None or arguments.get("program"):
        return None
    name = _known(conv_mode_of_version(version) if isinstance(version, str) else version, "version", path)
    return TrainedTemplate(name, _chat_template_of(path.parent) if name == TOKENIZER_VERSION else None, path)


def _chat_template_of(folder: Path) -> str | None:
    """The chat template of the tokenizer in a folder, which the run of this folder used."""
    jinja, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if jinja.is_file():
        with reading(jinja):
            return jinja.read_text(encoding="utf-8")
    text = read_json(settings).get("chat_template") if settings.is_file() else None
    return text if isinstance(text, str) else None


def _known(name: Any, key: str, path: Path) -> str:
    known = sorted({TOKENIZER_VERSION, *conv_templates})
    if name not in known:
        raise CheckpointError(f"{path}: its '{key}' is {name!r:.60}, and there is no such template; known: {known}")
    return name
