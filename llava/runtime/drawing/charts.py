"""Stacked bars of shares as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

PALETTE = ("#2f6db5", "#d9822b", "#4c9a57", "#a14ba0", "#8a6d3b", "#c0392b", "#16818a", "#7f8c8d")


def share_bars(shares: Mapping[str, Sequence[float]], *, width: int = 420, bar: int = 18) -> str:
    """One horizontal bar per row, cut by the shares, which add up to 1.

    Args:
        shares: share of each expert by the name of the row.
        width: of the image in pixels.
        bar: height of a bar in pixels.
    """
    left, gap = 110, 6
    height = len(shares) * (bar + gap) + gap
    parts = [svg_head(width, height)]
    for row, (name, values) in enumerate(shares.items()):
        y = gap + row * (bar + gap)
        parts.append(f'<text x="{left - 6}" y="{y + bar - 5}" text-anchor="end">{escape(name)}</text>')
        x = float(left)
        for expert, value in enumerate(values):
            span = value * (width - left - 4)
            colour = PALETTE[expert % len(PALETTE)]
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{span:.1f}" height="{bar}" fill="{colour}"/>')
            if span > 30:
                at = f'x="{x + span / 2:.1f}" y="{y + bar - 5}"'
                parts.append(f'<text {at} text-anchor="middle" fill="#fff">{100 * value:.0f} %</text>')
            x += span
    return "".join([*parts, "</svg>"])


def svg_head(width: int, height: int) -> str:
    """The opening tag of an image of that many pixels."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">'
    )
