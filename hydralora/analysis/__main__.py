"""Compare the A and B matrices of several adapters (section 3.1 and figure 3 of the paper).

    python -m hydralora.analysis math=ADAPTER_1 law=ADAPTER_2 --output-dir analysis

Reads plain LoRA, HydraLoRA and the original's adapters; writes figures and `similarity.json`. Without arguments the
adapters are those of the environment variable MODEL_PATHS, a JSON object of names and paths, as in the original.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from llava.errors import FlagError
from llava.runtime.output import replace_text
from llava.runtime.program import run_program

if TYPE_CHECKING:
    from hydralora.analysis.adapters import AdaptedLayer

RESULT_FILE = "similarity.json"
NO_FIGURES = "none"
MODEL_PATHS = "MODEL_PATHS"
"""Environment variable with which the original is told its adapters."""


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m hydralora.analysis", description="Compare the A and B matrices of several adapters."
    )
    parser.add_argument(
        "adapters",
        nargs="*",
        metavar="NAME=ADAPTER",
        help=f"a name and the folder of an adapter, or its file of weights; none: those of {MODEL_PATHS}",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("analysis"), help="where figures and numbers go")
    parser.add_argument(
        "--method",
        choices=["tsne", "pca", NO_FIGURES],
        default="tsne",
        help="how matrices become points; none: no figures",
    )
    parser.add_argument("--seed", type=int, default=42)
    return parser


def named_adapters(arguments: Sequence[str]) -> dict[str, dict[str, AdaptedLayer]]:
    """The layers of each adapter, by the name that it was given.

    Raises:
        CheckpointError: a folder is no adapter.
        FlagError: an argument has no name, or a name occurs twice.
    """
    from hydralora.analysis.adapters import read_adapter

    adapters: dict[str, dict[str, AdaptedLayer]] = {}
    for argument in arguments:
        name, separator, folder = argument.partition("=")
        if not (name and separator and folder):
            raise FlagError(f"'{argument}': expected NAME=ADAPTER")
        if name in adapters:
            raise FlagError(f"the name '{name}' is given twice")
        adapters[name] = read_adapter(Path(folder))
    return adapters


def adapters_of_environment() -> list[str]:
    """`NAME=ADAPTER` for each entry of MODEL_PATHS.

    Raises:
        FlagError: the variable is not set, or is not a JSON object of names and paths.
    """
    text = os.environ.get(MODEL_PATHS)
    if text is None:
        raise FlagError(f"name adapters as NAME=ADAPTER, or set {MODEL_PATHS} to a JSON object of names and paths")
    try:
        paths = json.loads(text)
    except ValueError as error:
        raise FlagError(f"{MODEL_PATHS} is not valid JSON ({error})") from error
    if not isinstance(paths, dict) or not paths or not all(isinstance(path, str) for path in paths.values()):
        raise FlagError(f"{MODEL_PATHS} is {text!r:.80}, expected a JSON object of names and paths")
    return [f"{name}={path}" for name, path in paths.items()]


def print_summary(record: dict[str, dict]) -> None:
    """The means over all layers, as a table."""
    table = Table(title="Mean over the layers", title_justify="left")
    columns = ("cosine_A", "cosine_B", "overlap_A", "overlap_B")
    table.add_column("compared")
    for name in columns:
        table.add_column(name.replace("_", " of "), justify="right")
    for compared, part in record.items():
        values = [f"{part['mean'][name]:.3f}" if name in part["mean"] else "" for name in columns]
        table.add_row(compared, *values)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program.

    Returns:
        Path of the numbers.

    Raises:
        LlavaError: an adapter or an option is wrong.
    """
    args = build_parser().parse_args(argv)
    adapters = named_adapters(args.adapters or adapters_of_environment())
    from hydralora.analysis.figures import plot_matrices
    from hydralora.analysis.similarity import between_adapters, between_experts, mean_of

    record: dict[str, dict] = {}
    if len(adapters) > 1:
        rows = between_adapters(adapters)
        record["adapters"] = {"mean": mean_of(rows), "layers": rows}
    for name, layers in adapters.items():
        rows = between_experts(layers)
        if rows:
            record[f"experts of {name}"] = {"mean": mean_of(rows), "layers": rows}
    result = replace_text(args.output_dir / RESULT_FILE, json.dumps(record, indent=2) + "\n")
    figures = []
    if args.method != NO_FIGURES:
        figures = plot_matrices(adapters, args.method, args.seed, args.output_dir / f"matrices-{args.method}")
    print_summary(record)
    print("written: " + ", ".join(map(str, [result, *figures])))
    return result


if __name__ == "__main__":
    run_program(main)
