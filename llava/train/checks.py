"""Checks of a run's options before anything is loaded; all problems are reported at once."""

from __future__ import annotations

from pathlib import Path

from llava.constants import MERGE_TYPES
from llava.data.dataset import ON_BAD_SAMPLE
from llava.data.pixels import ASPECT_RATIOS
from llava.data.rows import source_problem
from llava.data.tiling import parse_grid_pinpoints
from llava.errors import CheckpointError, FlagError
from llava.extension import installed_extensions
from llava.model.components import Component
from llava.model.formats import projector_file
from llava.model.loss import LossReduction
from llava.runtime.fsdp.checks import fsdp_problems
from llava.runtime.publishing.access import hub_problems
from llava.runtime.quantization import QUANT_TYPES
from llava.runtime.values import refuse
from llava.runtime.zero import zero_stage
from llava.train.compilation import compile_problems
from llava.train.evaluation.options import evaluation_problems
from llava.train.freeze import trained_components
from llava.train.inputs import output_problems
from llava.train.options import RunArguments
from llava.train.packing import packing_problems
from llava.train.peft_file import file_problems
from llava.train.streaming import stream_problems


def _values(args: RunArguments) -> list[str]:
    """Values outside an option's range."""
    problems = []
    if args.data.image_aspect_ratio not in ASPECT_RATIOS:
        problems.append(f"--image_aspect_ratio {args.data.image_aspect_ratio}: known values are {ASPECT_RATIOS}")
    if args.data.on_bad_sample not in ON_BAD_SAMPLE:
        problems.append(f"--on_bad_sample {args.data.on_bad_sample}: known values are {ON_BAD_SAMPLE}")
    if args.training.loss_reduction not in list(LossReduction):
        problems.append(
            f"--loss_reduction {args.training.loss_reduction}: known values are {list(map(str, LossReduction))}"
        )
    if args.training.bits not in (4, 8, 16):
        problems.append(f"--bits {args.training.bits}: known values are 4, 8 and 16")
    if args.training.quant_type not in QUANT_TYPES:
        problems.append(f"--quant_type {args.training.quant_type}: known values are {QUANT_TYPES}")
    if args.training.lora_bias != "none":
        problems.append(f"--lora_bias {args.training.lora_bias}: the decoder has no biases; only none is possible")
    if args.training.lora_weight_path:
        problems.append(
            "--lora_weight_path: the original never reads it; give the checkpoint by --resume_from_checkpoint"
        )
    if args.training.lora_enable and args.training.lora_r < 1:  # set by an extension
        problems.append(f"the LoRA rank is {args.training.lora_r}; it must be at least 1")
    return problems


def _rates(args: RunArguments) -> list[str]:
    """Learning rates of 0 for everything that is trained; for one part of several they are legitimate."""
    model, training, trained = args.model, args.training, trained_components(args)
    projector, tower = training.mm_projector_lr, training.mm_vision_tower_lr
    rates = {"learning_rate": training.learning_rate} if _trains_by_the_runs_rate(args, trained) else {}
    if model.vision_tower and Component.PROJECTOR in trained and projector is not None:
        rates["mm_projector_lr"] = projector
    if model.vision_tower and Component.VISION_TOWER in trained and tower is not None:
        rates["mm_vision_tower_lr"] = tower
    for name, extension in installed_extensions(list(args.extensions)).items() if args.extensions else ():
        rates |= {rate: getattr(args.options[name], rate) for rate in extension.rates}
    if not rates or any(rates.values()):
        return []
    return [f"{', '.join(f'--{name} {rate:g}' for name, rate in rates.items())}: nothing would be trained"]


def _trains_by_the_runs_rate(args: RunArguments, trained: set[Component]) -> bool:
    """True if a part is trained that has no learning rate of its own."""
    model, training = args.model, args.training
    has_tower = model.vision_tower is not None
    return (
        Component.LANGUAGE_MODEL in trained
        or training.has_adapter
        or (bool(args.extensions) and not all(e.rates for e in installed_extensions(list(args.extensions)).values()))
        or (has_tower and model.mm_use_im_start_end)
        or (has_tower and Component.PROJECTOR in trained and training.mm_projector_lr is None)
        or (has_tower and Component.VISION_TOWER in trained and training.mm_vision_tower_lr is None)
    )


