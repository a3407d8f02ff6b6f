"""The table of benchmarks: where each one's files lie, how it is asked, and what becomes of its answers.

Adding one is adding an entry. Files and limits are those of upstream's `scripts/v1_5/eval/*.sh` and
`docs/Evaluation.md`; upstream has no ChartQA and no captions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import FlagError
from llava.eval import eval_captions, eval_chartqa, model_vqa_qbench, model_vqa_science, outcomes
from llava.eval.answering.answers import Task, ToRow, answer_row
from llava.eval.answering.questions import read_questions
from llava.eval.model_vqa_loader import make_task
from llava.eval.outcomes import BenchmarkRun, Outcome
from llava.eval.scoring import mmbench

if TYPE_CHECKING:
    from llava.eval.answering.runner import OpenImage

SHORT, LONG = 128, 1024
"""Upstream's limits on the tokens of an answer, in `model_vqa_loader` and in the other programs."""


def read_jsonl_tasks(path: Path) -> list[Task]:
    """The questions of a JSON-lines file, asked as they stand."""
    return [make_task(question) for question in read_questions(path)]


def images_in(folder: Path) -> OpenImage:
    """A function that opens images by their names below `folder`."""
    from llava.data.images import load_image

    return lambda name, where: load_image(folder, name, row=where)


