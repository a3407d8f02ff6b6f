"""An image cut into exactly as many cells as tokens are to stay, each patch in one of them.

The cells are bands of rows, as many as make the cells about square, and each band is cut into columns. Where the
wanted number is a product of the two, this is a lattice (64 cells of 24 x 24 patches are 8 x 8 of 3 x 3); where it is
not, some bands have one column more, evenly spread over the image (128 cells: 11 bands of 11 or 12 columns). Edges are
rounded down, so cells differ by a patch where they cannot be equal, and never overlap.

An earlier rule may have left holes. Cells without patches are then given up, and the ones with the most patches halved
until the number is right.

Shape letters: n tokens that are judged.
"""

from __future__ import annotations

import math

from torch import Tensor


def cells(places: Tensor, count: int) -> Tensor:
    """The cell (n,) int64 of each patch, from 0 to `count` - 1, each at least once, on the CPU.

    Args:
        places: (n, 2) row and column of each patch within its tile.
        count: at most n.
    """
    corner = places.cpu().round().long()
    corner = corner - corner.amin(dim=0)
    height, width = (int(corner[:, axis].max()) + 1 for axis in (0, 1))
    wanted = min(count, height * width)
    bands = _bands(height, width, wanted)

    # Band i has the rows from i * height // bands on, and its cells are numbered from i * wanted // bands on.
    band = ((corner[:, 0] + 1) * bands - 1) // height  # (n,)
    first = band * wanted // bands
    columns = (band + 1) * wanted // bands - first
    cell = first + ((corner[:, 1] + 1) * columns - 1) // width

    filled = cell.bincount() > 0
    cell = (filled.cumsum(dim=0) - 1)[cell]  # numbered without gaps
    for number in range(int(filled.sum()), count):
        cell = _halve_largest(corner, cell, number)
    return cell


def _bands(height: int, width: int, count: int) -> int:
    """Bands of rows that make `count` cells about square, no band with more cells than columns."""
    return max(-(-count // width), min(height, count, round(math.sqrt(count * height / width))))


def _halve_largest(corner: Tensor, cell: Tensor, number: int) -> Tensor:
    """Give half of the cell with the most patches the number `number`: the lower or right half of its longer side."""
    members = (cell == cell.bincount().argmax()).nonzero().flatten()  # the first of equal ones
    inside = corner[members]
    longer = 0 if bool(inside[:, 0].max() - inside[:, 0].min() >= inside[:, 1].max() - inside[:, 1].min()) else 1
    order = inside[:, longer].sort(stable=True).indices
    cell = cell.clone()
    cell[members[order[(len(members) + 1) // 2 :]]] = number
    return cell


def central(places: Tensor, cell: Tensor) -> Tensor:
    """The patch of each cell (count,) int64 that is nearest to the middle of its patches, of equal ones the first.

    Args:
        places: (n, 2) as for `cells`.
        cell: (n,) on the CPU.
    """
    # Distances times the size of the cell are whole numbers: equal ones compare as equal.
    corner = places.cpu().round().long()
    size = cell.bincount()  # (count,)
    total = corner.new_zeros(len(size), 2).index_add_(0, cell, corner)
    distance = (corner * size[cell, None] - total[cell]).square().sum(dim=1)  # (n,)

    order = distance.sort(stable=True).indices
    order = order[cell[order].sort(stable=True).indices]  # by cell, then by distance, then by index
    return order[size.cumsum(0) - size]
