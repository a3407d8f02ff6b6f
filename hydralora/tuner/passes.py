"""How the note of a forward pass reaches the layers of an arbitrary host model, whose modules pass nothing on.

The note is in force from the start of a pass to its end, in the thread that runs it. What gradient checkpointing
recomputes later gets the note of its own pass, since the checkpointed function carries it. torch.compile and
torch.export trace all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hydralora.tuner.batch import BatchNote, note_of_pass, token_shape
from hydralora.tuner.caches import cache_of, given_cache
from hydralora.tuner.routing.given import Given, present, refuse_blind_recomputation

CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Attributes under which a module keeps the function that checkpoints: transformers', and torch's wrapper for FSDP."""

T = TypeVar("T")


class OfThread(Generic[T]):
    """A value that every thread has for itself.

    Tracing knows no threads: what is set and taken back within one trace is kept in an attribute.
    """

    def __init__(self) -> None:
        self._by_thread: dict[int, T] = {}
        self._traced: T | None = None

    def get(self) -> T | None:
        """The value, or None."""
        if self._traced is not None:
            return self._traced
        return self._by_thread.get(threading.get_ident()) if self._by_thread else None

    def put(self, value: T | None) -> None:
        """Set the value; None removes it."""
        if torch.compiler.is_compiling():
            self._traced = value
        elif value is None:
            self._by_thread.pop(threading.get_ident(), None)
        else:
            self._by_thread[threading.get_ident()] = value

    @contextmanager
    def holding(self, value: T | None) -> Iterator[None]:
        """The value within a block; the one before comes back afterwards."""
        before = self.get()
        self.put(value)
        try:
            yield
        finally:
            self.put(before)


@dataclass
class Call:
    """One call of `forward` or `generate` of the PEFT model.

    Attributes:
        prompt_length: tokens of a row before the first generated one; None until the first pass says it.
    """

    prompt_length: int | None


class Passes:
    """The forward passes of one model with adapters.

    Attributes:
        watched: whether notes are made.
        given: what the call that runs asks of the routing.
        asked: whether a call in training ever asked for something.
    """

    def __init__(self) -> None:
        self._note: OfThread[BatchNote] = OfThread()
        self._call: OfThread[Call] = OfThread()
        self.given: OfThread[Given] = OfThread()
        self.asked = False
        self._handles: list[RemovableHandle] = []
        self.watched = False

    def watch(self, model: nn.Module) -> None:
        """Make a note of every forward pass of `model` from now on; a second call does nothing."""
        if not self.watched:
            self.watched = True
            self._handles = [
                model.register_forward_pre_hook(self._begin, with_kwargs=True),
                model.register_forward_hook(self._end, always_call=True),
            ]

    def unwatch(self, model: nn.Module) -> None:
        """Take everything back that `watch` and the passes since put onto `model`."""
        self.watched = False
        while self._handles:
            self._handles.pop().remove()
        for module, attribute, function in _checkpoint_functions(model):
            if isinstance(function, BoundCheckpoint) and function.passes is self:
                setattr(module, attribute, function.checkpoint)

    @property
    def note(self) -> BatchNote:
        """The note of the pass in which this layer runs; an empty one for a part of the model that is called directly.

        Raises:
            RuntimeError: a backward pass recomputes a layer by a checkpoint that did not carry the note.
        """
        note = self._note.get()
        if note is not None:
            return note
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "routing='sequence': a backward pass recomputes this layer, and does not say which forward pass it "
                "belongs to. Let the model checkpoint its layers (gradient_checkpointing of the Trainer), or call "
                "torch.utils.checkpoint.checkpoint with "
                "context_fn=model.base_model.hydralora_passes.checkpoint_contexts"
            )
        return BatchNote()

    def given_now(self) -> Given | None:
        """What the call in which this layer runs asks of the routing; errors as of `refuse_blind_recomputation`."""
        given = self.given.get()
        if given is None and self.asked:
            refuse_blind_recomputation()
        return given

    @contextmanager
    def _holding(self, note: BatchNote, given: Given) -> Iterator[None]:
        with self._note.holding(note), self.given.holding(given):
            yield

    @contextmanager
    def one_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Surrounds a forward pass or a whole generation: what is longer than its input has been generated.

        Args:
            args: positional arguments of `forward` or `generate`.
            kwargs: its other arguments.
        """
        shape = token_shape(args, kwargs)
        with self._call.holding(Call(None if shape is None else shape[1])):
            yield

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` of `torch.utils.checkpoint.checkpoint`: the recomputation has the note of the present pass."""
        return nullcontext(), self._holding(self._note.get() or BatchNote(), present(self.given.get()))

    def carried(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which runs with the note of the present pass whenever and in whatever thread it is called."""
        note, given = self._note.get() or BatchNote(), present(self.given.get())

        def with_note(*args: Any, **kwargs: Any) -> Any:
            with self._holding(note, given):
                return function(*args, **kwargs)

        return with_note

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a causal language model."""
        cache = given_cache(args, kwargs)
        call = self._call.get()
        if call is not None and call.prompt_length is None:
            shape = token_shape(args, kwargs)
            call.prompt_length = None if shape is None else shape[1]
        # Without a cache, each step of a generation arrives here with all tokens so far.
        self._note.put(note_of_pass(args, kwargs, cache, None if call is None else call.prompt_length))
        if module.training and not torch.compiler.is_compiling():
            self.bind_checkpoints(module)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model: a cache that it made itself gets the weights too. No note is left behind."""
        note = self._note.get()
        if note is not None:
            note.keep_on(cache_of(output))
        self._note.put(None)

    def bind_checkpoints(self, model: nn.Module) -> None:
        """Let every function that checkpoints a layer carry the note."""
        for module, attribute, function in _checkpoint_functions(model):
            bound = function
            while isinstance(bound, BoundCheckpoint) and bound.passes is not self:
                bound = bound.checkpoint
            if not isinstance(bound, BoundCheckpoint):
                setattr(module, attribute, BoundCheckpoint(function, self))


@dataclass(frozen=True)
class BoundCheckpoint:
    """A function like `torch.utils.checkpoint.checkpoint` whose recomputation has the note of its own pass.

    Attributes:
        checkpoint: the function that does the work.
        passes: whose notes are carried.
    """

    checkpoint: Callable[..., Any]
    passes: Passes

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `function`."""
        if torch.compiler.is_compiling():  # a compiled backward pass recomputes operations, and runs no Python
            return self.checkpoint(function, *args, **kwargs)
        return self.checkpoint(self.passes.carried(function), *args, **kwargs)


def _checkpoint_functions(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """The functions that checkpoint something in `model`: the module, the attribute and its value."""
    for module in model.modules():
        for attribute in CHECKPOINT_FUNCTIONS:
            if callable(function := vars(module).get(attribute)):
                yield module, attribute, function