def images_in_rows(folder: Path) -> OpenImage:
    """A function that decodes images which the question file holds."""
    return mmbench.open_image


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: how the command line calls it.
        title: how papers call it.
        folder: its folder below `playground/data/eval`.
        splits: known splits, the first is asked without `--split`; any other name is tried as well.
        questions: file of questions below the folder; `{split}` stands for the split.
        images: folder of images below the folder; `{split}` as above.
        finish: scores the answers, or converts them for a server.
        read: reads the questions.
        answers: answers file below the folder, with `{split}` and `{model}`.
        max_new_tokens: limit on an answer.
        conv_mode: conversation template without `--conv-mode`.
        to_row: the row of an answer.
        open_images: from the folder of images to a function that opens one.
    """

    name: str
    title: str
    folder: str
    splits: tuple[str, ...]
    questions: str
    images: str
    finish: Callable[[BenchmarkRun], Outcome]
    read: Callable[[Path], list[Task]] = read_jsonl_tasks
    answers: str = "answers/{model}.jsonl"
    max_new_tokens: int = SHORT
    conv_mode: str = "vicuna_v1"
    to_row: ToRow = answer_row
    open_images: Callable[[Path], OpenImage] = images_in


def _letters_in_english(path: Path) -> list[Task]:
    return mmbench.read_tasks(path, single_pred_prompt=True, lang="en")


def _letters_in_chinese(path: Path) -> list[Task]:
    return mmbench.read_tasks(path, single_pred_prompt=True, lang="cn")


def _science_letters(path: Path) -> list[Task]:
    return model_vqa_science.read_tasks(path, single_pred_prompt=True)


def _qbench_in_chinese(path: Path) -> list[Task]:
    return model_vqa_qbench.read_tasks(path, lang="zh")


MMBENCH = Benchmark(
    name="mmbench",
    title="MMBench",
    folder="mmbench",
    splits=("mmbench_dev_20230712",),
    questions="{split}.tsv",
    images="",
    finish=outcomes.mmbench_sheet,
    read=_letters_in_english,
    answers="answers/{split}/{model}.jsonl",
    max_new_tokens=LONG,
    to_row=mmbench.to_row,
    open_images=images_in_rows,
)

QBENCH = Benchmark(
    name="qbench",
    title="Q-Bench",
    folder="qbench",
    splits=("dev", "test"),
    questions="llvisionqa_{split}.json",
    images="images_llvisionqa",
    finish=outcomes.qbench,
    read=model_vqa_qbench.read_tasks,
    answers="answers/llvisionqa_{split}_{model}.jsonl",
    max_new_tokens=LONG,
    conv_mode="llava_v1",
    to_row=model_vqa_qbench.to_row,
)

TABLE = (
    Benchmark(
        name="vqav2",
        title="VQAv2",
        folder="vqav2",
        splits=("llava_vqav2_mscoco_test-dev2015", "llava_vqav2_mscoco_test2015"),
        questions="{split}.jsonl",
        images="test2015",
        finish=outcomes.vqav2,
        answers="answers/{split}/{model}/merge.jsonl",
    ),
    Benchmark(
        name="gqa",
        title="GQA",
        folder="gqa",
        splits=("llava_gqa_testdev_balanced",),
        questions="{split}.jsonl",
        images="data/images",
        finish=outcomes.gqa,
        answers="answers/{split}/{model}/merge.jsonl",
    ),
    Benchmark("vizwiz", "VizWiz", "vizwiz", ("test",), "llava_{split}.jsonl", "{split}", outcomes.vizwiz),
    Benchmark(
        name="textvqa",
        title="TextVQA",
        folder="textvqa",
        splits=("llava_textvqa_val_v051_ocr",),
        questions="{split}.jsonl",
        images="train_images",
        finish=outcomes.textvqa,
    ),
    Benchmark(
        name="scienceqa",
        title="ScienceQA",
        folder="scienceqa",
        splits=("test", "val", "minitest", "minival"),
        questions="llava_{split}_CQM-A.json",
        images="images/{split}",
        finish=outcomes.science_qa,
        read=_science_letters,
        max_new_tokens=LONG,
    ),
    Benchmark("pope", "POPE", "pope", ("test",), "llava_pope_{split}.jsonl", "val2014", outcomes.pope),
    Benchmark("mme", "MME", "MME", ("llava_mme",), "{split}.jsonl", "MME_Benchmark_release_version", outcomes.mme),
    MMBENCH,
    replace(
        MMBENCH,
        name="mmbench_cn",
        title="MMBench-CN",
        folder="mmbench_cn",
        splits=("mmbench_dev_cn_20231003",),
        read=_letters_in_chinese,
    ),
    Benchmark(
        name="seed",
        title="SEED-Bench",
        folder="seed_bench",
        splits=("llava-seed-bench",),
        questions="{split}.jsonl",
        images="",
        finish=outcomes.seed,
        answers="answers/{model}/merge.jsonl",
    ),
    Benchmark(
        name="mmvet",
        title="MM-Vet",
        folder="mm-vet",
        splits=("llava-mm-vet",),
        questions="{split}.jsonl",
        images="images",
        finish=outcomes.mmvet,
        max_new_tokens=LONG,
    ),
    Benchmark(
        name="llavabench",
        title="LLaVA-Bench (in the wild)",
        folder="llava-bench-in-the-wild",
        splits=("questions",),
        questions="{split}.jsonl",
        images="images",
        finish=outcomes.llava_bench,
        max_new_tokens=LONG,
    ),
    QBENCH,
    replace(
        QBENCH,
        name="qbench_zh",
        title="Q-Bench (Chinese)",
        read=_qbench_in_chinese,
        answers="answers/llvisionqa_zh_{split}_{model}.jsonl",
    ),
    Benchmark(
        name="chartqa",
        title="ChartQA",
        folder="chartqa",
        splits=("test", "val"),
        questions="{split}",
        images="{split}/png",
        finish=outcomes.chartqa,
        read=eval_chartqa.read_tasks,
    ),
    Benchmark(
        name="coco_caption",
        title="COCO captions",
        folder="coco_caption",
        splits=("captions_val2014",),
        questions="annotations/{split}.json",
        images="val2014",
        finish=outcomes.captions,
        read=eval_captions.read_tasks,
    ),
)

BENCHMARKS = {benchmark.name: benchmark for benchmark in TABLE}


def find(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        FlagError: there is none; lists those that exist.
    """
    if name not in BENCHMARKS:
        raise FlagError(f"no benchmark '{name}'; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
