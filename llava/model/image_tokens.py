"""The tokens `<im_patch>`, `<im_start>` and `<im_end>`: adding them, training their embeddings, keeping those.

Corresponds to `initialize_vision_tokenizer` of upstream's `llava_arch.py`. Upstream trains the whole embedding table to
move two rows of it, in stage 1 only, and a LoRA run loses them; here the rows are parameters of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.errors import CheckpointError, FlagError
from llava.model.formats import TOKEN_TABLE, read_tensors
from llava.runtime.partition import assign_rows, fetch, rows_of, whole
from llava.runtime.weights.tensors import check_numbers

BORDER_TOKENS = (DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN)
"""Written around every image with `mm_use_im_start_end`."""

INPUT, OUTPUT = "embed_tokens", "lm_head"
"""Tensors in the file are named `embed_tokens/<im_start>`, `lm_head/<im_start>`, ...: (D,) each."""


class EmbeddingWithTrainedRows(nn.Embedding):
    """An embedding table that is frozen except for a few rows, which are a parameter of their own.

    Gradients, optimizer states and weight decay then exist for these rows alone.

    Args:
        table: the table; its weight is shared, not copied.
        row_ids: the trained rows; they start as the table has them.

    Attributes:
        rows: fp32 (n, D), used in place of the table's rows `row_ids`.
    """

    def __init__(self, table: nn.Embedding, row_ids: Sequence[int]) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, table.padding_idx, device="meta")
        self.weight = table.weight
        self.row_ids = tuple(row_ids)
        with whole([self.weight]):
            self.rows = nn.Parameter(self.weight.detach()[list(row_ids)].float().clone())  # (n, D)

    def forward(self, input: Tensor) -> Tensor:
        """Embed ids (...) as (..., D). Every row takes part, so that each has a gradient, of zeros where unused."""
        embeds = super().forward(input)  # (..., D)
        for row_id, row in zip(self.row_ids, self.rows, strict=True):
            embeds = torch.where((input == row_id)[..., None], row.to(embeds.dtype), embeds)
        return embeds


def wanted_tokens(config: Any) -> list[str]:
    """The tokens that a configuration, or the options of a run, ask for; in the order of their ids."""
    patch = [DEFAULT_IMAGE_PATCH_TOKEN] if getattr(config, "mm_use_im_patch_token", False) else []
    return patch + list(BORDER_TOKENS if getattr(config, "mm_use_im_start_end", False) else ())


@torch.no_grad()
def add_image_tokens(llava: Any, tokenizer: Any, tokens: Sequence[str]) -> list[str]:
    """Add tokens to the tokenizer, and rows to embeddings and head that are the mean of all former rows.

    Tokens and rows that exist already stay as they are; a table is never made smaller.

    Args:
        llava: bare LLaVA model.
        tokenizer: its tokenizer.
        tokens: see `wanted_tokens`.

    Returns:
        Those whose rows are new.
    """
    if not tokens:
        return []
    former = min(len(tokenizer), llava.config.vocab_size)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    ids = dict(zip(tokens, tokenizer.convert_tokens_to_ids(list(tokens)), strict=True))
    new = {token: index for token, index in ids.items() if index >= former}
    size = max(ids.values()) + 1
    if size > llava.config.vocab_size:
        llava.resize_token_embeddings(size, mean_resizing=False)
    for table in (llava.get_input_embeddings(), llava.get_output_embeddings()):
        with whole([table.weight], modify=True):
            mean = table.weight[:former].float().mean(dim=0)  # (D,)
            for index in new.values():
                table.weight[index] = mean.to(table.weight.dtype)
    llava.get_model().image_token_ids = ids
    return list(new)


def train_image_tokens(llava: Any) -> None:
    """Let the rows of `<im_start>` and `<im_end>` be trained although the language model is frozen.

    Raises:
        FlagError: head and embeddings share one table, so that the rows would have two meanings.
    """
    table = llava.get_input_embeddings()
    if llava.get_output_embeddings().weight is table.weight:
        raise FlagError(
            "--mm_use_im_start_end True: the base ties its head to its embeddings, so the new tokens cannot be trained "
            "beside a frozen language model; train it in full, or pass False"
        )
    ids = llava.get_model().image_token_ids
    llava.set_input_embeddings(EmbeddingWithTrainedRows(table, [ids[token] for token in BORDER_TOKENS]))


def image_token_rows(llava: Any, keep: bool = True) -> dict[str, Tensor]:
    """The rows of all image tokens, copied to the CPU; empty if the model has none.

    Args:
        llava: bare LLaVA model.
        keep: as in `partition.fetch`.
    """
    ids, table = llava.get_model().image_token_ids, llava.get_input_embeddings()
    if not ids:
        return {}
    head = llava.get_output_embeddings()
    trained = fetch({"rows": table.rows}, keep) if isinstance(table, EmbeddingWithTrainedRows) else {}
    places = list(ids.values())
    inputs, outputs = (rows_of(each.weight, places) for each in (table, head))
    tensors = {}
    for number, (token, index) in enumerate(ids.items() if keep else ()):
        row = inputs[number]
        if trained and index in table.row_ids:
            row = trained["rows"][table.row_ids.index(index)]
        tensors[f"{INPUT}/{token}"] = row.detach().cpu().clone()
        tensors[f"{OUTPUT}/{token}"] = outputs[number].detach().cpu().clone()
    return tensors


def read_rows(path: Path, ids: dict[str, int], size: int) -> dict[str, Tensor]:
    """Rows of image tokens out of our own file or a projector file of upstream's.

    Args:
        path: `image_tokens.safetensors` of a checkpoint, or a file that holds `model.embed_tokens.weight` beside a
            projector: the table of the run, or the rows of `<im_start>` and `<im_end>` alone.
        ids: id of each image token of the model.
        size: rows of the model's table.

    Returns:
        Tensors named as by `image_token_rows`; empty if a projector file holds no token rows.

    Raises:
        CheckpointError: the table has another number of rows.
    """
    tensors = read_tensors(path)
    if all("/" in name for name in tensors):
        return tensors
    if TOKEN_TABLE not in tensors:
        return {}
    table = tensors[TOKEN_TABLE]
    if len(table) == len(BORDER_TOKENS):
        return {f"{INPUT}/{token}": row for token, row in zip(BORDER_TOKENS, table, strict=True)}
    if len(table) != size:
        raise CheckpointError(f"{path}: '{TOKEN_TABLE}' has {len(table)} rows; the model has {size}")
    return {f"{INPUT}/{token}": table[index] for token, index in ids.items() if token in BORDER_TOKENS}


@torch.no_grad()
def load_image_tokens(llava: Any, path: Path) -> bool:
    """Fill the rows of the image tokens from a file; see `read_rows`.

    Returns:
        True if the file holds any.

    Raises:
        CheckpointError: the file holds a token that the model does not have, or rows of another width.
    """
    table, head, ids = llava.get_input_embeddings(), llava.get_output_embeddings(), llava.get_model().image_token_ids
    tensors = read_rows(path, ids, table.num_embeddings)
    check_numbers(tensors, path)
    for name, row in tensors.items():
        part, _, token = name.partition("/")
        if token not in ids:
            raise CheckpointError(
                f"{path}: holds the token {token!r}, which this model does not use; set --mm_use_im_start_end and "
                "--mm_use_im_patch_token as in the run that wrote it"
            )
        if row.shape != (table.embedding_dim,):
            raise CheckpointError(f"{path}: '{name}' has shape {tuple(row.shape)}, not ({table.embedding_dim},)")
        weight = (table if part == INPUT else head).weight
        assign_rows(weight, {ids[token]: row})
        if part == INPUT and isinstance(table, EmbeddingWithTrainedRows) and ids[token] in table.row_ids:
            assign_rows(table.rows, {table.row_ids.index(ids[token]): row})
    return bool(tensors)
