"""Charts as inline SVG: a line chart of losses and stacked bars of expert shares. No plotting library is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from llava.runtime.drawing.charts import PALETTE, share_bars, svg_head

__all__ = ["line_chart", "share_bars"]

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], *, x_label: str, width: int = 420, height: int = 220) -> str:
    """One line per series over common axes, the vertical one from 0.

    Args:
        series: points (x, y) by name, in order of x.
        x_label: what x counts.
        width: of the image in pixels.
        height: of the image in pixels.
    """
    left, right, top, bottom = 42, 12, 12, 40
    points = [point for line in series.values() for point in line]
    if not points:
        return "<p>nothing was logged</p>"
    x_max = max(x for x, _ in points) or 1.0
    y_max = max(y for _, y in points) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + x / x_max * (width - left - right),
            height - bottom - y / y_max * (height - top - bottom),
        )

    parts = [svg_head(width, height)]
    for tick in range(5):
        value = y_max * tick / 4
        _, y = place(0, value)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    parts.append(f'<text x="{left}" y="{height - bottom + 14}">0</text>')
    parts.append(f'<text x="{width - right}" y="{height - bottom + 14}" text-anchor="end">{x_max:g}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - bottom + 14}" text-anchor="middle">{escape(x_label)}</text>')
    for index, (name, line) in enumerate(series.items()):
        colour = PALETTE[index % len(PALETTE)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        x = left + index * 130
        parts.append(f'<rect x="{x}" y="{height - 14}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="{height - 5}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])
