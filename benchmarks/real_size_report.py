"""The tables of `benchmarks/real_size.py`: what each step took, the update by part, and what of it is floor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GB = 1e9


def document(record: Mapping[str, Any]) -> str:
    """The Markdown file of a record."""
    shape, steps = record["settings"]["shape"], record["steps"]
    if not steps:
        return "Nothing has been measured.\n"
    first = next(iter(steps.values()))
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    commands = "\n".join(f"$ {command}" for command in dict.fromkeys(step["command"] for step in steps.values()))
    loads = [step["machine"]["load_average"][0] for step in steps.values()]
    lines = [
        f"# A LLaVA of {shape['layers']} x {shape['width']} on the CPU: {first['machine']['cpu']}",
        "",
        (
            f"{first['date'][:10]}; {versions}; random weights in bfloat16, {record['patches']} patches, "
            f"{first['threads']} thread(s); wall clock; "
            f"load average when a step began {min(loads):.1f} to {max(loads):.1f}."
        ),
        "",
        "```console",
        commands,
        "```",
        "",
        "| step | seconds | resident (GB) | of it private | of it mapped files |",
        "| --- | --: | --: | --: | --: |",
    ]
    for name, step in steps.items():
        found = step["found"]
        if "seconds" in found:
            memory = found["memory"]
            sizes = [memory.get(kind, 0) / GB for kind in ("resident", "private", "mapped_files")]
            lines.append(
                f"| {_title(name, found)} | {found['seconds']:.1f} | " + " | ".join(f"{x:.1f}" for x in sizes) + " |"
            )
    if "update" in steps:
        lines += ["", *_update(steps)]
    return "\n".join(lines) + "\n"


def _title(name: str, found: Mapping[str, Any]) -> str:
    """What a step did."""
    if name == "answer":
        return (
            f"answer of {found['tokens']} tokens behind {found['positions']} positions "
            f"(first token {found['first_token']:.1f} s, each further one {found['further_token']:.2f} s)"
        )
    if name == "update":
        return f"update of MLLM-HydraLoRA: {found['micro_batches']} micro batches of {found['positions']} positions"
    return {"weights": "writing the weights", "load": "loading the checkpoint"}[name]


def _update(steps: Mapping[str, Any]) -> list[str]:
    """The update by part, next to its floor."""
    update = steps["update"]["found"]
    lines = ["| part of the update | seconds | share |", "| --- | --: | --: |"]
    for name, seconds in update["parts"].items():
        lines.append(f"| {name} | {seconds:.2f} | {seconds / update['seconds']:.0%} |")
    if "floor" in steps:
        floor = steps["floor"]["found"]
        of = floor["update"]
        sizes = ", ".join(f"{part} {size / GB:.2f}" for part, size in floor["memory"].items())
        lines += [
            "",
            (
                f"Floor: {of['flops'] / 1e12:.2f} TFLOP at {floor['rates']['flops'] / GB:.0f} GFLOP/s, the rate of a "
                f"product in bfloat16, take {of['seconds_by_flops']:.1f} s, {of['read_bytes'] / GB:.1f} GB of "
                f"weights at {floor['rates']['bytes'] / GB:.1f} GB/s take {of['seconds_by_bytes']:.1f} s; the "
                f"update took {update['seconds'] / of['seconds']:.2f} times the larger. A further token has to read "
                f"{floor['token']['read_bytes'] / GB:.1f} GB, {floor['token']['seconds']:.2f} s."
            ),
            "",
            f"Tensors at the peak by the plan (GB): {sizes}; {sum(floor['memory'].values()) / GB:.2f} in all.",
        ]
    return lines
