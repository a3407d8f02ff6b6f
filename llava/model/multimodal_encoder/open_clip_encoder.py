"""Vision towers of open_clip: `open_clip:ARCH/PRETRAINED`, or a folder with an `open_clip_config.json`.

ARCH is a name that open_clip knows. PRETRAINED is one of its tags, or the path of a weights file; a path that begins
with a slash makes two of them: `open_clip:ViT-L-14//data/weights.pt`. Weights are read without running pickled code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from llava.errors import CheckpointError, FlagError
from llava.model.formats import read_tensors
from llava.model.multimodal_encoder.base import TowerShape, VisionTower
from llava.runtime.files import read_json
from llava.runtime.weights.tensors import check_numbers

PREFIX = "open_clip:"
CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
RESAMPLE = {"bicubic": 3, "bilinear": 2}
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
"""open_clip builds a text model beside the image model; this is the smallest one, and it is dropped."""


class OpenClipName(NamedTuple):
    """Architecture and weights: a tag of open_clip, or a file."""

    architecture: str
    pretrained: str

    @property
    def is_file(self) -> bool:
        """True if the weights are named by a path; tags hold neither a slash nor such a suffix."""
        return "/" in self.pretrained or self.pretrained.endswith(WEIGHT_SUFFIXES)


def parse_name(name: str) -> OpenClipName:
    """The parts of `open_clip:ARCH/PRETRAINED`.

    Raises:
        FlagError: a part is missing.
    """
    architecture, _, pretrained = name.removeprefix(PREFIX).partition("/")
    if not architecture or not pretrained:
        raise FlagError(
            f"--vision_tower {name}: give {PREFIX}ARCH/PRETRAINED, for example {PREFIX}ViT-L-14-336/openai or "
            f"{PREFIX}ViT-L-14-336//path/to/weights.pt"
        )
    return OpenClipName(architecture, pretrained)


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise FlagError(
            'the vision tower comes from open_clip, which is not installed: pip install "llava-extensions[openclip]"'
        ) from error
    return open_clip


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Weights by their name in the image model; files of a training run keep them one level down.

    Raises:
        CheckpointError: the file is damaged, needs pickled code, or holds no image model.
    """
    tensors = read_tensors(path, inner="state_dict")
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    visual = {name.removeprefix("visual."): value for name, value in tensors.items() if name.startswith("visual.")}
    if not visual:
        raise CheckpointError(f"{path}: holds no image model of open_clip (no tensor is named 'visual.*')")
    check_numbers(visual, path)
    return visual


