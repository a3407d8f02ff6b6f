"""Tokenizer and image processor of a checkpoint in transformers' own LLaVA format.

The fast tokenizer written here gives the ids that a LLaVA was trained with: the text behind an image is tokenized as a
text of its own, and that behind `</s>` is not.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizerFast, LlavaImageProcessor, PreTrainedTokenizerFast

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.pixels import PLAIN_ASPECT_RATIOS
from llava.data.tiling import output_size
from llava.errors import FlagError
from llava.runtime.tokenizer import BLANK, LlamaTokenizer

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def hf_tokenizer(tokenizer: Any, save_folder: Path) -> PreTrainedTokenizerFast:
    """A fast tokenizer with an `<image>` token behind all others, whose ids are those of `tokenizer_image_token`.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        save_folder: where the tokenizer will be saved; a SentencePiece model is put there too.
    """
    if not isinstance(tokenizer, LlamaTokenizer):
        fast = AutoTokenizer.from_pretrained(tokenizer.name_or_path, local_files_only=True)
        fast.add_tokens([AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        fast.padding_side = "left"
        return fast
    backend = _llama_backend(tokenizer)
    # In the corrected form a blank goes in front of the first text and of one behind an image only, so the image is
    # found after a normalisation that writes the second of these; in the legacy form it goes in front of every text.
    backend.add_special_tokens([AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=not tokenizer.legacy)])
    named = {name: getattr(tokenizer, name) for name in SPECIAL_NAMES if getattr(tokenizer, name) is not None}
    shutil.copyfile(tokenizer.vocab_file, save_folder / "tokenizer.model")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        **named,
    )


def _llama_backend(tokenizer: LlamaTokenizer) -> Tokenizer:
    """Transformers' conversion of the SentencePiece model, with our own rule for blanks in front of texts."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(tokenizer.vocab_file, Path(folder) / "tokenizer.model")
        fast = LlamaTokenizerFast.from_pretrained(
            folder, add_bos_token=tokenizer.add_bos_token, add_eos_token=tokenizer.add_eos_token
        )
    backend = fast.backend_tokenizer
    if tokenizer.legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
        backend.pre_tokenizer = None
    else:
        image = DEFAULT_IMAGE_TOKEN
        backend.normalizer = normalizers.Replace(Regex(rf"{image}(?!{image}|\z)"), image + BLANK)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=BLANK, prepend_scheme="first", split=False)
    added = sorted(tokenizer.added_tokens_decoder.items())
    new = [token for index, token in added if index >= tokenizer.vocab_size]
    backend.add_special_tokens([AddedToken(token.content, special=True, normalized=False) for token in new])
    return backend


def hf_image_processor(image_processor: Any, aspect_ratio: str | None) -> LlavaImageProcessor:
    """Transformers' processor that treats images as `--image_aspect_ratio` does.

    Raises:
        FlagError: it cannot.
    """
    if aspect_ratio not in ("pad", "stretch", *PLAIN_ASPECT_RATIOS):
        raise FlagError(
            f"image_aspect_ratio {aspect_ratio}: transformers' LLaVA takes pad, square, resize and stretch; its "
            "LlavaNext, the counterpart of anyres, cuts and merges tiles by other rules of rounding"
        )
    height, width = output_size(image_processor)
    whole = {"height": height, "width": width}
    stretched = aspect_ratio == "stretch"
    return LlavaImageProcessor(
        do_pad=aspect_ratio == "pad",
        size=whole if stretched else dict(image_processor.size),
        do_center_crop=bool(getattr(image_processor, "do_center_crop", False)) and not stretched,
        crop_size=whole,
        resample=int(image_processor.resample),
        image_mean=list(image_processor.image_mean),
        image_std=list(image_processor.image_std),
    )
