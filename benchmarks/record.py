"""What a run writes: a JSON record that says how the numbers came about, and a Markdown table of the ratios."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from llava.errors import FlagError
from llava.runtime.output import replace_text
from llava.runtime.program import package_versions

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("python", "torch", "peft", "transformers", "llava-extensions")

RATIOS = {
    "to_lora": ("hydralora", "lora"),
    "to_lora_matched": ("hydralora", "lora_matched"),
    "sparse_to_lora": ("hydralora_sparse", "lora"),
    "loop_to_hydralora": ("loop", "hydralora"),
    "loop_to_lora": ("loop", "lora"),
}
"""Quotients of times by name: the first method's over the second's."""

AIMED_EXPERTS = 3
AIMS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "to_lora": ("at most 1.10 times LoRA of the same rank", lambda value: value <= 1.10),
    "loop_to_hydralora": ("at least 1.8 times faster than the loop", lambda value: value >= 1.8),
}
"""What the layer should reach; see `aim_lines`."""


def check_run(device: str, output: Path | None) -> None:
    """Refuse what no benchmark can carry out; called before anything is measured.

    Raises:
        FlagError: there is no such device, or `output` is no .json file.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise FlagError("--device cuda: torch finds no GPU here; use --device cpu")
    if output is not None and output.suffix != ".json":
        raise FlagError(f"--output {output}: expected a name that ends in .json")


def machine(device: torch.device) -> dict[str, Any]:
    """The machine that measures."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.platform(),
        "load_average": list(os.getloadavg()),
    }


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def provenance(program: str, arguments: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Date, command, versions, commit and machine, noted before the first measurement."""
    versions = package_versions()
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", program, *arguments]),
        "versions": {name: versions[name] for name in VERSIONS if name in versions},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "machine": machine(device),
    }


def write_result(record: Mapping[str, Any], path: Path) -> None:
    """Write the record of `benchmarks.hydralora` to `path` (JSON) and its table beside it (`.md`)."""
    write_files(record, path, document(record))


def write_files(record: Mapping[str, Any], path: Path, text: str) -> None:
    """Write `path` (JSON) and `text` beside it (`.md`), each whole or not at all."""
    for target, content in ((path, json.dumps(record, indent=1) + "\n"), (path.with_suffix(".md"), text)):
        replace_text(target, content)


def show_and_write(record: Mapping[str, Any], text: str, path: Path | None) -> None:
    """Show `text`, and write it with the record where there is a place to write to; see `write_files`."""
    show(text)
    if path is not None:
        write_files(record, path, text)
        show(f"Written: {path} and {path.with_suffix('.md')}")


def document(record: Mapping[str, Any]) -> str:
    """The Markdown file of a record."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    where, settings = record["machine"], record["settings"]
    device = where["gpu"] or f"{where['cpu']}, {settings['threads']} thread(s)"
    times = "computing time of the process" if settings["clock"] == "process" else "wall-clock time"
    batch = f"{settings['dtype']}; {settings['tokens']} tokens, rank {settings['rank']}"
    how = f"{times}, median of {settings['repeats']} rounds in each of {settings['passes']} passes"
    lines = [
        f"# Forward and backward of HydraLoRA, and decoding: {device}",
        "",
        f"{record['date'][:10]}; {versions}; {batch}; {how}.",
        "",
        "```console",
        f"$ {record['command']}",
        "```",
        "",
        *results(record["cases"]),
    ]
    return "\n".join(lines) + "\n"


def results(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of the tables, and of what was reached."""
    trained = [case for case in cases if case["kind"] != "token"]
    decoded = [case for case in cases if case["kind"] == "token"]
    lines = [table(trained), ""] if trained else []
    lines += ["One token in evaluation:", "", token_table(decoded), ""] if decoded else []
    return lines + aim_lines(cases)


