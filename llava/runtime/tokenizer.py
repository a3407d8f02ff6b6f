"""Tokenizers whose ids and character positions are known exactly.

`LlamaTokenizer` gives the ids of the SentencePiece-based ("slow") Llama tokenizer that LLaVA was trained with, in its
legacy and its corrected form; transformers 5 has only a re-implementation that differs for leading blanks. It also
says which characters each token covers, which is what label masks are made from (`llava/data/labels.py`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizer, PreTrainedTokenizerBase

from llava.errors import CheckpointError
from llava.runtime.files import read_json, reading, refuse_pointers
from llava.runtime.hub import TOKENIZER_FILES, local_folder
from llava.segments import Span

BLANK = "\u2581"
"""SentencePiece writes a blank as this character."""

NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""Protocol-buffer bytes of `normalizer_spec { add_dummy_prefix: false }`; appended to a model they override it."""


class TokenSpan(NamedTuple):
    """One token of a text: its SentencePiece piece or added-token text, and the characters it covers.

    `characters` is empty for a dummy prefix and for all but the last byte of a character spelt in bytes; such a token
    belongs to the character that follows.
    """

    token: str
    characters: Span


class Covered(NamedTuple):
    """Token ids of a text, and for each one the characters that it covers, `[start, end)`."""

    ids: list[int]
    spans: list[tuple[int, int]]


