"""The list of all programs: `python -m llava`.

A line has the name to type and the first sentence of the program's docstring, which is read from its file: nothing is
imported, so the list is there at once.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Sequence
from pathlib import Path

from llava.errors import LlavaError
from llava.runtime.program import run_program
from llava.scripts.files import source

PROGRAMS = {
    "train": (
        *("llava.train.train_mem", "llava.train.train", "llava.train.train_sparse", "llava.train.train_xformers"),
        *("llava.train.plan", "llava.train.publish"),
    ),
    "data": ("llava.data.check",),
    "eval": (
        "llava.eval",
        *("llava.eval.model_vqa_loader", "llava.eval.model_vqa", "llava.eval.model_vqa_mmbench"),
        *("llava.eval.model_vqa_qbench", "llava.eval.model_vqa_science", "llava.eval.run_llava"),
        "llava.eval.model_qa",
        *("llava.eval.merge", "llava.eval.score", "llava.eval.report"),
        *("llava.eval.eval_captions", "llava.eval.eval_chartqa", "llava.eval.eval_gqa", "llava.eval.eval_mme"),
        *("llava.eval.eval_pope", "llava.eval.eval_qbench", "llava.eval.eval_science_qa", "llava.eval.eval_textvqa"),
        *("llava.eval.eval_science_qa_gpt4", "llava.eval.eval_science_qa_gpt4_requery"),
        *("llava.eval.eval_gpt_review", "llava.eval.eval_gpt_review_visual"),
        *("llava.eval.eval_gpt_review_bench", "llava.eval.summarize_gpt_review"),
    ),
    "serve": (
        *("llava.serve.cli", "llava.serve.api", "llava.serve.web"),
        *("llava.serve.controller", "llava.serve.model_worker"),
    ),
    "convert": ("llava.convert",),
    "weights": ("llava.model.consolidate", "llava.model.make_delta", "llava.model.apply_delta"),
    "hydralora": (
        *("hydralora.finetune", "hydralora.evaluate", "hydralora.convert"),
        *("hydralora.components", "hydralora.analysis"),
    ),
    "dynamic": (
        *("llava.dynamic_eval.visualize", "dynamic.flops"),
        *("llava.dynamic_eval.model_lvis_for_ppl", "llava.dynamic_eval.model_lvis_multi_round_for_ppl"),
        *("llava.dynamic_eval.model_lvis_for_meteor", "llava.dynamic_eval.model_lvis_multi_round_for_meteor"),
    ),
    "mma": (
        *("mma.train", "mma.eval", "mma.eval_mme", "mma.demo"),
        *("mma.merge", "mma.weights", "mma.convert", "mma.data.mixture"),
    ),
    "moe_patch": ("moe_patch",),
    "scripts": (
        "llava.scripts",
        *("scripts/merge_lora_weights.py", "scripts/extract_mm_projector.py", "scripts/convert_sqa_to_llava.py"),
        *("scripts/convert_gqa_for_eval.py", "scripts/convert_mme_for_eval.py", "scripts/convert_mmvet_for_eval.py"),
        *("scripts/convert_mmbench_for_submission.py", "scripts/convert_seed_for_submission.py"),
        *("scripts/convert_vizwiz_for_submission.py", "scripts/convert_vqav2_for_submission.py"),
    ),
}
"""By group: modules for `python -m`, and files for `python`. A program with several names is here once."""


ROOT = Path(__file__).resolve().parent.parent
"""The folder that the packages are in."""


def file_of(program: str) -> Path:
    """The file that is run under a name.

    Raises:
        LlavaError: it is not there, so the installation is damaged.
    """
    path = (source() or ROOT) / program if program.endswith(".py") else ROOT.joinpath(*program.split("."))
    files = [path, path.with_suffix(".py"), path / "__main__.py"]
    found = [file for file in files if file.is_file()]
    if not found:
        raise LlavaError(f"{path}: is not there; install llava-extensions again")
    return found[0]


def work_of(program: str) -> tuple[Path, ast.Module]:
    """The file with the work of a program, and its content.

    A door is a module that has another module's `main` in its `__all__`; its work is that module's.
    """
    file = file_of(program)
    tree = ast.parse(file.read_bytes(), file)
    sources = {name.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names}
    lists = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and "__all__" in map(ast.unparse, node.targets)
    ]
    passes_on = any("main" in ast.literal_eval(names) for names in lists)
    return work_of(sources["main"]) if passes_on and sources.get("main") else (file, tree)


def sentence(program: str) -> str:
    """The first sentence that a program says about itself."""
    text = ast.get_docstring(work_of(program)[1]) or ""
    return re.split(r"(?<=[.?!])\s", " ".join(text.split()), maxsplit=1)[0]


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    return argparse.ArgumentParser(prog="python -m llava", description="List every program, a line each.")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the list."""
    build_parser().parse_args(argv)
    width = max(len(program) for group in PROGRAMS.values() for program in group)
    for group, programs in PROGRAMS.items():
        print(f"{group}:")
        for program in programs:
            print(f"  {program:{width}}  {sentence(program)}")
    print("\n`python -m NAME --help` describes a program; `python -m llava.scripts DIR` writes scripts/ into a folder.")


if __name__ == "__main__":
    run_program(main)
