"""Which paths of transformers' `generate` a LLaVA takes, decided before anything is computed.

A prompt enters `generate` as embeddings, since images have no token ids. Greedy search, sampling and beam search, with
any cache, work from embeddings. Paths that look the prompt up by its ids, cut it by them, or roll a cache back by the
number of ids would give other tokens than the same search without them, so they are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers import Cache, GenerationConfig

from llava.errors import FlagError


class Refusal(NamedTuple):
    """When an option of `generate` is refused, and why.

    Attributes:
        applies: of its value, which is not None.
        reason: ends the sentence that begins with the option.
    """

    applies: Callable[[Any], bool]
    reason: str


def _always(value: Any) -> bool:
    return True


_SPECULATION = "speculative decoding rolls the cache back by the ids of the prompt, and a LLaVA's prompt has images"
_REMOTE = "this search was moved out of transformers into code on a hub, which is not run"

REFUSALS: dict[str, Refusal] = {
    "assistant_model": Refusal(_always, _SPECULATION),
    "prompt_lookup_num_tokens": Refusal(_always, _SPECULATION),
    "assistant_early_exit": Refusal(_always, _SPECULATION),
    "use_mtp": Refusal(bool, _SPECULATION),
    "is_assistant": Refusal(bool, "a LLaVA cannot draft for another model, whose prompts are ids"),
    "prefill_chunk_size": Refusal(_always, "transformers cuts the ids of the prompt into chunks, not its embeddings"),
    "custom_generate": Refusal(_always, "it replaces the search, and may come from a hub"),
    "penalty_alpha": Refusal(lambda value: value > 0, _REMOTE),
    "dola_layers": Refusal(_always, _REMOTE),
    "num_beam_groups": Refusal(lambda value: value > 1, _REMOTE),
    "constraints": Refusal(_always, _REMOTE),
    "force_words_ids": Refusal(_always, _REMOTE),
    "token_healing": Refusal(bool, "it edits the last ids of the prompt"),
    "guidance_scale": Refusal(lambda value: value != 1, "it needs a second prompt made of ids"),
    "negative_prompt_ids": Refusal(_always, "it needs a second prompt made of ids"),
    "encoder_repetition_penalty": Refusal(lambda value: value != 1, "it reads the ids of the prompt"),
    "encoder_no_repeat_ngram_size": Refusal(lambda value: value > 0, "it reads the ids of the prompt"),
}
"""Options of transformers that a prompt of embeddings cannot follow."""

PAGED = "paged"
"""The `cache_implementation` of continuous batching."""


def check_options(model: Any, config: GenerationConfig | None, options: Mapping[str, Any]) -> None:
    """Refuse paths of `generate` that would not give the tokens of the search that was asked for.

    Args:
        model: with a `generation_config` of its own.
        config: that was passed to `generate`, or None.
        options: the other arguments of `generate`; each one goes before `config`, which goes before the model's.

    Raises:
        FlagError: names the option and its value.
    """

    def value(name: str) -> Any:
        found = (options.get(name), getattr(config, name, None), getattr(model.generation_config, name, None))
        return next((item for item in found if item is not None), None)

    for name, refusal in REFUSALS.items():
        given = value(name)
        if given is not None and refusal.applies(given):
            shown = given if isinstance(given, bool | int | float | str) else type(given).__name__
            raise FlagError(f"generate({name}={shown}) is not supported by a LLaVA: {refusal.reason}. Leave it out.")
    if value("cache_implementation") == PAGED:
        raise FlagError(
            f"generate(cache_implementation='{PAGED}') is not supported by a LLaVA: continuous batching takes token "
            "ids only. Leave it out; `python -m llava.serve.api` batches requests."
        )


def check_cache(cache: Cache | None, offered: bool, options: Mapping[str, Any], implementation: str | None) -> None:
    """Refuse caches that contradict the other arguments.

    Args:
        cache: that was passed to `generate`, or None.
        offered: True if an extension of the model has a cache of its own.
        options: arguments of `generate`.
        implementation: the wanted `cache_implementation`, or None.

    Raises:
        FlagError: says what to leave out.
    """
    if implementation is not None and offered:
        raise FlagError(
            f"generate(cache_implementation='{implementation}'): an extension of this model needs its own cache; leave "
            "the argument out"
        )
    if options.get("use_cache") is False and (cache is not None or implementation is not None):
        raise FlagError("generate(use_cache=False) contradicts the cache that was passed; leave one of them out")


def check_continuation(cache: Cache, mask: Tensor, options: Mapping[str, Any], config: GenerationConfig) -> None:
    """Refuse to continue a filled cache where its rows and positions need not be those of the prompts.

    Args:
        cache: of S positions.
        mask: (B, L) bool of the spliced prompts, which begin with what the cache holds.
        options: arguments of `generate`.
        config: in force next to them.

    Raises:
        FlagError: names both numbers, or the option.
    """
    stored, length = int(cache.get_seq_length()), mask.shape[1]
    if stored >= length:
        raise FlagError(
            f"the cache holds {stored} positions, but the prompt has {length} (images included): pass the whole "
            "conversation, ids and images, whose beginning the cache holds"
        )
    if len(mask) > 1 and not bool(mask.all()):
        raise FlagError(
            "a filled cache is continued for one prompt, or for prompts of equal length; these are padded, which moves "
            "their beginnings. Continue them one by one."
        )
    for name in ("num_beams", "num_return_sequences"):
        count = options.get(name) or getattr(config, name, None) or 1
        if count > 1:
            raise FlagError(f"generate({name}={count}) cannot continue a filled cache; pass no cache")
