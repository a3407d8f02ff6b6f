"""The report page of the demo: one HTML file with everything inside, to be opened without a network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from dynamic.figures import fade_dropped
from llava.eval.answering.questions import Question
from llava.eval.score import Score, normalize
from playground.charts import line_chart, share_bars
from playground.evaluate import Result
from playground.generate import PRETRAINED, Playground
from playground.recipe import write_atomically
from playground.sparse import Example, SparseRun
from playground.stages import TOWER_LOG

EXAMPLES_PER_FAMILY = 4

STYLE = """
body { font-family: sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222; }
h2 { margin-top: 2em; } table { border-collapse: collapse; } .charts { display: flex; flex-wrap: wrap; gap: 16px; }
td, th { padding: 3px 10px; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr.all td { font-weight: bold; }
figure { display: inline-block; width: 210px; margin: 6px; vertical-align: top; font-size: 13px; }
figure img { width: 144px; height: 144px; image-rendering: pixelated; display: block; }
.right { color: #2e7d32; } .wrong { color: #b3261e; } figcaption { margin-top: 4px; } .none { color: #777; }
"""


@dataclass(frozen=True)
class Measurement:
    """One question file answered before and after fine-tuning."""

    before: Result
    after: Result

    def by_family(self) -> dict[str, tuple[Score, Score]]:
        """Scores before and after of each family, and under `all`."""
        return {family: (score, self.after.scores[family]) for family, score in self.before.scores.items()}

    @property
    def rise(self) -> float:
        """Points of accuracy gained over all questions."""
        return 100 * (self.after.accuracy - self.before.accuracy)


@dataclass(frozen=True)
class DemoRun:
    """Everything that a demo has found out.

    Attributes:
        place: the playground it ran in.
        tuned: the fine-tuned checkpoint.
        new: scores on the new families.
        base: scores on the base families.
        trained: number of parameters in each file of weights of `tuned`.
        base_parameters: parameters of the base, the tower not counted.
        expert_shares: by family and decoder layer, the mean probability of each expert.
        sparse: the base with predictors, against the base.
        seconds: time of each part.
    """

    place: Playground
    tuned: Path
    new: Measurement
    base: Measurement
    trained: dict[str, int]
    base_parameters: int
    expert_shares: dict[str, list[list[float]]]
    sparse: SparseRun
    seconds: dict[str, float]


def write_report(path: Path, run: DemoRun) -> Path:
    """Write the page; returns its absolute path."""
    body = "\n".join([*_summary(run), *_losses(run), *_routing(run), *_examples(run), *_sparse(run.sparse)])
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>llava-extensions: demo</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
    write_atomically(path, page)
    return path.resolve()


def _summary(run: DemoRun) -> Iterator[str]:
    yield "<h1>Fine-tuning a small LLaVA with HydraLoRA</h1>"
    yield (
        f"<p>Seed {run.place.recipe.seed}. {sum(run.trained.values()):,} trained parameters on top of a base of "
        f"{run.base_parameters:,}. An answer counts as right if it equals the label (white space, one full stop and "
        "case aside); in parentheses the 95 % interval. The questions and images occur in no training data.</p>"
    )
    yield "<h2>Task families that the base has not seen</h2>"
    yield _score_table(run.new)
    yield "<h2>Task families of the base</h2><p>What fine-tuning on other families makes the model forget.</p>"
    yield _score_table(run.base)
    yield "<h2>Trained parameters and time</h2><table><tr><th>file</th><th>parameters</th></tr>"
    yield from (f"<tr><td>{escape(name)}</td><td>{count:,}</td></tr>" for name, count in run.trained.items())
    yield "</table><p></p><table><tr><th>part</th><th>seconds</th></tr>"
    yield from (f"<tr><td>{escape(name)}</td><td>{value:.1f}</td></tr>" for name, value in run.seconds.items())
    yield "</table>"


def _score_table(measurement: Measurement, headings: Sequence[str] = ("before", "after", "rise")) -> str:
    cells = "".join(f"<th>{heading}</th>" for heading in ("family", "questions", *headings))
    rows = [f"<tr>{cells}</tr>"]
    for family, (before, after) in measurement.by_family().items():
        rise = 100 * (after.accuracy - before.accuracy)
        rows.append(
            f'<tr class="{escape(family)}"><td>{escape(family)}</td><td>{before.n}</td><td>{_percent(before)}</td>'
            f"<td>{_percent(after)}</td><td>{rise:+.1f}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _percent(score: Score) -> str:
    return f"{100 * score.accuracy:.1f} % ({100 * score.low:.0f}-{100 * score.high:.0f})"


def _losses(run: DemoRun) -> Iterator[str]:
    logs = {
        "stage 1: tower": run.place.checkpoints / TOWER_LOG,
        "stage 2: projector": run.place.checkpoints / PRETRAINED / "trainer_state.json",
        "stage 3: full": run.place.base / "trainer_state.json",
        "fine-tuning": run.tuned / "trainer_state.json",
        "predictors": run.sparse.tuned / "trainer_state.json",
    }
    yield '<h2>Losses</h2><div class="charts">'
    for title, path in logs.items():
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        names = sorted({name for entry in history for name in entry if name.startswith("loss/")}, reverse=True)
        series = {name: [(e["step"], e[name]) for e in history if name in e] for name in names}
        yield f"<div><h3>{escape(title)}</h3>{line_chart(series, x_label='updates')}</div>"
    yield "</div>"


def _routing(run: DemoRun) -> Iterator[str]:
    yield "<h2>Experts by task family</h2><p>Mean router probability over all prompt tokens, by decoder layer.</p>"
    yield '<div class="charts">'
    layers = max((len(value) for value in run.expert_shares.values()), default=0)
    for layer in range(layers):
        shares = {family: value[layer] for family, value in run.expert_shares.items()}
        yield f"<div><h3>layer {layer}</h3>{share_bars(shares)}</div>"
    yield "</div>"


def _examples(run: DemoRun) -> Iterator[str]:
    yield "<h2>Examples</h2>"
    shown: dict[str, int] = {}
    for question in run.new.before.questions:
        count = shown.get(question.category, 0)
        if count == EXAMPLES_PER_FAMILY:
            continue
        if count == 0:
            yield f"<h3>{escape(question.category)}</h3>"
        shown[question.category] = count + 1
        yield _example(run, question)


def _example(run: DemoRun, question: Question) -> str:
    image = '<p class="none">(no image)</p>'
    if question.images:
        data = base64.b64encode((run.place.images / question.images[0]).read_bytes()).decode("ascii")
        image = f'<img alt="{escape(question.images[0])}" src="data:image/png;base64,{data}">'
    answers = [
        f"{when}: {_marked(result.answers[question.question_id], question.label or '')}"
        for when, result in (("before", run.new.before), ("after", run.new.after))
    ]
    return f"<figure>{image}<figcaption>{escape(question.text)}<br>{'<br>'.join(answers)}</figcaption></figure>"


def _sparse(run: SparseRun) -> Iterator[str]:
    yield "<h1>The same base with predictors that drop image tokens</h1>"
    yield (
        f"<p>Trained for {run.updates} updates more than the base, on the same conversations. Of the nine patches of "
        f"an image {100 * run.patches_kept:.0f} % are kept, of those that show something "
        f"{100 * run.things_kept:.0f} %: text has looked at all of them in the layer below, so a kept patch need not "
        "show anything. An image is nine tokens here and 576 in LLaVA-1.5, so little is saved, and the time says what "
        "the predictor costs.</p>"
    )
    headings = ("dense", "sparse", "difference")
    yield _score_table(Measurement(run.dense_result, run.sparse_result), headings)
    dense, sparse = run.dense_cost, run.sparse_cost
    yield (
        "<p></p><table><tr><th>a batch of prompts</th><th>dense</th><th>sparse</th><th>dense / sparse</th></tr>"
        f"<tr><td>prefill, ms</td><td>{dense.milliseconds:.1f}</td><td>{sparse.milliseconds:.1f}</td>"
        f"<td>{run.speedup:.2f}</td></tr>"
        "<tr><td>key-value cache without free slots, bytes</td>"
        f"<td>{dense.cache_bytes:,}</td><td>{sparse.cache_bytes:,}</td>"
        f"<td>{run.cache_ratio:.2f}</td></tr></table>"
    )
    yield "<h2>Kept patches</h2><p>Dropped ones are faded.</p>"
    yield from (_kept(one) for one in run.examples)


def _kept(one: Example) -> str:
    buffer = io.BytesIO()
    fade_dropped(one.image).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    answer = _marked(one.answer, one.question.label or "")
    return (
        f'<figure><img class="kept" alt="kept patches" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(one.image.caption)}<br>{escape(one.question.text)}<br>{answer}</figcaption></figure>"
    )


def _marked(answer: str, label: str) -> str:
    if normalize(answer) == normalize(label):
        return f'<span class="right">{escape(answer)}</span>'
    return f'<span class="wrong">{escape(answer) or "(nothing)"}</span> (right: {escape(label)})'
