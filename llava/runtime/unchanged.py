"""Is this the run that the output folder belongs to? Its record (`run.json`) against the options of now.

A resumed run under other options would be neither the old run nor a new one, and its record would call old weights by
new settings. What changes no number may change; the table below lists it, everything else has to be equal, unless
`--resume_changed True` accepts the differences.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError, FlagError
from llava.runtime.files import read_json
from llava.runtime.hub import data_set_revision, is_hub_id
from llava.runtime.places import RUN_FILE, split_weight
from llava.runtime.used_settings import FREE, unused
from llava.runtime.weights.fingerprint import WEIGHT_SUFFIXES, saved_fingerprint, weights_fingerprint
from llava.runtime.weights.run_file import check_resumes, latest

PATHS = frozenset(
    [
        *("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "data_path", "image_folder", "dataset_dir"),
        *("train_file", "validation_file", "tokenizer_name_or_path", "tokenizer_name", "peft_path", "data_root"),
        *("caption_file", "llama_model_path", "peft_config", "chat_template", "eval_data_path"),
    ]
)
"""Options that are paths: equal if they lead to the same place."""

DATA_FILES = {"dataset_dir": ("*.json", "*.jsonl"), "data_root": ("pid_splits.json",)}
"""Of `PATHS`, folders of data with the names of the files in them that decide what a run trains on."""

DATA_SETS = frozenset({"data_path", "eval_data_path"})
"""Of `PATHS`, those that may also name a folder of `datasets` or a data set of the hub."""

EVALUATION = frozenset(
    [
        *("eval_strategy", "eval_steps", "eval_delay", "eval_batch_size"),
        *("eval_data_path", "eval_questions", "eval_image_folder", "eval_data_dir", "eval_limit"),
        *("eval_max_new_tokens", "eval_split"),
    ]
)
"""Free unless what is measured decides which checkpoint is loaded at the end, or when the run ends."""

STREAMING, STREAMED = "streaming", "data_path"
"""The option that makes a stream of the data, and the option of `PATHS` that names them."""

END = 1 << 20
"""Bytes at the beginning and at the end of a file of a stream that are compared; it may be too large to read whole."""

LENGTH = frozenset({"max_steps", "num_train_epochs", "epochs"})
"""Options that say when the run ends. Free under a schedule that does not depend on it."""
FIXED = frozenset({"optim"})
"""Options that a checkpoint cannot be resumed without: it contains the state of that optimizer."""

LENGTHLESS = ("constant", "constant_with_warmup", "inverse_sqrt")

BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
BATCH_NAMES = frozenset({*BATCH, "train_batch_size", "batch_size", "accum_iter"})
"""Free as long as the global batch, their product with the number of processes, stays the same."""

ACCELERATOR = "accelerator_config"
BATCH_SHARING = ("split_batches", "even_batches")
"""Of accelerate's settings, those that say which rows make a batch."""

WORLD, FINGERPRINTS = "world_size", "fingerprints"
"""Keys of a record: the number of processes, and a digest of what each of `PATHS` leads to."""

EXTENSION = "extension "
"""What comes before the name of an extension, for its configuration among the options."""

SECTIONS = ("program", "model", "data", "training", "evaluation")
"""Of a record: what a program was told, and what came of it."""


