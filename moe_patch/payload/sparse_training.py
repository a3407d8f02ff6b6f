"""The Trainer of a run with predictors: their learning rate and the temperature."""

from __future__ import annotations

from typing import Any

from dynamic.model import added_parameters
from dynamic.training import TemperatureSchedule
from moe_patch.payload.sparse_state import Sparsity


def prepare_trainer(trainer: Any, sparsity: Sparsity) -> None:
    """Give the predictors their own groups in the optimizer, and let the Trainer set the temperature.

    Args:
        trainer: upstream's, with the model and its flags, before it made the optimizer.
        sparsity: of the model.

    Raises:
        ValueError: the optimizer is DeepSpeed's own, which has one learning rate for all.
    """
    args = trainer.args
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if deepspeed is not None and "optimizer" in deepspeed.config:
        raise ValueError(
            f"{args.deepspeed}: has an 'optimizer', whose learning rate is that of all parameters, and --predictor_lr "
            "would be ignored; leave it out there, as upstream's zero2.json and zero3.json do"
        )
    sparsity.schedule = TemperatureSchedule(args.gumbel_start_tau, args.gumbel_end_tau)
    trainer.add_callback(sparsity.schedule)
    create = trainer.create_optimizer

    def create_optimizer() -> Any:
        made_before = trainer.optimizer is not None
        optimizer = create()
        if not made_before:
            separate_predictors(optimizer, trainer.model, args.predictor_lr, args.predictor_weight_decay)
        return optimizer

    trainer.create_optimizer = create_optimizer


def separate_predictors(optimizer: Any, model: Any, rate: float, decay: float) -> None:
    """Move the predictors out of the optimizer's groups into groups of their own, before the first update.

    Args:
        optimizer: whose groups with a weight decay hold what upstream decays.
        model: bare model.
        rate: learning rate of the predictors.
        decay: weight decay of those of their parameters that are decayed.
    """
    mine = {id(parameter): name for name, parameter in added_parameters(model)}
    norms_and_biases = _without_decay(model)
    found: dict[bool, list[Any]] = {True: [], False: []}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in mine:
                found[id(parameter) not in norms_and_biases].append(parameter)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in mine]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for decayed, parameters in found.items():
        if parameters:
            optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": decay if decayed else 0.0})


def _without_decay(model: Any) -> set[int]:
    """Biases and normalisation layers, by upstream's own rule."""
    from transformers.trainer import ALL_LAYERNORM_LAYERS, get_parameter_names

    decayed = set(get_parameter_names(model, ALL_LAYERNORM_LAYERS))
    return {id(p) for name, p in model.named_parameters() if name not in decayed or "bias" in name.split(".")}
