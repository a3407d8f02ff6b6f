"""HydraLoRA as an extension of llava: routed MLP blocks, and HydraLoRA on attention layers of decoder and tower.

Corresponds to the changes of MLLM-HydraLoRA to `train.py`, `llava_llama.py` and `builder.py`. What the flags switch on
is decided in `flags.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hydralora import linears, moe_args, original
from hydralora import model as routed_model
from hydralora.config import HydraLoraOptions, HydraLoraSettings, RoutedMLPConfig
from hydralora.flags import settings_from_flags
from hydralora.layer import RoutedModule, expert_balance_loss
from hydralora.observation import UtilizationWatch, watch_utilization
from hydralora.statistics import RoutingStatistics
from llava.details import AnsweredRow, Detail, Shares
from llava.errors import CheckpointError
from llava.extension import Config, Extension, ImportedState, RunOptions
from llava.segments import DecoderState, MultimodalInputs


@dataclass
class _Watched:
    """Layers of a decoder whose routing is recorded, balanced and counted together.

    Attributes:
        prefix: of the names of loss and metrics.
        balance_weight: factor of their balance loss; 0: none.
        recorder: takes their routings during a forward pass.
        statistics: counts them between two log lines.
    """

    prefix: str
    balance_weight: float
    recorder: routed_model.RoutingRecorder
    statistics: RoutingStatistics = field(default_factory=RoutingStatistics)


class HydraLoraExtension(Extension):
    """Routed MLP blocks and HydraLoRA on attention layers; the configuration is `HydraLoraSettings.to_dict()`."""

    name = "hydralora"
    options = HydraLoraOptions
    core_options = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")

    def __init__(self) -> None:
        # Per model, and gone with it: one extension may serve several models.
        self._watched: WeakKeyDictionary[nn.Module, list[_Watched]] = WeakKeyDictionary()

    def configure(self, args: RunOptions) -> Config | None:
        """Switch LoRA on in the core, and return what the flags put beside it; None for nothing.

        Raises:
            FlagError: a flag is contradictory or not carried out; see the messages.
        """
        settings = settings_from_flags(args.options[self.name], args)
        return None if settings is None else settings.to_dict()

    def unused_options(self, options: Mapping[str, Any]) -> Collection[str]:
        """Settings of the routed blocks without `--llm_moe`, and of HydraLoRA on attention without its modules."""
        blocks = () if options["llm_moe"] else ("dense_moe", "llm_moe_num_experts", "moe_balance_w")
        linear = [name for name in options if name.startswith("hydralora_") and not options["hydralora_modules"]]
        return {*blocks, *linear, "vit_trainable"}

    def packing_problem(self, config: Config) -> str | None:
        """None: routing is by token, and the balance losses are by sample."""
        return None

    def attach(self, model: nn.Module, config: Config) -> None:
        """Put blocks and updates in place; the added parameters are float32 whatever the base is.

        Raises:
            CheckpointError: the configuration is damaged, or the model has no layers of the kind to be adapted.
        """
        try:
            settings = HydraLoraSettings.from_dict(config)
            if settings.mlp is not None:
                routed_model.attach(model, settings.mlp)
            if settings.linear is not None:
                layers = {"attention": routed_model.decoder_layers(model), "vision": _tower_blocks(model)}
                linears.add_updates(layers, settings.linear)
        except ValueError as error:
            raise CheckpointError(f"extension '{self.name}': {error}") from error

    def on_inputs(self, model: nn.Module, config: Config, inputs: MultimodalInputs) -> MultimodalInputs:
        """Start recording the routing if a loss will be wanted; a record that an error left open is ended."""
        for watched in self._watched.get(model, []):
            watched.recorder.stop()
        if inputs.labels is not None:
            if model not in self._watched:
                self._watched[model] = _watch(model, HydraLoraSettings.from_dict(config))
            for watched in self._watched[model]:
                watched.recorder.start()
        return inputs

    def losses(self, model: nn.Module, config: Config, inputs: MultimodalInputs) -> dict[str, Tensor]:
        """The weighted expert-balance losses, each over its layers and all valid tokens; none with weight 0.

        Ends the recording before the backward pass begins, so that recomputation under gradient checkpointing is
        not recorded.
        """
        found: dict[str, Tensor] = {}
        for watched in self._watched.get(model, []):
            routings = [passes[-1] for passes in watched.recorder.stop().values() if passes]
            if routings:
                if model.training:
                    watched.statistics.add(routings, inputs.attention_mask)
                if watched.balance_weight > 0:
                    packed = inputs.packed
                    texts = None if packed is None else (packed.samples, len(packed.rows))
                    loss = expert_balance_loss(routings, inputs.attention_mask, texts)
                    found[f"{watched.prefix}balance"] = watched.balance_weight * loss
        return found

    def metrics(self, model: nn.Module, config: Config) -> dict[str, float]:
        """`share_<expert>` and `entropy` of this process in training since the last call; see `RoutingStatistics`."""
        return {
            f"{watched.prefix}{name}": value
            for watched in self._watched.get(model, [])
            for name, value in watched.statistics.pop().items()
        }

    @contextmanager
    def observe(self, model: nn.Module, config: Config) -> Iterator[_Utilization]:
        """Expert utilization of each answer, by layer; of a single expert there is nothing to say."""
        parts = [
            {name: part for name, part in layer.named_modules() if _is_routed(part)}
            for layer in routed_model.decoder_layers(model)
        ]
        with watch_utilization(parts) as watch:
            yield _Utilization(watch)

    def named_parameters(self, model: nn.Module, config: Config) -> Iterator[tuple[str, nn.Parameter]]:
        """A, B and router of every block and every update."""
        return chain(routed_model.block_parameters(model), linears.added_parameters(model))

    def untrained_parameters(self, model: nn.Module, config: Config) -> list[nn.Parameter]:
        """The routers of sparse blocks without balance loss: data parallelism waits for gradients that never come."""
        mlp = HydraLoraSettings.from_dict(config).mlp
        if mlp is None or mlp.trains_routers:
            return []
        blocks = routed_model.routed_blocks(model).values()
        return [parameter for block in blocks for parameter in block.router.parameters()]

    def export_problem(self, config: Config) -> str | None:
        """The original's layout knows routed MLP blocks and LoRA alone."""
        if HydraLoraSettings.from_dict(config).linear is None:
            return None
        return (
            "it was trained with --hydralora_modules, and the layout of MLLM-HydraLoRA has no place for HydraLoRA on "
            "attention layers; load it with its base instead"
        )

    def import_checkpoint(self, folder: Path) -> ImportedState | None:
        """Read a folder written by MLLM-HydraLoRA, known by the keys in its `non_lora_trainables.bin`.

        Raises:
            CheckpointError: `moe_args.pth` is missing or unreadable, or tensors are missing or of the wrong shape.
        """
        try:
            return _import_original(folder)
        except ValueError as error:
            raise CheckpointError(str(error)) from error

    def export_checkpoint(self, model: nn.Module, config: Config, folder: Path) -> None:
        """Add the blocks to `non_lora_trainables.bin` in `folder` and write `moe_args.pth` beside it.

        `adapter_config.json`, if it is there already, tells the modules and the dropout of the attention LoRA. The
        original's loader wants `llava`, `lora` and `mohle` in the name of the folder, and one rank and alpha for
        attention and experts.

        Raises:
            CheckpointError: the attention LoRA in `folder` has another rank or alpha than the experts.
        """
        path = folder / original.WEIGHTS_FILE
        try:
            stored = original.read_weights(path) if path.is_file() else {}
            arguments = moe_args.arguments_of_config(
                RoutedMLPConfig.from_dict(config),  # of blocks alone; see `export_problem`
                folder / "adapter_config.json",
                (name for name, _ in model.named_modules()),
            )
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        torch.save(stored | original.to_original(routed_model.block_parameters(model)), path)
        moe_args.write_training_arguments(folder / moe_args.ARGUMENTS_FILE, arguments)


