"""Dynamic-LLaVA in a patched checkout: its flags, its predictors, and the checkpoint layout of the original.

The predictors lie among the full weights, so upstream's own code saves and resumes them; `sparse_config` in
`config.json` says that they are there. llava-extensions reads such a folder, and folders of its own are read here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dynamic import model as sparse_model
from dynamic.config import FLAG_RANGES, SparseConfig, SparseOptions
from llava.runtime.ranges import check_ranges
from moe_patch.payload.extension import Extension, State
from moe_patch.payload.folders import read_weights
from moe_patch.payload.gradients import keep_the_graph
from moe_patch.payload.sparse_inputs import user_marker_ids
from moe_patch.payload.sparse_state import ATTRIBUTE, Sparsity, check_transformers
from moe_patch.payload.sparse_training import prepare_trainer

CONFIG_KEY = "sparse_config"


class Dynamic(Extension):
    """Predictors that drop vision and text tokens from one layer on."""

    name = "dynamic"
    options = SparseOptions
    weights_of_its_own = (r"_score_predictor\.",)

    def configure(self, model_args: Any, training_args: Any) -> None:
        """Refuse what would not be carried out."""
        if not training_args.dynamic:
            fields = dataclasses.fields(SparseOptions)
            given = [f.name for f in fields if getattr(training_args, f.name) != f.default]
            if given:
                raise ValueError(f"{', '.join('--' + name for name in given)}: without effect; pass --dynamic True too")
            return
        check_transformers()
        beside = [name for name in ("use_lora", "lora_enable", "mma") if getattr(training_args, name, False)]
        if beside:
            raise ValueError(
                f"--dynamic True beside --{beside[0]} is not carried by moe_patch; train in llava-extensions"
            )
        if model_args.vision_tower is None:
            raise ValueError("--dynamic True needs --vision_tower")
        if model_args.tune_mm_mlp_adapter:
            raise ValueError(
                "--tune_mm_mlp_adapter True freezes all but the projector, the predictors of --dynamic too"
            )
        if training_args.bits != 16:
            raise ValueError(f"--bits {training_args.bits}: --dynamic trains full weights, which need --bits 16")
        check_ranges(training_args, FLAG_RANGES)
        _config(training_args)
        if training_args.gradient_checkpointing:
            keep_the_graph(training_args, "the loss does not reach the predictors of --dynamic through attention")

    def is_active(self, training_args: Any) -> bool:
        """With `--dynamic True`."""
        return bool(training_args.dynamic)

    def attach_beside_tower(self, model: Any, training_args: Any) -> None:
        """Put the predictors in, fresh or those of the base; they are trained, whatever else is."""
        found = self.read_original(Path(model.config._name_or_path))
        if not training_args.dynamic:
            if found is not None:
                raise ValueError(
                    f"{model.config._name_or_path}: holds predictors of Dynamic-LLaVA; pass --dynamic True"
                )
            return
        settings = _config(training_args)
        check_transformers()
        sparse_model.attach(model, settings)
        if found is not None:
            _copy(model, found[1], str(model.config._name_or_path))
        _install(model, settings)

    def prepare_trainer(self, trainer: Any) -> None:
        """The predictors' learning rate, and the schedule of the temperature."""
        if trainer.args.dynamic:
            self.take_tokenizer(trainer.model, trainer.tokenizer)
            prepare_trainer(trainer, getattr(trainer.model, ATTRIBUTE))

    def take_tokenizer(self, model: Any, tokenizer: Any) -> None:
        """Know how a later turn begins, unless the configuration says it."""
        if getattr(model, ATTRIBUTE, None) is not None and getattr(model.config, "user_marker_ids", None) is None:
            model.config.user_marker_ids = user_marker_ids(tokenizer)

    def attach(self, model: Any, config: Mapping[str, Any], tensors: State) -> None:
        """Put predictors with trained weights in."""
        settings = SparseConfig.from_dict(config)
        check_transformers()
        sparse_model.attach(model, settings)
        _copy(model, tensors, "the checkpoint")
        for _, parameter in sparse_model.added_parameters(model):
            parameter.requires_grad_(False)
        _install(model, settings)

    def read_original(self, folder: Path) -> tuple[dict[str, Any], State] | None:
        """Read a folder of the original or of a patched checkout."""
        path = folder / "config.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if CONFIG_KEY not in content:
            return None
        try:
            settings = SparseConfig.from_dict(content[CONFIG_KEY])
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: '{CONFIG_KEY}': {error}") from error
        switched_on = {
            sparse_model.IMAGE: settings.use_vision_predictor,
            sparse_model.OUTPUT_TEXT: settings.judges_output_text,
            sparse_model.INSTRUCT: settings.judges_instruction,
        }
        prefixes = tuple(f"model.{name}." for name, exists in switched_on.items() if exists)
        return settings.to_dict(), read_weights(folder, prefixes)

    def metrics(self, model: Any) -> dict[str, float]:
        """Losses and kept shares of the predictors, and the temperature."""
        sparsity: Sparsity | None = getattr(model, ATTRIBUTE, None)
        return {} if sparsity is None else sparsity.metrics()


def _config(training_args: Any) -> SparseConfig:
    """The configuration of the predictors that the flags ask for."""
    return SparseOptions(**{f.name: getattr(training_args, f.name) for f in dataclasses.fields(SparseOptions)}).config()


def _install(model: Any, settings: SparseConfig) -> None:
    """Let the model use its predictors; imported here, since another transformers lacks what that is built on."""
    from moe_patch.payload.sparse_llava import install

    install(model, settings)


def _copy(model: Any, tensors: State, source: str) -> None:
    """Copy trained weights into the predictors.

    Raises:
        ValueError: they do not fit; nothing was copied then.
    """
    parameters = dict(sparse_model.added_parameters(model))
    wrong = sorted(
        name
        for name in {*parameters, *tensors}
        if name not in parameters or name not in tensors or parameters[name].shape != tensors[name].shape
    )
    if wrong:
        raise ValueError(
            f"{source}: {len(wrong)} weights of predictors are missing, unknown or of another shape than the "
            f"configuration says, first {wrong[:3]}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
