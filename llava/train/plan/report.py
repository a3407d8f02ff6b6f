"""How a plan is shown and written."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from llava.runtime.output import replace_text
from llava.runtime.program import package_versions
from llava.train.plan.plan import GIB, Plan, outside


def show(plan: Plan) -> None:
    """Print the table and what follows from it."""
    command = plan.command
    where = "CPU" if command.device.type == "cpu" else f"GPU of {command.gpus}"
    table = Table(title=f"Peak memory of one {where}", title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    rows = {str(part): number for part, number in plan.share.parts.items()} | {"communication": plan.share.buffers}
    for name, number in rows.items():
        table.add_row(name, f"{number / GIB:.2f}")
    assumed = outside(command)
    if assumed:
        table.add_row("CUDA and libraries (assumed)", f"{assumed / GIB:.2f}")
    table.add_section()
    table.add_row("all", f"{(plan.share.total + assumed) / GIB:.2f}")
    console = Console()
    console.print(table)
    for line in lines(plan):
        console.print(line, highlight=False, soft_wrap=True)


def lines(plan: Plan) -> list[str]:
    """The sentences below the table."""
    command, training = plan.command, plan.command.args.training
    zero = "none" if command.zero is None else f"stage {command.zero.get('zero_optimization', {}).get('stage', 0)}"
    verdict = "fits into" if plan.fits else "does not fit into"
    found = [
        (
            f"batch {command.batch} x {training.model_max_length} positions, ZeRO: {zero}; {verdict} "
            f"{command.gpu_memory:g} GiB"
        ),
        f"largest batch that fits: {plan.largest}",
        f"trained parameters: {plan.update.trained:,}",
        f"floating-point operations of an update and GPU: {plan.update.flops:.3e}",
        f"host waits of a micro batch: {_counts(plan.update.waits)}",
    ]
    if command.zero is None:
        found.append(f"host waits of the optimizer's step: {_counts(plan.update.step_waits)}")
    if plan.share.host:
        found.append(f"memory of the machine for each GPU: {plan.share.host / GIB:.2f} GiB")
    return found


def _counts(waits: Mapping[str, int]) -> str:
    """A number of waits, and of each kind."""
    kinds = ", ".join(f"{kind}: {number}" for kind, number in sorted(waits.items()))
    return f"{sum(waits.values())} ({kinds or 'none'})"


def write(plan: Plan) -> None:
    """Write the numbers where the command says, whole or not at all."""
    path = plan.command.record
    if path is not None:
        replace_text(path, json.dumps(plan.to_dict() | {"versions": package_versions()}, indent=1) + "\n")
