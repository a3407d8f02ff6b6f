"""From flags to what one model carries: which layers get LoRA, routed blocks or HydraLoRA, with which sizes.

`--use_lora True` puts LoRA on the attention projections of the decoder and, with `--llm_moe True`, a routed block in
place of every MLP, as MLLM-HydraLoRA does. `--hydralora_modules` puts HydraLoRA in place of LoRA on attention layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hydralora.config import PARTS, HydraLoraOptions, HydraLoraSettings, RoutedLinearConfig, RoutedMLPConfig
from hydralora.linears import INPUTS, OUTPUTS
from llava.errors import FlagError
from llava.runtime import checkpointing
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, POSITIVE, PROBABILITY, check_ranges

RANGES = {
    "lora_rank": COUNT,
    "llm_moe_num_experts": COUNT,
    "moe_balance_w": NOT_NEGATIVE,
    "hydralora_rank": COUNT,
    "hydralora_alpha": POSITIVE,
    "hydralora_dropout": PROBABILITY,
    "hydralora_num_experts": COUNT,
    "hydralora_balance_w": NOT_NEGATIVE,
}
"""What the numbers of `HydraLoraOptions` may be."""

MLP_PROJECTIONS = frozenset({"gate_proj", "up_proj", "down_proj"})


def settings_from_flags(options: HydraLoraOptions, args: Any) -> HydraLoraSettings | None:
    """What the flags switch on; sets the core's LoRA options accordingly. None: nothing of this package.

    Args:
        options: of this package.
        args: `RunArguments` of llava, whose `training` and `model` are read and set.

    Raises:
        FlagError: a flag is contradictory or not carried out; see the messages.
    """
    if options.vit_trainable:
        raise FlagError(
            f"--vit_trainable {options.vit_trainable}: MLLM-HydraLoRA declares this flag and never reads it; "
            "to train the vision tower pass --unfreeze_mm_vision_tower True"
        )
    if not options.use_lora:
        _refuse_idle(options, [field.name for field in dataclasses.fields(options)], "--use_lora True")
        return None
    check_ranges(options, RANGES)
    if not options.hydralora_modules:
        names = [field.name for field in dataclasses.fields(options) if field.name.startswith("hydralora_")]
        _refuse_idle(options, names, "--hydralora_modules")
    linear = _linear_config(options, args) if options.hydralora_modules else None
    _switch_lora_on(options, args, linear)
    if not (options.llm_moe or linear):
        return None
    if checkpointing.asks_for_reentrant(args.training):
        raise FlagError(
            "--gradient_checkpointing_kwargs asks for use_reentrant, under which the expert-balance loss of --llm_moe "
            "and the first block of --hydralora_modules vision get no gradient; pass "
            '{"use_reentrant": false} or leave the flag out'
        )
    settings = HydraLoraSettings(_mlp_config(options, args.training) if options.llm_moe else None, linear)
    if settings.mlp is not None and not settings.mlp.trains_routers and args.training.should_log:
        print(
            f"--dense_moe False with --moe_balance_w {options.moe_balance_w:g} and {options.llm_moe_num_experts} "
            "experts: no loss depends on the routers of the MLP blocks; they stay as they are drawn"
        )
    return settings


def _refuse_idle(options: HydraLoraOptions, names: list[str], needed: str) -> None:
    """Raise if an option other than a switch was given that nothing carries out without the flag `needed`."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    switches = {"use_lora", "llm_moe"}
    idle = [
        f"--{name} {getattr(options, name)}"
        for name in names
        if name not in switches and getattr(options, name) != defaults[name]
    ]
    if idle:
        raise FlagError(f"{', '.join(idle)}: without effect; pass {needed} too")