def _grouped(cases: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The passes of each case together."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for case in cases:
        groups[tuple(case[name] for name in ("kind", "width", "inner", "experts", "dropout", "compiled"))].append(case)
    return list(groups.values())


def _ratio(group: Sequence[Mapping[str, Any]], name: str) -> str:
    """Median ratios of the passes, without a number twice."""
    values = [case["ratios"][name] for case in group if name in case["ratios"]]
    return ", ".join(f"{value['median']:.2f}" for value in values) or "-"


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """One line per case; a cell with several numbers has one for each pass."""
    columns = ("", "E", "dropout", "HydraLoRA / LoRA", "sparse / LoRA", "HydraLoRA / LoRA of its size")
    columns += ("loop / HydraLoRA", "loop / LoRA", "loop / HydraLoRA, update alone")
    columns += ("kept, LoRA (KiB)", "kept, HydraLoRA", "allowed", "kept, loop")
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " --: |" * (len(columns) - 1)]
    for group in _grouped(cases):
        case = group[0]
        name = f"{case['kind']} {case['width']} x {case['inner']}" + (", compiled" if case["compiled"] else "")
        kept = {method: values["saved_bytes"] for method, values in case["methods"].items()}
        memory = [kept["lora"], kept["hydralora"], case["memory"]["allowed_bytes"], kept["loop"]]
        cells = [name, str(case["experts"]), f"{case['dropout']:g}"]
        cells += [_ratio(group, ratio) for ratio in ("to_lora", "sparse_to_lora", "to_lora_matched")]
        cells += [_ratio(group, ratio) for ratio in ("loop_to_hydralora", "loop_to_lora", "update_loop_to_hydralora")]
        cells += [f"{size / 1024:,.0f}" for size in memory]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def token_table(cases: Sequence[Mapping[str, Any]]) -> str:
    """As `table`, of the layers that decode one token."""
    columns = ("", "E", "LoRA (ms)", "HydraLoRA / LoRA", "HydraLoRA / LoRA of its size", "loop / HydraLoRA")
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " --: |" * (len(columns) - 1)]
    for group in _grouped(cases):
        case = group[0]
        name = f"token {case['width']} x {case['inner']}" + (", compiled" if case["compiled"] else "")
        spent = min(each["methods"]["lora"]["milliseconds"]["median"] for each in group)
        cells = [name, str(case["experts"]), f"{spent:.3f}"]
        cells += [_ratio(group, ratio) for ratio in ("to_lora", "to_lora_matched", "loop_to_hydralora")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def aim_lines(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each aim, where it was reached and where not, in every pass.

    Forward and backward of layers with three experts; one token with any number of experts; memory of all cases.
    """
    lines = []
    aimed = [case for case in cases if case["kind"] == "layer" and case["experts"] == AIMED_EXPERTS]
    decoded = [case for case in cases if case["kind"] == "token"]
    compared = [(f"Layer with {AIMED_EXPERTS} experts", aimed, ratio) for ratio in AIMS]
    for what, chosen, ratio in [*compared, ("One token", decoded, "to_lora")]:
        text, reached = AIMS[ratio]
        if chosen:
            outcome = {_case_name(case): True for case in chosen}
            for case in chosen:
                outcome[_case_name(case)] &= reached(case["ratios"][ratio]["median"])
            lines.append(f"- {what}, {text}: {_outcome(outcome)}.")
    kept = [case for case in cases if not case["compiled"] and case["kind"] != "token"]
    memory = {_case_name(case): case["memory"]["gap_bytes"] <= 0 for case in kept}
    if memory:
        lines.append(f"- Kept for backward no more than LoRA's and the routed activations: {_outcome(memory)}.")
    return lines


def _case_name(case: Mapping[str, Any]) -> str:
    compiled = ", compiled" if case["compiled"] else ""
    return (
        f"{case['kind']} {case['width']} x {case['inner']}, E {case['experts']}, dropout {case['dropout']:g}{compiled}"
    )


def _outcome(reached: Mapping[str, bool]) -> str:
    missed = [name for name, good in reached.items() if not good]
    return f"reached in {len(reached) - len(missed)} of {len(reached)} cases" + (
        f"; missed by {'; '.join(missed)}" if missed else ""
    )


def show(text: str) -> None:
    """Print what a person reads at the end."""
    sys.stdout.write(text + "\n")
