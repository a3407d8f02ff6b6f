"""Other judges of image tokens in the place of the learned predictor: chance, and the attention scores of FastV.

A rule replaces what the image predictor returns; who is kept, the dropping and the cache stay those of `dynamic`.
FastV's rule (Chen et al., ECCV 2024, arXiv 2403.06764, in the form of its released code): the image tokens that the
last token of the prompt looks at most, in the layer before the sparse one, averaged over heads.

Shape letters: B batch, L sequence length, n image tokens, D width, H heads, C width of a head, S cached positions.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from dynamic.config import SparseConfig
from dynamic.model import predictors
from llava.errors import FlagError
from llava.extension import installed_extensions

NAME = "dynamic"


class Rule(Protocol):
    """Gives the tokens of images logits as a predictor does."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, n, 2) of the tokens (B, n, D); keeping is channel 0."""


def follow(model: Any, rule: Rule) -> None:
    """Let `rule` judge the images of a model that has predictors; the predictor's own logits are thrown away.

    Raises:
        FlagError: the model drops no image tokens.
    """
    image = predictors(model).image
    if image is None:
        raise FlagError("the model has no vision predictor, so there is nothing that a rule could replace")
    image.register_forward_hook(lambda _, inputs, output: rule(inputs[0]).to(output))


def attach_sparsity(model: Any, keep_rate: float, sparse_layer: int) -> None:
    """Make a dense model drop image tokens; its predictor is untrained and as small as can be, for a rule to replace.

    Raises:
        CheckpointError: the decoder has no such layer.
    """
    smallest = {"d_model": 4, "nhead": 1, "dim_feedforward": 1, "num_layers": 0}
    config = SparseConfig(
        use_text_predictor=False, vision_keep_rate=keep_rate, sparse_layer=sparse_layer, **smallest
    ).to_dict()
    model.extensions.attach(model, installed_extensions([NAME])[NAME], config)


class Chance:
    """Every token has the same chance, whatever it is.

    In training the logits are those of the keep rate, so that the Gumbel noise keeps each token with this probability;
    at inference they are drawn, so that the best of them are a random choice of the right number.
    """

    def __init__(self, model: nn.Module, keep_rate: float, seed: int) -> None:
        self.model = model
        self.keep_rate = keep_rate
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, n, 2)."""
        shape = (*tokens.shape[:2], 2)
        if self.model.training:
            logits = (math.log(self.keep_rate), math.log1p(-self.keep_rate))
            return torch.tensor(logits, device=tokens.device).expand(shape)
        return torch.rand(shape, generator=self.generator).to(tokens.device)


class LastTokenAttention:
    """FastV's rule, for images of one size and a decoder whose layers are those of Llama.

    It listens to the decoder for where the images lie, and to the layer below the sparse one for what enters and leaves
    it.

    Args:
        model: with `get_decoder()`.
        sparse_layer: of the model.
        layer: whose attention counts: the layer below the sparse one (FastV's), or the sparse layer itself, which is
            the first that reads the image where those below are blind to it.
    """

    def __init__(self, model: Any, sparse_layer: int, layer: int) -> None:
        if layer not in (sparse_layer - 1, sparse_layer):
            raise FlagError(f"attention of layer {layer}: expected {sparse_layer - 1} or {sparse_layer}")
        decoder = model.get_decoder()
        self.layer = decoder.layers[layer]
        self.takes_output = layer == sparse_layer
        self.places: list[tuple[int, int, int]] = []  # row, start, end of each image
        self.mask: Tensor | None = None
        self.received: Tensor | None = None
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        decoder.layers[sparse_layer - 1].register_forward_hook(self._listen, with_kwargs=True)

    def _begin(self, decoder: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A pass begins: note where the images are, and padding."""
        self.places, self.received = [], None
        if named.get("segments") is not None:
            samples = enumerate(named["segments"])
            self.places = [(row, start, end) for row, sample in samples for start, end in sample.images]
            self.mask = named.get("attention_mask")
            if len({end - start for _, start, end in self.places}) > 1:
                raise FlagError("attention scores are read for images of one size only, but a batch has several sizes")

    def _listen(self, below: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        if self.places:
            entering = self.layer.input_layernorm(output if self.takes_output else inputs[0])
            self.received = last_token_attention(
                self.layer.self_attn, entering, named["position_embeddings"], self.mask
            )

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, n, 2): the logarithm of the attention received, against zero."""
        if self.received is None:
            raise RuntimeError("image tokens are judged, but no prompt has passed the layer below the sparse one")
        scores = torch.stack([self.received[row, start:end] for row, start, end in self.places])
        return torch.stack([scores.log(), torch.zeros_like(scores)], dim=-1)


def last_token_attention(
    attention: Any, hidden: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """How much the last position looks at each other one, (B, L): attention after softmax, mean over the heads.

    Args:
        attention: a `LlamaAttention`.
        hidden: (B, L, D) what enters it; prompts padded on the left if at all.
        positions: rotary cosine and sine, (B or 1, L, C) each.
        mask: (B, L), zero at padding, or None.
    """

    def heads(x: Tensor) -> Tensor:  # (B, L, H C) -> (B, H, L, C)
        return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query, key = apply_rotary_pos_emb(heads(attention.q_proj(hidden)), heads(attention.k_proj(hidden)), *positions)
    key = repeat_kv(key, attention.num_key_value_groups)
    scores = (query[:, :, -1:] @ key.transpose(2, 3))[:, :, 0] * attention.scaling  # (B, H, L)
    if mask is not None:
        scores = scores.masked_fill(~mask.bool()[:, None], -torch.inf)
    return scores.float().softmax(dim=-1).mean(dim=1)  # (B, L)


class LateReading:
    """Text does not see images below layer `first`: all that it learns of them it learns from there on.

    Made for a model whose text has read the image before anything is dropped. Patches see each other as before.
    """

    def __init__(self, model: Any, first: int) -> None:
        decoder = model.get_decoder()
        self.images = torch.zeros(0, 0, dtype=torch.bool)
        self.seen: Tensor | None = None
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        for layer in decoder.layers[:first]:
            layer.register_forward_pre_hook(self._blind, with_kwargs=True)

    def _begin(self, decoder: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A pass over prompts, or over tokens that follow them, begins: which key each position sees, (B, 1, L, S)."""
        new = named["input_ids"] if named.get("inputs_embeds") is None else named["inputs_embeds"]
        batch, length = new.shape[:2]
        if named.get("segments") is not None:
            self.images = torch.zeros(batch, length, dtype=torch.bool, device=new.device)
            for row, sample in zip(self.images, named["segments"], strict=True):
                for start, end in sample.images:
                    row[start:end] = True
        mask = named.get("attention_mask")
        valid = (
            torch.ones(batch, length, dtype=torch.bool, device=new.device) if mask is None else mask.bool()
        )  # (B, S)
        total = valid.shape[1]
        images = nn.functional.pad(self.images, (0, total - self.images.shape[1]))  # (B, S)
        earlier = torch.ones(length, total, dtype=torch.bool, device=new.device).tril(total - length)
        seen = earlier & valid[:, None] & (images[:, total - length :, None] | ~images[:, None])  # (B, L, S)
        itself = torch.eye(length, dtype=torch.bool, device=new.device)  # so that padding sees something
        seen[:, :, total - length :] |= itself
        self.seen = seen[:, None]

    def _blind(
        self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return inputs, named | {"attention_mask": self.seen}
