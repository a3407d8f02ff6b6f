"""The model card of a publication: base, method, data, options, scores and license, from the files of the run.

What the files do not say is not in the card. The metadata is huggingface_hub's own `ModelCardData`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llava.runtime.files import read_json
from llava.runtime.publishing.access import HUB_ERRORS, Destination, hub_api
from llava.runtime.publishing.staging import ADAPTER_CONFIG, BASE_KEY, find_run_record, hub_base, published_record
from llava.runtime.unchanged import FINGERPRINTS, flat, hub_sources
from llava.runtime.weights.run_file import GIVEN, latest

CARD = "README.md"
MARK = "<!-- Written by llava-extensions. Delete this line to keep your own card when the model is published again. -->"
EVALUATION_PREFIX = "eval_"
EVALUATION_FILE = "eval_results.json"
DATA_OPTIONS = ("data_path", "train_file", "dataset_dir", "validation_file", "data_root", "image_folder")
LICENSE_KEYS = ("license", "license_name", "license_link")
NOT_SHOWN = frozenset({"hub_token", "hub_license", "hub_base_model", "output_dir"})


@dataclass(frozen=True)
class Kind:
    """What the program that trained knows of its models.

    Attributes:
        task: `pipeline_tag` of the hub.
        tags: of the card.
        method: what was trained, in words.
        usage: Python that loads the publication, with `{repository}` and `{base}`.
    """

    task: str
    tags: tuple[str, ...]
    method: str
    usage: str


@dataclass(frozen=True)
class Score:
    """A result of `python -m llava.eval`: a benchmark and its metrics, the headline first."""

    benchmark: str
    title: str
    split: str
    metrics: Mapping[str, float] = field(default_factory=dict)


def adapter_words(config: Mapping[str, Any]) -> str:
    """A PEFT adapter in words: method, and rank and scale where it has these."""
    variants = {"use_dora": "DoRA", "use_rslora": "rank-stabilized"}
    words = [str(config.get("peft_type")), *(word for key, word in variants.items() if config.get(key))]
    if isinstance(config.get("init_lora_weights"), str):
        words.append(f"initialized by {config['init_lora_weights']}")
    sizes = [f"{label} {config[key]}" for key, label in (("r", "rank"), ("lora_alpha", "alpha")) if config.get(key)]
    return f"an adapter ({', '.join([*words, *sizes])})"


def is_ours(text: str) -> bool:
    """Whether a card was written here, and left as it was."""
    return MARK in text


def write_card(
    folder: Path, staged: Path, destination: Destination, kind: Kind, scores: Sequence[Score] = ()
) -> ModelCard:
    """Write the README.md of a publication.

    Args:
        folder: finished folder of the run.
        staged: what is published; the card becomes a part of it.
        destination: where.
        kind: what was trained.
        scores: of benchmarks, measured after the training.

    Returns:
        The card.
    """
    record_file = find_run_record(folder)
    record = {} if record_file is None else latest(read_json(record_file))
    options = flat(record)
    name = options.get(BASE_KEY)
    # What has a fingerprint was a folder or file where the run was, even if it is not there now.
    was_here = BASE_KEY in (record.get(FINGERPRINTS) or {})
    base = hub_base(None if was_here else name, destination.base_model)
    license_ = _license(destination, name, base)
    repository = destination.repository
    data = ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if (staged / ADAPTER_CONFIG).is_file() else "finetune") if base else None,
        datasets=hub_sources(str((record.get(FINGERPRINTS) or {}).get("data_path", ""))) or None,
        library_name="peft" if (staged / ADAPTER_CONFIG).is_file() else "llava-extensions",
        model_name=repository.rpartition("/")[2],
        pipeline_tag=kind.task,
        tags=["llava-extensions", *kind.tags],
        eval_results=_results(scores, kind) or None,
        **license_,
    )
    shown = base or (Path(str(name)).name if name else "BASE")
    shown_record = published_record(record)
    shown_options = flat(shown_record)
    parts = [
        f"---\n{data.to_yaml()}\n---\n{MARK}\n\n# {repository.rpartition('/')[2]}",
        f"## Base model\n\n{f'[{base}](https://huggingface.co/{base})' if base else f'`{shown}`'}",
        f"## Method\n\n{kind.method}{_length(folder, options)}",
        _data_part(shown_options, record),
        _options_part(shown_options, record),
        _scores_part(folder, options, scores),
        f"## Usage\n\n```python\n{kind.usage.format(repository=repository, base=shown)}\n```",
        _license_part(license_, destination),
        _versions_part(record),
    ]
    card = ModelCard("\n\n".join(part for part in parts if part) + "\n")
    (staged / CARD).write_text(str(card), encoding="utf-8")
    return card


def _license(destination: Destination, name: Any, base: str | None) -> dict[str, Any]:
    """The license that was given, or that of the base's card; empty if neither says."""
    if destination.license is not None:
        return {"license": destination.license}
    own = Path(str(name)) / CARD if name else None
    try:
        if own is not None and own.is_file():
            found = ModelCard.load(own, ignore_metadata_errors=True).data.to_dict()
        elif base is not None:
            info = hub_api(destination.token).model_info(base)
            found = {} if info.card_data is None else info.card_data.to_dict()  # type: ignore[no-untyped-call]
        else:
            found = {}
    except HUB_ERRORS:  # no card that can be read: the license is not known
        found = {}
    return {key: str(found[key]) for key in LICENSE_KEYS if found.get(key)}


