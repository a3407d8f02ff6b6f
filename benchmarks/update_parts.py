"""Seconds of one update by part: tower, splicing, decoder, head and loss, recomputation, backward, clipping, optimizer.

Parts are timed by hooks on the modules of a run, so what is timed is the training program's own update.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback

from llava.model.checkpoint import bare_model
from llava.train.run import Run


class UpdateParts(TrainerCallback):
    """Times the updates of a run; a callback of its Trainer.

    Args:
        run: built, not yet trained.

    Attributes:
        seconds: by part, summed over all updates.
    """

    def __init__(self, run: Run) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._starts: dict[str, list[float]] = defaultdict(list)
        self._in_backward = False
        trainer: Any = run.trainer
        llava: Any = bare_model(run.model)
        decoder = llava.get_model()
        for name, module in (
            ("forward", llava),
            ("tower", decoder.vision_tower),
            ("projector", decoder.mm_projector),
            ("decoder", decoder),
            ("head and loss", llava.lm_head),
        ):
            self._time(name, module)
        for layer in decoder.layers:
            for module in (layer.self_attn, layer.mlp):
                module.register_forward_pre_hook(self._recomputes)
                module.register_forward_hook(self._recomputed)
        llava.build_inputs = self._timed("inputs", llava.build_inputs)
        self._backward = trainer.accelerator.backward
        trainer.accelerator.backward = self._timed("backward", self._run_backward)

    def _run_backward(self, *args: Any, **kwargs: Any) -> None:
        self._in_backward = True
        try:
            self._backward(*args, **kwargs)
        finally:
            self._in_backward = False

    def _begin(self, name: str) -> None:
        self._starts[name].append(time.perf_counter())

    def _end(self, name: str) -> None:
        self.seconds[name] += time.perf_counter() - self._starts[name].pop()

    def _time(self, name: str, module: nn.Module) -> None:
        """Time the calls of a module; a checkpointed chunk that is run again in the backward pass counts there."""
        module.register_forward_pre_hook(lambda *_: None if self._in_backward else self._begin(name))
        module.register_forward_hook(lambda *_: None if self._in_backward else self._end(name))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._begin(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._end(name)

        return timed

    def _recomputes(self, *_: Any) -> None:
        if self._in_backward:
            self._begin("recomputation")

    def _recomputed(self, *_: Any) -> None:
        if self._in_backward and self._starts["recomputation"]:
            self._end("recomputation")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """An update begins."""
        self._begin("update")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The gradients have been clipped."""
        self._begin("optimizer")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The weights have been changed."""
        self._end("optimizer")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The update is over."""
        self._end("update")

    def table(self) -> dict[str, float]:
        """Seconds of parts that do not overlap; their sum is that of the update."""
        found = self.seconds
        inner = found["inputs"] + found["decoder"] + found["head and loss"]
        return {
            "tower": found["tower"],
            "projector": found["projector"],
            "splicing": found["inputs"] - found["tower"] - found["projector"],
            "decoder, forward": found["decoder"],
            "head and loss, forward": found["head and loss"],
            "other losses": found["forward"] - inner,
            "decoder, recomputation": found["recomputation"],
            "backward": found["backward"] - found["recomputation"],
            "optimizer": found["optimizer"],
            "clipping, batches, log": found["update"] - found["forward"] - found["backward"] - found["optimizer"],
        }
