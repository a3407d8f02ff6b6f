"""What the experiment varies and what it holds fixed: sizes, training lengths, rates, and the command of each run.

The fine-tuning commands are those of `scripts/MLLM_HydraLoRA.sh` with other paths, sizes and rates: base and tower
frozen, projector trained, LoRA on the attention projections and routed MLP blocks (HydraLoRA), or LoRA on every linear
layer of the decoder (LoRA) at the rank that comes nearest in trainable parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.experiments.common.sizes import Sizes, Training

SEEDS = (0, 1, 2)
TEMPLATE = "v1"
METHODS = ("base", "hydra", "lora")


@dataclass(frozen=True)
class Recipe:
    """All settings of the experiment."""

    sizes: Sizes = field(default_factory=Sizes)
    base: Training = field(default_factory=lambda: Training(40_000, 16, 4e-4, {"count": 3, "exist": 3}))
    tuned: Training = field(
        default_factory=lambda: Training(24_000, 16, 1e-3, {"verify": 1, "count": 3, "exist": 2, "most": 1})
    )
    projector_rate: float = 5e-4
    rank: int = 16
    experts: int = 3

    def training(self, method: str) -> Training:
        """Length and rates of a run of `method`."""
        return self.base if method == "base" else self.tuned


def hydra_parameters(sizes: Sizes, rank: int, experts: int) -> int:
    """Parameters that HydraLoRA adds: LoRA on q, k, v, o; per projection of the MLP one A and E matrices B; routers."""
    width, mlp = sizes.width, sizes.mlp
    attention = 4 * rank * (width + width)
    shared = rank * (width + width + mlp)
    expert = rank * (mlp + mlp + width)
    router = experts * width + experts
    return sizes.layers * (attention + shared + experts * expert + router)


def lora_parameters(sizes: Sizes, rank: int) -> int:
    """Parameters of LoRA on all seven linear layers of every decoder layer."""
    attention = 4 * (sizes.width + sizes.width)
    mlp = 3 * (sizes.width + sizes.mlp)
    return sizes.layers * rank * (attention + mlp)


def matching_lora_rank(sizes: Sizes, rank: int, experts: int) -> int:
    """The LoRA rank whose parameter count comes nearest to that of HydraLoRA."""
    wanted = hydra_parameters(sizes, rank, experts)
    return max(1, round(wanted / lora_parameters(sizes, 1)))


def common_flags(recipe: Recipe, method: str, data: Path, images: Path, seed: int, output: Path) -> list[str]:
    """Flags that every run has."""
    training = recipe.training(method)
    flags = {
        "version": TEMPLATE,
        "data_path": data,
        "image_folder": images,
        "image_aspect_ratio": "stretch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -1,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "group_by_modality_length": False,
        "output_dir": output,
        "num_train_epochs": 1,
        "per_device_train_batch_size": training.batch,
        "learning_rate": training.learning_rate,
        "weight_decay": 0.0,
        "warmup_ratio": 0.05,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 500,
        "save_total_limit": 1,
        "logging_steps": 50,
        "model_max_length": recipe.sizes.max_length,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "use_cpu": True,
        "seed": seed,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def base_flags(language_model: Path, tower: Path) -> list[str]:
    """Flags of a run that trains everything from random weights."""
    return [
        *("--model_name_or_path", str(language_model)),
        *("--vision_tower", str(tower)),
        *("--unfreeze_mm_vision_tower", "True"),
    ]


def tuned_flags(recipe: Recipe, method: str, base: Path) -> list[str]:
    """Flags of a fine-tuning run on the finished base in the folder `base`."""
    start = [
        *("--model_name_or_path", str(base)),
        *("--vision_tower", str(base / "vision_tower")),
        *("--freeze_backbone", "True"),
        *("--mm_projector_lr", str(recipe.projector_rate)),
    ]
    if method == "hydra":
        return [
            *start,
            *("--use_lora", "True", "--lora_rank", str(recipe.rank), "--lora_alpha", str(2 * recipe.rank)),
            *("--lora_modules", "q_proj,k_proj,v_proj,o_proj"),
            *("--llm_moe", "True", "--dense_moe", "True", "--llm_moe_num_experts", str(recipe.experts)),
            *("--moe_balance_w", "0.05"),
        ]
    rank = matching_lora_rank(recipe.sizes, recipe.rank, recipe.experts)
    return [*start, "--lora_enable", "True", "--lora_r", str(rank), "--lora_alpha", str(2 * rank)]
