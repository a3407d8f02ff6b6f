"""What a training run reads, so that its output folder cannot fall on any of it (`llava.runtime.places`)."""

from __future__ import annotations

from pathlib import Path

from llava.errors import LlavaError
from llava.model.multimodal_encoder.builder import resolve_vision_tower
from llava.runtime.places import Input, folder_problems, split_weight
from llava.train.options import RunArguments


def inputs_of(args: RunArguments) -> list[Input]:
    """Base, tower, projector, data and images of a run."""
    model, data = args.model, args.data
    return [
        Input("--model_name_or_path", model.model_name_or_path),
        Input("--vision_tower", model.vision_tower),
        Input("--vision_tower", _found_tower(args)),
        Input("--pretrain_mm_mlp_adapter", model.pretrain_mm_mlp_adapter),
        *(Input("--data_path", split_weight(path)[0]) for path in data.data_path or []),
        Input("--image_folder", data.image_folder, has_images=True),
        *(Input("--eval_data_path", split_weight(path)[0]) for path in args.evaluation.eval_data_path or []),
        *(Input("--eval_questions", path) for path in args.evaluation.eval_questions or [] if Path(path).exists()),
        Input("--eval_image_folder", args.evaluation.eval_image_folder, has_images=True),
    ]


def _found_tower(args: RunArguments) -> str | None:
    """Where a tower with a bare name is: next to the base, for example."""
    name = args.model.vision_tower
    try:
        return name and resolve_vision_tower(name, [args.model.model_name_or_path or ""])
    except LlavaError:  # reported where the tower is loaded
        return None


def output_problems(args: RunArguments) -> list[str]:
    """Why a run must not write into its `--output_dir`, one line each."""
    return list(dict.fromkeys(folder_problems("--output_dir", args.training.output_dir, inputs_of(args))))