class LlamaTokenizer(PreTrainedTokenizer):
    """SentencePiece tokenizer of Llama and Vicuna, equal to transformers 4.37 `LlamaTokenizer(use_fast=False)`.

    Added tokens are cut out of the text first. Corrected form (`legacy=False`): one blank goes in front of the whole
    text and a piece after an added token gets none. Legacy form: SentencePiece puts a blank before every piece.

    Args:
        vocab_file: path of `tokenizer.model`.
        legacy: form as above; files that do not say are legacy, as in transformers 4.37.
        add_bos_token: put `<s>` in front of every text.
        add_eos_token: put `</s>` behind every text.
        kwargs: passed on to transformers (special tokens, `model_max_length`, `padding_side`, ...).

    Raises:
        CheckpointError: an added token wants blanks around it removed, which no Llama tokenizer does; or a token is to
            be added to every text, but there is none.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 (transformers' own way to declare it)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str,
        legacy: bool | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_file = vocab_file
        self.legacy = True if legacy is None else legacy
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        model = Path(vocab_file).read_bytes()
        self.sp_model = sentencepiece.SentencePieceProcessor(
            model_proto=model if self.legacy else model + NO_DUMMY_PREFIX
        )
        pattern = {(True, False): "bos", (False, True): "eos", (True, True): "bos_eos", (False, False): "none"}
        kwargs["special_tokens_pattern"] = pattern[add_bos_token, add_eos_token]
        defaults = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        super().__init__(legacy=self.legacy, **(defaults | kwargs))
        for name in ("bos_token", "eos_token"):
            if getattr(self, f"add_{name}") and getattr(self, name) is None:
                raise CheckpointError(
                    f"{Path(vocab_file).parent / 'tokenizer_config.json'}: add_{name} is true, but there is no {name}"
                )
        for token in self.added_tokens_decoder.values():
            if token.lstrip or token.rstrip or token.single_word:
                raise CheckpointError(
                    f"{vocab_file}: the added token {token.content!r} has lstrip, rstrip or single_word set, which "
                    "this tokenizer does not carry out; set them to false in tokenizer_config.json"
                )

    @property
    def vocab_size(self) -> int:
        """Number of pieces in `tokenizer.model`, added tokens not counted."""
        return len(self._piece_ids)

    @cached_property
    def _piece_ids(self) -> dict[str, int]:
        return {self.sp_model.id_to_piece(index): index for index in range(self.sp_model.get_piece_size())}

    def get_vocab(self) -> dict[str, int]:
        """Every piece and added token with its id."""
        return self._piece_ids | self._added_tokens_encoder

    @cached_property
    def _byte_pieces(self) -> frozenset[str]:
        return frozenset(piece for piece, index in self._piece_ids.items() if self.sp_model.is_byte(index))

    @cached_property
    def _ascii_bytes(self) -> dict[str, str]:
        """The pieces that are a character spelt in one byte."""
        return {piece: chr(int(piece[1:-1], 16)) for piece in self._byte_pieces if int(piece[1:-1], 16) < 128}

    def encode_covered(self, text: str) -> Covered:
        """Ids of `text`, without `<s>` and `</s>` around it, and the characters that each one covers.

        Raises:
            CheckpointError: see `token_spans`.
        """
        tokens, ends = self._cover(text)
        added, pieces, unknown = self._added_tokens_encoder, self._piece_ids, self.sp_model.unk_id()
        ids = [added[token] if token in added else pieces.get(token, unknown) for token in tokens]
        return Covered(ids, list(zip([0, *ends], ends, strict=False)))

    def token_spans(self, text: str) -> list[TokenSpan]:
        """Tokens of `text`, without `<s>` and `</s>` around it, and the characters of `text` that each one covers.

        The spans are in order, do not overlap and cover every character.

        Raises:
            CheckpointError: the pieces do not spell the text, because `tokenizer.model` normalises text.
        """
        tokens, ends = self._cover(text)
        return [TokenSpan(token, Span(*span)) for token, *span in zip(tokens, [0, *ends], ends, strict=False)]

    def _cover(self, text: str) -> tuple[list[str], list[int]]:
        """Tokens of `text`, and the position at which each one ends; it begins where the one before it ends."""
        has_prefix = bool(text) and not self.legacy
        source = " " + text.replace(BLANK, " ") if has_prefix else text
        position = -1 if has_prefix else 0
        tokens: list[str] = []
        ends: list[int] = []
        for segment in self._segments(source):
            if segment in self._added_tokens_encoder:
                tokens.append(segment)
                ends.append(position + len(segment))
            elif segment:
                pieces, places = self._align(segment, position)
                tokens += pieces
                ends += places
            position += len(segment)
        if has_prefix and len(tokens) > 1 and tokens[0] == BLANK and tokens[1] in self.all_special_tokens:
            del tokens[0], ends[0]
        return tokens, ends

    def _segments(self, text: str) -> list[str]:
        """The text cut at its added tokens, as `tokens_trie.split` does it; some segments may be empty."""
        pattern = added_token_pattern(tuple(self._added_tokens_encoder))
        return self.tokens_trie.split(text) if pattern is None else pattern.split(text)

    def _align(self, segment: str, start: int) -> tuple[list[str], list[int]]:
        """As `_cover`, of a text without added tokens whose first character has the position `start` (-1: a prefix)."""
        spelt = segment.replace(" ", BLANK)
        first = max(start, 0)
        if self.legacy:  # SentencePiece itself puts a blank in front
            spelt, start = BLANK + spelt, start - 1
        pieces = self.sp_model.encode(segment, out_type=str)
        spellings = [self._ascii_bytes.get(piece, piece) for piece in pieces]
        spells = "".join(spellings) == spelt
        lengths = map(len, spellings) if spells else self._lengths(pieces, spelt, segment)
        ends = list(accumulate(lengths, initial=start))[1:]
        for place, end in enumerate(ends):
            if end >= first:
                break
            ends[place] = first
        return pieces, ends

    def _lengths(self, pieces: Sequence[str], spelt: str, segment: str) -> Iterator[int]:
        """Characters of `spelt` that each piece covers, where some characters are spelt in several bytes."""
        byte_pieces = self._byte_pieces
        done = 0  # characters that are covered
        pending_bytes = 0  # bytes of the next character that are covered
        for piece in pieces:
            if piece in byte_pieces:
                pending_bytes += 1
                length = int(pending_bytes == len(spelt[done : done + 1].encode()))
                pending_bytes -= pending_bytes * length
            else:
                length = len(piece)
                if not spelt.startswith(piece, done):
                    raise CheckpointError(
                        f"{self.vocab_file}: piece {piece!r} does not spell {spelt[done : done + length]!r} in "
                        f"{segment!r}; only models with identity normalisation can be aligned with their text"
                    )
            done += length
            yield length

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Pieces and added tokens of `text`, without `<s>` and `</s>` around it."""
        return [token for token, _ in self.token_spans(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp_model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of the tokens; those that are not in `tokenizer.model` stand between blanks, as in transformers 4.37."""
        appended = {token for token, index in self._added_tokens_encoder.items() if index >= self.vocab_size}
        parts: list[str] = []
        for is_appended, run in groupby(tokens, key=appended.__contains__):
            tokens_of_run = list(run)
            parts.extend(tokens_of_run if is_appended else [self._spell(tokens_of_run)])
        return " ".join(parts)

    def _spell(self, tokens: list[str]) -> str:
        """Text of the tokens of `tokenizer.model`.

        A blank in front of all tokens is dropped. Legacy also drops one in front of every run of pieces, and puts one
        before a run that a special token ends.
        """
        parts: list[str] = []
        for is_special, run in groupby(tokens, key=self._added_tokens_encoder.__contains__):
            if not is_special:
                parts.append(self.sp_model.decode([self.sp_model.piece_to_id(piece) for piece in run]))
                continue
            if self.legacy and parts:
                parts[-1] = " " + parts[-1]
            parts.append("".join(run))
        text = "".join(parts)
        return text.removeprefix(" ") if tokens[0].startswith(BLANK) else text

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy `tokenizer.model` into a folder."""
        name = (f"{filename_prefix}-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / name
        if not (target.exists() and target.samefile(self.vocab_file)):
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Save as transformers does, and also `add_bos_token` and `add_eos_token`, which transformers 5 leaves out."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(files[0])
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        return files


def load_tokenizer(
    folder: str | os.PathLike[str],
    *,
    model_max_length: int | None = None,
    padding_side: str = "right",
    **kwargs: Any,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder: `LlamaTokenizer` if it has a `tokenizer.model`, else its own fast one.

    A tokenizer without padding token gets `<unk>`, as in every LLaVA recipe from v0.5 on.

    Args:
        folder: folder with `tokenizer.model` or `tokenizer.json`, or an id on a model hub.
        model_max_length: longest row in tokens; None keeps the value of the folder.
        padding_side: `right` or `left`.
        kwargs: override what the folder's `tokenizer_config.json` says (`legacy`, `add_bos_token`, ...).

    Raises:
        CheckpointError: the folder has neither file, or the hub has no such model.
    """
    if model_max_length is not None:
        kwargs["model_max_length"] = model_max_length
    folder = local_folder(folder, TOKENIZER_FILES)
    names = {path.name for path in folder.glob("tokenizer.*")}
    refuse_pointers(folder)
    for path in sorted(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.suffix == ".json"):
        read_json(path)  # whose messages name the file
    if "tokenizer.model" in names:
        check_pieces(folder / "tokenizer.model")  # first: whatever is wrong afterwards is in the other files
        with reading(folder / "tokenizer_config.json", "no tokenizer can be made with these settings"):
            options = {"padding_side": padding_side, "local_files_only": True, **kwargs}
            tokenizer = LlamaTokenizer.from_pretrained(folder, **options)
    elif "tokenizer.json" in names:
        with reading(folder / "tokenizer.json", "no tokenizer can be made of it and tokenizer_config.json"):
            options = {"padding_side": padding_side, "local_files_only": True, **kwargs}
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    else:
        raise CheckpointError(f"no tokenizer in {folder}: it holds neither tokenizer.model nor tokenizer.json")
    limit = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
        path = folder / "tokenizer_config.json"
        raise CheckpointError(f"{path}: 'model_max_length' is {limit!r}, expected a number of tokens")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def check_pieces(path: Path) -> None:
    """Refuse a SentencePiece model that cannot be read.

    Raises:
        CheckpointError: names the file.
    """
    with reading(path):
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        if not [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())]:
            raise ValueError("it has no pieces")


@lru_cache(maxsize=16)
def added_token_pattern(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    """A pattern that splits a text at these tokens as transformers' `Trie` does: at each place the longest one.

    None where the two could differ: a token holds, behind its beginning, a character that a token begins with, so that
    they may overlap in a text.
    """
    first = {token[0] for token in tokens if token}
    if not first or any(character in first for token in tokens for character in token[1:]):
        return None
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def encode_covered(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Covered]:
    """Ids of several texts by one call, without `<s>` and `</s>` around them, and the characters that each covers.

    Raises:
        CheckpointError: the tokenizer cannot tell which characters a token covers.
    """
    if isinstance(tokenizer, LlamaTokenizer):
        return [tokenizer.encode_covered(text) for text in texts]
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{type(tokenizer).__name__} cannot tell which characters a token covers; use a folder with a "
            "SentencePiece tokenizer.model or a tokenizer.json"
        )
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    return [Covered(*found) for found in zip(encoded.input_ids, encoded.offset_mapping, strict=True)]


def encode_with_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    """`encode_covered` of one text.

    Raises:
        CheckpointError: the tokenizer cannot tell which characters a token covers.
    """
    [covered] = encode_covered(tokenizer, [text])
    return covered.ids, [Span(*span) for span in covered.spans]


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the tokenizer puts `<s>` in front of every text."""
    if tokenizer.bos_token_id is None:
        return False
    if isinstance(tokenizer, LlamaTokenizer):
        ids = tokenizer.build_inputs_with_special_tokens([])
    elif tokenizer.is_fast and tokenizer.backend_tokenizer.padding is None:
        ids = tokenizer.backend_tokenizer.encode("").ids  # what `tokenizer("")` does, in a hundredth of the time
    else:
        ids = tokenizer("").input_ids
    return ids[:1] == [tokenizer.bos_token_id]


def eos_ids(config: GenerationConfig | None) -> list[int]:
    """The tokens that end generation by a `generation_config`, which has one, a list, or none."""
    ids = getattr(config, "eos_token_id", None)
    return [] if ids is None else torch.as_tensor(ids).flatten().tolist()


def add_ends(config: GenerationConfig, ids: Sequence[int]) -> list[int]:
    """Make generation end at each of `ids`, in addition to what it ends at; returns those that are new.

    A configuration that names them all is left as it is.
    """
    present = eos_ids(config)
    new = [token for token in ids if token not in present]
    if new:
        ends = [*present, *new]
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    return new
