"""Tiny base weights as Meta publishes them, a tower, and ScienceQA: what LaVIN's command lines read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mma.lavin.train import main
from mma.lavin.weights.meta import open_meta
from tests.golden import golden_dir, load_case
from tests.mma.golden_model import write_tower
from tests.mma.lavin.base_files import META, META_TENSORS, save_vicuna, weights_root
from tests.mma.lavin.test_data import save_problems


@dataclass(frozen=True)
class LavinFiles:
    """Folders of a tiny LaVIN."""

    weights: Path
    tower: Path
    data: Path

    @property
    def words(self) -> list[str]:
        """Options that name them, and what lets a run pass on a small machine."""
        return [
            *("--llama_model_path", str(self.weights), "--vision_tower", str(self.tower)),
            *("--data_root", str(self.data), "--caption_file", str(self.data / "captions.json"), "--device", "cpu"),
        ]


def tiny_words(files: LavinFiles, output: Path, *words: str) -> list[str]:
    """Four updates over two epochs of ScienceQA."""
    return [
        *files.words,
        *("--output_dir", str(output), "--prompt_format", "QCM-ALE", "--visual_adapter_type", "router"),
        *("--batch_size", "4", "--accum_iter", "2", "--epochs", "2", "--warmup_epochs", "0.5", "--lr", "0.01"),
        *("--num_workers", "0", "--logging_steps", "1", "--hidden_proj", "16", *words),
    ]


def train_tiny(files: LavinFiles, output: Path, *words: str) -> Path:
    """Run `tiny_words`."""
    return main(tiny_words(files, output, *words))


def difference(llama: Path) -> dict[str, Tensor]:
    """A small step away from a LLaMA, as a Vicuna is published."""
    generator = torch.Generator().manual_seed(5)
    return {name: 0.02 * torch.randn(weight.shape, generator=generator) for name, weight in open_meta(llama)[0].items()}


def save_lavin_files(folder: Path) -> LavinFiles:
    """Write all of them below `folder`."""
    weights = weights_root(folder, META, META_TENSORS, META["n_shards"])
    (weights / "13B").symlink_to("7B")
    save_vicuna(weights, difference(weights / "7B"))
    (weights / "vicuna_13B").symlink_to("vicuna_7B")
    config = load_case("lavin", "clip_base")[0]["config"]
    save_problems(folder / "data", golden_dir("lavin") / "images")
    return LavinFiles(weights, write_tower(folder / "tower", config), folder / "data")
