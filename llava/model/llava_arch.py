"""The multimodal parts of a LLaVA: tower, projector, and the step from ids and images to embeddings.

Mixins for a decoder and its causal language model, with upstream's method names (`llava/model/llava_arch.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.splice_plan import SplicePlanner
from llava.data.tiling import ImageLength, get_anyres_image_grid_shape
from llava.encoded_images import LINE_END, EncodedImages, texts_behind_images
from llava.errors import FlagError
from llava.extension import ExtensionSet
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_encoder.builder import set_normalization
from llava.model.multimodal_encoder.identity import lasting_name
from llava.model.multimodal_encoder.reading import read_tower
from llava.model.multimodal_encoder.stored import StoredTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.splice import carry_out, check_plan, splice
from llava.model.tiles import merge_tiles
from llava.runtime.cache_name import takes_cache
from llava.segments import MultimodalInputs, SpliceOptions, SplicePlan

Images = Tensor | Sequence[Tensor]
"""Images of a batch: (N, 3, height, width), or (N, tiles, 3, height, width), or a list of (3, height, width) and
(tiles, 3, height, width)."""


class LlavaMetaModel:
    """Adds a vision tower and a projector to a decoder."""

    config: Any
    vision_tower: VisionTower | None
    mm_projector: nn.Module | None

    def init_vision_parts(self) -> None:
        """Create what the configuration says is in the checkpoint; the tower is added by `load_vision_tower`."""
        self.vision_tower = None
        self.mm_projector = None
        self.has_new_projector = False  # True if it is not the one that the base has
        self.image_token_ids: dict[str, int] = {}
        if getattr(self.config, "mm_hidden_size", None) is not None:
            self.mm_projector = build_vision_projector(self.config)
            if "unpad" in getattr(self.config, "mm_patch_merge_type", "flat"):
                self.image_newline = nn.Parameter(torch.zeros(self.config.hidden_size))

    def get_vision_tower(self) -> VisionTower | None:
        """The tower, or None for a model without vision."""
        return self.vision_tower

    def load_vision_tower(
        self,
        near: Iterable[str | Path] = (),
        dtype: torch.dtype | None = None,
        stored: StoredTower | None = None,
        identify: bool = False,
    ) -> VisionTower:
        """Read the tower named in the configuration, looking inside and beside the folders `near`.

        Args:
            near: folders searched for a tower given by a relative name.
            dtype: of its weights; None: float32.
            stored: the tower in full weights, whose weights are read in place of those of the one that is named.
            identify: compute the digest of its weights although the configuration has none to compare it with.

        Raises:
            CheckpointError: the tower cannot be found, or `stored` is not of its kind and shape.
            FlagError: it has other weights than the configuration says.
        """
        self.vision_tower = read_tower(self.config, near, dtype, stored, identify)
        set_normalization(self.vision_tower.image_processor, getattr(self.config, "mm_image_normalization", "tower"))
        return self.vision_tower

    def initialize_vision_modules(
        self, model_args: Any, near: Iterable[str | Path] = (), stored: StoredTower | None = None
    ) -> None:
        """Give a language model its tower and projector, as `train.py` is told by its flags.

        An existing projector is kept. `--pretrain_mm_mlp_adapter` is read by the caller, which knows file formats.

        Args:
            model_args: `ModelArguments` of the run.
            near: folders searched for a tower given by a bare name.
            stored: the tower in the base's full weights, which is kept.
        """
        config = self.config
        config.mm_vision_tower, config.mm_vision_tower_sha256 = model_args.vision_tower, None
        config.mm_vision_select_layer = model_args.mm_vision_select_layer
        config.mm_vision_select_feature = model_args.mm_vision_select_feature
        config.mm_patch_merge_type = model_args.mm_patch_merge_type
        config.mm_image_normalization = model_args.mm_image_normalization
        config.use_mm_proj = True
        tower = self.load_vision_tower(near, stored=stored, identify=True)
        config.mm_vision_tower = lasting_name(tower.vision_tower_name)
        config.mm_vision_tower_sha256 = tower.digest
        self.initialize_projector(model_args, tower.hidden_size)

    def initialize_projector(self, model_args: Any, width: int) -> None:
        """Make a projector for features of a width, or keep that of the base.

        Raises:
            FlagError: that of the base is of another kind than `--mm_projector_type`, or takes another width.
        """
        config = self.config
        if self.mm_projector is not None and getattr(config, "mm_hidden_size", width) != width:
            raise FlagError(
                f"--vision_tower {model_args.vision_tower} is {width} wide, but the projector of the base "
                f"model takes {config.mm_hidden_size}; use the tower that the base was trained with"
            )
        config.mm_hidden_size = width
        if self.mm_projector is None:
            config.mm_projector_type = model_args.mm_projector_type
            self.mm_projector = build_vision_projector(config)
            self.has_new_projector = True
        elif config.mm_projector_type != model_args.mm_projector_type:
            raise FlagError(
                f"--mm_projector_type is '{model_args.mm_projector_type}', but the base model has a "
                f"'{config.mm_projector_type}' projector; give that value"
            )
        self._init_newline()

    def _init_newline(self) -> None:
        """Create the vector that ends a row of tiles, or remove one that this way of merging does not use."""
        if "unpad" not in self.config.mm_patch_merge_type:
            if hasattr(self, "image_newline"):
                del self.image_newline
        elif not hasattr(self, "image_newline"):
            width = self.config.hidden_size
            self.image_newline = nn.Parameter(torch.randn(width) / width**0.5)
            self.has_new_projector = True  # a frozen one is written too, as nobody else has it


class LlavaMetaForCausalLM:
    """Turns ids and images into the embeddings that the decoder reads."""

    config: Any
    extensions: ExtensionSet

    def get_model(self) -> Any:
        """The decoder, with tower and projector."""
        raise TypeError(f"{type(self).__name__} must define get_model()")

    def get_vision_tower(self) -> VisionTower | None:
        """The tower, or None for a model without vision."""
        return self.get_model().get_vision_tower()

    def encode_images(self, images: Tensor) -> Tensor:
        """Project images into the language model's width.

        Args:
            images: (N, 3, height, width).

        Returns:
            (N, P, D).
        """
        model = self.get_model()
        features = model.get_vision_tower()(images)  # (N, P, D_vision)
        return model.mm_projector(features)  # (N, P, D)

    def image_features(self, images: Images, image_sizes: Sequence[tuple[int, int]] | None = None) -> list[Tensor]:
        """Features of every image, tiles merged.

        Args:
            images: see `Images`.
            image_sizes: width and height in pixels of each image; needed by the spatial merge types.

        Returns:
            One (P_i, D) per image.
        """
        if isinstance(images, Tensor) and images.ndim == 4:
            return list(self.encode_images(images))
        stacks = [image[None] if image.ndim == 3 else image for image in images]
        encoded = self.encode_images(torch.cat(list(stacks))).split([len(stack) for stack in stacks])
        merge_type = getattr(self.config, "mm_patch_merge_type", "flat")
        newline = getattr(self.get_model(), "image_newline", None)
        merged = []
        for index, features in enumerate(encoded):
            size = None if image_sizes is None else tuple(image_sizes[index])
            merged.append(merge_tiles(features, merge_type, self._tile_grid(size), size, newline))
        return merged

    def encoded_images(
        self,
        images: Images,
        image_sizes: Sequence[tuple[int, int]] | None,
        texts: Callable[[], list[Tensor]],
    ) -> EncodedImages:
        """The images for extensions that look at them, encoded and not yet projected.

        Args:
            images: see `Images`.
            image_sizes: see `image_features`.
            texts: see `EncodedImages`.
        """
        model, block_inputs = self.get_model(), {}
        stacks = [image[None] if image.ndim == 3 else image for image in images]
        pixels = torch.cat(list(stacks))  # (N, 3, height, width)
        features = model.get_vision_tower()(pixels, block_inputs=block_inputs)  # (N, P, D_vision)
        numbers = torch.arange(features.shape[0] * features.shape[1], device=features.device).view(len(features), -1, 1)
        sources = numbers.split([len(stack) for stack in stacks])
        newline = getattr(model, "image_newline", None)
        layouts: list[Any] = [None] * len(stacks)
        if not (isinstance(images, Tensor) and images.ndim == 4):
            # Numbers take the way of features: whatever merging does, it is known where each of them went.
            line_end = None if newline is None else torch.tensor([LINE_END], device=features.device)
            merge_type = getattr(self.config, "mm_patch_merge_type", "flat")
            sizes = [None] * len(stacks) if image_sizes is None else [tuple(size) for size in image_sizes]
            grids = [
                self._tile_grid(size) if len(stack) > 1 else None for stack, size in zip(stacks, sizes, strict=True)
            ]
            layouts = [None if grid is None else (grid, size) for grid, size in zip(grids, sizes, strict=True)]
            sources = [
                merge_tiles(each, merge_type, self._tile_grid(size), size, line_end)
                for each, size in zip(sources, sizes, strict=True)
            ]
        return EncodedImages(
            pixels=pixels,
            tiles=tuple(len(stack) for stack in stacks),
            tower_features=features,
            sources=[each.flatten() for each in sources],
            tower=model.get_vision_tower(),
            block_inputs=block_inputs,
            projector=model.mm_projector,
            newline=newline,
            layouts=layouts,
            texts=texts,
            notes=[{} for _ in stacks],
        )

    def _tile_grid(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """Tiles across and down of an `anyres` image; None for any other aspect setting."""
        if getattr(self.config, "image_aspect_ratio", None) != "anyres" or size is None:
            return None
        tower = self.get_vision_tower()
        return get_anyres_image_grid_shape(size, self.config.image_grid_pinpoints, tower.image_size)

    def image_lengths(self, images: Images, image_sizes: Sequence[tuple[int, int]] | None = None) -> list[int]:
        """Positions that each image will take in the sequence; arguments as of `image_features`."""
        length = self.image_length()
        if image_sizes is None:
            image_sizes = [(1, 1)] * len(images)
        return [length(image, tuple(size)) for image, size in zip(images, image_sizes, strict=True)]

    def image_length(self) -> ImageLength:
        """What says how many positions an image takes; knows the configuration and no weights."""
        tower = self.get_vision_tower()
        anyres = getattr(self.config, "image_aspect_ratio", None) == "anyres"
        return ImageLength(
            features=tower.num_features,
            merge_type=getattr(self.config, "mm_patch_merge_type", "flat"),
            resolutions=self.config.image_grid_pinpoints if anyres else None,
            tile_size=tower.image_size,
        )

    def splice_options(self) -> SpliceOptions:
        """Lengths and sides as the configuration has them."""
        return SpliceOptions.of_config(self.config)

    def splice_planner(self, packing: bool = False) -> SplicePlanner:
        """What plans the batches of this model where they are collated; see `DataCollatorForSupervisedDataset`.

        Args:
            packing: put several samples into a row; without a loss nothing reads such rows.
        """
        length = None if self.get_vision_tower() is None else self.image_length()
        return SplicePlanner(self.config, length, packing)

    def build_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Images | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        padding_side: str | None = None,
        plan: SplicePlan | None = None,
        extensions: ExtensionSet | None = None,
    ) -> MultimodalInputs:
        """Embeddings, labels, masks and segments of a batch, before any extension has seen them.

        Args:
            input_ids: (B, T) with image tokens.
            attention_mask: (B, T), zero at padding, or None.
            labels: (B, T) or None.
            images: images in row order, or None.
            image_sizes: see `image_features`.
            padding_side: overrides the configuration; generation pads on the left.
            plan: of the batch, made where it was collated; the ids are then not looked at.
            extensions: that look at the images; None: those of the model.

        Raises:
            ValueError: images and image tokens do not match in number, or the plan is of another batch or of a model
                with other settings.
        """
        features = notes = None
        extensions = self.extensions if extensions is None else extensions
        if images is not None and self.get_vision_tower() is not None:
            if extensions.sees_images:
                texts = functools.partial(texts_behind_images, input_ids, attention_mask, IMAGE_TOKEN_INDEX)
                encoded = self.encoded_images(images, image_sizes, texts)
                extensions.on_images(self, encoded)  # type: ignore[arg-type]
                features, notes = encoded.finished(), encoded.notes
            else:
                features = self.image_features(images, image_sizes)
        options = self.splice_options()
        if plan is not None:
            check_plan(plan, input_ids, options)
            inputs = carry_out(plan.to(input_ids.device), features, self.get_model().embed_tokens)
            return replace(inputs, labels=None if labels is None else inputs.labels, image_notes=notes)
        options = replace(options, padding_side=options.padding_side if padding_side is None else padding_side)
        inputs = splice(input_ids, labels, attention_mask, features, self.get_model().embed_tokens, options)
        return replace(inputs, image_notes=notes)

    @takes_cache
    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: Any,
        labels: Tensor | None,
        images: Images | None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Any, Tensor | None, Tensor | None]:
        """Upstream's entry point with upstream's return value, for code written against it.

        Returns:
            (input_ids or None, position_ids, attention_mask, cache, inputs_embeds or None, labels); mask
            and positions are None where None was given, the mask keeps its dtype.
        """
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, cache, None, labels
        inputs = self.build_inputs(input_ids, attention_mask, labels, images, image_sizes)
        mask = None if attention_mask is None else inputs.attention_mask.to(attention_mask.dtype)
        positions = None if position_ids is None else inputs.position_ids
        return None, positions, mask, cache, inputs.inputs_embeds, inputs.labels