class OpenClipVisionTower(VisionTower):
    """A vision transformer of open_clip. Hidden state 0 is the output of the norm before the blocks."""

    marker_file = CONFIG_FILE

    def read_shape(self) -> TowerShape:
        """Sizes from open_clip's own table, or from `open_clip_config.json`.

        Raises:
            FlagError: open_clip does not know the architecture or the tag, or it is no vision transformer.
        """
        self.model_config, self.preprocessing = self._read_config()
        vision = self.model_config["vision_cfg"]
        if vision.get("timm_model_name") or isinstance(vision.get("layers", 12), list):
            raise FlagError(
                f"--vision_tower {self.vision_tower_name}: is no vision transformer of open_clip's own; a SigLIP or "
                "CLIP model in transformers' format can be given by its folder"
            )
        defaults = _open_clip().CLIPVisionCfg
        return TowerShape(
            layers=vision.get("layers", defaults.layers),
            hidden_size=vision.get("width", defaults.width),
            image_size=vision.get("image_size", defaults.image_size),
            patch_size=vision.get("patch_size", defaults.patch_size),
            class_token=True,
        )

    def _read_config(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Configuration of the model, and what its pixels should look like."""
        if not self.vision_tower_name.startswith(PREFIX):
            content = read_json(Path(self.vision_tower_name) / CONFIG_FILE)
            return content["model_cfg"], content.get("preprocess_cfg", {})
        open_clip, name = _open_clip(), parse_name(self.vision_tower_name)
        config = None if ":" in name.architecture else open_clip.get_model_config(name.architecture)
        if config is None:
            known = [model for model in open_clip.list_models() if model.startswith(name.architecture[:3])]
            raise FlagError(f"--vision_tower {self.vision_tower_name}: no such architecture; similar: {known[:10]}")
        if name.is_file:
            return config, {}
        tag = open_clip.get_pretrained_cfg(name.architecture, name.pretrained)
        if not tag:
            tags = open_clip.list_pretrained_tags_by_model(name.architecture)
            raise FlagError(
                f"--vision_tower {self.vision_tower_name}: no such tag for {name.architecture}; known: {tags}; a file "
                f"is given as {PREFIX}{name.architecture}/FOLDER/FILE"
            )
        if "quick_gelu" in tag:
            config["quick_gelu"] = tag["quick_gelu"]
        return config, {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if tag.get(key)}

    def read_network(self, source: str, dtype: torch.dtype) -> nn.Module:
        """The image model with its weights.

        Raises:
            CheckpointError: weights are missing, or do not fit the architecture.
        """
        open_clip = _open_clip()
        config = {
            key: self.model_config[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in self.model_config
        }
        network = open_clip.CLIP(**config, text_cfg=NO_TEXT).visual
        path = self._weights(source)
        try:
            network.load_state_dict(_state_dict(path))
        except RuntimeError as error:
            raise CheckpointError(
                f"{path}: does not fit the vision tower '{self.vision_tower_name}': {error}"
            ) from error
        return network.to(dtype)

    def _weights(self, source: str) -> Path:
        """The weights file; a tag is downloaded by open_clip."""
        if source.startswith(PREFIX):
            name = parse_name(source)
            if name.is_file:
                return Path(name.pretrained)
            open_clip = _open_clip()
            return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(name.architecture, name.pretrained)))
        files = [Path(source) / name for name in WEIGHT_FILES if (Path(source) / name).is_file()]
        if not files:
            raise CheckpointError(f"{source}: holds neither of {WEIGHT_FILES}")
        return files[0]

    def read_image_processor(self) -> Any:
        """A processor with the settings of open_clip's own transform.

        It crops as CLIP's processor does: where an odd number of pixels is cut off, open_clip cuts one more at the top.

        Raises:
            FlagError: the model wants its images in another way.
        """
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        settings = self.preprocessing
        interpolation, mode = settings.get("interpolation", "bicubic"), settings.get("resize_mode", "shortest")
        if interpolation not in RESAMPLE or mode not in ("shortest", "squash"):
            raise FlagError(
                f"{self.vision_tower_name}: images resized by '{interpolation}', '{mode}' are not supported"
            )
        side = self.shape.image_size
        square = {"height": side, "width": side}
        options = {
            "resample": RESAMPLE[interpolation],
            "image_mean": list(settings.get("mean", OPENAI_DATASET_MEAN)),
            "image_std": list(settings.get("std", OPENAI_DATASET_STD)),
        }
        if mode == "squash":
            return SiglipImageProcessorPil(size=square, **options)
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square, **options)

    def embedding_modules(self, network: Any) -> Sequence[nn.Module | nn.Parameter]:
        """Patch, class and position embeddings, and the norm behind them; fixed positions are not trained."""
        fixed = self.model_config["vision_cfg"].get("pos_embed_type", "learnable") != "learnable"
        positions = [] if fixed else [network.positional_embedding]
        return [network.conv1, network.class_embedding, *positions, network.ln_pre]

    def blocks(self, network: Any) -> Sequence[nn.Module]:
        """The residual attention blocks."""
        return network.transformer.resblocks

    def embed(self, network: Any, images: Tensor) -> Tensor:
        """(N, P + 1, D_vision) of (N, 3, height, width); dropout of whole patches is left out."""
        patches = network.conv1(images).flatten(2).transpose(1, 2)  # (N, P, D_vision)
        class_token = network.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        hidden = torch.cat([class_token, patches], dim=1)  # (N, P + 1, D_vision)
        return network.ln_pre(hidden + network.positional_embedding.to(patches.dtype))

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """One block; every patch sees every other."""
        return block(hidden)

    def queries_and_keys(self, block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(N, H, P, C) each; open_clip's blocks have one matrix for queries, keys and values."""
        attention, width = block.attn, hidden.shape[-1]
        bias = None if attention.in_proj_bias is None else attention.in_proj_bias[: 2 * width]
        both = F.linear(block.ln_1(hidden), attention.in_proj_weight[: 2 * width], bias)  # (N, P, 2 D_vision)
        queries, keys = both.unflatten(-1, (2, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return queries, keys

    def save(self, folder: str | Path, tensors: dict[str, Tensor] | None = None) -> None:
        """Write the folder as on model hubs, with the image model alone."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        processor = self.image_processor
        squash = isinstance(processor, SiglipImageProcessorPil)
        preprocessing = {
            "mean": list(processor.image_mean),
            "std": list(processor.image_std),
            "interpolation": next(name for name, code in RESAMPLE.items() if code == processor.resample),
            "resize_mode": "squash" if squash else "shortest",
        }
        content = {"model_cfg": self.model_config, "preprocess_cfg": preprocessing}
        (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        held = self.loaded().state_dict() | (tensors or {})
        stored = {f"visual.{name}": value.detach().cpu().clone().contiguous() for name, value in held.items()}
        save_file(stored, folder / WEIGHT_FILES[0], {"format": "pt"})
