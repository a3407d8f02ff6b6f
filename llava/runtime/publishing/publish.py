"""A finished folder onto the hub: stage, card, upload; and the command that does it again."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from peft import PeftConfig

from llava.runtime.files import read_json, reading
from llava.runtime.publishing.access import Destination
from llava.runtime.publishing.card import Kind, Score, adapter_words, write_card
from llava.runtime.publishing.staging import ADAPTER_CONFIG, stage
from llava.runtime.publishing.upload import upload
from llava.runtime.weights.completeness import write_file_list

PROGRAM = "llava.train.publish"
"""The program that publishes a folder which a run has finished."""


def nothing_more(folder: Path, staged: Path) -> None:
    """Complete a publication by nothing."""


def publish(
    folder: Path,
    destination: Destination,
    kind: Kind,
    complete: Callable[[Path, Path], None] = nothing_more,
    scores: Sequence[Score] = (),
) -> str:
    """Publish a finished folder in one commit.

    Args:
        folder: of a run, of its adapter, or a checkpoint.
        destination: where.
        kind: what was trained.
        complete: adds to the staged files what a reader elsewhere needs; takes the folder and the staged one.
        scores: of benchmarks.

    Returns:
        Address of the repository.

    Raises:
        CheckpointError: the folder is not a finished one.
        PublishingError: it could not be uploaded; the message has the command that does it again.
    """
    with tempfile.TemporaryDirectory(prefix="llava-publish-") as scratch:
        staged = Path(scratch)
        stage(folder, staged, destination.base_model)
        complete(folder, staged)
        write_file_list(staged)
        write_card(folder, staged, destination, kind, scores)
        return upload(staged, destination, again(folder, destination))


def publish_adapter(folder: Path, destination: Destination, scores: Sequence[Score] = ()) -> str:
    """Publish a PEFT adapter of a text model; see `publish`."""
    path = folder / ADAPTER_CONFIG
    values = read_json(path)
    with reading(path, "does not describe an adapter"):
        package = type(PeftConfig.from_pretrained(str(folder))).__module__.partition(".")[0]
    method = str(values.get("peft_type"))
    usage = (
        f"{'' if package == 'peft' else f'import {package}  # makes the method {method} known to PEFT{chr(10)}'}"
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        'model = PeftModel.from_pretrained(base, "{repository}")'
    )
    kind = Kind("text-generation", (method.lower(),), f"Fine-tuned: {adapter_words(values)}.", usage)
    return publish(folder, destination, kind, scores=scores)


def again(folder: Path, destination: Destination) -> str:
    """The command that publishes a folder; a token is not in it."""
    words = ["python", "-m", PROGRAM, str(folder), "--hub_model_id", destination.repository]
    options = {
        "--hub_revision": destination.revision,
        "--hub_base_model": destination.base_model,
        "--hub_license": destination.license,
        "--hub_private_repo": None if destination.private is None else str(destination.private),
    }
    return shlex.join([*words, *(word for name, value in options.items() if value for word in (name, value))])


def named(destination: Destination, repository: str) -> Destination:
    """A destination whose repository is `owner/name`."""
    return replace(destination, repository=repository)
