"""Mixture-of-Modality Adaptation in a patched checkout: flags, adapters, and the routing of each pass.

Adapters and projector are trained on a frozen model, on the pictures as LLaVA feeds them (`--visual_input llava`). A
sample's modality is read off its token ids: an image token makes it `image`. The folder written is that of
llava-extensions, since the original's file has no place for LLaVA's projector.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mma import modality
from mma.config import MmaConfig, MmaOptions
from mma.modality import Routing, Table, Witness
from mma.model import EMBEDDING, ROUTING, added_parameters, attach
from moe_patch.payload.extension import Extension, State
from moe_patch.payload.gradients import keep_the_graph

ATTRIBUTE = "mma_modalities"
"""Where a model keeps its `Modalities`."""

IMAGE_TOKEN_INDEX = -200
"""Upstream's token id of an image."""

OUR_BLOCKS = "model.vision_tower.vision_tower.encoder.layers."
"""Beginning of the names of the tower's blocks in llava-extensions; upstream's older CLIP has one more level."""


class Mma(Extension):
    """Adapters mixed by the modality of a sample, in the language model and in the vision tower."""

    name = "mma"
    options = MmaOptions

    def configure(self, model_args: Any, training_args: Any) -> None:
        """Freeze the language model, and refuse what would not be carried out."""
        if not training_args.mma:
            given = [f.name for f in dataclasses.fields(MmaOptions) if getattr(training_args, f.name) != f.default]
            if given:
                raise ValueError(f"{', '.join('--' + name for name in given)}: without effect; pass --mma True too")
            return
        if training_args.visual_input != "llava":
            raise ValueError(
                f"--visual_input {training_args.visual_input}: upstream's LLaVA does not feed pictures as LaVIN does; "
                "pass --visual_input llava, or train in llava-extensions"
            )
        if model_args.vision_tower is None:
            raise ValueError("--mma True needs --vision_tower")
        if training_args.lora_enable or getattr(training_args, "use_lora", False):
            raise ValueError("--mma True beside LoRA is not carried by moe_patch; train both in llava-extensions")
        if model_args.tune_mm_mlp_adapter:
            raise ValueError("--tune_mm_mlp_adapter True freezes all but the projector, the adapters of --mma too")
        _config(training_args)
        _check_torch()
        model_args.freeze_backbone = True
        if training_args.gradient_checkpointing:
            keep_the_graph(training_args, "the loss does not reach the routers of --mma")

    def is_active(self, training_args: Any) -> bool:
        """With `--mma True`."""
        return bool(training_args.mma)

    def writes_itself(self, training_args: Any) -> bool:
        """With `--mma True`."""
        return bool(training_args.mma)

    def attach_beside_tower(self, model: Any, training_args: Any) -> None:
        """Put the adapters in place; they and the projector are what is trained."""
        if not training_args.mma:
            return
        config = _config(training_args)
        model.requires_grad_(False)
        model.get_model().mm_projector.requires_grad_(not training_args.freeze_mm_mlp_adapter)
        setattr(model, ATTRIBUTE, Modalities(model, config))
        if config.adapters_per_block:
            _let_gradients_through(model.get_vision_tower())

    def attach(self, model: Any, config: Mapping[str, Any], tensors: State) -> None:
        """Put adapters with trained weights in place; loads the tower, which holds some of them."""
        settings = MmaConfig.from_dict(config)
        if settings.merged_for or settings.shifted_decoding:
            raise ValueError("a checkpoint that was merged for a modality, or decodes with shifted positions as LaVIN")
        tower = model.get_vision_tower()
        if settings.adapters_per_block and not tower.is_loaded:
            tower.load_model()
            tower.to(device=model.device, dtype=model.dtype)
        setattr(model, ATTRIBUTE, Modalities(model, settings))
        parameters = {self._our_name(model, name): parameter for name, parameter in added_parameters(model)}
        wrong = sorted(n for n in {*parameters, *tensors} if _shape(parameters, n) != _shape(tensors, n))
        if wrong:
            raise ValueError(f"{len(wrong)} weights of adapters are missing, unknown or of another shape: {wrong[:3]}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
                parameter.requires_grad_(False)

    def own_config(self, model: Any) -> dict[str, Any] | None:
        """Configuration of the adapters."""
        modalities = getattr(model, ATTRIBUTE, None)
        return None if modalities is None else modalities.config.to_dict()

    def to_ours(self, model: Any, state: State) -> State:
        """Adapters and modality embedding."""
        names = {name for name, _ in added_parameters(model)}
        return {self._our_name(model, name): tensor for name, tensor in state.items() if name in names}

    def refuse(self, config: Any) -> None:
        """LaVIN's own picture is not to be had in upstream's LLaVA."""
        feature = getattr(config, "mm_vision_select_feature", "patch")
        pixels = getattr(config, "mm_image_normalization", "tower")
        if feature not in ("patch", "cls_patch") or pixels != "tower":
            raise ValueError(
                f"the checkpoint was trained with --visual_input lavin (features '{feature}', pixels normalised by "
                f"'{pixels}'), which upstream's LLaVA does not have; load it in llava-extensions"
            )

    @staticmethod
    def _our_name(model: Any, name: str) -> str:
        """Name in llava-extensions of an adapter's weight: the tower's blocks lie elsewhere there."""
        found = re.search(r"\.layers\.(\d+\..*)$", name)
        return OUR_BLOCKS + found[1] if found and "vision_tower" in name.split(".") else name


class Modalities:
    """Puts adapters into a model, and tells every pass of which modality its samples are.

    Contract: a backward pass follows its forward pass before the next one begins, as in a Trainer; a checkpointed layer
    that is recomputed reads the routing of the last forward pass.

    Args:
        model: bare model of upstream's class, the tower loaded if it gets adapters.
        config: of the adapters.
    """

    def __init__(self, model: Any, config: MmaConfig) -> None:
        _check_torch()
        self.config = config
        self._rows: Tensor | None = None
        self._routing: Routing | None = None
        self._kept: tuple[Table, Witness] | None = None
        tower = model.get_vision_tower()
        blocks, width = (_blocks(tower), tower.hidden_size) if config.adapters_per_block else ([], 0)
        attach(model, blocks, width, config)
        if not config.adapters_per_layer:
            return
        for name in ("generate", "prepare_inputs_labels_for_multimodal"):
            setattr(model, name, self._noting(getattr(model, name)))
        decoder = model.get_decoder()
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        for index, layer in enumerate(decoder.layers):
            # In front of the hook that takes the routing out of the arguments.
            layer.register_forward_pre_hook(
                functools.partial(self._give, decoder, index), with_kwargs=True, prepend=True
            )

    def _noting(self, inner: Any) -> Any:
        """A method whose first argument are token ids, with a look at them; one token alone is a step of generation."""

        @functools.wraps(inner)
        def noting(*args: Any, **kwargs: Any) -> Any:
            given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids"))]
            ids = next((value for value in given if isinstance(value, Tensor)), None)
            if ids is not None and ids.shape[1] > 1:
                self._rows = (ids == IMAGE_TOKEN_INDEX).any(dim=1).long()
            return inner(*args, **kwargs)

        return noting

    def _begin(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The weights of all adapters for the samples of this pass."""
        given = kwargs.get("inputs_embeds")
        given = kwargs.get("input_ids", *args[:1]) if given is None else given
        batch = len(given)
        if self._rows is None or batch % len(self._rows):
            noted = 0 if self._rows is None else len(self._rows)
            raise ValueError(
                f"the modality of {batch} sequences is unknown ({noted} noted): call model or generate with token ids"
            )
        rows = self._rows.repeat_interleave(batch // len(self._rows))  # beams of a sample have its modality
        routing = modality.routing_of(rows.tolist(), rows.device)
        self._routing = dataclasses.replace(routing, table=self._table(decoder))

    def _give(self, decoder: Any, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Tell a layer the weights of its adapters, unless it was called for the table itself."""
        if ROUTING in kwargs or self._routing is None:
            return None
        return args, {**kwargs, ROUTING: self._routing.at(decoder, index)}

    def _table(self, decoder: Any) -> Table:
        """The weights of all layers: with gradient in training, otherwise kept while they hold."""
        dtype = decoder.embed_tokens.weight.dtype
        roots = [*decoder.layers, getattr(decoder, EMBEDDING)]
        if torch.is_grad_enabled() or not modality.can_be_witnessed(roots):
            self._kept = None
            return Table(_routing_table(decoder, dtype))
        circumstances = (dtype, torch.is_autocast_enabled())
        if self._kept is None or not self._kept[1].still_holds(roots, *circumstances):
            table = Table(_routing_table(decoder, dtype))
            self._kept = table, Witness(roots, *circumstances)
        return self._kept[0]


def _config(training_args: Any) -> MmaConfig:
    """The configuration of the adapters that the flags ask for."""
    return MmaOptions(**{f.name: getattr(training_args, f.name) for f in dataclasses.fields(MmaOptions)}).config()


def _check_torch() -> None:
    """Raise `ValueError` if torch has no hooks that run after an error too; `mma/model.py` registers one."""
    if "always_call" not in inspect.signature(nn.Module.register_forward_hook).parameters:
        raise ValueError(f"--mma and its checkpoints need torch 2.1 or later; installed is {torch.__version__}")


def _routing_table(decoder: Any, dtype: torch.dtype) -> Tensor:
    """`mma.modality.routing_table`, also for transformers 4, whose layers make rotary embeddings themselves."""
    if hasattr(decoder, "rotary_emb"):
        return modality.routing_table(decoder, dtype)
    tokens, rows = modality.start(decoder, dtype), []
    positions = torch.zeros(1, 1, dtype=torch.long, device=tokens.device)
    for layer in decoder.layers:
        noted: list[Tensor] = []
        tokens = layer(tokens, attention_mask=None, position_ids=positions, use_cache=False, **{ROUTING: noted})[0]
        rows.append(torch.stack(noted, dim=1))  # (M, A, 2)
    return torch.stack(rows)


def _blocks(tower: Any) -> list[nn.Module]:
    """The blocks of upstream's CLIP tower that run before the selected hidden state."""
    network = tower.vision_tower
    layers = getattr(network, "vision_model", network).encoder.layers
    last = tower.select_layer if tower.select_layer >= 0 else len(layers) + 1 + tower.select_layer
    return list(layers[:last])


def _let_gradients_through(tower: Any) -> None:
    """Upstream runs the tower under `torch.no_grad`, which would leave its adapters untrained.

    Raises:
        ValueError: the tower's forward is built otherwise.
    """
    inner = getattr(type(tower).forward, "__wrapped__", None)
    if inner is None:
        raise ValueError(f"{type(tower).__name__}.forward is not wrapped in torch.no_grad; this LLaVA is not known")
    tower.forward = types.MethodType(inner, tower)


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
