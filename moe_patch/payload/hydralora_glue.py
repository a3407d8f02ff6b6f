"""HydraLoRA in a patched checkout: its flags, its blocks, and the checkpoint layout of MLLM-HydraLoRA.

The flags are those of the original. Checkpoints are written in the original's layout, `non_lora_trainables.bin` with
one matrix B per expert and `moe_args.pth` beside it, which llava-extensions and the original's code read too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydralora import moe_args, original
from hydralora.config import OriginalOptions, RoutedMLPConfig
from hydralora.patch import ATTRIBUTE, LlavaPatch, patch_llava
from moe_patch.payload.extension import Extension, State
from moe_patch.payload.folders import NON_LORA_FILE, PEFT_PREFIX, bare_names, read_bin
from moe_patch.payload.gradients import keep_the_graph

MLP_PROJECTIONS = frozenset({"gate_proj", "up_proj", "down_proj"})
SWITCHES = frozenset({"use_lora", "llm_moe"})


class HydraLora(Extension):
    """Routed MLP blocks in the decoder beside LoRA on its attention layers."""

    name = "hydralora"
    options = OriginalOptions

    def configure(self, model_args: Any, training_args: Any) -> None:
        """Turn `--use_lora` into upstream's `--lora_enable`, and refuse what would not be carried out."""
        if training_args.vit_trainable:
            raise ValueError(f"--vit_trainable {training_args.vit_trainable}: the original never reads this flag")
        if not training_args.use_lora:
            idle = [f"--{f.name}" for f in dataclasses.fields(OriginalOptions) if f.name not in SWITCHES]
            given = [n for n in idle if getattr(training_args, n[2:]) != getattr(OriginalOptions(), n[2:])]
            if given:
                raise ValueError(f"{', '.join(given)}: without effect; pass --use_lora True too")
            return
        if training_args.lora_r not in (type(training_args).lora_r, training_args.lora_rank):
            raise ValueError(f"--lora_r {training_args.lora_r} contradicts --lora_rank {training_args.lora_rank}")
        training_args.lora_enable, training_args.lora_r = True, training_args.lora_rank
        clash = sorted(MLP_PROJECTIONS.intersection(self.lora_modules(training_args) or []))
        if training_args.llm_moe and clash:
            raise ValueError(f"--lora_modules names {clash}, which the blocks of --llm_moe True adapt already")
        if model_args.tune_mm_mlp_adapter:
            raise ValueError("--tune_mm_mlp_adapter True freezes all but the projector, the blocks of --use_lora too")
        if training_args.llm_moe and _config(training_args).needs_balance_loss and training_args.gradient_checkpointing:
            keep_the_graph(training_args, "the expert-balance loss trains nothing (--moe_balance_w 0 does without it)")

    def is_active(self, training_args: Any) -> bool:
        """With `--use_lora True`."""
        return bool(training_args.use_lora)

    def lora_modules(self, training_args: Any) -> list[str] | None:
        """The names in `--lora_modules`, with `--use_lora True`."""
        if not training_args.use_lora:
            return None
        return [name.strip() for name in training_args.lora_modules.split(",")]

    def attach_for_training(self, model: Any, training_args: Any) -> None:
        """Replace the MLPs by blocks, with `--use_lora True --llm_moe True`."""
        if training_args.use_lora and training_args.llm_moe:
            patch_llava(model, _config(training_args))

    def attach(self, model: Any, config: Mapping[str, Any], tensors: State) -> None:
        """Replace the MLPs by blocks with trained weights."""
        if "linear" in config:
            raise ValueError(
                "the checkpoint was trained with --hydralora_modules (HydraLoRA on attention layers), which moe_patch "
                "does not carry; load it in llava-extensions"
            )
        patch = patch_llava(model, RoutedMLPConfig.from_dict(config))
        patch.load(tensors)
        for block in patch.blocks.values():
            block.requires_grad_(False).eval()

    def to_saved(self, model: Any, state: State) -> State:
        """One matrix B per expert."""
        ours = self._names(model)
        blocks = original.to_original((name[len(PEFT_PREFIX) :], t) for name, t in state.items() if name in ours)
        return {**{name: tensor for name, tensor in state.items() if name not in ours}, **blocks}

    def from_saved(self, model: Any, state: State) -> State:
        """The matrices B of a projection stacked again."""
        patch = _patch(model)
        if patch is None:
            return state
        blocks = original.from_original(bare_names(state), patch.config, Path(NON_LORA_FILE))
        rest = {name: tensor for name, tensor in state.items() if not self.owns(name)}
        return {**rest, **{PEFT_PREFIX + name: tensor for name, tensor in blocks.items()}}

    def write_settings(self, model: Any, training_args: Any, folder: Path) -> None:
        """`moe_args.pth`, the original's only record of how the blocks are wired."""
        if _patch(model) is not None:
            names = [f.name for f in dataclasses.fields(OriginalOptions)] + ["lora_alpha", "lora_dropout", "lora_bias"]
            values = {name: getattr(training_args, name) for name in names}
            moe_args.write_training_arguments(folder / moe_args.ARGUMENTS_FILE, values)

    def owns(self, key: str) -> bool:
        """True for the tensors of the blocks."""
        return original.is_original_key(key)

    def read_original(self, folder: Path) -> tuple[dict[str, Any], State] | None:
        """Read a folder of MLLM-HydraLoRA, of a patched checkout, or of `llava.convert to-original`."""
        path, arguments = folder / NON_LORA_FILE, folder / moe_args.ARGUMENTS_FILE
        if not path.is_file():
            return None
        tensors = read_bin(path)
        if not any(map(self.owns, tensors)):
            return None
        if not arguments.is_file():
            raise ValueError(
                f"{path}: holds routed MLP blocks, but {arguments.name}, which says how they are wired, is gone"
            )
        config = moe_args.config_from_arguments(moe_args.read_training_arguments(arguments), arguments)
        return config.to_dict(), original.from_original(tensors, config, path)

    def metrics(self, model: Any) -> dict[str, float]:
        """The weighted expert-balance loss of the last batch of this process."""
        patch = _patch(model)
        return (
            {} if patch is None or patch.balance_loss is None else {"balance_loss": round(float(patch.balance_loss), 4)}
        )

    @staticmethod
    def _names(model: Any) -> set[str]:
        """Names of the blocks' parameters in PEFT's wrapper."""
        patch = _patch(model)
        return set() if patch is None else {PEFT_PREFIX + name for name, _ in patch.parameters()}


def _patch(model: Any) -> LlavaPatch | None:
    return getattr(model, ATTRIBUTE, None)


def _config(training_args: Any) -> RoutedMLPConfig:
    """The configuration of the blocks that the flags ask for."""
    return RoutedMLPConfig(
        experts=training_args.llm_moe_num_experts,
        rank=training_args.lora_rank,
        alpha=training_args.lora_alpha,
        dropout=training_args.lora_dropout,
        dense=training_args.dense_moe,
        balance_weight=training_args.moe_balance_w,
    )