def fingerprints(options: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files, weights and data sets that the options of a run name, separated by blanks.

    Models of the hub and folders of images have none. Of several paths one without a digest is there by its name.
    """
    found = {}
    for name in sorted(PATHS & options.keys()):
        paths = options[name] if isinstance(options[name], list) else [options[name]]
        texts = [path for path in paths if isinstance(path, str)]
        is_stream = name == STREAMED and options.get(STREAMING) is True
        digests = [_streamed(path) if is_stream else _weighted(path, name) for path in texts]
        if any(digests):
            found[name] = " ".join(digest or _digest(text) for digest, text in zip(digests, texts, strict=True))
    return found


def hub_sources(prints: str) -> list[str]:
    """Ids of the data sets of the hub in an entry of `fingerprints`: nothing else there has a slash."""
    return [word.partition("@")[0].partition(":")[0] for word in prints.split() if "/" in word]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _streamed(name: str) -> str | None:
    """The digest of a source of a stream, with its weight: sizes and both ends of its files, or its id on the hub."""
    path = Path(split_weight(name)[0])
    if not path.exists():
        return _weighted(name, STREAMED)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path) if path.is_dir() else ''} {size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(END))
            content.seek(max(0, size - END))
            digest.update(content.read(END))
    return f"{digest.hexdigest()[:16]}@{split_weight(name)[1]:g}"


def _weighted(name: str, option: str) -> str | None:
    """The digest of a path, with its weight where it has one (`PATH@WEIGHT`)."""
    path, weight = split_weight(name)
    digest = _data_set(path) if option in DATA_SETS else None
    digest = _fingerprint(Path(path), DATA_FILES.get(option, ())) if digest is None else digest
    return digest if digest is None or weight == 1 else f"{digest}@{weight:g}"


def _data_set(path: str) -> str | None:
    """Of a folder of `datasets` a digest, of a data set of the hub its id and revision; None for anything else."""
    if Path(path).exists() or not is_hub_id(path):
        return saved_fingerprint(Path(path))
    revision = data_set_revision(path)
    return None if revision is None else f"{path}:{revision}"


def _fingerprint(path: Path, data_files: Sequence[str] = ()) -> str | None:
    """Of a file its content; of a folder the names and content of its data files, or the ends of its weights."""
    if path.is_dir() and data_files:
        files = sorted(file for pattern in data_files for file in path.glob(pattern) if file.is_file())
        named = [f"{file.name} {_fingerprint(file)}" for file in files]
        return _digest("\n".join(named)) if named else None
    if path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    has_weights = path.is_dir() and any(child.suffix in WEIGHT_SUFFIXES for child in path.iterdir())
    return weights_fingerprint(path) if has_weights or path.is_file() else None


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a record by their names, whatever section they are in."""
    sections = record.get("arguments", record)
    options: dict[str, Any] = {}
    for section in SECTIONS:
        options |= sections.get(section) or {}
    extensions = sections.get("extensions") or {}
    for values in (sections.get("options") or {}).values():
        options |= values or {}
    for name in {*(sections.get("options") or {}), *extensions}:
        options[f"{EXTENSION}{name}"] = extensions.get(name)
    if "experts" in sections:
        options["number of experts"] = sections["experts"]
    return options


def _effective(record: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a record that have an effect; what a default follows from is filled in."""
    options = flat(record)
    left_out = unused(options)
    options = {name: value for name, value in options.items() if name not in left_out}
    if "data_seed" in options and options["data_seed"] in (None, "None"):
        options["data_seed"] = options.get("seed")
    return options


def check_sections(record: Mapping[str, Any], path: Path) -> None:
    """Refuse a record whose sections are not tables of options.

    Raises:
        CheckpointError: names the file and the sections.
    """
    sections = record.get("arguments", record)
    tables: dict[str, Any] = {FINGERPRINTS: record.get(FINGERPRINTS)}
    if isinstance(sections, dict):
        tables |= {name: sections.get(name) for name in (*SECTIONS, "options", "extensions")}
        options = sections.get("options")
        tables |= {f"options.{name}": values for name, values in options.items()} if isinstance(options, dict) else {}
    wrong = [name for name, value in tables.items() if value is not None and not isinstance(value, dict)]
    wrong += [] if isinstance(sections, dict) else ["arguments"]
    if wrong:
        raise CheckpointError(
            f"{path}: {', '.join(sorted(wrong))} should contain options by name; the record of this run is damaged. "
            "Get the file again, or choose another --output_dir"
        )


def _same_path(one: Any, other: Any) -> bool:
    """True if two values of an option lead to the same files."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same_path, one, other))
    if not (isinstance(one, str) and isinstance(other, str)):
        return one == other
    return one == other or Path(one).resolve() == Path(other).resolve()


def _same(name: str, then: Mapping[str, Any], now: Mapping[str, Any], before: Any, after: Any) -> bool:
    """True if an option has the same meaning in both records."""
    if name not in PATHS:
        # Records of earlier versions have everything that is not a number as a text.
        return before == after or str(before) == str(after) or (name == ACCELERATOR and _same_loading(before, after))
    prints = [(record.get(FINGERPRINTS) or {}).get(name) for record in (then, now)]
    return prints[0] == prints[1] if None not in prints else _same_path(before, after)


def _same_loading(before: Any, after: Any) -> bool:
    """True if two values of `--accelerator_config` share out the same batches."""
    tables = []
    for value in (before, after):
        try:
            table = ast.literal_eval(value) if isinstance(value, str) else value
        except (ValueError, SyntaxError):
            return False
        tables.append(table if isinstance(table, dict) else {})
    one, other = tables
    return all(one[name] == other[name] for name in BATCH_SHARING if name in one and name in other)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Options of two records that make them records of different runs, one line each.

    Args:
        then: the stored record.
        now: that of the options of now.
    """
    # Both as they come out of a file: tuples are lists there, and numbers that are no JSON become strings.
    now = json.loads(json.dumps(now, default=str))
    before, after = _effective(then), _effective(now)
    if STREAMING in after:
        before.setdefault(STREAMING, False)  # records of earlier versions do not have it
    free = set(FREE)
    batch, changed_batch = batch_shares(then), batch_shares(now)
    other_batch = batch is not None and changed_batch is not None and math.prod(batch) != math.prod(changed_batch)
    free |= BATCH_NAMES if batch is not None and changed_batch is not None and not other_batch else set()
    free |= LENGTH if length_is_free(then, now) else set()
    decides = after.get("load_best_model_at_end") or after.get("early_stopping_patience") is not None
    free |= set() if decides else EVALUATION
    # Where a part of the training rows is evaluated on, `do_eval` says which rows are trained on.
    free |= {"do_eval"} if not decides and "eval_data_path" in after else set()
    extensions = {name for name in (*before, *after) if name.startswith(EXTENSION)}
    lines = []
    if batch is not None and changed_batch is not None and other_batch:
        lines.append(f"global batch: {describe_shares(batch)} then, {describe_shares(changed_batch)} now")
    elif after.get(STREAMING) is True and then.get(WORLD) != now.get(WORLD):
        # Every process has a part of the stream of its own.
        lines.append(f"processes that share the stream: {then.get(WORLD)} then, {now.get(WORLD)} now")
    for name in sorted((before.keys() & after.keys() | extensions) - free):
        old, new = before.get(name), after.get(name)
        if not _same(name, then, now, old, new):
            what = name if " " in name else f"--{name}"
            changed = "the same path, other content" if old == new else f"{new!r:.200} now"
            lines.append(f"{what}: {old!r:.200} then, {changed}")
    return lines


def length_is_free(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """True if no learning rate, and nothing of an extension, depends on when the run ends."""
    before, after = _effective(then), _effective(now)
    runs = any(value for name, value in after.items() if name.startswith(EXTENSION))
    return before.get("lr_scheduler_type") in LENGTHLESS and not runs


Shares = tuple[int, int, int]
"""Processes, micro batches and rows in each, whose product is the global batch."""


def batch_shares(record: Mapping[str, Any]) -> Shares | None:
    """What makes up the global batch of a run; None if that is not recorded."""
    options = flat(record)
    rows, steps = (options.get(name) for name in BATCH)
    shares = (record.get(WORLD), steps, rows)
    return shares if all(isinstance(share, int) for share in shares) else None  # type: ignore[return-value]


def describe_shares(shares: Shares) -> str:
    """A global batch in words; see `batch_shares`."""
    return "{} rows ({} process(es) x {} micro batches x {} rows)".format(math.prod(shares), *shares)


def find_record(output: Path, resume_from: Path | None) -> Path | None:
    """The record of the run that a checkpoint, or else an output folder, belongs to."""
    places = [] if resume_from is None else [resume_from / RUN_FILE]
    if resume_from is None or resume_from.parent.resolve() == output.resolve():
        places.append(output / RUN_FILE)
    return next((path for path in places if path.is_file()), None)


def read_record(path: Path) -> dict[str, Any]:
    """The record of how a run was started or last resumed.

    Raises:
        CheckpointError: the record is damaged.
    """
    record = read_json(path)
    check_resumes(record, path)
    last = latest(record)
    check_sections(last, path)
    return last


def refuse_changes(
    now: Mapping[str, Any], output: Path, resume_from: Path | None, results: bool, accepted: bool = False
) -> list[str]:
    """Refuse to continue, or to replace, what other options have made.

    Args:
        now: the record of the options of now.
        output: output folder of the run.
        resume_from: the checkpoint that the run would continue from.
        results: the output folder contains trained weights.
        accepted: continue from the checkpoint all the same (`--resume_changed True`).

    Returns:
        The differences that were accepted, one line each.

    Raises:
        FlagError: lists the options that differ.
        CheckpointError: the record is damaged.
    """
    if resume_from is not None and resume_from.parent.resolve() != output.resolve() and results:
        refuse_changes(now, output, None, results)  # the results in the output folder are of another run
    record = find_record(output, resume_from)
    if record is None or (resume_from is None and not results):
        return []
    then = read_record(record)
    lines = differences(then, now)
    fixed = [line for line in lines if line.partition(":")[0].removeprefix("--") in FIXED]
    if not lines or (accepted and resume_from is not None and not fixed):
        return lines
    if resume_from is None:
        what, instead = "be replaced by a run that is not the same", "another --output_dir"
    elif accepted:
        what, lines, instead = "be resumed with another optimizer, which has no state here", fixed, "a new --output_dir"
    else:
        what, instead = (
            "be resumed from",
            "another --output_dir, or --resume_changed True to continue with these changes",
        )
    raise FlagError(
        f"{resume_from or output}: cannot {what} under changed options; according to {record}:\n  "
        + "\n  ".join(lines)
        + f"\nGive the options of then, or {instead}"
    )
