"""Publish the finished folder of a run on a model hub: what `--push_to_hub True` does at the end of a training.

python -m llava.train.publish ./checkpoints/llava-v1.5-7b-lora --hub_model_id me/llava-v1.5-7b-lora

One commit has everything that loads the model, and a model card; nothing that only resumes the run. A vision tower that
the folder names by a path on this machine is published inside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import FlagError
from llava.runtime.files import read_json
from llava.runtime.program import run_program
from llava.runtime.starting.boolean import boolean

if TYPE_CHECKING:
    from llava.runtime.publishing.card import Score

RESULT_KEYS = frozenset({"benchmark", "split", "metrics"})


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.train.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="finished folder of a run, of its adapter, or a checkpoint-N")
    add(
        "--hub_model_id",
        required=True,
        help="owner/name of the repository, or a name of yours; made if it is not there",
    )
    add("--hub_private_repo", type=boolean, default=None, help="whether a new repository is private")
    add("--hub_revision", help="branch to publish on; default: the main one")
    add("--hub_token", help="token; default: HF_TOKEN, or that of `hf auth login`")
    add("--hub_base_model", help="id of the base on the hub, where the run read it from a folder")
    add("--hub_license", help="license of the result; default: that of the base's model card")
    add(
        "--results", nargs="+", type=Path, default=[], metavar="RESULT", help="NAME.result.json of python -m llava.eval"
    )
    return parser


def read_scores(paths: Sequence[Path]) -> list[Score]:
    """Result files of `python -m llava.eval`.

    Raises:
        FlagError: a file is not one.
    """
    from llava.runtime.publishing.card import Score

    scores = []
    for path in paths:
        result = read_json(path)
        missing = sorted(RESULT_KEYS - result.keys())
        if missing:
            raise FlagError(
                f"--results {path}: lacks {missing}, so it is not a NAME.result.json of python -m llava.eval"
            )
        title = result.get("title", result["benchmark"])
        scores.append(Score(result["benchmark"], title, result["split"], result["metrics"]))
    return scores


def main(argv: Sequence[str] | None = None) -> str:
    """Publish a folder.

    Returns:
        Address of the repository.

    Raises:
        LlavaError: the folder is not a finished one, or the hub refuses it.
    """
    args = build_parser().parse_args(argv)
    from llava.extension import installed_extensions
    from llava.runtime.publishing.access import AT_END, check_access, destination_of, hub_problems
    from llava.runtime.publishing.publish import named, publish_adapter
    from llava.runtime.publishing.staging import ADAPTER_CONFIG
    from llava.runtime.values import refuse
    from llava.train.publication import CONFIG_FILE, publish_llava

    args.push_to_hub, args.hub_strategy, args.output_dir = True, AT_END, args.folder
    refuse(hub_problems(args))
    scores = read_scores(args.results)
    destination = destination_of(args)
    destination = named(destination, check_access(destination))
    if (args.folder / CONFIG_FILE).is_file():
        address = publish_llava(args.folder, destination, scores)
    elif (args.folder / ADAPTER_CONFIG).is_file():
        installed_extensions()  # which bring methods of PEFT along
        address = publish_adapter(args.folder, destination, scores)
    else:
        raise FlagError(
            f"{args.folder}: contains neither {CONFIG_FILE} nor {ADAPTER_CONFIG}, so there is no model in it"
        )
    print(f"published: {address}")
    return address


if __name__ == "__main__":
    run_program(main)
