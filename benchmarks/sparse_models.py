"""A dense and a sparse model of the same weights for `benchmarks/dynamic.py`, and the passes that are measured.

The passes are those of the original's bench scripts (`dynamic_eval/bench_test`): a prompt of one image and two tokens;
given tokens fed one by one, with cache and without. They begin at the decoder: tower and projector are the same for
both models and are left out.

Shape letters: B batch, L = 1 + P + 1 sequence length of the prompt, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynamic.config import SparseConfig
from dynamic.extension import DynamicExtension
from dynamic.layer import KEEP, TextPredictor
from dynamic.model import predictors
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.runtime.cache_name import cache_of
from llava.segments import MultimodalInputs, Segments, Span

VOCABULARY = 2_000
POSITIONS = 8_192
BALANCED_TOKENS = 256


@dataclass(frozen=True)
class Size:
    """Sizes of a decoder, and of the image in its prompt.

    Attributes:
        layers, width, inner, heads: of the decoder.
        patches: P image tokens.
        vocabulary: rows of the table and of the head.
    """

    layers: int = 16
    width: int = 512
    inner: int = 1376
    heads: int = 8
    patches: int = 576
    vocabulary: int = VOCABULARY


def build(size: Size, settings: SparseConfig | None, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of random weights, always the same for a size; sparse if there are `settings`.

    The predictors are left as drawn, except that those of text are shifted until they keep half of the tokens that are
    fed behind a prompt; images are cut by rank, so nothing needs to be shifted for them.
    """
    torch.manual_seed(0)
    config = LlavaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=POSITIONS,
        attn_implementation="sdpa",
    )
    model = LlavaLlamaForCausalLM(config).to(device, dtype).eval()
    if settings is not None:
        seen = _answer_tokens(model, size, settings.sparse_layer)
        model.extensions.attach(model, DynamicExtension(), settings.to_dict())
        found = predictors(model)
        for predictor in (found.image, found.output_text, found.instruct):
            if predictor is not None:
                predictor.to(device, dtype)
        for judge in (found.output_text, found.instruct):
            if judge is not None:
                _balance(judge, seen)
    return model


@torch.no_grad()
def _answer_tokens(model: Any, size: Size, index: int) -> Tensor:
    """Hidden states (1, T, D), before layer `index`, of given tokens behind a prompt."""
    seen: list[Tensor] = []
    layer = model.get_decoder().layers[index]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ids = random_ids(model, 1, BALANCED_TOKENS)
    try:
        recompute(model, make_prompt(model, size, 1), ids)
    finally:
        handle.remove()
    return seen[0][:, -ids.shape[1] :]


@torch.no_grad()
def _balance(judge: TextPredictor, seen: Tensor) -> None:
    """Shift a text predictor so that it keeps half of the tokens `seen` (1, T, D)."""
    logits = judge(seen)[0]  # (T, 2)
    judge.output_mlp[-1].bias[KEEP] -= (logits[:, KEEP] - logits[:, 1 - KEEP]).median()


@dataclass(frozen=True)
class Prompt:
    """One image between two tokens, for each sample of a batch.

    Attributes:
        embeddings: (B, L, D).
        segments: one per sample.
    """

    embeddings: Tensor
    segments: list[Segments]


def make_prompt(model: Any, size: Size, batch: int) -> Prompt:
    """A prompt of random image features, as large as embeddings."""
    generator = torch.Generator().manual_seed(1)
    length = size.patches + 2
    embeddings = 0.02 * torch.randn(batch, length, size.width, generator=generator)
    image, end = Span(1, 1 + size.patches), Span(1 + size.patches, length)
    segment = Segments(Span(0, 1), (image,), end, end, Span(length, length))
    return Prompt(embeddings.to(model.device, model.dtype), [segment] * batch)


@torch.no_grad()
def prefill(model: Any, prompt: Prompt) -> Any:
    """The cache after a prompt; the logits of its last position are computed too."""
    return cache_of(prefill_output(model, prompt, model.extensions.make_cache(model)))