def _license_part(found: Mapping[str, str], destination: Destination) -> str:
    if not found:
        return "## License\n\nNot stated. The license of the base model applies to what is derived from it."
    source = "" if destination.license is not None else " (that of the base model)"
    return f"## License\n\n{found.get('license_name', found.get('license'))}{source}"


def _data_part(options: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    prints = record.get(FINGERPRINTS) or {}
    lines = []
    for option in DATA_OPTIONS:
        value = options.get(option)
        if value:
            names = ", ".join(f"`{each}`" for each in (value if isinstance(value, list) else [value]))
            lines.append(f"- `{option}`: {names}" + (f" (SHA-256 {prints[option]})" if option in prints else ""))
    return "## Data\n\n" + "\n".join(lines) if lines else ""


def _options_part(options: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    given = [name for name in record.get(GIVEN) or () if name in options and name not in NOT_SHOWN]
    if not given:
        return "## Options\n\n`run.json` lists them." if record else ""
    rows = [f"| `{name}` | `{_cell(options[name])}` |" for name in sorted(given)]
    text = "\n".join(["| option | value |", "| --- | --- |", *rows])
    return f"## Options\n\n{text}\n\n`run.json` lists all of them, with defaults."


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.replace("|", "\\|").replace("\n", " ").replace("`", "'")


def _state(folder: Path) -> Mapping[str, Any]:
    places = [place / "trainer_state.json" for place in (folder, folder.parent)]
    found = next((path for path in places if path.is_file()), None)
    return {} if found is None else read_json(found)


def _best_step(folder: Path, options: Mapping[str, Any]) -> int | None:
    """The update whose weights a finished run has loaded at its end; None if they are those of the last one."""
    state = _state(folder)
    is_checkpoint = folder.name == f"{PREFIX_CHECKPOINT_DIR}-{state.get('global_step')}"
    best = state.get("best_global_step")
    loaded = options.get("load_best_model_at_end") in (True, "True") and not is_checkpoint
    return best if loaded and isinstance(best, int) else None


def _length(folder: Path, options: Mapping[str, Any]) -> str:
    state = _state(folder)
    steps, epochs = state.get("global_step"), state.get("epoch")
    if not isinstance(steps, int):
        return ""
    best = _best_step(folder, options)
    chosen = "" if best is None else f" These are the weights of update {best}, which was evaluated as the best."
    return f" {steps} updates" + (f", {epochs:.2f} epochs." if isinstance(epochs, int | float) else ".") + chosen


def _evaluated(folder: Path, options: Mapping[str, Any]) -> dict[str, float]:
    """The latest value of every metric that was measured on the weights that the folder has.

    Where the best checkpoint was loaded at the end, only its evaluation counts, and one after the training.
    """
    best = _best_step(folder, options)
    history = [entry for entry in _state(folder).get("log_history") or [] if best in (None, entry.get("step"))]
    found: dict[str, float] = {}
    results = [read_json(path) for place in (folder, folder.parent) if (path := place / EVALUATION_FILE).is_file()]
    for entry in [*history, *results[:1]]:
        for name, value in entry.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if name.startswith(EVALUATION_PREFIX) and number:
                found[name.removeprefix(EVALUATION_PREFIX)] = value
    speed = ("runtime", "samples_per_second", "steps_per_second")
    return {name: value for name, value in found.items() if not name.endswith(speed)}


def _scores_part(folder: Path, options: Mapping[str, Any], scores: Sequence[Score]) -> str:
    measured = sorted(_evaluated(folder, options).items())
    rows = [f"| evaluation of the run | {name} | {value:.4g} |" for name, value in measured]
    for score in scores:
        rows += [f"| {score.title} ({score.split}) | {name} | {value:.4g} |" for name, value in score.metrics.items()]
    return "## Scores\n\n" + "\n".join(["| on | metric | value |", "| --- | --- | --: |", *rows]) if rows else ""


def _results(scores: Sequence[Score], kind: Kind) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=kind.task,
            dataset_type=score.benchmark,
            dataset_name=score.title,
            dataset_split=score.split,
            metric_type=name,
            metric_value=round(value, 4),
        )
        for score in scores
        for name, value in score.metrics.items()
    ]


def _versions_part(record: Mapping[str, Any]) -> str:
    versions = record.get("versions") or {}
    shown = [
        f"{name} {versions[name]}" for name in ("llava-extensions", "torch", "transformers", "peft") if name in versions
    ]
    return f"## Versions\n\n{', '.join(shown)}" if shown else ""
