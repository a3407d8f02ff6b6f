"""How the note of a forward pass reaches the layers of an arbitrary host model, whose modules pass nothing on.

Every model of transformers inside of the host is a place where a call may enter: the causal language model, the
decoder in it, encoder and decoder of a pair. The note is made of the arguments of that call and is in force until it
returns, in the thread that runs it. What gradient checkpointing recomputes later gets the note of its own pass, since
the checkpointed function carries it. torch.compile and torch.export trace all of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hydralora.tuner.batch import BatchNote
from hydralora.tuner.caches import cache_of, carry
from hydralora.tuner.calls.batching import BATCHED, BATCHING
from hydralora.tuner.calls.checkpoints import bind_checkpoints, release_checkpoints
from hydralora.tuner.calls.generation import GENERATE, PREPARE, AroundMethod, Generation
from hydralora.tuner.calls.inputs import PROMPT_MASK, PassInputs, parameter_names, read_inputs
from hydralora.tuner.calls.notes import GUIDED, crossing, note_of_pass
from hydralora.tuner.calls.thread_value import OfThread
from hydralora.tuner.config import RoutingUnit
from hydralora.tuner.routing.given import Given, present, refuse_blind_recomputation

OUTSIDE = (
    "this layer runs outside of a forward pass of its model, which would say where padding and prompt are. Call the "
    "model, or a model of transformers in it"
)


@dataclass(frozen=True)
class Running:
    """A forward pass that is under way.

    Attributes:
        note: of its tokens.
        pair: whether it is a pass of an encoder and its decoder; the note is the decoder's.
        labelled: whether it has targets.
        caller: the Python frame of the call, by which one that was interrupted is told; None: not known.
        before: what was under way around it.
        owner: the module whose call it is (its `id`).
    """

    note: BatchNote
    pair: bool = False
    labelled: bool = False
    caller: FrameType | None = None
    before: tuple[Running, ...] | None = None
    owner: int = 0


class Passes:
    """The forward passes of one model with adapters.

    Attributes:
        watched: whether notes are made.
        given: what the call that runs asks of the routing.
        asked: whether a call in training ever asked for something.
    """

    def __init__(self) -> None:
        self._running: OfThread[tuple[Running, ...]] = OfThread()
        self._generation: OfThread[Generation] = OfThread()
        self.given: OfThread[Given] = OfThread()
        self.asked = False
        self._handles: list[RemovableHandle] = []
        self._methods: list[AroundMethod] = []
        self._seen: list[nn.Module] = []
        self._root: nn.Module | None = None
        self._generates = False
        self.watched = False

    def guard(self, model: nn.Module) -> None:
        """Refuse what would run the layers of `model` where the routing of a call does not reach them."""
        for entry in model.modules():
            for name in (BATCHING, BATCHED) if isinstance(entry, PreTrainedModel) else ():
                guarded = isinstance(vars(entry).get(name), AroundMethod)
                if not guarded and callable(getattr(entry, name, None)):
                    self._put_around(entry, name)

    def _put_around(self, entry: nn.Module, name: str) -> None:
        around = AroundMethod(entry, name, self)
        setattr(entry, name, around)
        self._methods.append(around)

    def watch(self, model: nn.Module) -> None:
        """Make a note of every forward pass of `model` from now on; what was watched already is not touched again."""
        self.watched, self._root = True, model
        entries = [module for module in model.modules() if module is model or isinstance(module, PreTrainedModel)]
        self._generates = any(_generates(entry) for entry in entries)
        for entry in entries:
            if not self._is_new(entry):
                continue
            begin = partial(self._begin, parameter_names(entry))
            self._handles.append(entry.register_forward_pre_hook(begin, with_kwargs=True))
            self._handles.append(entry.register_forward_hook(self._end, always_call=True))
            for name in (GENERATE, PREPARE) if callable(getattr(entry, GENERATE, None)) else ():
                if callable(getattr(entry, name, None)):
                    self._put_around(entry, name)
        # Where there are two texts, a layer is told by its input which of them it sees.
        if any("encoder_hidden_states" in parameter_names(entry) for entry in entries):
            for layer in model.modules():
                if getattr(layer, "passes", None) is self and self._is_new(layer):
                    self._handles.append(layer.register_forward_pre_hook(self._enter_layer))
                    self._handles.append(layer.register_forward_hook(self._leave_layer, always_call=True))

    def unwatch(self, model: nn.Module) -> None:
        """Take everything back that `watch` and the passes since put onto `model`."""
        self.watched, self._root, self._seen = False, None, []
        while self._handles:
            self._handles.pop().remove()
        while self._methods:
            self._methods.pop().restore()
        release_checkpoints(model, self)

    def _is_new(self, module: nn.Module) -> bool:
        """Whether `module` was never watched; it is from now on."""
        if any(module is seen for seen in self._seen):
            return False
        self._seen.append(module)
        return True

    @property
    def note(self) -> BatchNote:
        """The note of the pass in which this layer runs.

        Raises:
            RuntimeError: a backward pass recomputes a layer by a checkpoint that did not carry the note.
        """
        running = self._running.get()
        if running:
            return running[-1].note
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "routing='sequence': a backward pass recomputes this layer, and does not say which forward pass it "
                "belongs to. Let the model checkpoint its layers (gradient_checkpointing of the Trainer), or call "
                "torch.utils.checkpoint.checkpoint with "
                "context_fn=model.base_model.hydralora_passes.checkpoint_contexts"
            )
        return BatchNote(refusal=OUTSIDE if self.watched else None)

    @property
    def by_sequence(self) -> bool:
        """Whether an adapter routes by sequence, and adapters are not disabled."""
        layers = () if self._root is None else self._root.modules()
        return any(
            RoutingUnit.SEQUENCE in layer.routing.values()
            for layer in layers
            if getattr(layer, "passes", None) is self and not layer.disable_adapters
        )

    @property
    def generation(self) -> Generation | None:
        """The call of `generate` that is under way, or None."""
        return self._generation.get()

    def generating(self, generation: Generation) -> AbstractContextManager[None]:
        """Surrounds a call of `generate`."""
        return self._generation.holding(generation)

    def given_now(self) -> Given | None:
        """What the call in which this layer runs asks of the routing; errors as of `refuse_blind_recomputation`."""
        given = self.given.get()
        if given is None and self.asked:
            refuse_blind_recomputation()
        return given

    @contextmanager
    def _holding(self, running: tuple[Running, ...], given: Given) -> Iterator[None]:
        with self._running.holding(running), self.given.holding(given):
            yield

    def bind_checkpoints(self, model: nn.Module) -> None:
        """Let every function that checkpoints a layer of `model` carry the note and what a call asks for."""
        bind_checkpoints(model, self)

    @contextmanager
    def one_call(self) -> Iterator[None]:
        """Surrounds a call: whatever happens in it, nothing of its passes is under way afterwards."""
        before = self._running.place
        try:
            yield
        finally:
            self._running.put(before)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` of `torch.utils.checkpoint.checkpoint`: the recomputation has the note of the present pass."""
        return nullcontext(), self._holding(self._present(), present(self.given.get()))

    def carried(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which runs with the note of the present pass whenever and in whatever thread it is called."""
        running, given = self._present(), present(self.given.get())

        def with_note(*args: Any, **kwargs: Any) -> Any:
            with self._holding(running, given):
                return function(*args, **kwargs)

        return with_note

    def _present(self) -> tuple[Running, ...]:
        """What is under way, to be taken up again when its calls have returned."""
        running = self._running.get() or ()
        return (replace(running[-1], caller=None, before=None),) if running else ()

    def _begin(
        self, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of every place where a call may enter."""
        running = _alive(self._running.get() or ())
        inputs = read_inputs(
            names, args, kwargs, predicts=_generates(module) or not isinstance(module, PreTrainedModel)
        )
        outer = running[-1] if running else None
        note = self._note_within(outer, inputs, module)
        if inputs.states is not None:
            note = replace(note, states=inputs.states, encoder=crossing(inputs.states, inputs.states_mask))
        compiling = torch.compiler.is_compiling()
        before = self._running.place if compiling else running or None
        caller = None if compiling else sys._getframe(1)
        labelled = inputs.labels is not None or (outer is not None and outer.labelled)
        self._running.put((*running, Running(note, inputs.pair, labelled, caller, before, id(module))))
        if module.training and not compiling and self._root is not None and outer is None:
            bind_checkpoints(self._root, self)
        if PROMPT_MASK not in kwargs:
            return None
        return args, {name: value for name, value in kwargs.items() if name != PROMPT_MASK}

    def _note_within(self, outer: Running | None, inputs: PassInputs, module: nn.Module) -> BatchNote:
        """The note of a pass within another one: that one's, if both see the same tokens."""
        decoder = inputs.states is not None
        if outer is None:
            generation = self._generation.get()
            # `generate` runs an encoder by itself.
            if generation is not None and generation.prepares and not generation.pending:
                if generation.unconditional and generation.begun:
                    return BatchNote(shape=inputs.shape, refusal=GUIDED)
                generation = None
            return note_of_pass(inputs, generation, self._must_be_told(inputs, module))
        same = inputs.shape is not None and inputs.shape == outer.note.shape
        if same and (not outer.pair or decoder or inputs.pair):
            return outer.note
        if outer.labelled and (decoder or not outer.pair):
            return BatchNote(
                refusal=f"the labels are those of {outer.note.shape} tokens, but this part of the model sees "
                f"{inputs.shape or 'something else'}; route by token here, or leave its layers out (exclude_modules)"
            )
        return note_of_pass(inputs, None, self._must_be_told(inputs, module) and not outer.pair)

    def _must_be_told(self, inputs: PassInputs, module: nn.Module) -> bool:
        """Whether a pass must say what its prompt is: one that trains a model to predict tokens."""
        encoder = self._root is not None and _has_decoder(self._root) and not inputs.pair and inputs.states is None
        return self._generates and module.training and torch.is_grad_enabled() and not encoder

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: a cache that the model made itself gets the weights too. No note is left behind."""
        running = self._running.get()
        if not running or running[-1].owner != id(module):
            return
        note = running[-1].note
        if not note.continues and note.starts is None and note.refusal is None:
            carry(cache_of(output), note.weights)
        self._running.put(running[-1].before)

    def _enter_layer(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a layer that may see either of two texts: its own, or the encoder's."""
        running = self._running.get() or ()
        seen = _seen(running[-1].note, args[0]) if running else None
        if seen is not None and seen is not running[-1].note:
            entered = replace(running[-1], note=seen, before=self._running.place, owner=id(layer))
            self._running.put((*running, entered))

    def _leave_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running = self._running.get()
        if running and running[-1].owner == id(layer):
            self._running.put(running[-1].before)


def _seen(note: BatchNote, x: Tensor) -> BatchNote:
    """The note of the tokens of `x`: the encoder's, if these are its states."""
    states = note.states
    if states is None or note.encoder is None or x.shape[:-1] != states.shape[:-1]:
        return note
    if torch.compiler.is_compiling():
        return note.encoder if x is states else note
    if x.shape[:-1] == note.shape and x.device != states.device:
        return BatchNote(
            refusal="the texts of encoder and decoder are equally long here, and the layer is on another device than "
            "the encoder's output, so that they cannot be told apart; route by token on several devices"
        )
    # A recomputation sees the same numbers through another tensor.
    return note.encoder if x.shape == states.shape and x.data_ptr() == states.data_ptr() else note


def _generates(module: nn.Module) -> bool:
    """Whether a model predicts the next token."""
    return isinstance(module, PreTrainedModel) and type(module).can_generate()


def _has_decoder(module: nn.Module) -> bool:
    """Whether a model is an encoder with a decoder."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _alive(running: tuple[Running, ...]) -> tuple[Running, ...]:
    """The passes whose call is still under way: one that was interrupted has not said its end."""
    if not running or torch.compiler.is_compiling():
        return running
    frames = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.add(id(frame))
        frame = frame.f_back
    return tuple(each for each in running if each.caller is None or id(each.caller) in frames)
