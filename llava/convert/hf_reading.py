"""Reading a folder in transformers' own format (its LLaVA or LLaVA-NeXT), each file checked first.

transformers fills missing values by defaults and reports damaged files by many kinds of errors. Here every error names
the file. What our own `to-hf` recorded in `config.json` is required as a whole where it is present.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, LlavaNextConfig
from transformers import LlavaConfig as HfConfig

from llava.convert.hf_format import DERIVED, SETTINGS_KEY, swapped
from llava.errors import CheckpointError, FlagError
from llava.model.multimodal_encoder.builder import KINDS
from llava.model.multimodal_encoder.transformers_tower import TransformersTower, check_image_size
from llava.model.settings import IMAGE_PROCESSOR, VISION_KEYS, VISION_TOWER
from llava.runtime.files import read_json, reading, refuse_pointers
from llava.runtime.hub import TOKENIZER_FILES
from llava.runtime.weights.settings import TOKEN, Rule, Rules, check_language_model, check_settings
from llava.runtime.weights.weight_files import check_weight_files

HF_LLAVA: Rules = {
    "image_token_index": Rule("int", 0, TOKEN, required=True),
    "vision_feature_select_strategy": Rule("str", required=True, choices=("default", "full")),
    "projector_hidden_act": Rule("str", required=True),
    "multimodal_projector_bias": Rule("bool"),
}
"""`config.json` of a LLaVA in transformers' format."""

TOKENIZER_SETTINGS: Rules = {
    "legacy": Rule("bool", required=True),
    "add_bos_token": Rule("bool", required=True),
    "add_eos_token": Rule("bool", required=True),
    "model_max_length": Rule("float", 1, 1e31, required=True),  # transformers writes 1e30 for no limit
    "padding_side": Rule("str", required=True, choices=("left", "right")),
    **{name: Rule("str") for name in ("bos_token", "eos_token", "pad_token")},
}
"""What `to-hf` records of a SentencePiece tokenizer."""

TOWER_SETTINGS = ("size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std", "rescale_factor")
"""Settings of an image processor that the tower's own processor takes."""

IMPLIED = ("do_resize", "do_normalize")
"""Settings that transformers leaves out of `preprocessor_config.json` where they are true."""


@dataclass(frozen=True)
class HfFolder:
    """What a folder in transformers' format contains, weights apart.

    Attributes:
        folder: the folder.
        config: of the model.
        record: what `to-hf` recorded; empty in folders of other programs.
        tokenizer: with the `<image>` token.
        image_settings: of its image processor.
        tower_class: the kind of its vision tower.
        chat_template: of its processor, or where that has none, of its tokenizer.
    """

    folder: Path
    config: HfConfig | LlavaNextConfig
    record: Mapping[str, Any]
    tokenizer: Any
    image_settings: Mapping[str, Any]
    tower_class: type[TransformersTower]
    chat_template: str | None

    @property
    def config_file(self) -> Path:
        """For messages."""
        return self.folder / "config.json"

    def tower_processor(self) -> Any:
        """Image processor of the tower by itself.

        Raises:
            CheckpointError: the recorded settings make images of another size than the tower takes.
        """
        settings = self.record.get("image_processor") or self.image_settings
        source = self.config_file if "image_processor" in self.record else _image_processor_file(self.folder)
        options = {name: settings[name] for name in TOWER_SETTINGS if settings.get(name) is not None}
        with reading(source, "no image processor can be made with these settings"):
            processor = self.tower_class.processor_class(**options)
        check_image_size(processor, self.config.vision_config.image_size, source)
        return processor


