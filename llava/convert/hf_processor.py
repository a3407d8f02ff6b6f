"""Tokenizer and image processor of a checkpoint in transformers' own LLaVA format.

The fast tokenizer written here gives the ids that a LLaVA was trained with: the text behind an image is tokenized as a
text of its own, and that behind `</s>` is not.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaTokenizerFast,
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    PreTrainedTokenizerFast,
)

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
        pieces = {name for name, index in tokenizer.get_vocab().items() if index < tokenizer.vocab_size}
        named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
        fast = LlamaTokenizerFast.from_pretrained(
            folder,
            add_bos_token=tokenizer.add_bos_token,
            add_eos_token=tokenizer.add_eos_token,
            # One behind the pieces is added below with the others, in the order of their ids.
            **{name: token for name, token in named.items() if token in pieces},
        )
    backend = fast.backend_tokenizer
    if tokenizer.legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
        backend.pre_tokenizer = None
    else:
        image = DEFAULT_IMAGE_TOKEN
        after_image = normalizers.Replace(Regex(rf"{image}(?!{image}|\z)"), image + BLANK)
        # A text that begins with an added token keeps its blank in front, unless the token is one of the named ones.
        names = plain_tokens(tokenizer)
        leading = [normalizers.Replace(Regex(rf"\A{re.escape(name)}(?!\z)"), BLANK + name) for name in names]
        backend.normalizer = normalizers.Sequence([after_image, *leading])
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=BLANK, prepend_scheme="first", split=False)
    # What is found before normalization divides the text, and the beginning of a part looks like that of the text.
    later = not tokenizer.legacy and bool(plain_tokens(tokenizer))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=later) for name in added_tokens(tokenizer)])
    return backend


def added_tokens(tokenizer: Any) -> list[str]:
    """All added tokens of a tokenizer, in the order of their ids."""
    return [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]


def plain_tokens(tokenizer: Any) -> list[str]:
    """Those that are not named as special tokens, as `<|im_start|>` of ChatML."""
    return [name for name in added_tokens(tokenizer) if name not in tokenizer.all_special_tokens]


def hf_image_processor(
    image_processor: Any, aspect_ratio: str | None, pinpoints: list[list[int]] | None = None
) -> LlavaImageProcessor | LlavaNextImageProcessor:
    """Transformers' processor that treats images as `--image_aspect_ratio` does.

    Args:
        image_processor: of the tower.
        aspect_ratio: of the LLaVA.
        pinpoints: possible resolutions of `anyres` as (height, width).

    Raises:
        FlagError: it cannot.
    """
    if aspect_ratio not in ("pad", "stretch", "anyres", *PLAIN_ASPECT_RATIOS):
        raise FlagError(
            f"image_aspect_ratio {aspect_ratio}: transformers' LLaVA takes pad, square, resize and stretch, its "
            "LLaVA-NeXT anyres"
        )
    height, width = output_size(image_processor)
    whole = {"height": height, "width": width}
    stretched = aspect_ratio == "stretch"
    settings = {
        "size": whole if stretched else {side: n for side, n in dict(image_processor.size).items() if n is not None},
        "do_center_crop": bool(getattr(image_processor, "do_center_crop", False)) and not stretched,
        "crop_size": whole,
        "resample": int(image_processor.resample),
        "image_mean": list(image_processor.image_mean),
        "image_std": list(image_processor.image_std),
    }
    if aspect_ratio == "anyres":  # whose `do_pad` fills up the batch, not the image
        return LlavaNextImageProcessor(image_grid_pinpoints=pinpoints, **settings)
    return LlavaImageProcessor(do_pad=aspect_ratio == "pad", **settings)
