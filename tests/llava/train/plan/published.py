"""The published 7B commands on the configuration of LLaVA-1.5-7B, and what the plan says of them.

    python -m tests.llava.train.plan.published

writes `published.json` next to this file. There are no weights: a plan reads configurations and a tokenizer alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig

from llava.model.language_model.llava_llama import LlavaConfig
from llava.train.plan.command import read_command
from llava.train.plan.plan import make_plan
from playground.tokenizer import save_tokenizer
from tests.structure import ROOT

RECORD = Path(__file__).with_suffix(".json")

NOTE = '#!/bin/sh\nprintf "%s\\n" "$@"\n'
"""A launcher that prints what it is told to start."""

DECODER = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
IMAGES = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 1024,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
}


@dataclass(frozen=True)
class Published:
    """One command.

    Attributes:
        source: script that it is taken from.
        base: folder that `write_folders` makes.
        gpus: that the authors started it on.
    """

    source: str
    base: str
    gpus: int


COMMANDS = {
    "LoRA": Published("scripts/v1_5/finetune_lora.sh", "vicuna", 8),
    "full": Published("scripts/v1_5/finetune.sh", "vicuna", 8),
    "MLLM-HydraLoRA": Published("scripts/MLLM_HydraLoRA.sh", "llava", 1),
    "Dynamic-LLaVA": Published("run/train_dynamic_llava_7b.sh", "llava", 8),
}


def write_folders(folder: Path) -> None:
    """`vicuna/`, `llava/`, `tower/` with CLIP-L of 336 pixels, and an empty projector file."""
    shared: dict[str, Any] = DECODER | {"vocab_size": 32000, "max_position_embeddings": 4096, "torch_dtype": "float16"}
    LlamaConfig(**shared).save_pretrained(folder / "vicuna")
    images = IMAGES | {"mm_vision_tower": str(folder / "tower"), "use_mm_proj": True}
    LlavaConfig(**shared, **images).save_pretrained(folder / "llava")
    for base in ("vicuna", "llava"):
        save_tokenizer(folder / base, seed=0)
    CLIPVisionConfig(**TOWER, image_size=336, patch_size=14, projection_dim=768).save_pretrained(folder / "tower")
    crop = {"height": 336, "width": 336}
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=crop).save_pretrained(folder / "tower")
    (folder / "mm_projector.bin").touch()
    (folder / "rows.json").write_text("[]", encoding="utf-8")
    (folder / "note").write_text(NOTE, encoding="utf-8")
    (folder / "note").chmod(0o755)


def words_of(published: Published, folder: Path) -> list[str]:
    """The command's words, with the folders of `write_folders`."""
    places = {
        "MODEL": folder / published.base,
        "VISION_TOWER": folder / "tower",
        "PROJECTOR": folder / "mm_projector.bin",
        "DATA": folder / "rows.json",
        "IMAGES": folder,
        "OUTPUT": folder / "out",
        "LAUNCHER": folder / "note",
        "PYTHON": folder / "note",
    }
    environment = {"PATH": os.environ["PATH"], **{name: str(place) for name, place in places.items()}}
    command = ["bash", str(ROOT / published.source)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def numbers(name: str, folder: Path) -> dict[str, Any]:
    """What the plan says of one of `COMMANDS`."""
    published = COMMANDS[name]
    return make_plan(read_command(["--gpus", str(published.gpus), *words_of(published, folder)])).to_dict()


def main() -> None:
    """Write the record, a command at a time; those that it has already are left out."""
    found = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        write_folders(Path(folder))
        for name in COMMANDS:
            if name not in found:
                found[name] = numbers(name, Path(folder))
                RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(
                    f"{name}: {found[name]['total'] / 1e9:.1f} GB, largest batch {found[name]['largest_batch']}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
