"""Do the A of adapters of different tasks agree, and their B differ? The claim of section 3.1, with its controls.

Plain LoRA adapters of one task each are compared by `python -m hydralora.analysis` in these sets:

* tasks: five tasks, the same A at the start (the same seed);
* rows: pairs of adapters of one task with the same A at the start, trained on other rows in another order;
* seeds: five tasks, each with an A of its own at the start.

The same is done with what training changed (A minus A at the start; B starts at 0), since two A that start equal agree
as far as they have not moved.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.experiments.common.methods import Method, MethodRun
from benchmarks.experiments.common.steps import Step
from benchmarks.experiments.text.recipe import Recipe, finetune_command
from benchmarks.experiments.text.tasks import TASKS
from hydralora.text.training import ADAPTER_FOLDER
from llava.errors import CheckpointError
from llava.runtime.output import replacing

WEIGHTS = "adapter_model.safetensors"
FIGURE = "lora-a-and-b-by-task.png"
FIGURE_WIDTH = 2000
SHOWN = "compare-tasks"
SHARED_SEED = 0
NAMES = [task.name for task in TASKS]


def single(recipe: Recipe) -> Method:
    """Plain LoRA of rank r on one task."""
    return Method("single", f"LoRA on one task, r = {recipe.rank}", recipe.rank)


def build_parser() -> argparse.ArgumentParser:
    """The options of this program: an adapter, minus the one that it started as."""
    parser = argparse.ArgumentParser(description="Write what training changed in an adapter, as an adapter.")
    parser.add_argument("--adapter", type=Path, required=True, help="the trained adapter")
    parser.add_argument("--start", type=Path, required=True, help="the same adapter before its first update")
    parser.add_argument("--output-dir", type=Path, required=True, help="where the difference goes")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        CheckpointError: the adapters have different weights.
    """
    args = build_parser().parse_args(argv)
    trained, start = (load_file(folder / WEIGHTS) for folder in (args.adapter, args.start))
    if {name: value.shape for name, value in trained.items()} != {name: value.shape for name, value in start.items()}:
        raise CheckpointError(f"{args.adapter} and {args.start}: have weights of different names or shapes")
    with replacing(args.output_dir / "adapter_config.json") as partial:
        shutil.copyfile(args.adapter / "adapter_config.json", partial)
    with replacing(args.output_dir / WEIGHTS) as partial:
        save_file({name: value - start[name] for name, value in trained.items()}, partial)


def own_seed(task: str) -> int:
    """The seed of a task in the set `seeds`."""
    return 10 + NAMES.index(task)


def sets() -> dict[str, list[str]]:
    """Names of the adapters in each comparison; a set of several comparisons has a number behind its name."""
    compared = {
        "tasks": [f"single-{task}-{SHARED_SEED}" for task in NAMES],
        "seeds": [f"single-{task}-{own_seed(task)}" for task in NAMES],
    }
    for number, task in enumerate(NAMES):
        compared[f"rows-{number}"] = [f"single-{task}-{SHARED_SEED}", f"single-{task}-{SHARED_SEED}-rows"]
    return compared