def read_hf_folder(folder: Path) -> HfFolder:
    """Read and check everything but the weights, whose files are looked at only.

    Raises:
        CheckpointError: it is not a LLaVA of transformers, or a file is missing or damaged; the file is named.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: contains no config.json, so it is not a checkpoint")
    refuse_pointers(folder)
    for each in sorted(folder.glob("*.json")):
        read_json(each)  # whose messages name the file
    content = read_json(path)
    with reading(path):
        config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, HfConfig | LlavaNextConfig):
        raise CheckpointError(f"{path}: says '{config.model_type}'; expected transformers' llava or llava_next")
    _check_config(content, path)
    check_weight_files(folder)
    tower_class = _tower_class(config, path)
    record = _checked_settings(content, path)
    images = _image_settings(folder)
    if isinstance(config, LlavaNextConfig):
        _check_pinpoints(config, images, folder)
    tokenizer = _tokenizer(folder)
    return HfFolder(folder, config, record, tokenizer, images, tower_class, _chat_template(folder, tokenizer))


def _check_pinpoints(config: LlavaNextConfig, images: Mapping[str, Any], folder: Path) -> None:
    """Model and image processor must cut tiles for the same resolutions.

    Raises:
        CheckpointError: they differ, or are not sizes.
    """
    cut = images.get("image_grid_pinpoints")
    try:
        same = swapped(cut) == swapped(config.image_grid_pinpoints)
    except FlagError as error:
        raise CheckpointError(f"{folder / 'config.json'} or {_image_processor_file(folder)}: {error}") from error
    if not same:
        raise CheckpointError(
            f"{_image_processor_file(folder)} cuts images for {cut}, but {folder / 'config.json'} has "
            f"image_grid_pinpoints {config.image_grid_pinpoints}"
        )


def _check_config(content: Mapping[str, Any], path: Path) -> None:
    index = content.get("image_token_index", content.get("image_token_id"))  # later versions write the second name
    check_settings({**content, "image_token_index": index}, HF_LLAVA, path)
    for part in ("text_config", "vision_config"):
        if not isinstance(content.get(part), dict):
            raise CheckpointError(f"{path}: its '{part}' is not an object")
    # What equals a default of transformers is left out.
    check_language_model(content["text_config"], f"{path} (text_config)", complete=False)
    check_settings(content["vision_config"], VISION_TOWER, f"{path} (vision_config)", complete=False)
    layer = content.get("vision_feature_layer")
    if not isinstance(layer, list):  # several layers are refused by what they mean
        check_settings({"mm_vision_select_layer": layer}, {"mm_vision_select_layer": Rule("int", required=True)}, path)


def _checked_settings(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """What `to-hf` recorded, whole.

    Raises:
        CheckpointError: a part of it is missing or impossible.
    """
    if SETTINGS_KEY not in content:
        return {}
    record, where = content[SETTINGS_KEY], f"{path} ({SETTINGS_KEY})"
    if not isinstance(record, dict):
        raise CheckpointError(f"{where}: is not an object")
    rules = {"settings": Rule("dict", required=True), "image_processor": Rule("dict", required=True)}
    rows = content["text_config"].get("vocab_size", 2**24)
    check_settings(record, rules | {"vocab_size": Rule("int", 1, rows, required=True)}, where)
    check_settings(record["settings"], VISION_KEYS, where)
    lacking = [name for name in DERIVED if name not in record["settings"]]
    if lacking:
        raise CheckpointError(f"{where}: its settings lack {lacking}")
    check_settings(record["image_processor"], IMAGE_PROCESSOR, where)
    tokenizer = record.get("tokenizer")
    if "tokenizer" not in record or not isinstance(tokenizer, dict | None):
        raise CheckpointError(f"{where}: its 'tokenizer' is neither an object nor null")
    check_settings(record, {"chat_template": Rule("str")}, where)
    if tokenizer is not None:
        check_settings(tokenizer, TOKENIZER_SETTINGS, where)
        for name in ("added", "plain"):  # earlier versions wrote the first alone
            tokens = tokenizer.get(name, [] if name == "plain" else None)
            if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
                raise CheckpointError(f"{where}: the '{name}' tokens of its tokenizer are not a list of texts")
    return record


def _tower_class(config: HfConfig | LlavaNextConfig, path: Path) -> type[TransformersTower]:
    kind = config.vision_config.model_type
    tower_class = KINDS.get(kind)
    if tower_class is None or not issubclass(tower_class, TransformersTower):
        raise CheckpointError(f"{path}: its vision tower is a '{kind}'; towers here are {sorted(KINDS)}")
    return tower_class


def _tokenizer(folder: Path) -> Any:
    files = sorted({path.name for pattern in TOKENIZER_FILES for path in folder.glob(pattern)})
    if not {"tokenizer.json", "tokenizer.model"} & set(files):
        raise CheckpointError(f"{folder}: contains neither tokenizer.json nor tokenizer.model")
    with reading(folder, f"no tokenizer can be made of {', '.join(files)}"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _chat_template(folder: Path, tokenizer: Any) -> str | None:
    """As newer versions of transformers write it, as older ones did, or that of the tokenizer.

    Raises:
        CheckpointError: it is not a text.
    """
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        with reading(jinja):
            return jinja.read_text(encoding="utf-8")
    for path in (folder / "chat_template.json", folder / "processor_config.json"):
        text = read_json(path).get("chat_template") if path.is_file() else None
        if text is not None and not isinstance(text, str):
            raise CheckpointError(f"{path}: its 'chat_template' is {text!r:.60}; expected the text of a template")
        if text is not None:
            return text
    return tokenizer.get_chat_template() if tokenizer.chat_template else None


def _image_processor_file(folder: Path) -> Path:
    """The file that says how images are treated: newer versions of transformers keep it with the whole processor."""
    path = folder / "processor_config.json"
    nested = path.is_file() and "image_processor" in read_json(path)
    return path if nested else folder / "preprocessor_config.json"


def _image_settings(folder: Path) -> Mapping[str, Any]:
    path = _image_processor_file(folder)
    content = read_json(path)
    values = content.get("image_processor", content) if path.name == "processor_config.json" else content
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: its 'image_processor' is not an object")
    rules = IMAGE_PROCESSOR | {name: dataclasses.replace(IMAGE_PROCESSOR[name], required=False) for name in IMPLIED}
    check_settings(values, rules | {"do_pad": Rule("bool")}, path)
    with reading(path):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return processor.to_dict()
