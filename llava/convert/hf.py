"""Converting a LLaVA to transformers' own format (`LlavaForConditionalGeneration`, for vLLM, SGLang, ...) and back.

`python -m llava.convert to-hf` and `from-hf` are the programs. LoRA is merged; what cannot be expressed is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig as HfConfig
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava.conversation import conv_templates
from llava.convert.hf_format import check_convertible, hf_config, hf_model, our_config, our_tensors, refuse_extensions
from llava.convert.hf_processor import chat_template, hf_image_processor, hf_tokenizer
from llava.convert.hf_reading import HfFolder, read_hf_folder
from llava.errors import CheckpointError, FlagError
from llava.model.builder import base_folder, load_pretrained_model
from llava.model.formats import TOWER_FOLDER, CheckpointContents, inspect_checkpoint, weight_file_names
from llava.model.language_model.backbones import CLASSES
from llava.runtime.files import naming, read_json, reading
from llava.runtime.hub import local_folder
from llava.runtime.output import check_new, new_path
from llava.runtime.program import errors_only
from llava.runtime.tokenizer import LlamaTokenizer, check_pieces
from llava.runtime.weights.base_weights import read_base
from llava.runtime.weights.settings import Rule, check_settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_hf(
    checkpoint: str | Path,
    output: str | Path,
    model_base: str | None = None,
    dtype: str = "auto",
    conv_mode: str = "vicuna_v1",
) -> Path:
    """Write a checkpoint in transformers' format, with its processor.

    LoRA is merged in fp32, whatever the dtype of the result.

    Args:
        checkpoint: of any kind that `load_pretrained_model` reads.
        output: folder to write.
        model_base: base of the checkpoint, where it is not the recorded one.
        dtype: `auto`, or a key of `DTYPES`.
        conv_mode: conversation template that becomes the chat template.

    Returns:
        The folder written. It appears whole or not at all.

    Raises:
        CheckpointError: the checkpoint cannot be read, or `output` exists already.
        FlagError: transformers' LLaVA cannot express it.
    """
    if conv_mode not in conv_templates:
        raise FlagError(f"--conv-mode {conv_mode}: no such template; there are {sorted(conv_templates)}")
    check_new(output, [checkpoint, model_base])
    contents = inspect_checkpoint(local_folder(checkpoint))
    refuse_extensions(sorted(contents.extensions))
    base = base_folder(contents, model_base)
    base = None if base is None else str(local_folder(base))
    target = _stored_dtype(contents, base) if dtype == "auto" else DTYPES[dtype]
    loaded_in = torch.float32 if contents.adapter is not None else target
    tokenizer, model, image_processor, _ = load_pretrained_model(
        str(contents.folder), base, device="cpu", torch_dtype=loaded_in
    )
    check_convertible(model)
    with new_path(output, [checkpoint, base]) as folder:
        folder.mkdir()
        tokens = hf_tokenizer(tokenizer, folder)
        image_token = tokens.convert_tokens_to_ids("<image>")
        record = {"tokenizer": _tokenizer_settings(tokenizer), "image_processor": image_processor.to_dict()}
        config = hf_config(model, image_token, record)
        pixels = hf_image_processor(image_processor, getattr(model.config, "image_aspect_ratio", None))
        template = chat_template(conv_templates[conv_mode], bool(getattr(model.config, "mm_use_im_start_end", False)))
        if template is None:
            print(f"no chat template is written: '{conv_mode}' has no counterpart; pass whole prompts to the processor")
        processor = LlavaProcessor(
            image_processor=pixels,
            tokenizer=tokens,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=template,
            num_additional_image_tokens=int(model.get_vision_tower().shape.class_token),
        )
        hf_model(model, config, target).save_pretrained(folder)
        processor.save_pretrained(folder)
        pixels.save_pretrained(folder)
    return Path(output)


def from_hf(checkpoint: str | Path, output: str | Path, image_aspect_ratio: str | None = None) -> Path:
    """Write a LLaVA of transformers' format in ours: full weights, tokenizer, and the tower in `vision_tower/`.

    Args:
        checkpoint: folder with model and processor.
        output: folder to write.
        image_aspect_ratio: overrides what the image processor says.

    Returns:
        The folder written. It appears whole or not at all.

    Raises:
        CheckpointError: it is no LLaVA of transformers, or has parts that we do not have; or `output` exists already.
    """
    check_new(output, [checkpoint])
    source = read_hf_folder(local_folder(checkpoint))
    aspect_ratio = image_aspect_ratio or ("pad" if source.image_settings.get("do_pad") else "square")
    vocab_size = source.record.get("vocab_size") or _vocabulary(source.tokenizer, source.config)
    ours = our_config(source.config, _select_feature(source), vocab_size, aspect_ratio, source.config_file)
    if image_aspect_ratio:
        ours.image_aspect_ratio = image_aspect_ratio
    ours.mm_vision_tower = TOWER_FOLDER
    processor = source.tower_processor()
    tokenizer = _our_tokenizer(source)
    with errors_only():
        model, missing = read_base(LlavaForConditionalGeneration, source.folder, source.config, dtype="auto")
    if missing:
        files = weight_file_names(source.folder)
        raise CheckpointError(f"{source.folder}: lacks the weights {sorted(missing)[:3]} in {files}")
    with new_path(output, [checkpoint]) as folder:
        folder.mkdir()
        model.model.vision_tower.save_pretrained(folder / TOWER_FOLDER)
        processor.save_pretrained(folder / TOWER_FOLDER)
        _save_language_model(model, ours, vocab_size, folder, source.config_file)
        tokenizer.save_pretrained(folder)
    return Path(output)


def _stored_dtype(contents: CheckpointContents, base: str | None) -> torch.dtype:
    """Dtype that the configuration of the weights names; fp32 if it names none."""
    content = read_json(Path(base or contents.folder) / "config.json")
    name = content.get("dtype") or content.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise CheckpointError(
            f"{base or contents.folder}: its weights are {name}; give --dtype, one of {sorted(DTYPES)}"
        )
    return DTYPES[name]


def _tokenizer_settings(tokenizer: Any) -> dict[str, Any] | None:
    """What the SentencePiece model alone does not say."""
    if not isinstance(tokenizer, LlamaTokenizer):
        return None
    new = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if i >= tokenizer.vocab_size}
    return {
        "legacy": tokenizer.legacy,
        "add_bos_token": tokenizer.add_bos_token,
        "add_eos_token": tokenizer.add_eos_token,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "pad_token": tokenizer.pad_token,
        "added": [new[index] for index in sorted(new)],
    }


def _our_tokenizer(source: HfFolder) -> Any:
    """The tokenizer: from the SentencePiece model if there is one, else the fast one as it is.

    Raises:
        CheckpointError: the files of the SentencePiece model are damaged.
    """
    path, record = source.folder / "tokenizer.model", source.record.get("tokenizer")
    if not path.is_file():
        return source.tokenizer
    settings = dict(record or {})
    added = settings.pop("added", [])
    named_in = source.config_file
    if record is None:
        named_in = source.folder / "tokenizer_config.json"
        stored = read_json(named_in)
        check_settings(stored, {"legacy": Rule("bool")}, named_in)
        settings = {"legacy": stored.get("legacy"), "pad_token": "<unk>", "padding_side": "right"}
    check_pieces(path)
    with reading(named_in, "no tokenizer can be made with these settings"):
        tokenizer = LlamaTokenizer(str(path), **settings)
        tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


def _vocabulary(tokenizer: Any, config: HfConfig) -> int:
    """Rows that a LLaVA needs: all up to the image token, if nothing but special tokens stands behind it."""
    image, size = config.image_token_index, config.text_config.vocab_size
    added = tokenizer.added_tokens_decoder
    behind = [index for index in tokenizer.get_vocab().values() if index >= image]
    return image if image < size and all(index in added and added[index].special for index in behind) else size


def _select_feature(source: HfFolder) -> str:
    """`patch` or `cls_patch`; `default` drops the first row, which must be a class token."""
    class_token = source.tower_class.class_token
    if source.config.vision_feature_select_strategy == "full":
        return "cls_patch" if class_token else "patch"
    if not class_token:
        raise CheckpointError(f"{source.config_file}: drops the first patch of a tower without class token")
    return "patch"


def _save_language_model(
    model: LlavaForConditionalGeneration, config: Any, vocab_size: int, folder: Path, config_file: Path
) -> None:
    """Full weights without the tower."""
    backbone = next(cls for cls in CLASSES if cls.config_class is type(config))
    tensors = our_tensors(model, vocab_size)
    tensors = {name: value for name, value in tensors.items() if not name.startswith("model.vision_tower.")}
    config.dtype = model.dtype
    with naming(config_file), torch.device("meta"):
        ours = backbone(config)
    ours.load_state_dict(tensors, assign=True)
    ours.tie_weights()
    given = model.generation_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(ours.generation_config, name, getattr(given, name))
    ours.save_pretrained(folder)