def _mlp_config(options: HydraLoraOptions, training: Any) -> RoutedMLPConfig:
    try:
        return RoutedMLPConfig(
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


def _linear_config(options: HydraLoraOptions, args: Any) -> RoutedLinearConfig:
    """What `--hydralora_modules` asks for, checked against the flags of the vision tower."""

    def first(given: Any, default: Any) -> Any:
        return default if given is None else given

    try:
        config = RoutedLinearConfig(
            targets=_names("--hydralora_modules", options.hydralora_modules),
            experts=first(options.hydralora_num_experts, options.llm_moe_num_experts),
            rank=first(options.hydralora_rank, options.lora_rank),
            alpha=first(options.hydralora_alpha, args.training.lora_alpha),
            dropout=first(options.hydralora_dropout, args.training.lora_dropout),
            balance_weight=options.hydralora_balance_w,
        )
    except ValueError as error:
        names = ("modules", "num_experts", "rank", "alpha", "dropout", "balance_w")
        raise FlagError(f"{error} (flags: {', '.join(f'--hydralora_{name}' for name in names)})") from error
    wanted = f"--hydralora_modules {options.hydralora_modules}"
    if config.projections("vision") is not None and not args.model.vision_tower:
        raise FlagError(f"{wanted} needs --vision_tower")
    if config.projections("vision") is not None and args.model.unfreeze_mm_vision_tower:
        raise FlagError(
            f"{wanted} and --unfreeze_mm_vision_tower True: the tower is trained in full already; leave one of them out"
        )
    if config.balance_weight and config.projections("attention") is None:
        raise FlagError(
            f"--hydralora_balance_w {config.balance_weight} balances the decoder's attention layers, and {wanted} "
            f"names none of {PARTS['attention']}; leave it out"
        )
    return config


def _switch_lora_on(options: HydraLoraOptions, args: Any, linear: RoutedLinearConfig | None) -> None:
    """Set the core's LoRA options, which may have been given too if they say the same.

    Where HydraLoRA takes the place of LoRA on all layers, LoRA is off and the language model frozen.
    """
    training = args.training
    modules = ",".join(_lora_modules(options, linear))
    default_rank = type(training).__dataclass_fields__["lora_r"].default
    if training.lora_r not in (default_rank, options.lora_rank):
        raise FlagError(f"--lora_r {training.lora_r} contradicts --lora_rank {options.lora_rank}; give one of them")
    if training.lora_target_modules not in (None, modules):
        raise FlagError(
            f"--lora_target_modules {training.lora_target_modules} contradicts --lora_modules "
            f"{modules or '(all of them have HydraLoRA)'}; give one of them"
        )
    if modules:
        training.lora_enable, training.lora_r, training.lora_target_modules = True, options.lora_rank, modules
    else:
        training.lora_enable, args.model.freeze_backbone = False, True


def _lora_modules(options: HydraLoraOptions, linear: RoutedLinearConfig | None) -> list[str]:
    """The layers of `--lora_modules` that are not adapted otherwise."""
    names = _names("--lora_modules", options.lora_modules)
    clash = sorted(MLP_PROJECTIONS.intersection(names))
    if options.llm_moe and clash:
        raise FlagError(
            f"--lora_modules names {clash}, which the routed blocks of --llm_moe True adapt already; leave them out or "
            "pass --llm_moe False"
        )
    chosen = None if linear is None else linear.projections("attention")
    taken = set() if chosen is None else set(chosen or (*INPUTS, *OUTPUTS))
    is_default = options.lora_modules == type(options)().lora_modules
    if taken.intersection(names) and not is_default:
        raise FlagError(
            f"--lora_modules names {sorted(taken.intersection(names))}, which --hydralora_modules "
            f"{options.hydralora_modules} adapts already; leave them out of one of the two"
        )
    return [name for name in names if name not in taken]


def _names(flag: str, value: str) -> list[str]:
    """The names in a flag's value, without blanks."""
    names = [name.strip() for name in value.split(",")]
    if not all(names):
        raise FlagError(f"{flag} '{value}' names no module or holds an empty name")
    return names
