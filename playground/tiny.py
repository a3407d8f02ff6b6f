"""The tiny models before training: a CLIP tower, a Llama and its tokenizer, with random weights.

The folders have the layout of the published ones (`openai/clip-vit-*`, Vicuna), so everything that loads those loads
these. Used by the generator as its starting point, and by tests as the smallest complete LLaVA.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from playground.draw import CELL, IMAGE_SIZE
from playground.tokenizer import VOCABULARY_SIZE, save_tokenizer

TOWER_FOLDER = "tiny-clip"
LANGUAGE_FOLDER = "tiny-vicuna"
MAX_POSITIONS = 512

WEIGHT_STD = 0.09
"""Of the Llama's initial weights; the usual 0.02 suits widths of thousands and leaves attention too even here."""
POSITION_STD = 1.0
"""Of the tower's position embeddings, as large as the pixels of a patch, so that places are told apart at once."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the tiny models.

    Attributes:
        tower_width, tower_layers, tower_heads: the CLIP tower. The hidden state before the last layer is what LLaVA
            reads (`--mm_vision_select_layer -2`), so one layer stays unused, as in LLaVA-1.5.
        width, mlp_width, layers, heads: the Llama.
    """

    tower_width: int = 96
    tower_layers: int = 3
    tower_heads: int = 4
    width: int = 128
    mlp_width: int = 256
    layers: int = 3
    heads: int = 4


@dataclass(frozen=True)
class TinyFolders:
    """Where `build_tiny` wrote the parts."""

    tower: Path
    language_model: Path


def build_tiny(folder: Path, seed: int = 0, sizes: Sizes | None = None) -> TinyFolders:
    """Write `tiny-clip/` and `tiny-vicuna/` (with its tokenizer) into `folder`, fp32, with random weights.

    The global random generator is left as it was.
    """
    sizes = sizes or Sizes()
    folders = TinyFolders(Path(folder) / TOWER_FOLDER, Path(folder) / LANGUAGE_FOLDER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _save_tower(folders.tower, sizes)
        _save_language_model(folders.language_model, sizes)
    save_tokenizer(folders.language_model, seed)
    return folders


def _save_tower(folder: Path, sizes: Sizes) -> None:
    config = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=CELL,
        hidden_size=sizes.tower_width,
        intermediate_size=2 * sizes.tower_width,
        num_hidden_layers=sizes.tower_layers,
        num_attention_heads=sizes.tower_heads,
        projection_dim=sizes.tower_width,
    )
    model = CLIPVisionModel(config)
    positions = [module for module in model.modules() if isinstance(module, CLIPVisionEmbeddings)]
    torch.nn.init.normal_(positions[0].position_embedding.weight, std=POSITION_STD)
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)


def _save_language_model(folder: Path, sizes: Sizes) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=WEIGHT_STD,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
