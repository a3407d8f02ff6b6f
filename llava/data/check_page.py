"""The page of `llava.data.check`: problems, lengths, and sample prompts with the trained tokens highlighted.

One HTML file with everything inside, small copies of the images included; it needs no network and runs no script.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.image_names import RowImage, StoredImage, image_names
from llava.data.inspection import RowReport, RowReports, Settings, thumbnail
from llava.data.kinds import EXPLANATIONS, Kind
from llava.data.rows import Row
from llava.data.statistics import PERCENTILES, DataSummary
from llava.errors import BadSampleError
from llava.runtime.output import replacing
from llava.runtime.recognize import refuse_foreign

THUMBNAIL_SIDE = 160  # pixels
ROWS_PER_KIND = 100
BARS = 24

STYLE = """
body { font-family: sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } td, th { padding: 3px 10px; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child, td.text { text-align: left; }
.prompt { font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f7f7; padding: 10px;
  line-height: 1.7; }
.prompt span { border-right: 1px solid #ddd; } .prompt mark { border-right: 1px solid #6bb573; }
mark { background: #b9e6bd; } .cut { text-decoration: line-through; color: #999; } .image { background: #cfe0ff; }
.bars { display: flex; align-items: flex-end; height: 120px; gap: 2px; }
.bars div { flex: 1; background: #6b8fd0; min-height: 1px; } .axis { display: flex; justify-content: space-between; }
figure { display: inline-block; margin: 4px; font-size: 12px; } h3 { margin-bottom: 4px; }
"""


PAGE_HEAD = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Data check</title>'
"""The beginning of every page, by which an earlier one is known."""


def write_page(
    path: str | os.PathLike[str], rows: RowReports, reports: Sequence[RowReport], summary: DataSummary, samples: int
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: file to write.
        rows: the rows and how they would be trained on.
        reports: the report of each row.
        summary: see `summarise`.
        samples: number of sample prompts.
    """
    refuse_foreign(Path(path), PAGE_HEAD)
    with replacing(path) as partial, partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(_page(rows, reports, summary, samples))


def _page(rows: RowReports, reports: Sequence[RowReport], summary: DataSummary, samples: int) -> Iterator[str]:
    yield PAGE_HEAD
    yield f"<style>{STYLE}</style><body>\n"
    files = ", ".join(f"{escape(path)} ({count:,} rows)" for path, count in summary.rows.items())
    yield f"<h1>Data check</h1><p>{files}; {summary.rows_with_problems:,} rows with problems; template "
    yield f"{escape(rows.settings.template.version)}, cut at {rows.settings.max_length:,} positions.</p>\n"
    yield from _problems(reports, summary)
    yield from _statistics(reports, summary)
    yield '<h2>Sample prompts</h2><p>Trained tokens are <mark>green</mark>, images <span class="image">blue</span>; '
    yield 'what is cut off is <span class="cut">struck through</span>. Each box is one token.</p>\n'
    for index in choose_samples(reports, samples):
        yield _sample(rows, index, reports[index])
    yield "</body></html>\n"


def _problems(reports: Sequence[RowReport], summary: DataSummary) -> Iterator[str]:
    yield "<h2>Problems</h2>\n"
    if not summary.problems:
        yield "<p>None.</p>\n"
    for kind, count in summary.problems.items():
        yield f"<details><summary><b>{kind}</b>: {count:,} ({escape(EXPLANATIONS[kind])})</summary>"
        if kind is Kind.ANSWER_END:
            yield f"<p>{escape(summary.answer_end or '')}</p></details>\n"
            continue
        yield "<table>"
        yield "<tr><th>row</th><th>id</th><th>message</th></tr>\n"
        found = [(report, problem) for report in reports for problem in report.problems if problem.kind is kind]
        for report, problem in found[:ROWS_PER_KIND]:
            where = escape(f"{report.file}, row {report.row}")
            yield f'<tr><td>{where}</td><td class="text">{escape(str(report.sample_id))}</td>'
            yield f'<td class="text">{escape(problem.message)}</td></tr>\n'
        yield "</table>"
        yield f"<p>and {count - ROWS_PER_KIND:,} more</p>" if count > ROWS_PER_KIND else ""
        yield "</details>\n"


def _statistics(reports: Sequence[RowReport], summary: DataSummary) -> Iterator[str]:
    yield "<h2>Lengths</h2><table><tr><th></th>"
    yield "".join(f"<th>{percentile} %</th>" for percentile in PERCENTILES) + "<th>mean</th></tr>\n"
    for name, numbers in summary.numbers.items():
        cells = "".join(f"<td>{value:,}</td>" for value in numbers.percentiles)
        yield f"<tr><td>{name}</td>{cells}<td>{numbers.mean:,.1f}</td></tr>\n"
    yield "</table>\n"
    yield _histogram([report.tokens for report in reports if report.tokens is not None], "tokens per sample")


def _histogram(values: Sequence[int], title: str) -> str:
    """Bars of equal width over the range of the values."""
    if not values:
        return ""
    low, width = min(values), max(1, -(-(max(values) - min(values) + 1) // BARS))
    counts = [0] * BARS
    for value in values:
        counts[(value - low) // width] += 1
    bars = "".join(
        f'<div style="height: {100 * count / max(counts):.0f}%" title="{low + number * width:,} to '
        f'{low + (number + 1) * width - 1:,}: {count:,} rows"></div>'
        for number, count in enumerate(counts)
    )
    axis = f'<div class="axis"><span>{low:,}</span><span>{title}</span><span>{low + BARS * width - 1:,}</span></div>'
    return f'<div class="bars">{bars}</div>{axis}\n'


def choose_samples(reports: Sequence[RowReport], count: int) -> list[int]:
    """Indices of rows with a prompt, spread evenly over the data, the shortest and the longest among them."""
    usable = [index for index, report in enumerate(reports) if report.tokens is not None]
    if len(usable) <= count:
        return usable
    if count == 0:
        return []
    by_length = sorted(usable, key=lambda index: reports[index].tokens or 0)
    chosen = {by_length[-1], by_length[0]} if count > 1 else {by_length[-1]}
    step = len(usable) / max(1, count - len(chosen))
    spread = [usable[int(number * step)] for number in range(count - len(chosen))]
    return sorted(chosen | set(spread))


def _sample(rows: RowReports, index: int, report: RowReport) -> str:
    row = rows.rows[index]
    title = escape(f"{rows.rows.name(index)} (id {report.sample_id!r})")
    images = "".join(_figure(rows.settings, name) for name in image_names(row))
    numbers = f"{report.tokens:,} positions, {report.trained:,} trained, {report.images} image(s)"
    return f"<h3>{title}</h3><p>{numbers}</p>{images}{render_prompt(row, rows.settings)}\n"


def _figure(settings: Settings, name: RowImage) -> str:
    """A small copy of an image, or why there is none."""
    caption = f"<figcaption>{escape(str(name))}</figcaption>"
    if settings.image_folder is None and not isinstance(name, StoredImage):
        return f"<figure>{caption}</figure>"
    try:
        image = thumbnail(settings.image_folder, name, THUMBNAIL_SIDE)
    except BadSampleError as error:
        return f"<figure>{escape(str(error).removeprefix(': '))}</figure>"
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<figure><img src="{source}" alt="{escape(str(name))}">{caption}</figure>'


def render_prompt(row: Row, settings: Settings) -> str:
    """The prompt as HTML, one box for each token; tokens that cover no character are left out."""
    prompt, lengths = settings.prompt(row), iter(settings.image_lengths(row))
    boxes = []
    position = 0
    for index, label, span in zip(prompt.input_ids.tolist(), prompt.labels.tolist(), prompt.spans, strict=True):
        is_image = index == IMAGE_TOKEN_INDEX
        classes = "image " * is_image + "cut" * (position >= settings.max_length)
        position += next(lengths) if is_image else 1
        if span.start == span.end:
            continue
        tag = "span" if label == IGNORE_INDEX else "mark"
        text = escape(prompt.prompt[span.start : span.end]).replace("\n", "\u21b5\n")
        boxes.append(f'<{tag} class="{classes.strip()}" title="{index}">{text}</{tag}>')
    return f'<div class="prompt">{"".join(boxes)}</div>'
