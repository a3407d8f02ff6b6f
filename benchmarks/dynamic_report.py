"""The table and the plot of `benchmarks/dynamic.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.runtime.output import replacing

MIB = 2**20


def document(record: Mapping[str, Any]) -> str:
    """The Markdown file of a record."""
    # All numbers come from the JSON file, so a page can be written again without measuring.
    size, where, settings = record["size"], record["machine"], record["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    device = where["gpu"] or f"{where['cpu']}, {settings['threads']} thread(s)"
    predictors = record["predictors"]
    times = "computing time of the process" if settings["clock"] == "process" else "wall-clock time"
    answer, training = record["answer"], record["training"]
    model = (
        f"A decoder of {size['layers']} layers of width {size['width']} with {size['patches']} image tokens; keep rate "
        f"{predictors['vision_keep_rate']}, sparse layer {predictors['sparse_layer']}, predictors of width "
        f"{predictors['d_model']}."
    )
    # The command stands above the table: what is not in it is a default.
    lines = [
        f"# Dense against sparse: {device}",
        "",
        f"{record['date'][:10]}; {versions}; {settings['dtype']}; {times}, median of {settings['repeats']} rounds.",
        model,
        "",
        "```console",
        f"$ {record['command']}",
        "```",
        "",
        "| | dense | sparse | dense / sparse | lowest, highest | ideal |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for entry in record["prefill"]:
        lines.append(_line(f"prefill, batch {entry['batch']} (ms)", entry, entry["milliseconds"]))
    # With a cache the sparse model saves attention alone, without one every layer's work: two different claims.
    with_cache, without = answer["with_cache"], answer["without_cache"]
    lines.append(_line("decoding with cache (ms per token)", with_cache, with_cache["milliseconds_per_token"]))
    for entry in record["decoding"]:
        name = f"decoding with cache, batch {entry['batch']}, {entry['tokens']} tokens (ms per token of all)"
        lines.append(_line(name, entry, entry["milliseconds"]))
    lines.append(_line("last steps without cache (ms)", without, without["milliseconds"]))
    # Bytes have no spread: they are counted, not timed.
    cache = answer["cache"]
    dense, sparse = cache["curve"]["dense"][-1], cache["curve"]["sparse"][-1]
    lines.append(
        f"| cache after {answer['tokens']} tokens (MiB) | {dense / MIB:.1f} | {sparse / MIB:.1f} "
        f"| {dense / sparse:.2f} | | {1 / cache['ideal']:.2f} |"
    )
    # What a reader needs to judge the table: the real keep rate of the random text, and what `ideal` means.
    kept = (
        f"Of the fed tokens {answer['kept_share']:.0%} were kept; the cache holds {cache['over_kept_tokens']:+.1%} "
        "beyond the bytes of its kept tokens, slots for the next ones. Ideal: operations of the dense model over those "
        "of the sparse one with its predictors; for the cache, tokens. Parts other than prefill are timed in half as "
        "many rounds, decoding in batches in a round for each token."
    )
    step = (
        f"Training step over {training['length']} positions, attention as a matrix against linear memory: "
        f"{training['speedup']:.2f} times as fast ({training['lowest']:.2f} to {training['highest']:.2f}); kept for "
        f"backward {_against(training['saved_bytes'])}."
    )
    lines += ["", kept, "", step]
    return "\n".join(lines) + "\n"


def _line(name: str, entry: Mapping[str, Any], times: Mapping[str, float]) -> str:
    ideal = f"{entry['ideal']:.2f}" if "ideal" in entry else ""
    return (
        f"| {name} | {times['dense']:.1f} | {times['sparse']:.1f} | {entry['speedup']:.2f} | {entry['lowest']:.2f}, "
        f"{entry['highest']:.2f} | {ideal} |"
    )


def _against(values: Mapping[str, int]) -> str:
    eager, other = values.values()
    return f"{eager / MIB:.0f} MiB against {other / MIB:.0f} MiB"


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Speed-ups beside the ideal ones, and the cache over the tokens of an answer, as a PNG."""
    from matplotlib.figure import Figure

    answer = record["answer"]
    entries = [(f"prefill\nbatch {entry['batch']}", entry) for entry in record["prefill"]]
    entries += [("decoding\nwith cache", answer["with_cache"]), ("decoding\nno cache", answer["without_cache"])]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    bars, curve = figure.subplots(1, 2)
    places = range(len(entries))
    bars.bar([place - 0.2 for place in places], [entry["speedup"] for _, entry in entries], 0.4, label="measured")
    bars.bar([place + 0.2 for place in places], [entry["ideal"] for _, entry in entries], 0.4, label="from FLOPs")
    bars.set_xticks(list(places), [name for name, _ in entries], fontsize=8)
    bars.axhline(1, color="grey", linewidth=0.8)
    bars.set_ylabel("time of dense / sparse")
    bars.margins(y=0.18)  # room for the legend
    bars.legend(frameon=False, ncols=2, loc="upper center")
    points = answer["cache"]["curve"]
    for name in ("dense", "sparse"):
        curve.plot(points["tokens"], [value / MIB for value in points[name]], marker=".", label=name)
    curve.set_xlabel("tokens of the answer")
    curve.set_ylabel("key-value cache (MiB)")
    curve.set_ylim(bottom=0)
    curve.legend(frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)
