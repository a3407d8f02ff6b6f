"""Towers that transformers reads: what CLIP and SigLIP share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llava.data.tiling import output_size
from llava.errors import CheckpointError
from llava.model.multimodal_encoder.base import TowerShape, VisionTower
from llava.model.multimodal_encoder.stored import (
    FILE_PREFIX,
    STORED_PREFIX,
    StoredTower,
    check_names,
    check_shape,
    fill,
)
from llava.model.settings import IMAGE_PROCESSOR, VISION_TOWER
from llava.runtime.files import read_json, reading, refuse_pointers
from llava.runtime.program import errors_only
from llava.runtime.weights.settings import check_settings
from llava.runtime.weights.tensors import Entry, check_dtype, check_finite, check_numbers
from llava.runtime.weights.weight_files import weights_of

OTHER_PARTS = frozenset({"text_model", "text_projection", "visual_projection", "logit_scale", "logit_bias"})
"""Parts of a whole CLIP or SigLIP that are not its vision model."""


class TransformersTower(VisionTower):
    """A vision model of transformers with `embeddings` and `encoder.layers`.

    Attributes:
        config_class, model_class, processor_class: of transformers.
        class_token: True if the model has one.
    """

    config_class: ClassVar[type[PreTrainedConfig]]
    model_class: ClassVar[type[PreTrainedModel]]
    processor_class: ClassVar[type[Any]]
    class_token: ClassVar[bool]

    def read_shape(self) -> TowerShape:
        """Sizes from `config.json`; of a full model's, its vision part."""
        path = Path(self.vision_tower_name) / "config.json"
        if path.is_file():
            content = read_json(path)
            inner = content.get("vision_config")
            if inner is None:
                check_settings(content, VISION_TOWER, path)
            elif not isinstance(inner, dict):
                raise CheckpointError(f"{path}: its 'vision_config' is not an object")
            else:  # of a full model; what equals the defaults may be left out there
                check_settings(inner, VISION_TOWER, path, complete=False)
        with reading(path):
            self.config = self.config_class.from_pretrained(self.vision_tower_name)
        return TowerShape(
            self.config.num_hidden_layers,
            self.config.hidden_size,
            self.config.image_size,
            self.config.patch_size,
            self.class_token,
        )

    def read_image_processor(self) -> Any:
        """The processor of `preprocessor_config.json`; torchvision's resizing differs from the original's."""
        path = Path(self.vision_tower_name) / "preprocessor_config.json"
        if path.parent.is_dir():
            check_settings(read_json(path), IMAGE_PROCESSOR, path)
        with reading(path):
            processor = self.processor_class.from_pretrained(self.vision_tower_name)
        check_image_size(processor, self.shape.image_size, path)
        return processor

    def read_network(self, source: str, dtype: torch.dtype) -> nn.Module:
        """The vision part of a checkpoint.

        Raises:
            CheckpointError: weights are missing.
        """
        folder = Path(source)
        if folder.is_dir():
            refuse_pointers(folder)
        entries = weights_of(folder) if folder.is_dir() else {}
        model, report = self._from_pretrained(source, source, dtype)
        if report["mismatched_keys"]:
            name, stored, wanted = sorted(report["mismatched_keys"])[0]
            raise CheckpointError(
                f"{_file_of(entries, name, source)}: '{name}' has shape {tuple(stored)}, but {folder / 'config.json'} "
                f"asks for {tuple(wanted)}"
            )
        unknown = sorted(name for name in report["unexpected_keys"] if name.split(".")[0] not in OTHER_PARTS)
        if unknown:
            raise CheckpointError(
                f"{_file_of(entries, unknown[0], source)}: {len(unknown)} weights belong to no part of the vision "
                f"tower that {folder / 'config.json'} describes (first: {unknown[:3]}); without them it would be "
                "another one"
            )
        optional = {id(weight) for part in self.optional_weights(model) for weight in part.parameters()}
        optional_names = {name for name, weight in model.named_parameters() if id(weight) in optional}
        missing = set(report["missing_keys"]) - optional_names
        if missing:
            raise CheckpointError(
                f"{source}: {len(missing)} weights of the vision tower that its config.json describes are missing "
                f"(first: {sorted(missing)[:3]}) in {sorted({entry.path.name for entry in entries.values()})}"
            )
        for name, weight in model.named_parameters():
            if name not in optional_names and weight.is_floating_point():
                path = _file_of(entries, name, source)
                if (entry := _entry(entries, name)) is not None:
                    check_dtype(name, entry.dtype, path)
                check_finite(name, getattr(weight, "ds_tensor", weight), path)
        return model

    def _from_pretrained(
        self, source: str, weights: str | None, dtype: torch.dtype, **options: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The model and transformers' report; `source` is for messages, `weights` where they are unless given."""
        options |= {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        problem = "its weights cannot be read as its config.json says"
        with errors_only(), reading(source, problem):  # the text part of a whole model is left out
            return self.model_class.from_pretrained(weights, **options)

    def read_stored(self, stored: StoredTower, dtype: torch.dtype) -> nn.Module:
        """As in `VisionTower`; the weights of the tower that is named are not read unless some are lacking."""
        tensors, tower = stored.read(), self.vision_tower_name
        if Path(tower).is_dir():
            refuse_pointers(Path(tower))
        check_numbers({STORED_PREFIX + name: tensor for name, tensor in tensors.items()}, stored.folder)
        # Under the names of published files, which transformers then writes too.
        named = {f"{FILE_PREFIX}{name}": tensor for name, tensor in tensors.items()}
        model, report = self._from_pretrained(str(stored.folder), None, dtype, config=self.config, state_dict=named)
        for name, found, expected in sorted(report["mismatched_keys"]):
            check_shape(stored.folder, tower, name, found, expected)
        missing = set(report["missing_keys"])
        check_names(stored.folder, tower, missing & set(self.used_names(model)), report["unexpected_keys"])
        if missing:  # no feature depends on them, but a saved tower is whole
            model = self.read_network(tower, dtype)
            fill(model, stored, self.used_names(model), tower)
        return model

    def blocks(self, network: Any) -> Sequence[nn.Module]:
        """The encoder layers."""
        return network.encoder.layers

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """One encoder layer; every patch sees every other."""
        return block(hidden, attention_mask=None)

    def queries_and_keys(self, block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(N, H, P, C) each."""
        attention, normed = block.self_attn, block.layer_norm1(hidden)
        return tuple(  # type: ignore[return-value]
            project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj)
        )

    def save(self, folder: str | Path, tensors: dict[str, Tensor] | None = None) -> None:
        """Write the folder as transformers does."""
        self.loaded().save_pretrained(folder, state_dict=tensors)
        self.image_processor.save_pretrained(folder)


def check_image_size(processor: Any, side: int, path: Path) -> None:
    """Refuse an image processor whose images a tower cannot take.

    Args:
        processor: made of the settings in `path`.
        side: of the images that the tower takes.
        path: for messages.

    Raises:
        CheckpointError: its images have another size, or are cut out of smaller ones.
    """
    with reading(path):
        size = output_size(processor) if processor.do_center_crop or "height" in processor.size else (side, side)
        scaled = [length for length in dict(processor.size).values() if length is not None]
    if size != (side, side):
        raise CheckpointError(f"{path}: makes images of {size} pixels, but the tower takes {(side, side)}")
    if processor.do_center_crop and processor.do_resize and min(scaled) < side:
        raise CheckpointError(f"{path}: cuts {side} pixels out of images that it scales to {min(scaled)}; see 'size'")


def _entry(entries: Mapping[str, Entry], name: str) -> Entry | None:
    """The tensor of a weight: files of full models have the name behind a prefix, `vision_model.` and the like."""
    found = (entry for stored, entry in entries.items() if stored == name or stored.endswith(f".{name}"))
    return entries.get(name) or next(found, None)


def _file_of(entries: Mapping[str, Entry], name: str, source: str) -> str | Path:
    entry = _entry(entries, name)
    return source if entry is None else entry.path