def _tiles(args: RunArguments) -> list[str]:
    """Options of `anyres` that do not go together."""
    model, data = args.model, args.data
    problems = []
    anyres = data.image_aspect_ratio == "anyres"
    if anyres:
        try:
            parse_grid_pinpoints(data.image_grid_pinpoints)
        except FlagError as error:
            problems.append(str(error))
    elif data.image_grid_pinpoints is not None:
        problems.append("--image_grid_pinpoints belongs to --image_aspect_ratio anyres")
    if anyres and not model.vision_tower:
        problems.append("--image_aspect_ratio anyres needs --vision_tower")
    if model.mm_patch_merge_type not in MERGE_TYPES:
        problems.append(f"--mm_patch_merge_type {model.mm_patch_merge_type}: known values are {MERGE_TYPES}")
    elif model.mm_patch_merge_type != "flat":
        if not anyres:
            problems.append(
                f"--mm_patch_merge_type {model.mm_patch_merge_type} merges tiles, which only --image_aspect_ratio "
                "anyres makes; use flat"
            )
        if model.mm_vision_select_feature != "patch":
            problems.append(
                f"--mm_patch_merge_type {model.mm_patch_merge_type} has no place for the class token of "
                f"--mm_vision_select_feature {model.mm_vision_select_feature}; use patch"
            )
    return problems


def _files(args: RunArguments) -> list[str]:
    """Missing files and folders."""
    data, model = args.data, args.model
    problems = []
    if not data.data_path:
        problems.append("--data_path is missing")
    problems += filter(None, map(source_problem, data.data_path or []))
    if data.image_folder is not None and not Path(data.image_folder).is_dir():
        problems.append(f"--image_folder {data.image_folder}: no such folder")
    if model.pretrain_mm_mlp_adapter:
        try:
            projector_file(model.pretrain_mm_mlp_adapter)
        except CheckpointError as error:
            problems.append(f"--pretrain_mm_mlp_adapter {error}")
    return problems


LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
"""Options about adapters, which have no effect without any."""


def _switched_off(args: RunArguments) -> list[str]:
    """Options about LoRA where LoRA is off, so that every weight would be trained instead."""
    if args.training.lora_enable:
        return []
    active = installed_extensions(list(args.extensions)) if args.extensions else {}
    read = {name for extension in active.values() for name in extension.core_options}
    defaults = type(args.training).__dataclass_fields__
    return [
        f"--{name} {getattr(args.training, name)}: belongs to LoRA, which is off, so that it would have no effect; add "
        "--lora_enable True, or leave it out"
        for name in LORA
        if name not in read
        and (name in args.given or getattr(args.training, name) != defaults[name].default)
        and not (name == "lora_dropout" and args.training.lora_dropout == 0)  # there is none
    ]


def _contradictions(args: RunArguments) -> list[str]:
    """Options that exclude each other."""
    model, training = args.model, args.training
    problems = []
    if model.tune_mm_mlp_adapter and training.freeze_mm_mlp_adapter:
        problems.append(
            "--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter exclude each other: nothing would be trained"
        )
    if training.bits != 16 and not (training.has_adapter or (model.freeze_backbone and args.extensions)):
        problems.append(f"--bits {training.bits}: quantised weights cannot be trained; add --lora_enable True")
    if model.tune_mm_mlp_adapter and training.has_adapter:
        problems.append("--tune_mm_mlp_adapter trains the projector alone; no adapter can be on as well")
    if model.tune_mm_mlp_adapter and args.extensions:
        problems.append(f"--tune_mm_mlp_adapter trains the projector alone; switch off {sorted(args.extensions)}")
    if model.tune_mm_mlp_adapter and not model.vision_tower:
        problems.append("--tune_mm_mlp_adapter needs --vision_tower")
    if model.mm_use_im_start_end and not model.vision_tower:
        problems.append("--mm_use_im_start_end needs --vision_tower")
    if model.unfreeze_mm_vision_tower and not model.vision_tower:
        problems.append("--unfreeze_mm_vision_tower needs --vision_tower")
    if training.mm_vision_tower_lr is not None and not model.unfreeze_mm_vision_tower:
        problems.append("--mm_vision_tower_lr has no effect on a frozen tower; pass --unfreeze_mm_vision_tower True")
    if training.bits != 16 and zero_stage(training) == 3:
        problems.append(f"--bits {training.bits}: ZeRO-3 cannot split quantised weights; use scripts/zero2.json")
    if training.n_gpu > 1:
        problems.append(
            f"{training.n_gpu} GPUs are visible to one process; start with torchrun --nproc_per_node {training.n_gpu}, "
            "or choose one by CUDA_VISIBLE_DEVICES"
        )
    return problems


def check_arguments(args: RunArguments) -> None:
    """Refuse a run that could not be carried out.

    Raises:
        FlagError: lists every problem, one per line.
    """
    problems = _values(args) + _rates(args) + _tiles(args) + _files(args)
    problems += _contradictions(args) + _switched_off(args) + output_problems(args)
    problems += stream_problems(args) + packing_problems(args) + compile_problems(args)
    problems += evaluation_problems(args.evaluation, args.training)
    problems += fsdp_problems(args.training, args.training.bits, "--bits") + hub_problems(args.training)
    problems += file_problems(args.training.peft_config, args.given, args.training.lora_enable)
    refuse(problems)
