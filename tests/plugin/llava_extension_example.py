"""The smallest extension that uses every part of a training run: a learnable scale in front of one decoder layer.

It stands for a package that somebody else publishes: it is found by its entry point alone.
Shape letters: B batch, L sequence length, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from llava.errors import FlagError
from llava.extension import Config, Extension, ParameterGroup, RunOptions
from llava.segments import DecoderState, MultimodalInputs


@dataclass
class ScaleOptions:
    """Command-line options of the extension."""

    scale_layer: int | None = field(
        default=None, metadata={"help": "decoder layer whose input is scaled; unset is off"}
    )
    scale_lr: float | None = field(
        default=None, metadata={"help": "learning rate of the scale; unset: that of the run"}
    )
    scale_penalty: float = field(default=0.1, metadata={"help": "weight of the squared distance of the scale from 1"})


class HiddenScale(nn.Module):
    """Multiplies every hidden feature by a learned factor; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))  # (D,)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Scale (B, L, D) hidden states."""
        return hidden_states * self.weight.to(hidden_states.dtype)


class ScaleExtension(Extension):
    """Scale before one layer, with a penalty, a learning rate and a logged value of its own."""

    name: ClassVar[str] = "example_scale"
    options: ClassVar[type | None] = ScaleOptions

    def configure(self, args: RunOptions) -> Config | None:
        """Off unless `--scale_layer` is given."""
        options: ScaleOptions = args.options[self.name]
        if options.scale_layer is None:
            return None
        if options.scale_layer < 0:
            raise FlagError(f"--scale_layer {options.scale_layer} is negative; layers count from 0")
        return {"layer": options.scale_layer, "penalty": options.scale_penalty}

    def attach(self, model: nn.Module, config: Config) -> None:
        """Add the scale beside the decoder layers."""
        decoder = model.get_model()
        layers = len(decoder.layers)
        if config["layer"] >= layers:
            raise FlagError(f"--scale_layer {config['layer']} does not exist; the model has {layers} layers, from 0")
        decoder.example_scale = HiddenScale(model.config.hidden_size).to(decoder.norm.weight.device)

    def before_layer(self, model: nn.Module, config: Config, index: int, state: DecoderState) -> DecoderState:
        """Scale what enters the chosen layer."""
        if index == config["layer"]:
            state.hidden_states = model.get_model().example_scale(state.hidden_states)  # (B, L, D)
        return state

    def losses(self, model: nn.Module, config: Config, inputs: MultimodalInputs) -> dict[str, Tensor]:
        """Weighted mean squared distance of the scale from 1."""
        return {"penalty": config["penalty"] * (model.get_model().example_scale.weight - 1).square().mean()}

    def metrics(self, model: nn.Module, config: Config) -> dict[str, float]:
        """Largest factor."""
        return {"largest": model.get_model().example_scale.weight.max().item()}

    def parameter_groups(self, model: nn.Module, config: Config, args: RunOptions) -> list[ParameterGroup]:
        """The scale, with `--scale_lr` and without weight decay towards zero."""
        options: ScaleOptions = args.options[self.name]
        weight = model.get_model().example_scale.weight
        return [ParameterGroup(self.name, [weight], learning_rate=options.scale_lr, weight_decay=0.0)]

    def named_parameters(self, model: nn.Module, config: Config) -> Iterator[tuple[str, nn.Parameter]]:
        """The one parameter, by its name in the model."""
        yield "model.example_scale.weight", model.get_model().example_scale.weight
