"""What every vision tower has in common: which hidden layer it returns, how it is frozen, saved and read again.

A tower is a stack of blocks behind an embedding of the pixels. A kind of tower says where these are in its network;
the loop over the blocks, the checks and the sizes are here (upstream has one file per tower, each with its own copy).
"""

from __future__ import annotations

import abc
import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava.errors import CheckpointError, FlagError
from llava.model.multimodal_encoder.stored import StoredTower, fill
from llava.runtime.partition import shared_like
from llava.runtime.weights.tensors import Entry
from llava.runtime.weights.weight_files import weights_of

SELECT_FEATURES = ("patch", "cls_patch", "cls_every_N")


def _class_token_interval(select_feature: str) -> int | None:
    """N of `cls_every_N`; None for the features of one layer."""
    match = re.fullmatch(r"cls_every_([1-9]\d*)", select_feature)
    return None if match is None else int(match.group(1))


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a tower, known before its weights are read.

    Attributes:
        layers: number of blocks.
        hidden_size: D_vision.
        image_size: side of the square input in pixels.
        patch_size: side of a patch in pixels.
        class_token: True if row 0 of the features is a class token.
    """

    layers: int
    hidden_size: int
    image_size: int
    patch_size: int
    class_token: bool


class VisionTower(nn.Module, abc.ABC):
    """An image encoder that returns the features of one hidden layer, or the class token of several.

    Hidden state 0 is what enters the first block, hidden state i the output of block i; negative numbers count from the
    end. `patch` drops a class token, `cls_patch` keeps it; `cls_every_N` is the class token after the blocks N, 2N, ...
    up to the selected layer, a row each (LaVIN: `cls_every_4`). Blocks behind what is selected never run.

    Args:
        name_or_path: where the tower comes from; the form depends on the kind.
        select_layer: hidden state to return (`--mm_vision_select_layer`).
        select_feature: `patch`, `cls_patch` or `cls_every_N` (`--mm_vision_select_feature`).

    Attributes:
        vision_tower: the network; None until `load_model`.
        image_processor: turns RGB images into pixel values; None until `load_model`.
        stored: where the weights were read instead of the place that is named: in the full weights of a LLaVA; or None.
        digest: of the weights as they were read, where somebody asked for it.
        trainable: False runs the network without gradient and in evaluation mode; True if anything in it is trained,
            its own weights or what an extension added.

    Raises:
        FlagError: the layer does not exist, or there is no class token to keep.
    """

    marker_file: ClassVar[str] = "config.json"
    """File by which a folder that `save` wrote is known."""

    vision_tower: nn.Module | None
    image_processor: Any

    def __init__(self, name_or_path: str, select_layer: int, select_feature: str = "patch") -> None:
        super().__init__()
        self.interval = _class_token_interval(select_feature)
        if select_feature not in SELECT_FEATURES[:2] and self.interval is None:
            raise FlagError(f"--mm_vision_select_feature is '{select_feature}'; known values: {SELECT_FEATURES}")
        self.vision_tower_name = name_or_path
        self.select_layer = select_layer
        self.select_feature = select_feature
        self.trainable = False
        self.stored: StoredTower | None = None
        self.digest: str | None = None
        self._is_from_elsewhere: bool | None = None
        self.vision_tower = None
        self.image_processor = None
        self.shape = self.read_shape()
        if select_feature != "patch" and not self.shape.class_token:
            raise FlagError(
                f"--mm_vision_select_feature {select_feature}: '{name_or_path}' has no class token; use patch, which "
                "keeps every row"
            )
        layers = self.shape.layers
        self.num_blocks = select_layer if select_layer >= 0 else layers + 1 + select_layer
        if not 0 <= self.num_blocks <= layers:
            raise FlagError(
                f"--mm_vision_select_layer is {select_layer}, but '{name_or_path}' has hidden states 0..{layers}"
            )
        if self.interval is not None:
            if self.num_blocks < self.interval:
                raise FlagError(
                    f"--mm_vision_select_feature {select_feature}: up to --mm_vision_select_layer {select_layer} only "
                    f"{self.num_blocks} blocks of '{name_or_path}' run, so there is no such class token"
                )
            self.num_blocks -= self.num_blocks % self.interval

    # What a kind of tower has to say
    @abc.abstractmethod
    def read_shape(self) -> TowerShape:
        """Sizes from the configuration alone."""

    @abc.abstractmethod
    def read_network(self, source: str, dtype: torch.dtype) -> nn.Module:
        """Network and weights from `name_or_path`, or from a folder that `save` wrote.

        Raises:
            CheckpointError: weights are missing.
        """

    @abc.abstractmethod
    def read_image_processor(self) -> Any:
        """The image processor that the tower was trained with, computing with Pillow."""

    def optional_weights(self, network: Any) -> Sequence[nn.Module]:
        """Parts that no feature depends on and that a checkpoint may lack."""
        return ()

    @abc.abstractmethod
    def embedding_modules(self, network: Any) -> Sequence[nn.Module | nn.Parameter]:
        """Everything in front of the first block that has parameters."""

    @abc.abstractmethod
    def blocks(self, network: Any) -> Sequence[nn.Module]:
        """The blocks in order."""

    @abc.abstractmethod
    def embed(self, network: Any, images: Tensor) -> Tensor:
        """Hidden state 0, (N, P, D_vision) with the class token, if any, first, of pixels (N, 3, height, width)."""

    @abc.abstractmethod
    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """One block: (N, P, D_vision) to the same shape."""

    @abc.abstractmethod
    def queries_and_keys(self, block: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(N, H, P, C) each, of the attention of a block whose input is `hidden` (N, P, D_vision)."""

    @abc.abstractmethod
    def save(self, folder: str | Path, tensors: dict[str, Tensor] | None = None) -> None:
        """Write network and image processor so that the folder alone is a tower of this kind.

        Args:
            folder: created if missing.
            tensors: the network's weights in whole, where ZeRO-3 has split them; None takes those it holds.
        """

    # What follows from that
    @property
    def is_loaded(self) -> bool:
        """True once the weights are in memory."""
        return self.vision_tower is not None

    def load_model(self, dtype: torch.dtype | None = None, stored: StoredTower | None = None) -> None:
        """Read weights and image processor; the weights are frozen until `freeze.py` says otherwise.

        Args:
            dtype: of the weights; None: float32.
            stored: the tower in full weights, to be read in place of the one that is named.

        Raises:
            CheckpointError: weights are missing in the folder, or `stored` is not a tower of this shape.
        """
        self.image_processor = self.read_image_processor()
        dtype, self.stored, self._is_from_elsewhere = dtype or torch.float32, stored, None
        if stored is None:
            self.vision_tower = self.read_network(self.vision_tower_name, dtype)
        else:
            self.vision_tower = self.read_stored(stored, dtype)
        self.vision_tower.requires_grad_(False)
        self.trainable = False
        self.eval()

    def read_stored(self, stored: StoredTower, dtype: torch.dtype) -> nn.Module:
        """Network with the weights of a tower in full weights.

        What they lack and no feature depends on comes from the tower that is named.

        Raises:
            CheckpointError: a weight is missing, unknown, of another shape, or not of finite numbers; names it.
        """
        network = self.read_network(self.vision_tower_name, dtype)
        fill(network, stored, self.used_names(network), self.vision_tower_name)
        return network

    def is_from_elsewhere(self) -> bool:
        """Whether the weights were read from full weights and are not those of the tower that is named.

        A frozen tower that somebody stored along is the one that is named, as in LLaVA-1.5's folders.
        """
        if self._is_from_elsewhere is None:  # compared once: the files are as large as the tower
            self._is_from_elsewhere = self.stored is not None and not self.stored.equals(self.named_entries())
        return self._is_from_elsewhere

    def named_entries(self) -> Mapping[str, Entry]:
        """What the files of the tower that is named contain; nothing if they cannot be compared."""
        folder = Path(self.vision_tower_name)
        return weights_of(folder) if folder.is_dir() else {}

    def load_weights(self, folder: str | Path) -> None:
        """Replace the weights by those of a tower that was saved in a checkpoint, keeping dtype and device.

        Raises:
            CheckpointError: weights are missing in the folder, or the tower there is of another kind or shape.
        """
        if not (Path(folder) / self.marker_file).is_file():
            raise CheckpointError(
                f"{folder}: holds no {self.marker_file}, so it is no tower of the kind of '{self.vision_tower_name}'"
            )
        wrong = f"{folder}: is not a tower of the shape of '{self.vision_tower_name}'"
        network, tensors = self.loaded(), self.read_network(str(folder), self.dtype).state_dict()
        weights = {name: tensors[name] for name, _ in network.named_parameters() if name in tensors}
        tensors |= shared_like(weights, network.parameters())
        try:  # not strict: what extensions have added is theirs to read
            result = network.load_state_dict(tensors, strict=False)
        except RuntimeError as error:
            raise CheckpointError(wrong) from error
        if result.unexpected_keys:
            raise CheckpointError(f"{wrong}: it has {result.unexpected_keys[:3]}")

    def loaded(self) -> Any:
        """The network.

        Raises:
            RuntimeError: `load_model` was not called.
        """
        if self.vision_tower is None:
            raise RuntimeError(f"the vision tower '{self.vision_tower_name}' is not loaded; call load_model() first")
        return self.vision_tower

    def used_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that the selected feature depends on: the blocks behind it get no gradient."""
        wanted = self._used_ids(self.loaded())
        for name, parameter in self.named_parameters():
            if id(parameter) in wanted:
                yield name, parameter

    def used_names(self, network: nn.Module) -> list[str]:
        """Names in a network of the parameters that the selected feature depends on."""
        wanted = self._used_ids(network)
        return [name for name, parameter in network.named_parameters() if id(parameter) in wanted]

    def _used_ids(self, network: nn.Module) -> set[int]:
        used = [*self.embedding_modules(network), *self.blocks(network)[: self.num_blocks]]
        wanted = {id(part) for part in used if isinstance(part, nn.Parameter)}
        return wanted | {id(weight) for part in used if isinstance(part, nn.Module) for weight in part.parameters()}

    def train(self, mode: bool = True) -> VisionTower:
        """Training mode for a tower that is trained; a frozen one always stays in evaluation mode."""
        return super().train(mode and self.trainable)

    def forward(self, images: Tensor, block_inputs: dict[int, Tensor] | None = None) -> Tensor:
        """Features of a batch of images.

        Args:
            images: (N, 3, height, width) normalised pixels, any floating dtype.
            block_inputs: to be filled with what enters the first and the last block that runs, by their number.

        Returns:
            (N, P, D_vision) in the dtype of `images`; P + 1 rows with the class token for `cls_patch`, one row for
            each class token for `cls_every_N`.
        """
        network = self.loaded()
        context = contextlib.nullcontext() if self.trainable else torch.no_grad()
        class_tokens: list[Tensor] = []
        with context:
            hidden = self.embed(network, images.to(device=self.device, dtype=self.dtype))
            for number, block in enumerate(self.blocks(network)[: self.num_blocks], start=1):
                if block_inputs is not None and number in (1, self.num_blocks):
                    block_inputs[number - 1] = hidden
                hidden = self.run_block(block, hidden)
                if self.interval is not None and number % self.interval == 0:
                    class_tokens.append(hidden[:, 0])
        if class_tokens:
            return torch.stack(class_tokens, dim=1).to(images.dtype)
        drops_class = self.shape.class_token and self.select_feature == "patch"
        return (hidden[:, 1:] if drops_class else hidden).to(images.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.loaded().parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.loaded().parameters()).device

    @property
    def hidden_size(self) -> int:
        """D_vision."""
        return self.shape.hidden_size

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.shape.image_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of the image."""
        return self.shape.image_size // self.shape.patch_size

    @property
    def num_patches(self) -> int:
        """P: patches of one image, the class token not counted."""
        return self.num_patches_per_side**2

    @property
    def num_features(self) -> int:
        """Rows that one image takes in the sequence: P, P + 1 with the class token, or class tokens alone."""
        if self.interval is not None:
            return self.num_blocks // self.interval
        return self.num_patches + (self.select_feature == "cls_patch")
