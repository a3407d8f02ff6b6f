"""Answers in batches against one question at a time, as upstream's programs ask: images a second, same answers.

    python -m benchmarks.eval --output benchmarks/results/eval-cpu.json

A LLaVA of random weights answers questions about drawn images: in upstream's way (open an image, preprocess it, one
`generate`), and by the runner of `llava/eval/answering/runner.py` with batches of several sizes. The ways take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.experiments.common import tiny
from benchmarks.experiments.common.sizes import Sizes
from benchmarks.measuring import Clock, clock_for
from benchmarks.record import check_run, provenance, show_and_write
from llava.conversation import conv_templates
from llava.data.images import load_image
from llava.data.pixels import process_images
from llava.errors import FlagError
from llava.eval.answering.answers import AnswersFile, Task
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.prompts import add_image_markers, ask, prompt_ids
from llava.eval.answering.runner import answer_tasks
from llava.runtime.program import run_program
from llava.runtime.tokenizer import load_tokenizer
from llava.train.build import build_model
from llava.train.train import parse_args

PROGRAM = "benchmarks.eval"
TEMPLATE = "vicuna_v1"
WORDS = (
    *("what", "which", "how", "many", "colour", "shape", "left", "right", "above", "below"),
    *("is", "are", "there", "the", "a", "of", "picture", "square", "circle"),
)
VOCABULARY = 400


@dataclass(frozen=True)
class Model:
    """A model that is measured: its name and its sizes."""

    name: str
    sizes: Sizes


MODELS = {
    "cpu": (
        Model("tiny", Sizes(image=48, patch=16)),
        Model("mid-size", Sizes(image=96, patch=16, width=384, layers=8, heads=6, tower_mlp=1536, mlp=1024)),
    ),
    "cuda": (
        Model("tiny", Sizes(image=48, patch=16)),
        Model(
            "size of 1B", Sizes(image=336, patch=14, width=2048, layers=22, heads=16, tower_mlp=8192, mlp=5632,
                                max_length=2048)
        ),
    ),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=1, help="threads of torch on the CPU (default %(default)s)")
    add("--questions", type=int, default=64, help="questions, each about an image of its own (default %(default)s)")
    add("--tokens", type=int, nargs="+", default=[8, 32], help="tokens of an answer (default 8 32)")
    add("--batch-sizes", type=int, nargs="+", default=[1, 4, 16], help="of the runner (default 1 4 16)")
    add("--repeats", type=int, default=3, help="timed rounds (default %(default)s)")
    add("--models", nargs="+", default=None, help="names of the models to measure; default: all")
    add("--output", type=Path, default=None, help="JSON file; the table (.md) goes beside it")
    return parser


def build(model: Model, folder: Path, device: str) -> LoadedModel:
    """The model, of random weights, with tower, projector and tokenizer."""
    sizes = replace(model.sizes, vocabulary=VOCABULARY)
    generator = Random(0)
    lines = [conv_templates[TEMPLATE].system] * 50 + [question(generator) for _ in range(400)]
    tiny.save_tower(folder / "tower", sizes, seed=0)
    tiny.save_language_model(folder / "llm", sizes, seed=0)
    tiny.save_tokenizer(folder / "llm", tiny.train_tokenizer(lines, VOCABULARY), sizes.max_length)
    (folder / "rows.json").write_text("[]", encoding="utf-8")
    words: dict[str, Any] = {
        "model_name_or_path": folder / "llm", "vision_tower": folder / "tower", "data_path": folder / "rows.json",
        "output_dir": folder / "out", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_use_im_patch_token": False, "image_aspect_ratio": "pad", "version": "v1", "use_cpu": device == "cpu",
        "bf16": False, "report_to": "none", "tune_mm_mlp_adapter": True,
    }  # fmt: skip
    args = parse_args([word for key, value in words.items() for word in (f"--{key}", str(value))])
    tokenizer = load_tokenizer(str(folder / "llm"))
    torch.manual_seed(0)  # of the projector
    llava: Any = build_model(args, tokenizer)
    llava.config.use_cache = True
    llava = llava.to(device=device, dtype=torch.float32 if device == "cpu" else torch.float16)
    return LoadedModel(model.name, tokenizer, llava.eval(), llava.get_vision_tower().image_processor)


def question(random: Random) -> str:
    """A question of 3 to 24 words."""
    return " ".join(random.choices(WORDS, k=random.randint(3, 24))).capitalize() + "?"


def draw(folder: Path, count: int) -> list[Task]:
    """Questions about images of noise of different sizes, as files."""
    random = Random(1)
    tasks = []
    for number in range(count):
        size = (random.randint(60, 200), random.randint(60, 200))
        image = Image.frombytes("RGB", size, random.randbytes(3 * size[0] * size[1]))
        image.save(folder / f"{number}.png")
        tasks.append(Task(number, question(random), "", (f"{number}.png",), where=f"question {number}"))
    return tasks


def one_by_one(tasks: Sequence[Task], loaded: LoadedModel, folder: Path, tokens: int) -> dict[int, str]:
    """Upstream's loop: read an image, preprocess it, generate, decode; the next one then."""
    answers = {}
    for task in tasks:
        text = add_image_markers(task.question, 1, mm_use_im_start_end=False, where=task.where)
        ids = prompt_ids(ask(text, TEMPLATE, loaded.tokenizer), loaded.tokenizer)[None]
        image = load_image(folder, task.images[0], task.where)
        pixels = process_images([image], loaded.image_processor, loaded.model.config)
        with torch.no_grad():
            output = loaded.model.generate(
                ids.to(loaded.model.device),
                images=pixels.to(loaded.model.device, loaded.model.dtype),
                image_sizes=[image.size],
                attention_mask=torch.ones_like(ids, dtype=torch.bool).to(loaded.model.device),
                do_sample=False,
                max_new_tokens=tokens,
                use_cache=True,
                pad_token_id=loaded.tokenizer.pad_token_id,
            )
        answers[task.question_id] = loaded.tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()
    return answers