def steps(recipe: Recipe, folder: Path) -> list[Step]:
    """Training of the single-task adapters, the adapters at the start, the differences, and all comparisons."""
    found: list[Step] = []
    seeds = [SHARED_SEED, *map(own_seed, NAMES)]
    for seed in seeds:
        run = MethodRun(Method(f"start-{seed}", "", recipe.rank), seed)
        rows = folder / f"test-{NAMES[0]}.json"
        command = finetune_command(recipe, run, folder / "base", rows, folder / f"start-{seed}")
        still = ("--learning_rate", "0", "--max_steps", "1")
        found.append(Step(f"train-start-{seed}", ((*command, *still),), ("train-base",)))
    for task in NAMES:
        for seed, name, data in (
            (SHARED_SEED, f"single-{task}-{SHARED_SEED}", f"train-{task}-0"),
            (SHARED_SEED, f"single-{task}-{SHARED_SEED}-rows", f"train-{task}-1"),
            (own_seed(task), f"single-{task}-{own_seed(task)}", f"train-{task}-0"),
        ):
            run = MethodRun(single(recipe), seed, task)
            command = finetune_command(recipe, run, folder / "base", folder / f"{data}.json", folder / name)
            other_order = ("--data_seed", "1") if name.endswith("-rows") else ()
            found.append(Step(f"train-{name}", ((*command, *other_order),), ("train-base",)))
            flags = (
                *("--adapter", str(folder / name / ADAPTER_FOLDER)),
                *("--start", str(folder / f"start-{seed}" / ADAPTER_FOLDER)),
                *("--output-dir", str(folder / f"change-{name}")),
            )
            change = ("-m", "benchmarks.experiments.text.compare", *flags)
            found.append(Step(f"change-{name}", (change,), (f"train-{name}", f"train-start-{seed}")))
    for label, names in sets().items():
        for kind in ("compare", "compare-change"):
            changed = kind == "compare-change"
            folders = [folder / f"change-{name}" if changed else folder / name / ADAPTER_FOLDER for name in names]
            found.append(_comparison(f"{kind}-{label}", names, folders, [f"change-{name}" for name in names], folder))
    hydra = [f"hydra-5-{SHARED_SEED}"]
    found.append(
        _comparison("compare-hydra", hydra, [folder / hydra[0] / ADAPTER_FOLDER], [f"train-{hydra[0]}"], folder)
    )
    return found


def _comparison(name: str, names: Sequence[str], folders: Sequence[Path], needs: Sequence[str], folder: Path) -> Step:
    """One comparison; the figure of one set is drawn, since figures take longer than numbers."""
    short = [one.removeprefix("single-") for one in names]
    adapters = [f"{each}={path}" for each, path in zip(short, folders, strict=True)]
    method = "pca" if name == SHOWN else "none"
    command = ("-m", "hydralora.analysis", *adapters, "--output-dir", str(folder / name), "--method", method)
    return Step(name, (command,), tuple(needs))


def read_means(folder: Path, kind: str, label: str) -> dict[str, float]:
    """Means over layers, and over the comparisons of a set of several."""
    files = [folder / f"{kind}-{one}" / "similarity.json" for one in sets() if one.partition("-")[0] == label]
    means = [json.loads(path.read_text(encoding="utf-8"))["adapters"]["mean"] for path in files]
    return {name: mean(one[name] for one in means) for name in means[0]}


LABELS = {
    "tasks": "five tasks, same A at the start",
    "rows": "same task, same A at the start, other rows",
    "seeds": "five tasks, each its own A at the start",
}


def summary_table(folder: Path) -> str:
    """Markdown: cosines and overlaps of A and B, and of what training changed, in each set."""
    columns = ("cosine_A", "cosine_B", "overlap_A", "overlap_B")
    lines = [
        "| compared | cosine of A | cosine of B | overlap of A | overlap of B | cosine of A - A0 | overlap of A - A0 |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for label, title in LABELS.items():
        plain, change = (read_means(folder, kind, label) for kind in ("compare", "compare-change"))
        numbers = [*(plain[name] for name in columns), change["cosine_A"], change["overlap_A"]]
        lines.append(f"| {title} | {' | '.join(f'{number:.3f}' for number in numbers)} |")
    record = json.loads((folder / "compare-hydra" / "similarity.json").read_text(encoding="utf-8"))
    ((_, experts),) = record.items()
    numbers = [experts["mean"]["cosine_B"], experts["mean"]["overlap_B"]]
    lines.append(f"| five experts of HydraLoRA on the mixture | - | {numbers[0]:.3f} | - | {numbers[1]:.3f} | - | - |")
    return "\n".join(lines)


def copy_figure(folder: Path, target: Path) -> None:
    """Put the figure of the set `tasks` next to README.md, `FIGURE_WIDTH` pixels wide and with few colours."""
    with Image.open(folder / SHOWN / "matrices-pca.png") as figure, replacing(target / FIGURE) as partial:
        size = (FIGURE_WIDTH, round(figure.height * FIGURE_WIDTH / figure.width))
        figure.convert("RGB").resize(size, Image.Resampling.LANCZOS).quantize(64).save(partial, optimize=True)


if __name__ == "__main__":
    main()