@dataclass(frozen=True)
class _Utilization:
    """What is said of an answer: for each kind of part the share of each expert, by layer."""

    watch: UtilizationWatch

    def enter_layer(self, index: int, state: DecoderState) -> None:
        """See `llava.details.Observation`."""
        batch, length, _ = state.hidden_states.shape
        if state.attention_mask is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=state.hidden_states.device)
        else:
            valid = state.attention_mask[:, -length:].bool()
        self.watch.enter(index, valid)

    def details(self, answered: AnsweredRow) -> list[Detail]:
        """See `llava.details.Observation`."""
        found: list[Detail] = []
        for name, layers in self.watch.shares(answered.index).items():
            experts = tuple(f"expert {number}" for number in range(len(next(iter(layers.values())))))
            rows = tuple((f"layer {index}", shares) for index, shares in layers.items())
            found.append(Shares(f"Expert utilization: {name.removesuffix(f'.{linears.CHILD}')}", experts, rows))
        return found


def _is_routed(part: Any) -> TypeGuard[RoutedModule]:
    """Whether a module chooses among experts."""
    return isinstance(part, RoutedModule) and part.experts > 1


def _import_original(folder: Path) -> ImportedState | None:
    """`import_checkpoint` with `ValueError` for whatever is wrong."""
    path, arguments_path = folder / original.WEIGHTS_FILE, folder / moe_args.ARGUMENTS_FILE
    if not path.is_file():
        return None
    stored = original.read_weights(path)
    keys = frozenset(key for key in stored if original.is_original_key(key))
    if not keys:
        return None
    if not arguments_path.is_file():
        raise ValueError(
            f"{path} holds routed MLP blocks ('{min(keys)}'), but {arguments_path} is missing: it alone tells how they "
            "are wired (dense or sparse, alpha); copy it from where the checkpoint came from"
        )
    config = moe_args.config_from_arguments(moe_args.read_training_arguments(arguments_path), arguments_path)
    return ImportedState(config.to_dict(), original.from_original(stored, config, path), keys | {arguments_path.name})


def _tower_blocks(model: Any) -> list[nn.Module]:
    """The blocks of the vision tower that run; none without a tower."""
    tower = model.get_vision_tower()
    return [] if tower is None else list(tower.blocks(tower.loaded())[: tower.num_blocks])


def _watch(model: Any, settings: HydraLoraSettings) -> list[_Watched]:
    """What is recorded of a model: its blocks, and the attention layers of its decoder.

    The tower's layers are not: its tokens are no tokens of the text, and images that fill up rows of text alone run
    through it too.
    """
    found: list[_Watched] = []
    mlp, linear = settings.mlp, settings.linear
    if mlp is not None and mlp.experts > 1:
        recorder = routed_model.RoutingRecorder(routed_model.routed_blocks(model))
        found.append(_Watched("", mlp.balance_weight, recorder))
    if linear is not None and linear.experts > 1 and linear.projections("attention") is not None:
        recorder = routed_model.RoutingRecorder(linears.routed_updates(model.get_decoder().layers))
        found.append(_Watched("attention_", linear.balance_weight, recorder))
    return found
