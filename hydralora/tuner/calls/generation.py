"""One call of `generate`: what its prompt is, and which of its forward passes read it.

Everything that follows the prompt has been generated and decides nothing, with a cache of any kind or without. What
`generate` passes on to its model does not say so, hence this is noted around `generate` and
`prepare_inputs_for_generation` of the model itself, whoever calls them.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from hydralora.tuner.batch import Weights
from hydralora.tuner.caches import given_cache, is_filled
from hydralora.tuner.calls.batching import BATCHED, BATCHING, refuse_batching, refuse_routing_arguments
from hydralora.tuner.calls.inputs import DECODER, token_shape

logger = logging.getLogger(__name__)

ONE_CHUNK = 1 << 30
"""Tokens of a chunk that contains any prompt; None would mean the setting of the model."""

GENERATE, PREPARE = "generate", "prepare_inputs_for_generation"


@dataclass
class Generation:
    """One call of `generate`.

    Attributes:
        prompt_length: tokens of a row before the first generated one; None until the first pass says it.
        assistant: whether it only proposes tokens, which another model judges.
        unconditional: whether other passes of the model, without a cache, are part of it (`guidance_scale`).
        prepares: whether each pass is announced by `prepare_inputs_for_generation`.
        pending: the next pass has been announced.
        total: tokens of a row so far, of an announced pass.
        mask: (B, total), zero at padding, of an announced pass as `generate` has it; None: all are valid.
        begun: whether a pass has been run.
        weights: of the prompts.
    """

    prompt_length: int | None
    assistant: bool = False
    unconditional: bool = False
    prepares: bool = True
    pending: bool = False
    total: int = 0
    mask: Any = None
    begun: bool = False
    weights: Weights = field(default_factory=dict)


def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation:
    """The generation that a call of `generate` with these arguments starts."""
    config, setting = _given_config(args, kwargs), partial(_setting, module, args, kwargs)
    assisted = kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens") is not None
    if _is_pair(module):
        # The first pass says how long the prompt of a decoder is, unless proposed tokens come with it.
        length = (
            _decoder_length(kwargs.get("decoder_input_ids"), setting("decoder_start_token_id")) if assisted else None
        )
    else:
        embedded = kwargs.get("inputs_embeds")
        shape = token_shape(args, kwargs) if embedded is None else token_shape((embedded,), {})
        length = None if shape is None else shape[1]
    return Generation(
        prompt_length=length,
        assistant=bool(getattr(config, "is_assistant", False)),
        unconditional=setting("guidance_scale") not in (None, 1) and setting("use_cache") is False,
        prepares=hasattr(module, PREPARE),
    )


def in_one_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of `generate` by which the whole prompt is read in one pass, since all of it decides first.

    It is not read in chunks, nor is a part of it taken from a cache of an earlier call.
    """
    changed = dict(kwargs)
    if _setting(module, args, kwargs, "prefill_chunk_size") is not None:
        logger.warning("routing='sequence': the prompt is read in one pass, prefill_chunk_size is ignored")
        changed["prefill_chunk_size"] = ONE_CHUNK
    cache, shape, mask = given_cache((), kwargs), token_shape(args, kwargs), kwargs.get("attention_mask")
    assists = getattr(_given_config(args, kwargs), "is_assistant", False)
    if cache is None or shape is None or assists or _is_pair(module) or not is_filled(cache):
        return changed
    # With a wider mask, the tokens given are only those that follow the cache.
    if mask is None or (isinstance(mask, Tensor) and mask.shape[-1] == shape[1]):
        logger.warning(
            "routing='sequence': the whole prompt is read again, since all of it decides; the cache is not used"
        )
        return {name: value for name, value in changed.items() if value is not cache}
    return changed


def _given_config(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs.get("generation_config") or next(iter(args[1:2]), None)


def _setting(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """A setting of a call of `generate`: of its arguments, of its configuration, or of the model's; None without."""
    places = (_given_config(args, kwargs), getattr(module, "generation_config", None))
    values = (kwargs.get(name), *(getattr(place, name, None) for place in places))
    return next((value for value in values if value is not None), None)


def _is_pair(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _decoder_length(ids: Tensor | None, start: int | None) -> int:
    """Tokens of a decoder's prompt; `generate` puts the token that starts a decoder in front where it is not."""
    return 1 if ids is None else ids.shape[1] + int(start is not None and bool((ids[:, 0] != start).all()))


class Watcher(Protocol):
    """Who is told of a generation: `Passes`."""

    watched: bool

    @property
    def by_sequence(self) -> bool:
        """Whether an adapter routes by sequence."""

    @property
    def generation(self) -> Generation | None:
        """The one that is under way."""

    def generating(self, generation: Generation) -> AbstractContextManager[None]:
        """Surrounds one."""


class AroundMethod:
    """A method of a module, with what this package notes around it; the module has it as an attribute of its own."""

    def __init__(self, module: nn.Module, name: str, passes: Watcher) -> None:
        self.module, self.name, self.passes = module, name, passes
        self.before = vars(module).get(name)
        """What the module had as an attribute of its own before, or None."""

    @property
    def __wrapped__(self) -> Any:
        """The method itself, whose signature transformers reads."""
        return self.before or getattr(type(self.module), self.name).__get__(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method."""
        if self.name == BATCHING:
            refuse_batching(self.module, self.passes)
            return self.__wrapped__(*args, **kwargs)
        if self.name == BATCHED:
            refuse_routing_arguments(kwargs)
            return self.__wrapped__(*args, **kwargs)
        if not self.passes.watched:
            return self.__wrapped__(*args, **kwargs)
        if self.name == GENERATE:
            kwargs = in_one_pass(self.module, args, kwargs) if self.passes.by_sequence else kwargs
            with self.passes.generating(begin(self.module, args, kwargs)):
                return self.__wrapped__(*args, **kwargs)
        self._announce(self.passes.generation, args, kwargs)
        return self.__wrapped__(*args, **kwargs)

    def _announce(self, generation: Generation | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the next pass of a generation reads: `input_ids` are all tokens so far."""
        if generation is None:
            return
        ids = args[0] if args else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        lengths = [each.shape[1] for each in (ids, None if generation.begun else embeds) if isinstance(each, Tensor)]
        generation.pending, generation.total = True, max(lengths, default=0)
        generation.mask = kwargs.get((DECODER if _is_pair(self.module) else "") + "attention_mask")

    def restore(self) -> None:
        """Take this off the module, unless something else has been put around it since."""
        if vars(self.module).get(self.name) is self:
            delattr(self.module, self.name)
            if self.before is not None:
                setattr(self.module, self.name, self.before)
