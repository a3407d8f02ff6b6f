"""Functions on images, prompts and names under upstream's name (upstream `llava/mm_utils.py`); each in its module."""

from __future__ import annotations

from llava.data.pixels import expand2square, process_anyres_image, process_image, process_images
from llava.data.tiling import (
    divide_to_patches,
    get_anyres_image_grid_shape,
    resize_and_pad_image,
    select_best_resolution,
)
from llava.eval.answering.generation import KeywordsStoppingCriteria
from llava.eval.answering.prompts import tokenizer_image_token
from llava.runtime.hub import get_model_name_from_path

__all__ = [
    "KeywordsStoppingCriteria",
    "divide_to_patches",
    "expand2square",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "process_anyres_image",
    "process_image",
    "process_images",
    "resize_and_pad_image",
    "select_best_resolution",
    "tokenizer_image_token",
]
