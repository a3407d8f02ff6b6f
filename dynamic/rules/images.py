"""What rules see of images in front of the decoder, and what becomes of their choices.

The tokens of an image are its patches: a class token that the tower hands over stays, and the vector behind a line of
tiles stays as long as one of its patches does. Places are counted in the image as the model would have spliced it in
whole, so positions, segments and padding are not touched here.

Shape letters: n tokens that are judged, P positions of an image, D width of the language model, D_vision of the tower,
C width of a head, T tokens of a text.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dynamic.rules.plan import Stage
from dynamic.rules.regions import Region, tile_regions
from dynamic.rules.rule import ImageRule
from dynamic.rules.selection import Selection
from llava.encoded_images import LINE_END, EncodedImages


class Batch:
    """What all views of one batch share; each thing is computed once, when the first rule asks for it.

    Args:
        encoded: the images.
        embed: embedding table of the language model.
    """

    def __init__(self, encoded: EncodedImages, embed: nn.Module) -> None:
        tower = encoded.tower
        self.encoded, self.embed = encoded, embed
        self.first = tower.num_features - tower.num_patches  # 1 where the class token is handed over

    @functools.cached_property
    def received(self) -> Tensor:
        """(N, patches), see `ImageView`."""
        return self.encoded.attention_received(-1)

    @functools.cached_property
    def received_early(self) -> Tensor:
        """(N, patches), see `ImageView`."""
        return self.encoded.attention_received(0)

    @functools.cached_property
    def keys(self) -> Tensor:
        """(N, patches, C), see `ImageView`."""
        return self.encoded.keys(-1)

    @functools.cached_property
    def texts(self) -> list[Tensor]:
        """(T,) ids of each image."""
        return self.encoded.texts()


class View:
    """An image, or a tile of it, or what earlier rules have left of it; see `rule.ImageView`.

    Args:
        batch: of the image.
        image: its number in the batch.
        rows: (n,) int64, where its tokens are in the flattened features of the tower.
        tower: (n, D_vision).
        projected: (n, D), or None before anything is merged behind the projector.
    """

    def __init__(self, batch: Batch, image: int, rows: Tensor, tower: Tensor, projected: Tensor | None) -> None:
        self.batch, self.image, self.rows, self.tower, self._projected = batch, image, rows, tower, projected

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches of a tile."""
        side = self.batch.encoded.tower.num_patches_per_side
        return side, side

    @property
    def tile(self) -> Tensor:
        """(n,) int64: the tile of each token, counted in the batch."""
        return self.rows // self.batch.encoded.tower_features.shape[1]

    @property
    def patch(self) -> Tensor:
        """(n,) int64: which patch of its tile each token is."""
        return self.rows % self.batch.encoded.tower_features.shape[1] - self.batch.first

    @property
    def places(self) -> Tensor:
        """(n, 2) float32: row and column within its tile."""
        columns = self.grid[1]
        return torch.stack([self.patch // columns, self.patch % columns], dim=1).float()

    @property
    def region(self) -> Region | None:
        """What the tile shows of its image, see `rule.ImageView`."""
        encoded, tiles = self.batch.encoded, self.tile.unique().tolist()
        layout = encoded.layouts[self.image]
        if layout is None or len(tiles) != 1:
            return None
        first = sum(encoded.tiles[: self.image])
        return tile_regions(layout[0], encoded.tower.image_size, layout[1])[tiles[0] - first]

    @property
    def projected(self) -> Tensor:
        """(n, D)."""
        if self._projected is None:
            self._projected = self.batch.encoded.projector(self.tower)
        return self._projected

    @property
    def received(self) -> Tensor:
        """(n,)."""
        return self.batch.received[self.tile, self.patch]

    @property
    def received_early(self) -> Tensor:
        """(n,)."""
        return self.batch.received_early[self.tile, self.patch]

    @property
    def keys(self) -> Tensor:
        """(n, C)."""
        return self.batch.keys[self.tile, self.patch]

    @property
    def question(self) -> Tensor:
        """(T, D)."""
        ids = self.batch.texts[self.image]
        return self.batch.embed(ids.to(self.tower.device))

    def digest(self) -> int:
        """A number made of the pixels."""
        encoded = self.batch.encoded
        start = sum(encoded.tiles[: self.image])
        pixels = encoded.pixels[start : start + encoded.tiles[self.image]].float().cpu().contiguous()
        return int.from_bytes(hashlib.sha256(pixels.numpy().tobytes()).digest()[:8], "big")

    def part(self, chosen: Tensor) -> View:
        """The tokens `chosen` (n,) alone."""
        projected = None if self._projected is None else self._projected[chosen]
        return View(self.batch, self.image, self.rows[chosen], self.tower[chosen], projected)

    def merged(self, selection: Selection, rule: ImageRule) -> View:
        """What a rule leaves: its kept tokens, with what is merged into them."""
        left = self.part(selection.kept)
        if selection.merge is None:
            return left
        if rule.place == "tower":
            left.tower = (selection.merge @ self.tower.float()).to(self.tower.dtype)  # (n, D_vision)
            left._projected = None
        else:
            left._projected = (selection.merge @ self.projected.float()).to(self.projected.dtype)  # (n, D)
        return left


@dataclass(frozen=True)
class Reduced:
    """An image after all rules in front of the decoder.

    Attributes:
        view: the tokens that are left, ascending.
        kept: (n,) int64 positions of the image that stay, class token and line ends included, ascending.
        counts: tokens in front of the first rule, and after each.
    """

    view: View
    kept: Tensor
    counts: tuple[int, ...]


def reduce_image(batch: Batch, image: int, stages: Sequence[Stage], depth: int) -> Reduced:
    """Run the rules on one image, one after another; shares are of the image as it was in front of all of them.

    Args:
        batch: of the image.
        image: its number in the batch.
        stages: in front of the decoder.
        depth: layers of the decoder.
    """
    source = batch.encoded.sources[image]
    patches = source % batch.encoded.tower_features.shape[1] >= batch.first
    places = (patches & (source != LINE_END)).nonzero().flatten()  # (n,) positions of the patches
    rows = source[places]
    tower = batch.encoded.tower_features.flatten(0, 1)[rows]  # (n, D_vision)
    view, total, counts = View(batch, image, rows, tower, None), len(rows), [len(rows)]
    for stage in stages:
        rule = cast(ImageRule, stage.rule)
        wanted = min(stage.counts(total, depth)[0], len(view.rows))
        selection = _select(rule, view, wanted).ascending()
        selection.check(len(view.rows), wanted, rule.name)
        view, places = view.merged(selection, rule), places[selection.kept]
        counts.append(len(places))
    return Reduced(view, _with_line_ends(source, places, batch), tuple(counts))


def everything(count: int, device: torch.device) -> Selection:
    """All of `count` tokens."""
    return Selection(torch.arange(count, device=device))


def _select(rule: ImageRule, view: View, keep: int) -> Selection:
    """What a rule keeps of an image, tile by tile if it looks at tiles; who keeps everything is not asked."""
    count = len(view.rows)
    if keep == count:
        return everything(count, view.rows.device)
    if not rule.per_tile:
        return rule.select(view, keep)
    tiles = [(view.tile == number).nonzero().flatten() for number in view.tile.unique().tolist()]
    parts = [view.part(chosen) for chosen in tiles]
    quotas = rule.quotas(parts, [len(chosen) for chosen in tiles], keep)
    kept, merges = [], []
    for chosen, part, quota in zip(tiles, parts, quotas, strict=True):
        if quota == 0:
            continue
        selection = everything(quota, chosen.device) if quota == len(chosen) else rule.select(part, quota)
        kept.append(chosen[selection.kept])
        merge = torch.eye(len(chosen), device=view.rows.device)[selection.kept]
        wide = torch.zeros(quota, count, device=view.rows.device)
        wide[:, chosen] = merge if selection.merge is None else selection.merge.to(wide)
        merges.append((selection.merge is not None, wide))
    merge = torch.cat([wide for _, wide in merges]) if any(merged for merged, _ in merges) else None
    return Selection(torch.cat(kept), merge)


def _with_line_ends(source: Tensor, places: Tensor, batch: Batch) -> Tensor:
    """Positions that stay: patches, the class token of each tile, and the ends of lines that keep a patch."""
    positions = batch.encoded.tower_features.shape[1]
    stays = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    stays[places] = True
    is_end = source == LINE_END
    alive = is_end.clone()
    if ends := is_end.nonzero().flatten().tolist():
        # The image in small comes first and has no lines of its own; alone, one end follows it.
        start = positions if len(ends) > 1 else 0
        for end in ends:
            alive[end] = bool(stays[start:end].any())
            start = end + 1
    is_class = ~is_end & (source % positions < batch.first)
    return (stays | alive | is_class).nonzero().flatten()


def place_features(batch: Batch, reduced: Sequence[Reduced]) -> list[Tensor]:
    """For each image (P, D): what is left at its places, zeros where nothing will be seen."""
    encoded, found = batch.encoded, []
    for source, each in zip(encoded.sources, reduced, strict=True):
        projected = each.view.projected  # (n, D)
        features = projected.new_zeros(len(source), projected.shape[1])
        stays = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        stays[each.kept] = True
        flat = source % encoded.tower_features.shape[1]
        is_class = stays & (source != LINE_END) & (flat < batch.first)
        is_patch = stays & (source != LINE_END) & ~is_class
        features[is_patch] = projected
        if bool(is_class.any()):
            features[is_class] = encoded.projector(encoded.tower_features.flatten(0, 1)[source[is_class]])
        found.append(encoded.placed(source, features))
    return found
