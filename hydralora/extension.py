"""HydraLoRA as an extension of llava: routed MLP blocks with the flags of MLLM-HydraLoRA.

Corresponds to the changes of MLLM-HydraLoRA to `train.py`, `llava_llama.py` and `builder.py`. `--use_lora True` puts
LoRA on the attention projections and, with `--llm_moe True`, a routed block in place of every MLP of the decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hydralora import convert, moe_args
from hydralora import model as routed_model
from hydralora.config import HydraLoraOptions, RoutedMLPConfig
from hydralora.layer import expert_balance_loss
from hydralora.statistics import RoutingStatistics
from llava.errors import CheckpointError, FlagError
from llava.extension import Config, Extension, ImportedState, MultimodalInputs

if TYPE_CHECKING:
    from llava.train.arguments import RunArguments, TrainingArguments

MLP_PROJECTIONS = frozenset({"gate_proj", "up_proj", "down_proj"})


class HydraLoraExtension(Extension):
    """Routed MLP blocks; the configuration is `RoutedMLPConfig.to_dict()`."""

    name = "hydralora"
    options = HydraLoraOptions

    def __init__(self) -> None:
        # Per model, and gone with it: one extension may serve several models.
        self._recorders: WeakKeyDictionary[nn.Module, routed_model.RoutingRecorder] = WeakKeyDictionary()
        self._statistics: WeakKeyDictionary[nn.Module, RoutingStatistics] = WeakKeyDictionary()

    def configure(self, args: RunArguments) -> Config | None:
        """Switch LoRA on in the core, and return the configuration of the blocks if `--llm_moe` is on.

        Raises:
            FlagError: a flag is contradictory or not carried out; see the messages.
        """
        options: HydraLoraOptions = args.options[self.name]
        if options.vit_trainable:
            raise FlagError(
                f"--vit_trainable {options.vit_trainable}: MLLM-HydraLoRA declares this flag and never reads it; "
                "to train the vision tower pass --unfreeze_mm_vision_tower True"
            )
        if not options.use_lora:
            _refuse_options_without_use_lora(options)
            return None
        _switch_lora_on(options, args.training)
        if not options.llm_moe:
            return None
        training = args.training
        if (training.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise FlagError(
                "--gradient_checkpointing_kwargs asks for use_reentrant, under which the expert-balance loss of "
                '--llm_moe reaches no parameter; pass {"use_reentrant": false} or leave the flag out'
            )
        try:
            config = RoutedMLPConfig(
                experts=options.llm_moe_num_experts,
                rank=options.lora_rank,
                alpha=training.lora_alpha,
                dropout=training.lora_dropout,
                dense=options.dense_moe,
                balance_weight=options.moe_balance_w,
            )
        except ValueError as error:
            raise FlagError(
                f"{error} (flags: --llm_moe_num_experts, --lora_rank, --lora_alpha, --lora_dropout, --moe_balance_w)"
            ) from error
        return config.to_dict()

    def attach(self, model: nn.Module, config: Config) -> None:
        """Put the blocks in place; the added parameters are float32 whatever the base is.

        Raises:
            CheckpointError: the configuration is damaged, or the decoder has no gated MLPs to put the blocks around.
        """
        try:
            routed_model.attach(model, RoutedMLPConfig.from_dict(config))
        except ValueError as error:
            raise CheckpointError(f"extension '{self.name}': {error}") from error

    def on_inputs(self, model: nn.Module, config: Config, inputs: MultimodalInputs) -> MultimodalInputs:
        """Start recording the routing if a loss will be wanted."""
        if inputs.labels is not None and RoutedMLPConfig.from_dict(config).experts > 1:
            if model not in self._recorders:
                self._recorders[model] = routed_model.RoutingRecorder(routed_model.routed_blocks(model))
            self._recorders[model].start()
        return inputs

    def losses(self, model: nn.Module, config: Config, inputs: MultimodalInputs) -> dict[str, Tensor]:
        """The weighted expert-balance loss, over all blocks and valid tokens; none with one expert or weight 0.

        Ends the recording before the backward pass begins, so that recomputation under gradient checkpointing is
        not recorded.
        """
        if model not in self._recorders:
            return {}
        routings = [passes[-1] for passes in self._recorders[model].stop().values() if passes]
        if not routings:
            return {}
        self._statistics.setdefault(model, RoutingStatistics()).add(routings, inputs.attention_mask)
        settings = RoutedMLPConfig.from_dict(config)
        if not settings.needs_balance_loss:
            return {}
        return {"balance": settings.balance_weight * expert_balance_loss(routings, inputs.attention_mask)}

    def metrics(self, model: nn.Module, config: Config) -> dict[str, float]:
        """`share_<expert>` and `entropy` of this process since the last call; see `RoutingStatistics`."""
        return self._statistics[model].pop() if model in self._statistics else {}

    def named_parameters(self, model: nn.Module, config: Config) -> Iterator[tuple[str, nn.Parameter]]:
        """A, B and router of every block."""
        return routed_model.added_parameters(model)

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
        path = folder / convert.WEIGHTS_FILE
        try:
            stored = convert.read_weights(path) if path.is_file() else {}
            arguments = moe_args.arguments_of_config(
                RoutedMLPConfig.from_dict(config),
                folder / "adapter_config.json",
                (name for name, _ in model.named_modules()),
            )
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        torch.save(stored | convert.to_original(routed_model.added_parameters(model)), path)
        moe_args.write_training_arguments(folder / moe_args.ARGUMENTS_FILE, arguments)


def _import_original(folder: Path) -> ImportedState | None:
    """`import_checkpoint` with `ValueError` for whatever is wrong."""
    path, arguments_path = folder / convert.WEIGHTS_FILE, folder / moe_args.ARGUMENTS_FILE
    if not path.is_file():
        return None
    stored = convert.read_weights(path)
    keys = frozenset(key for key in stored if convert.is_original_key(key))
    if not keys:
        return None
    if not arguments_path.is_file():
        raise ValueError(
            f"{path} holds routed MLP blocks ('{min(keys)}'), but {arguments_path} is missing: it alone tells how they "
            "are wired (dense or sparse, alpha); copy it from where the checkpoint came from"
        )
    config = moe_args.config_from_arguments(moe_args.read_training_arguments(arguments_path), arguments_path)
    return ImportedState(config.to_dict(), convert.from_original(stored, config, path), keys | {arguments_path.name})


def _refuse_options_without_use_lora(options: HydraLoraOptions) -> None:
    """Raise if an option other than a switch was given that nothing carries out while `--use_lora` is off."""
    switches = {"use_lora", "llm_moe"}
    idle = [
        f"--{option.name} {getattr(options, option.name)}"
        for option in dataclasses.fields(options)
        if option.name not in switches and getattr(options, option.name) != option.default
    ]
    if idle:
        raise FlagError(f"{', '.join(idle)}: without effect while --use_lora is off; pass --use_lora True")


def _switch_lora_on(options: HydraLoraOptions, training: TrainingArguments) -> None:
    """Set the core's LoRA options, which may have been given too if they say the same."""
    modules = _lora_modules(options)
    default_rank = type(training).__dataclass_fields__["lora_r"].default
    if training.lora_r not in (default_rank, options.lora_rank):
        raise FlagError(f"--lora_r {training.lora_r} contradicts --lora_rank {options.lora_rank}; give one of them")
    if training.lora_target_modules not in (None, modules):
        raise FlagError(
            f"--lora_target_modules {training.lora_target_modules} contradicts --lora_modules {modules}; "
            "give one of them"
        )
    training.lora_enable, training.lora_r, training.lora_target_modules = True, options.lora_rank, modules


def _lora_modules(options: HydraLoraOptions) -> str:
    """`--lora_modules` without blanks, checked."""
    names = [name.strip() for name in options.lora_modules.split(",")]
    if not all(names):
        raise FlagError(f"--lora_modules '{options.lora_modules}' names no module or holds an empty name")
    clash = sorted(MLP_PROJECTIONS.intersection(names))
    if options.llm_moe and clash:
        raise FlagError(
            f"--lora_modules names {clash}, which the routed blocks of --llm_moe True adapt already; leave them out or "
            "pass --llm_moe False"
        )
    return ",".join(names)
