"""Checkpoints of a LLaVA with random weights, for programs that measure: any size, written tensor by tensor.

Weights are named and shaped by the model's own class on the meta device. Numbers are copied from one block of random
ones, so that writing takes as long as the disk; a file is filled and written before the next one is begun.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from benchmarks.experiments.common import tiny
from llava.conversation import conv_templates
from llava.data.trained_template import TEMPLATE_KEY
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.runtime.output import replace_text

TEMPLATE = "v1"
WORDS = (
    *("what", "which", "how", "many", "color", "shape", "left", "right", "above", "below"),
    *("is", "are", "there", "the", "a", "of", "image", "square", "circle"),
)
DEVIATION = 0.02
POOL = 2**24 + 43
"""Random numbers that weights are copied from, in turn; an odd number, so that rows of a matrix differ."""

TRAINED_PIECES = 400
"""Pieces of the tokenizer that are learned from text; the rest of the vocabulary are single characters."""

HEAD, FIRST_TEXT = "lm_head.weight", 259
"""Ids below are special ones and bytes. Their logits are zero, so an answer is text, and as long as it may be."""

FIRST_CHARACTER, CHARACTERS = 0x4E00, 31_700
"""A range of letters that no prompt contains, most of them ideographs."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA of Llama, CLIP and mlp2x_gelu.

    Attributes:
        layers, width, inner, heads, vocabulary: of the language model.
        image, patch: pixels of a side.
        tower_layers, tower_width, tower_inner, tower_heads: of the tower.
        positions: the longest sequence.
    """

    layers: int = 8
    width: int = 512
    inner: int = 1376
    heads: int = 8
    vocabulary: int = 32_000
    image: int = 336
    patch: int = 14
    tower_layers: int = 4
    tower_width: int = 256
    tower_inner: int = 1024
    tower_heads: int = 4
    positions: int = 4096

    @property
    def patches(self) -> int:
        """P."""
        return (self.image // self.patch) ** 2


SEVEN_B = Shape(
    layers=32, width=4096, inner=11008, heads=32, tower_layers=24, tower_width=1024, tower_inner=4096, tower_heads=16
)
"""LLaVA-1.5-7B."""


@dataclass(frozen=True)
class Folders:
    """Where `write_llava` wrote the model and its tower."""

    llava: Path
    tower: Path


def question(random: Random) -> str:
    """A question of 3 to 24 words."""
    return " ".join(random.choices(WORDS, k=random.randint(3, 24))).capitalize() + "?"


def write_image(path: Path, side: int, random: Random) -> None:
    """A square image of noise."""
    Image.frombytes("RGB", (side, side), random.randbytes(3 * side * side)).save(path)


def write_rows(path: Path, images: Sequence[str], words: int) -> None:
    """Training rows in upstream's format, one for each image: a question, and an answer of so many words."""
    random = Random(3)
    rows = []
    for number, image in enumerate(images):
        answer = " ".join(question(random) for _ in range(words)).split()[:words]
        turns = [
            {"from": "human", "value": f"<image>\n{question(random)}"},
            {"from": "gpt", "value": " ".join(answer)},
        ]
        rows.append({"id": str(number), "image": image, "conversations": turns})
    write_json(path, rows)


def write_llava(
    folder: Path, shape: Shape, dtype: torch.dtype, say: Callable[[str], object] = lambda _: None
) -> Folders:
    """Write `llava/` (sharded full weights, tokenizer) and `tower/` (CLIP) into `folder`.

    Args:
        folder: exists.
        shape: sizes.
        dtype: of the weights.
        say: is told of each file.
    """
    folders = Folders(folder / "llava", folder / "tower")
    numbers = Numbers(dtype)
    vision = CLIPVisionConfig(
        image_size=shape.image, patch_size=shape.patch, hidden_size=shape.tower_width,
        intermediate_size=shape.tower_inner, num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads, projection_dim=shape.tower_width, dtype=dtype,
    )  # fmt: skip
    with torch.device("meta"):
        tower = CLIPVisionModel(vision)
        llava = LlavaLlamaForCausalLM(_configuration(shape, folders.tower, dtype))
    vision.architectures = ["CLIPVisionModel"]
    llava.config.architectures = ["LlavaLlamaForCausalLM"]
    tokenizer_of(folders.llava, shape)
    for target, model in ((folders.tower, tower), (folders.llava, llava)):
        target.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(target)
        _write_weights(model, target, numbers, say)
    crop = {"height": shape.image, "width": shape.image}
    CLIPImageProcessorPil(size={"shortest_edge": shape.image}, crop_size=crop).save_pretrained(folders.tower)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(folders.llava)
    return folders