def in_batches(
    tasks: Sequence[Task], loaded: LoadedModel, folder: Path, tokens: int, size: int, scratch: Path
) -> dict[int, str]:
    """The runner of the evaluation programs, answers file included."""
    answers = AnswersFile(scratch, tasks, model_id=loaded.name, settings={"size": size}, restart=True)
    options = GenerationOptions(temperature=0, max_new_tokens=tokens)

    def open_image(name: str, where: str) -> Image.Image:
        return load_image(folder, name, where)

    answer_tasks(answers, loaded, open_image, options, conv_mode=TEMPLATE, batch_size=size)
    return {row["question_id"]: row["text"] for row in answers.rows.values()}


def measure(model: Model, tokens: int, args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Images a second of each way, and how many answers are those of one at a time.

    Raises:
        FlagError: an answer of the runner differs from that of one question at a time in float32.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaded, tasks = build(model, folder, args.device), draw(folder, args.questions)
        ways = {"one by one": lambda: one_by_one(tasks, loaded, folder, tokens)}
        for size in args.batch_sizes:
            ways[f"batch {size}"] = lambda size=size: in_batches(
                tasks, loaded, folder, tokens, size, folder / f"answers-{size}.jsonl"
            )
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        answers: dict[str, dict[int, str]] = {}
        one_by_one(tasks[:2], loaded, folder, tokens)  # what happens once
        for number in tqdm(range(args.repeats), desc=f"{model.name}, {tokens} tokens", unit="round"):
            names = list(ways)
            for way in names[number % len(names) :] + names[: number % len(names)]:
                start = clock.read()
                answers[way] = ways[way]()
                seconds[way].append(clock.read() - start)
    reference = answers["one by one"]
    entries = []
    for way, times in seconds.items():
        ratios = [alone / time for alone, time in zip(seconds["one by one"], times, strict=True)]
        same = sum(answers[way][key] == text for key, text in reference.items())
        if same < len(reference) and args.device == "cpu":
            raise FlagError(f"{model.name}, {way}: {len(reference) - same} of {len(reference)} answers differ")
        entries.append(
            {
                "way": way,
                "images_per_second": args.questions / statistics.median(times),
                "speedup": statistics.median(ratios),
                "speedups": ratios,
                "same_answers": same,
            }
        )
    return {"model": model.name, "tokens": tokens, "sizes": asdict(model.sizes), "ways": entries}


def document(record: Mapping[str, Any]) -> str:
    """The Markdown file of a record."""
    settings, where = record["settings"], record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    times = "computing time of the process" if settings["clock"] == "process" else "wall-clock time"
    work = f"{settings['questions']} questions"
    lines = [
        f"# Evaluation in batches: {where['gpu'] or where['cpu']}",
        "",
        f"{record['date'][:10]}; {versions}; {work}; {times}, median of {settings['repeats']} rounds.",
        "",
        "```console",
        f"$ {record['command']}",
        "```",
        "",
        "| model | tokens an answer | way | images/s | times one by one | lowest, highest | same answers |",
        "| --- | --: | --- | --: | --: | --: | --: |",
    ]
    for result in record["results"]:
        for way in result["ways"]:
            spread = f"{min(way['speedups']):.2f}, {max(way['speedups']):.2f}"
            same = f"{way['same_answers']} of {settings['questions']}"
            cells = [result["model"], str(result["tokens"]), way["way"], f"{way['images_per_second']:.2f}"]
            lines.append("| " + " | ".join([*cells, f"{way['speedup']:.2f}", spread, same]) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, show and write.

    Raises:
        FlagError: a flag is out of its range, or the answers differ.
    """
    args = build_parser().parse_args(argv)
    check_run(args.device, args.output)
    known = [model.name for model in MODELS[args.device]]
    if unknown := sorted(set(args.models or known) - set(known)):
        raise FlagError(f"--models {unknown}: on this device there are {known}")
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    clock = clock_for(device, args.threads)
    record = provenance(PROGRAM, sys.argv[1:] if argv is None else argv, device)
    settings = {name: getattr(args, name) for name in ("threads", "questions", "tokens", "batch_sizes", "repeats")}
    record["settings"] = settings | {"clock": clock.name}
    wanted = [model for model in MODELS[args.device] if args.models is None or model.name in args.models]
    record["results"] = [measure(model, tokens, args, clock) for model in wanted for tokens in args.tokens]
    show_and_write(record, document(record), args.output)
    return record


if __name__ == "__main__":
    run_program(main)
