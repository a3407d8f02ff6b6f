"""The steps of `benchmarks/real_size.py`: loading, an answer, an update of the published command, and its floor."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.floors import measure_rates
from benchmarks.llava_models import Folders, Shape, question, write_image, write_llava, write_rows
from benchmarks.memory import PeakMemory
from benchmarks.update_parts import UpdateParts
from llava.data.images import load_image
from llava.eval.answering.answers import Task
from llava.eval.answering.loading import load_model
from llava.eval.answering.runner import generate_batch, load_images, make_prompt
from llava.train.plan.command import read_command
from llava.train.plan.update import measure
from llava.train.train import build_run, parse_args

IMAGE = "image.png"
PUBLISHED = (
    "--use_lora True --lora_rank 32 --lora_alpha 64 --mm_projector_lr 2e-5 --llm_moe True --dense_moe True "
    "--llm_moe_num_experts 3 --moe_balance_w 0.05 --lora_modules q_proj,k_proj,v_proj,o_proj --version v1 "
    "--freeze_backbone True --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False "
    "--mm_use_im_patch_token False --image_aspect_ratio resize --group_by_modality_length True --bf16 True "
    "--num_train_epochs 1 --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --save_strategy no "
    "--learning_rate 2e-4 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 "
    "--model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 0 --use_cpu True --max_steps 1 "
    "--report_to none"
)
"""The published command of MLLM-HydraLoRA, for one update on the CPU."""

MICRO_BATCHES = 2
PASSES = 3
"""Times that a micro batch reads the frozen weights: forward, recomputation, backward."""


def weights(folder: Path, shape: Shape) -> dict[str, Any]:
    """Write the model, an image and the rows of an update."""
    start = time.perf_counter()
    with PeakMemory() as memory:
        write_llava(folder, shape, torch.bfloat16, print)
    seconds = time.perf_counter() - start
    write_image(folder / IMAGE, shape.image, Random(1))
    written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return {"seconds": seconds, "bytes": written, "memory": memory.record()}


def load(folders: Folders) -> dict[str, Any]:
    """Load the checkpoint as the evaluation programs do."""
    start = time.perf_counter()
    with PeakMemory() as memory:
        loaded = load_model(str(folders.llava), device="cpu", torch_dtype="bfloat16")
        seconds = time.perf_counter() - start
    count = sum(weight.numel() for weight in loaded.model.parameters())
    return {"seconds": seconds, "parameters": count, "memory": memory.record()}


class Clocked(LogitsProcessor):
    """Notes the moment of each token."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores as they are."""
        self.moments.append(time.perf_counter())
        return scores


def answer(folders: Folders, folder: Path, tokens: int) -> dict[str, Any]:
    """Answer a question about an image: seconds of all, until the first token, and of each further one."""
    loaded = load_model(str(folders.llava), device="cpu", torch_dtype="bfloat16")
    task = Task(0, question(Random(2)), "", (IMAGE,), "the question")
    clock = Clocked()
    arguments = {"do_sample": False, "max_new_tokens": tokens, "logits_processor": LogitsProcessorList([clock])}
    with PeakMemory() as memory:
        start = time.perf_counter()
        prompt = make_prompt("0", task, loaded, "vicuna_v1")
        images = load_images(task, loaded, lambda name, where: load_image(folder, name, where))
        generate_batch([prompt], [images], loaded, arguments)
        seconds = time.perf_counter() - start
    spent = clock.moments[-1] - clock.moments[0]
    return {
        "seconds": seconds,
        "positions": prompt.length,
        "tokens": len(clock.moments),
        "first_token": clock.moments[0] - start,
        "further_token": spent / max(1, len(clock.moments) - 1),
        "memory": memory.record(),
    }


def command(folders: Folders, folder: Path) -> list[str]:
    """The words of the update."""
    paths = f"--model_name_or_path {folders.llava} --data_path {folder}/rows.json --image_folder {folder} "
    paths += f"--vision_tower {folders.tower} --output_dir {folder}/trained "
    return (paths + PUBLISHED).split()


def update(folders: Folders, folder: Path, words: int) -> dict[str, Any]:
    """One update by the training program's own Trainer: seconds by part, and peaks of memory."""
    write_rows(folder / "rows.json", [IMAGE] * MICRO_BATCHES, words)
    start = time.perf_counter()
    with PeakMemory() as memory:
        run = build_run(parse_args(command(folders, folder)))
        built = time.perf_counter() - start
        parts = UpdateParts(run)
        run.trainer.add_callback(parts)
        run.trainer.train()
    trained = sum(weight.numel() for weight in run.model.parameters() if weight.requires_grad)
    batch = run.trainer.data_collator([run.dataset[0]])
    return {
        "seconds": parts.seconds["update"],
        "building": built,
        "parts": parts.table(),
        "micro_batches": MICRO_BATCHES,
        "positions": int(batch["plan"].labels.shape[1]),
        "targets": int(batch["plan"].targets),
        "trained_parameters": trained,
        "memory": memory.record(),
    }


def floor(folders: Folders, folder: Path, shape: Shape, steps: dict[str, Any]) -> dict[str, Any]:
    """What the update and the answer take at least, by operations and bytes, and the bytes that it plans for."""
    positions = steps["update"]["found"]["positions"]
    rates = measure_rates(positions, shape.width, shape.inner, torch.bfloat16)
    planned = measure(read_command(["--length", str(positions), *command(folders, folder)]), 1)
    frozen = planned.weights - 4 * planned.trained
    read = PASSES * MICRO_BATCHES * frozen
    decoder = 2 * (shape.layers * (4 * shape.width**2 + 3 * shape.width * shape.inner) + shape.width * shape.vocabulary)
    return {
        "rates": rates.record(),
        "update": {
            "flops": planned.flops,
            "read_bytes": read,
            "seconds_by_flops": planned.flops / rates.flops,
            "seconds_by_bytes": read / rates.bytes,
            "seconds": rates.floor(planned.flops, read),
        },
        "token": {"read_bytes": decoder, "seconds": rates.floor(decoder, decoder)},
        "memory": {str(part): size for part, size in planned.peak.items()},
    }