@torch.no_grad()
def prefill_output(model: Any, prompt: Prompt, cache: Any) -> Any:
    """The output of a prompt with the logits of its last position."""
    return model(
        inputs_embeds=prompt.embeddings,
        segments=prompt.segments,
        cache=cache,
        use_cache=True,
        logits_to_keep=1,
    )


@torch.no_grad()
def feed(model: Any, cache: Any, ids: Tensor) -> None:
    """Decode given tokens (B, T) one by one on top of a cache."""
    for column in ids.unbind(dim=1):
        model(input_ids=column[:, None], cache=cache, use_cache=True)


@torch.no_grad()
def recompute(model: Any, prompt: Prompt, ids: Tensor) -> None:
    """One step without cache: the prompt and all of `ids` (B, T) in one pass, for the logits of the last token."""
    text = model.get_input_embeddings()(ids)
    segments = [
        Segments(s.system, s.images, s.instruct, s.last_instruct, Span(s.answer.start, s.answer.end + ids.shape[1]))
        for s in prompt.segments
    ]
    embeddings = torch.cat([prompt.embeddings, text], dim=1)
    model(inputs_embeds=embeddings, segments=segments, use_cache=False, logits_to_keep=1)


def random_ids(model: Any, batch: int, tokens: int) -> Tensor:
    """Given tokens (B, T), the same for every model."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(min(VOCABULARY, model.config.vocab_size), (batch, tokens), generator=generator).to(
        model.device
    )


def cache_bytes(cache: Any) -> int:
    """Memory behind the keys and values of all layers, free slots included."""
    return sum(states.untyped_storage().nbytes() for layer in cache.layers for states in (layer.keys, layer.values))


def kept_bytes(cache: Any, size: Size, dtype: torch.dtype) -> int:
    """What the kept tokens alone need, counted token by token; of a dense cache the same as `cache_bytes`."""
    if not hasattr(cache, "report"):
        return cache_bytes(cache)
    tokens = sum(count for layer in cache.report().lengths for count in layer)
    return 2 * tokens * size.width * dtype.itemsize


class TrainingStep(nn.Module):
    """Forward pass of a sparse model with all its losses, for `measuring.saved_bytes`.

    Args:
        model: sparse.
        segments: of each sample.
        labels: (B, L).
        implementation: of policy attention.
    """

    def __init__(self, model: Any, segments: list[Segments], labels: Tensor, implementation: str) -> None:
        super().__init__()
        self.model, self.segments, self.labels, self.implementation = model, segments, labels, implementation

    def forward(self, embeddings: Tensor) -> Tensor:
        """The loss for spliced `embeddings` (B, L, D)."""
        extensions = self.model.extensions
        inputs = MultimodalInputs(embeddings, self.labels, None, None, self.segments)
        inputs = extensions.on_inputs(self.model, inputs)
        output = self.model(
            inputs_embeds=inputs.inputs_embeds,
            labels=inputs.labels,
            segments=inputs.segments,
            policy_implementation=self.implementation,
        )
        return output.loss + sum(extensions.losses(self.model, inputs).values())


def training_step(
    model: Any, size: Size, prompt: Prompt, text: int, implementation: str
) -> tuple[TrainingStep, Tensor]:
    """A step on one image and an answer of `text` tokens, and its embeddings (B, L, D)."""
    ids = random_ids(model, len(prompt.segments), text)
    embeddings = torch.cat([prompt.embeddings, model.get_input_embeddings()(ids).detach()], dim=1)
    start = prompt.embeddings.shape[1]
    segments = [
        Segments(s.system, s.images, s.instruct, s.last_instruct, Span(start, start + text)) for s in prompt.segments
    ]
    labels = torch.cat([torch.full((len(ids), start), -100, device=ids.device), ids], dim=1)
    return TrainingStep(model, segments, labels, implementation), embeddings.requires_grad_()
