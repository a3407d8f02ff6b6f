"""The training stages of the tiny base, all run through `llava.train.train.main`.

1. `tower`: tower, projector and language model together, from random weights, on captions;
2. `pretrain`: a new projector alone, on captions (LLaVA's stage 1);
3. `full`: projector and language model on conversations, the tower frozen (LLaVA's stage 2).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from llava.model.formats import TOWER_FOLDER
from llava.runtime.output import put_in_place
from llava.runtime.tokenizer import load_tokenizer
from llava.train.train import main as train
from playground.questions import BASE_TRAIN, CAPTIONS, IMAGES
from playground.recipe import Recipe, Stage
from playground.tiny import LANGUAGE_FOLDER, MAX_POSITIONS

TRAINED_TOWER = "tiny-clip"
TRAINED_LANGUAGE_MODEL = "tiny-vicuna"
TOWER_LOG = "tiny-tower-trainer_state.json"
PROJECTOR_FILE = "mm_projector.safetensors"
PROJECTOR_PREFIX = "model.mm_projector."


def stage_flags(stage: Stage, seed: int) -> list[str]:
    """Flags that set length and speed of a stage; the same for every stage and for the demo's fine-tuning."""
    values = {
        "max_steps": stage.steps,
        "per_device_train_batch_size": stage.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": stage.learning_rate,
        "warmup_ratio": stage.warmup,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "adam_beta2": 0.98,
        "seed": seed,
        "logging_steps": max(1, stage.steps // 50),
        "save_strategy": "no",
        "report_to": "none",
        "model_max_length": MAX_POSITIONS,
        "dataloader_num_workers": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def model_flags(model: Path, tower: Path | str, image_folder: Path) -> list[str]:
    """Flags that every stage shares."""
    values = {
        "model_name_or_path": model,
        "vision_tower": tower,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_patch_token": False,
        "image_folder": image_folder,
        "image_aspect_ratio": "square",
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def train_tower(data: Path, untrained: Path, output: Path, recipe: Recipe) -> None:
    """Stage 1, and its two results beside each other in `output`: `tiny-clip/` and `tiny-vicuna/`."""
    whole = output / "tower-stage"
    train(
        [
            *model_flags(untrained / LANGUAGE_FOLDER, untrained / TRAINED_TOWER, data / IMAGES),
            *stage_flags(recipe.tower, recipe.seed),
            *("--version", "plain", "--data_path", str(data / CAPTIONS)),
            *("--unfreeze_mm_vision_tower", "True", "--output_dir", str(whole)),
        ]
    )
    put_in_place(whole / TOWER_FOLDER, output / TRAINED_TOWER)
    language_model = output / TRAINED_LANGUAGE_MODEL
    language_model.mkdir()
    # A Llama of its own, as Vicuna is before it meets an image: no projector, no word of LLaVA in its configuration.
    weights = load_file(whole / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(PROJECTOR_PREFIX)}
    save_file(weights, language_model / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(untrained / LANGUAGE_FOLDER / name, language_model / name)
    load_tokenizer(untrained / LANGUAGE_FOLDER).save_pretrained(language_model)
    shutil.copyfile(whole / "trainer_state.json", output / TOWER_LOG)
    shutil.rmtree(whole)


def train_projector(data: Path, checkpoints: Path, output: Path, recipe: Recipe) -> None:
    """Stage 2: only `mm_projector.safetensors` is new in `output`."""
    train(
        [
            *model_flags(checkpoints / TRAINED_LANGUAGE_MODEL, TRAINED_TOWER, data / IMAGES),
            *stage_flags(recipe.projector, recipe.seed),
            *("--version", "plain", "--data_path", str(data / CAPTIONS)),
            *("--tune_mm_mlp_adapter", "True", "--output_dir", str(output)),
        ]
    )


def train_full(data: Path, checkpoints: Path, pretrained: Path, output: Path, recipe: Recipe) -> None:
    """Stage 3: the base, with its projector in a file of its own beside the weights, as LLaVA-1.5 is published."""
    train(
        [
            *model_flags(checkpoints / TRAINED_LANGUAGE_MODEL, TRAINED_TOWER, data / IMAGES),
            *stage_flags(recipe.full, recipe.seed),
            *("--version", "v1", "--data_path", str(data / BASE_TRAIN)),
            *("--pretrain_mm_mlp_adapter", str(pretrained / PROJECTOR_FILE), "--output_dir", str(output)),
        ]
    )
    weights = load_file(output / "model.safetensors")
    projector = {name: tensor for name, tensor in weights.items() if name.startswith(PROJECTOR_PREFIX)}
    save_file(projector, output / PROJECTOR_FILE, {"format": "pt"})