def tokenizer_of(folder: Path, shape: Shape) -> None:
    """Write a tokenizer with one piece less than the model has rows, so that every id stands for a text.

    The last row is that of the image token in transformers' format: with a row more, its loss would be another one.
    """
    random = Random(0)
    lines = [conv_templates[TEMPLATE].system] * 50 + [question(random) for _ in range(400)]
    count = max(0, shape.vocabulary - TRAINED_PIECES)
    required = "".join(chr(FIRST_CHARACTER + number) for number in range(min(count, CHARACTERS)))
    pieces = tiny.train_tokenizer(lines, shape.vocabulary - 1, required)
    tiny.save_tokenizer(folder, pieces, shape.positions)


def _configuration(shape: Shape, tower: Path, dtype: torch.dtype) -> LlavaConfig:
    settings: dict[str, Any] = {
        "mm_vision_tower": str(tower.resolve()), "mm_hidden_size": shape.tower_width,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat", "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "use_mm_proj": True, "image_aspect_ratio": "resize", "tokenizer_model_max_length": shape.positions,
        TEMPLATE_KEY: TEMPLATE,
    }  # fmt: skip
    return LlavaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False, dtype=dtype, **settings,
    )  # fmt: skip


class Numbers:
    """Random weights of a dtype, each tensor another section of one block."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pool = (DEVIATION * torch.randn(POOL, generator=generator)).to(dtype)
        self.position = 0

    def of(self, name: str, like: Tensor) -> Tensor:
        """A tensor of the shape of `like`: scales are one, other vectors zero, all else is random."""
        if like.ndim == 1:
            fill = 1.0 if name.rpartition(".")[2] == "weight" else 0.0
            return torch.full(like.shape, fill, dtype=self.pool.dtype)
        made = torch.empty(like.shape, dtype=self.pool.dtype)
        flat, done = made.view(-1), 0
        while done < len(flat):
            count = min(len(flat) - done, POOL - self.position)
            flat[done : done + count] = self.pool[self.position : self.position + count]
            done, self.position = done + count, (self.position + count) % POOL
        if name == HEAD:
            made[:FIRST_TEXT] = 0
        return made


def _write_weights(model: nn.Module, folder: Path, numbers: Numbers, say: Callable[[str], object]) -> None:
    """A file for each of about a gigabyte; one alone has the usual name."""
    groups = list(_groups(dict(model.state_dict()), 2**30 // numbers.pool.element_size()))
    if len(groups) == 1:
        save_file({name: numbers.of(name, like) for name, like in groups[0].items()}, folder / SAFE_WEIGHTS_NAME, _META)
        return
    places: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: numbers.of(name, like) for name, like in group.items()}, folder / file, _META)
        places |= dict.fromkeys(group, file)
        say(f"written: {file}")
    size = numbers.pool.element_size() * sum(like.numel() for group in groups for like in group.values())
    write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": places})


_META = {"format": "pt"}


def _groups(tensors: dict[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    """Tensors in order, in groups of at most so many numbers; a larger one is a group by itself."""
    group: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if group and sum(map(torch.numel, group.values())) + tensor.numel() > most:
            yield group
            group = {}
        group[name] = tensor
    yield group


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    replace_text(path, json.dumps(content, indent=1) + "\n")
