"""Converting a LLaVA to transformers' own format (its LLaVA or LLaVA-NeXT, for vLLM, SGLang, ...) and back.

`python -m llava.convert to-hf` and `from-hf` are the programs. LoRA is merged; what cannot be expressed is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import LlavaConfig as HfConfig
from transformers import LlavaNextConfig, LlavaNextProcessor, LlavaProcessor

from llava.conversation import TOKENIZER_VERSION
from llava.convert.hf_format import (
    MODELS,
    HfModel,
    check_convertible,
    hf_config,
    hf_model,
    our_config,
    our_tensors,
    refuse_extensions,
)
from llava.convert.hf_processor import added_tokens, hf_image_processor, hf_tokenizer, plain_tokens
from llava.convert.hf_reading import HfFolder, read_hf_folder
from llava.convert.hf_template import chat_template, recognized_mode, takes_texts
from llava.data.answer_end import answer_end, turn_end
from llava.data.templates import template_of_mode
from llava.data.trained_template import TEMPLATE_KEY, record_template, same_template
from llava.errors import CheckpointError, FlagError
from llava.eval.answering.conv_mode import conv_mode_of_turns
from llava.eval.answering.options import Fallback
from llava.eval.answering.prompts import check_conv_mode, infer_conv_mode
from llava.model.builder import base_folder, load_pretrained_model, refuse_adapted
from llava.model.formats import TOWER_FOLDER, inspect_checkpoint, weight_file_names
from llava.model.language_model.backbones import CLASSES
from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.model.stored_dtype import DTYPES, stored_dtype
from llava.runtime.files import naming, read_json, reading
from llava.runtime.hub import get_model_name_from_path, local_folder
from llava.runtime.output import check_new, new_path
from llava.runtime.program import errors_only
from llava.runtime.tokenizer import LlamaTokenizer, add_ends, check_pieces
from llava.runtime.weights.base_weights import read_base
from llava.runtime.weights.settings import Rule, check_settings


def to_hf(
    checkpoint: str | Path,
    output: str | Path,
    model_base: str | None = None,
    dtype: str = "auto",
    conv_mode: str | None = None,
) -> Path:
    """Write a checkpoint in transformers' format, with its processor.

    LoRA is merged in fp32, whatever the dtype of the result.

    Args:
        checkpoint: of any kind that `load_pretrained_model` reads.
        output: folder to write.
        model_base: base of the checkpoint, where it is not the recorded one.
        dtype: `auto`, or a key of `DTYPES`.
        conv_mode: conversation template that becomes the chat template; None: that of the checkpoint's training.

    Returns:
        The folder written. It appears whole or not at all.

    Raises:
        CheckpointError: the checkpoint cannot be read, or `output` exists already.
        FlagError: transformers' LLaVA cannot express it.
    """
    # What cannot be expressed is refused before anything is loaded.
    mode = exported_mode(conv_mode, str(checkpoint))
    check_new(output, [checkpoint, model_base])
    contents = inspect_checkpoint(local_folder(checkpoint))
    refuse_extensions(sorted(contents.extensions))
    base = base_folder(contents, model_base)
    base = None if base is None else str(local_folder(base))
    # LoRA is merged in fp32 and rounded once.
    target = stored_dtype(base or contents.folder, "; give --dtype") if dtype == "auto" else DTYPES[dtype]
    loaded_in = torch.float32 if contents.adapter is not None else target
    tokenizer, model, image_processor, _ = load_pretrained_model(
        str(contents.folder), base, device="cpu", torch_dtype=loaded_in
    )
    refuse_adapted(model, contents)
    check_convertible(model)
    wrapped = bool(getattr(model.config, "mm_use_im_start_end", False))
    template = chat_template(template_of_mode(mode, tokenizer), wrapped)
    with new_path(output, [checkpoint, base]) as folder:
        folder.mkdir()
        # The image token gets the id behind the vocabulary; what transformers has no place for is recorded.
        tokens = hf_tokenizer(tokenizer, folder)
        image_token = tokens.convert_tokens_to_ids("<image>")
        record = {
            "tokenizer": _tokenizer_settings(tokenizer),
            "image_processor": image_processor.to_dict(),
            "chat_template": tokenizer.get_chat_template() if tokenizer.chat_template else None,
        }
        tokens.chat_template = template
        config = hf_config(model, image_token, record)
        aspect_ratio = getattr(model.config, "image_aspect_ratio", None)
        pixels = hf_image_processor(image_processor, aspect_ratio, getattr(config, "image_grid_pinpoints", None))
        # The processor counts the patches of an image by itself, as the model does.
        _export_end(model, tokenizer, mode)
        processor_class = LlavaNextProcessor if isinstance(config, LlavaNextConfig) else LlavaProcessor
        processor = processor_class(
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
    print(f"chat template: the prompts of --conv-mode {mode}")
    return Path(output)


def exported_mode(wanted: str | None, checkpoint: str) -> str:
    """The template that becomes the chat template: that of the training, unless another is asked for.

    Of a checkpoint that does not say, the name tells it as to upstream; Vicuna's v1 by the system text of LLaVA-1.5.

    Raises:
        FlagError: `wanted` is not the name of a template.
        CheckpointError: the folder names a template that does not exist, or the hub cannot be asked.
    """
    guess = infer_conv_mode(get_model_name_from_path(checkpoint))
    fallback = Fallback("vicuna_v1" if guess in ("llava_v0", "llava_v1") else guess)
    return conv_mode_of_turns(fallback if wanted is None else wanted, checkpoint)


def _export_end(model: LlavaForCausalLM, tokenizer: Any, mode: str) -> None:
    """Make the exported generation_config name the token that ends an answer of the template, or say the text."""
    end = answer_end(turn_end(template_of_mode(mode, tokenizer), tokenizer), tokenizer, model.generation_config)
    add_ends(model.generation_config, end.ids)
    if end.texts:
        print(f"answers of '{mode}' end with {end.texts[0]!r}, which is not a token: use it as a stop string")


def from_hf(
    checkpoint: str | Path,
    output: str | Path,
    image_aspect_ratio: str | None = None,
    conv_mode: str | None = None,
) -> Path:
    """Write a LLaVA of transformers' format in ours: full weights, tokenizer, and the tower in `vision_tower/`.

    Args:
        checkpoint: folder with model and processor.
        output: folder to write.
        image_aspect_ratio: overrides what the image processor says.
        conv_mode: the conversation template that the model was trained with; None: what `to-hf` recorded, else the one
            whose prompts the folder's chat template writes.

    Returns:
        The folder written. It appears whole or not at all.

    Raises:
        CheckpointError: it is no LLaVA of transformers, or has parts that we do not have; or `output` exists already.
        FlagError: `conv_mode` is not the name of a template.
    """
    check_new(output, [checkpoint])
    if conv_mode is not None:
        check_conv_mode(conv_mode)
    source = read_hf_folder(local_folder(checkpoint))
    aspect_ratio = image_aspect_ratio or ("pad" if source.image_settings.get("do_pad") else "square")
    vocab_size = source.record.get("vocab_size") or _vocabulary(source.tokenizer, source.config)
    ours = our_config(source.config, _select_feature(source), vocab_size, aspect_ratio, source.config_file)
    if image_aspect_ratio and isinstance(source.config, LlavaNextConfig) and image_aspect_ratio != "anyres":
        raise FlagError(
            f"--image_aspect_ratio {image_aspect_ratio}: {source.folder} is a LLaVA-NeXT, whose images are anyres"
        )
    if image_aspect_ratio:
        ours.image_aspect_ratio = image_aspect_ratio
    ours.mm_vision_tower = TOWER_FOLDER
    processor = source.tower_processor()
    tokenizer = _our_tokenizer(source)
    if "chat_template" in source.record:
        tokenizer.chat_template = source.record["chat_template"]
    _record_template(ours, tokenizer, source, conv_mode)
    with errors_only():
        model, missing = read_base(MODELS[type(source.config)], source.folder, source.config, dtype="auto")
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


def _record_template(config: Any, tokenizer: Any, source: HfFolder, wanted: str | None) -> None:
    """Write the template of the model's training into its configuration, as far as anybody says it.

    Args:
        config: with what `to-hf` recorded.
        tokenizer: with the chat template that it had before `to-hf`; gets that of a folder which others wrote, if that
            is the template.
        source: the folder.
        wanted: the template that was asked for.

    Raises:
        FlagError: `wanted` is `tokenizer`, and the chat template there is none for texts.
    """
    recorded = getattr(config, TEMPLATE_KEY, None)
    if recorded is not None and (wanted is None or same_template(wanted, recorded)):
        return
    if recorded is not None:
        print(
            f"[WARNING] {source.config_file}: was trained with the template '{recorded}', but --conv-mode asks for "
            f"'{wanted}': using '{wanted}'"
        )
    mode = wanted
    if mode is None and source.record:  # the checkpoint did not say it before `to-hf` either, which had to guess
        return
    if mode is None and source.chat_template is not None:
        mode = recognized_mode(source.chat_template, source.tokenizer)
    if mode is None:
        print(
            f"[WARNING] {source.folder}: no template here writes the prompts of its chat template, so the checkpoint "
            "does not say how it is asked; name the template by --conv-mode"
        )
        return
    if mode == TOKENIZER_VERSION and "chat_template" not in source.record:
        if source.chat_template is None or not takes_texts(source.chat_template, source.tokenizer):
            raise FlagError(
                f"--conv-mode {mode}: {source.folder} has no chat template that takes messages of one text, <image> "
                "within it, as prompts are written here; name another template"
            )
        tokenizer.chat_template = source.chat_template
    template_of_mode(mode, tokenizer)  # refused where the tokenizer has no template of its own
    record_template(config, mode, tokenizer)
    print(f"template: --conv-mode {mode}")


def _tokenizer_settings(tokenizer: Any) -> dict[str, Any] | None:
    """What the SentencePiece model alone does not say."""
    if not isinstance(tokenizer, LlamaTokenizer):
        return None
    return {
        "legacy": tokenizer.legacy,
        "add_bos_token": tokenizer.add_bos_token,
        "add_eos_token": tokenizer.add_eos_token,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        **{name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")},
        "added": added_tokens(tokenizer),
        "plain": plain_tokens(tokenizer),
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
    added, plain = settings.pop("added", []), settings.pop("plain", [])
    named_in = source.config_file
    if record is None:
        named_in = source.folder / "tokenizer_config.json"
        stored = read_json(named_in)
        check_settings(stored, {"legacy": Rule("bool")}, named_in)
        ends = {name: getattr(source.tokenizer, name) for name in ("bos_token", "eos_token")}
        settings = {"legacy": stored.get("legacy"), "pad_token": "<unk>", "padding_side": "right"} | ends
        stored_tokens = source.tokenizer.added_tokens_decoder
        image = source.config.image_token_index
        added = [stored_tokens[index].content for index in sorted(stored_tokens) if index < image]
        plain = [name for name in plain_tokens(source.tokenizer) if name in added]
    check_pieces(path)
    with reading(named_in, "no tokenizer can be made with these settings"):
        plainest = LlamaTokenizer(str(path))
        known = {name: index for name, index in plainest.get_vocab().items() if index < plainest.vocab_size}
        new = iter(range(plainest.vocab_size, plainest.vocab_size + len(added)))
        decoder = {
            known[name] if name in known else next(new): AddedToken(name, special=True, normalized=False)
            for name in added
        }
        tokenizer = LlamaTokenizer(str(path), **settings, added_tokens_decoder=decoder)
        tokenizer.add_tokens([name for name in added if name not in plain], special_tokens=True)
    return tokenizer


def _vocabulary(tokenizer: Any, config: HfConfig | LlavaNextConfig) -> int:
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


def _save_language_model(model: HfModel, config: Any, vocab_size: int, folder: Path, config_file: Path) -> None:
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
