"""Mixture-of-Modality Adaptation as an extension of llava: the adapters, their flags, and the routing of a batch.

Corresponds to LaVIN's `train.py`, `lavin/mm_adaptation.py` and the forward passes of `lavin/model.py` and
`lavin/eval_model.py`. The language model is frozen; adapters, modality embedding and projector are trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llava.details import AnsweredRow, Detail, Observation, Shares
from llava.errors import CheckpointError, FlagError
from llava.extension import Config, Extension, LayerVisit, RunOptions
from llava.runtime import checkpointing
from llava.runtime.ranges import check_ranges
from llava.segments import DecoderState, MultimodalInputs
from mma import cache, modality
from mma import model as adapted_model
from mma.config import FLAG_RANGES, MODALITIES, VISUAL_INPUTS, MmaConfig, MmaOptions
from mma.decoder_layer import ROUTING
from mma.modality import Routing, Table, Witness


class MmaExtension(Extension):
    """Adapters mixed by the modality of a sample; the configuration is `MmaConfig.to_dict()`."""

    name = "mma"
    options = MmaOptions
    adjustable = frozenset({"shifted_decoding"})

    def __init__(self) -> None:
        # Per model, and gone with it: one extension may serve several models.
        self._tables: WeakKeyDictionary[nn.Module, tuple[Table, Witness]] = WeakKeyDictionary()

    def configure(self, args: RunOptions) -> Config | None:
        """The configuration of the adapters if `--mma` is on; freezes the language model, chooses LaVIN's image.

        Raises:
            FlagError: a value is refused, or flags contradict each other.
        """
        options: MmaOptions = args.options[self.name]
        if not options.mma:
            _refuse_idle_options(options)
            return None
        if checkpointing.asks_for_reentrant(args.training):
            raise FlagError(
                "--gradient_checkpointing_kwargs asks for use_reentrant, under which the loss does not reach the "
                'routers of --mma; pass {"use_reentrant": false} or leave the flag out'
            )
        if args.model.vision_tower is None and options.visual_adapter_type != "none":
            raise FlagError(
                f"--visual_adapter_type {options.visual_adapter_type}: there is no tower to be adapted; give "
                "--vision_tower, or pass --visual_adapter_type none"
            )
        check_ranges(options, FLAG_RANGES)
        try:
            config = options.config().to_dict()
        except ValueError as error:
            raise FlagError(f"{error} (the flags have the same names)") from error
        if options.drop_path and options.adapter_type == "none":
            raise FlagError(
                f"--drop_path {options.drop_path}: belongs to the adapters of the language model, and --adapter_type "
                "is none; leave it out"
            )
        args.model.freeze_backbone = True
        _choose_visual_input(args, options)
        return config

    def unused_options(self, options: Mapping[str, Any]) -> Collection[str]:
        """The width of a projector that LLaVA's own flags describe, and what adapters that are not there would do."""
        language, vision = options["adapter_type"] != "none", options["visual_adapter_type"] != "none"
        routed = language or options["visual_adapter_type"] in ("router", "router_block")
        return {
            *(() if options["visual_input"] == "lavin" else ("hidden_proj",)),
            *(() if language else ("drop_path",)),
            *(() if routed else ("adapter_scale", "temperature")),
            *(() if language or vision else ("adapter_dim", "adapter_dropout")),
        }

    def packing_problem(self, config: Config) -> str | None:
        """Adapters are mixed for each token by its sample; a skipped layer is skipped for a whole row."""
        if config.get("drop_path", MmaConfig.drop_path):
            return f"--drop_path {config['drop_path']:g} skips layers for a sample, and a row has several"
        return None

    def attach(self, model: nn.Module, config: Config) -> None:
        """Put the adapters in place; their parameters are float32 whatever the base is.

        Raises:
            CheckpointError: the configuration is damaged, or the model has no layers of the kind to be adapted.
        """
        host: Any = model
        tower = host.get_vision_tower()
        blocks = [] if tower is None else list(tower.blocks(tower.loaded())[: tower.num_blocks])
        try:
            adapted_model.attach(model, MmaConfig.from_dict(config), blocks=blocks)
        except ValueError as error:
            raise CheckpointError(f"extension '{self.name}': {error}") from error

    def on_inputs(self, model: nn.Module, config: Config, inputs: MultimodalInputs) -> MultimodalInputs:
        """Refuse what a merged model was not merged for.

        Raises:
            ValueError: a sample is of the other modality.
        """
        merged_for = config.get("merged_for", MmaConfig.merged_for)
        other = [row for row, sample in enumerate(inputs.segments) if sample.has_image != (merged_for == "image")]
        if merged_for and other:
            raise ValueError(
                f"the adapters of this model were merged for samples of {merged_for} alone, and rows {other} are of "
                "the other kind; load the checkpoint that it was merged from"
            )
        return inputs

    def layer_visit(self, model: nn.Module, config: Config, state: DecoderState) -> LayerVisit | None:
        """Give the layers the weights of their adapters for each sample: all at once where the table is kept."""
        if config.get("adapter_type", MmaConfig.adapter_type) == "none":
            return None
        routing = self._begin(model, config, state)
        known = routing.known()
        if known is None:
            return _Walk(model.get_decoder(), routing)  # type: ignore[operator]
        state.layer_kwargs[ROUTING] = known
        return None

    def _begin(self, model: nn.Module, config: Config, state: DecoderState) -> Routing:
        """What the routing of a pass follows from: the segments of its samples, or what the cache remembers."""
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        hidden = state.hidden_states
        if state.segments is None:
            routing = cache.remembered(state.cache, len(hidden))
            if config.get("shifted_decoding", MmaConfig.shifted_decoding):
                state.position_ids = (state.position_ids - 1).clamp(min=0)
                state.position_embeddings = decoder.rotary_emb(hidden, position_ids=state.position_ids)
            return routing
        routing = modality.routing_of([sample.has_image for sample in state.segments], hidden.device)
        if state.packed is not None:
            routing = replace(routing, modalities=state.packed.spread(routing.modalities))
        table = self._table(model, hidden, state.cache is not None)
        if table is None:
            return replace(routing, tokens=modality.start(decoder, hidden.dtype))
        routing = replace(routing, table=table)
        if state.cache is not None:
            cache.remember(state.cache, routing)
        return routing

    def _table(self, model: nn.Module, hidden: Tensor, wanted: bool) -> Table | None:
        """The routing of all layers: the kept one if it still holds; None to route layer by layer.

        Args:
            model: with adapters.
            hidden: what enters the first layer.
            wanted: compute it in any case.
        """
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        roots = [*decoder.layers, getattr(decoder, adapted_model.EMBEDDING)]
        if torch.is_grad_enabled() or not modality.can_be_witnessed(roots):
            self._tables.pop(model, None)
            return Table(modality.routing_table(decoder, hidden.dtype)) if wanted else None
        kind = hidden.device.type
        circumstances = (hidden.dtype, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        if model in self._tables:
            table, witness = self._tables[model]
            if witness.still_holds(roots, *circumstances):
                return table
        table = modality.kept_table(decoder, hidden.dtype)
        self._tables[model] = (table, Witness(roots, *circumstances))
        return table

    def observe(self, model: nn.Module, config: Config) -> AbstractContextManager[Observation] | None:
        """How the adapters of each decoder layer were mixed for a sample; merged adapters are no longer mixed."""
        routed = config.get("adapter_type", MmaConfig.adapter_type) != "none"
        return nullcontext(_Mixed(model)) if routed else None

    def named_parameters(self, model: nn.Module, config: Config) -> Iterator[tuple[str, nn.Parameter]]:
        """Adapters and modality embedding."""
        return adapted_model.added_parameters(model)

    def export_problem(self, config: Config) -> str | None:
        """The original's layout holds nothing but the adapters, in one file."""
        return "LaVIN has a file of its own for adapters: python -m mma.convert export CHECKPOINT FILE.pth"

    def export_checkpoint(self, model: nn.Module, config: Config, folder: Path) -> None:
        """Not reached: see `export_problem`.

        Raises:
            FlagError: always.
        """
        raise FlagError(str(self.export_problem(config)))


class _Walk:
    """Gives each layer the weights of its adapters in a pass without a kept table; made for one pass.

    Args:
        decoder: with adapters.
        routing: before the first layer.
    """

    def __init__(self, decoder: nn.Module, routing: Routing) -> None:
        self.decoder, self.routing = decoder, routing

    def __call__(self, index: int, state: DecoderState) -> DecoderState:
        """Seam 4 of `llava.extension`, before decoder layer `index`."""
        self.routing, state.layer_kwargs[ROUTING] = self.routing.at(self.decoder, index)
        return state


@dataclass
class _Mixed:
    """What is said of an answer: the weights of both up-projections, by layer and place of the adapter.

    Attributes:
        model: with adapters.
        has_image: of each row.
        dtype: of the hidden states.
    """

    model: nn.Module
    has_image: list[bool] = field(default_factory=list)
    dtype: torch.dtype = torch.float32

    def enter_layer(self, index: int, state: DecoderState) -> None:
        """See `llava.details.Observation`."""
        if index == 0 and state.segments is not None:
            self.has_image = [sample.has_image for sample in state.segments]
            self.dtype = state.hidden_states.dtype

    @torch.no_grad()
    def details(self, answered: AnsweredRow) -> list[Detail]:
        """See `llava.details.Observation`."""
        modality_row = int(self.has_image[answered.index])
        decoder: Any = self.model.get_decoder()  # type: ignore[operator]
        weights = modality.routing_table(decoder, self.dtype)[:, modality_row].tolist()  # (layers, A, 2)
        places = ("attention", "MLP")
        rows = tuple(
            (f"layer {index}, {place}", tuple(pair))
            for index, adapters in enumerate(weights)
            for place, pair in zip(places, adapters, strict=False)
        )
        kind = MODALITIES[modality_row]
        return [Shares(f"Weights of the adapters for samples of {kind}", ("first path", "second path"), rows)]


IMAGE_FLAGS: dict[str, tuple[str, str, Any]] = {
    "mm_vision_select_feature": ("model", "patch", "cls_every_4"),
    "mm_vision_select_layer": ("model", -1, -1),
    "mm_image_normalization": ("model", "tower", "imagenet"),
    "image_aspect_ratio": ("data", "square", "stretch"),
}
"""LLaVA's flags for LaVIN's image: where they are, their default, and LaVIN's value."""


def _choose_visual_input(args: RunOptions, options: MmaOptions) -> None:
    """Set LLaVA's own flags as LaVIN feeds images.

    Raises:
        FlagError: one of them was given with another value.
    """
    if options.visual_input not in VISUAL_INPUTS:
        raise FlagError(f"--visual_input is '{options.visual_input}'; known values: {VISUAL_INPUTS}")
    if args.model.vision_tower is None or options.visual_input == "llava":
        if "hidden_proj" in args.given:
            raise FlagError(
                f"--hidden_proj {options.hidden_proj}: is the width of the projector of --visual_input lavin behind a "
                "--vision_tower; otherwise --mm_projector_type decides (bottleneckH_silu is LaVIN's kind)"
            )
        return
    wanted = {**IMAGE_FLAGS, "mm_projector_type": ("model", "linear", f"bottleneck{options.hidden_proj}_silu")}
    for name, (part, default, value) in wanted.items():
        chosen = getattr(getattr(args, part), name)
        of_base = name in args.base.values and name not in args.given
        if chosen != value and (chosen != default or name in args.given) and not of_base:
            raise FlagError(
                f"--{name} {chosen}: --visual_input lavin has {value}; leave the flag out, or pass --visual_input "
                "llava to feed images as LLaVA does"
            )
        setattr(getattr(args, part), name, value)


def _refuse_idle_options(options: MmaOptions) -> None:
    """Raise if an option was given that nothing carries out while `--mma` is off."""
    idle = [
        f"--{option.name} {getattr(options, option.name)}"
        for option in dataclasses.fields(options)
        if getattr(options, option.name) != option.default
    ]
    if idle:
        raise FlagError(f"{', '.join(idle)}: without effect while --mma is off; pass --mma True")
