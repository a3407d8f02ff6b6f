"""Answering questions in LaVIN's prompts: the model of a command line, and the way to a finished answers file.

Batches, resuming, images and sampling are those of `llava/eval/answering/runner.py`; LaVIN brings its order of tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.images import load_image
from llava.errors import FlagError
from llava.eval.answering.answers import (
    AnswersFile,
    Task,
    answer_row,
    refuse_foreign_answers,
    refuse_other_settings,
    settings_path,
)
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import LoadedModel, choose_device, choose_dtype, load_model
from llava.eval.answering.options import json_values
from llava.eval.answering.processes import Processes, part_of, put_together
from llava.eval.answering.questions import read_jsonl
from llava.eval.answering.runner import Prompt, answer_tasks
from llava.runtime.hub import get_model_name_from_path
from llava.runtime.places import Input, refuse_file, refuse_folder, same_place
from llava.runtime.ranges import NOT_NEGATIVE, check_ranges
from llava.runtime.weights.fingerprint import weights_fingerprint
from mma.lavin.adapter_files import ready_folder
from mma.lavin.data.tokens import prompt_ids
from mma.lavin.eval_options import ADAPTER_OPTIONS, ANSWER_RANGES, BITS, MODEL_RANGES, check_adapters
from mma.lavin.weights.base import BaseWeights, base_folder
from mma.lavin.weights.choices import AUTO
from mma.original import SETTINGS, is_bottleneck

CONV_MODE = "lavin"
"""In the settings of an answers file, in place of a conversation template."""

ANSWERS_FILE = "answers.jsonl"


def make_prompt(key: str, task: Task, loaded: LoadedModel) -> Prompt:
    """A task in LaVIN's order of tokens; `task.question` is the prompt."""
    ids = prompt_ids(loaded.tokenizer, task.question, bool(task.images))  # (T,)
    length = len(ids) + len(task.images) * (loaded.patches_per_image - 1)
    return Prompt(key, task, ids, length, loaded.answer_end())


def continued_text(prompt: Prompt, ids: Sequence[int], loaded: LoadedModel) -> str:
    """What the model has written behind the prompt, its leading white space included, up to the end of the answer.

    The original decodes prompt and answer together. Decoded alone, an answer loses the blank that its first token
    begins with, which moves every character that MME judges.
    """
    tokenizer = loaded.tokenizer
    before = [token for token in prompt.input_ids.tolist() if token != IMAGE_TOKEN_INDEX]
    head = tokenizer.decode(before, skip_special_tokens=True)
    return tokenizer.decode([*before, *prompt.end.before(ids)], skip_special_tokens=True)[len(head) :]


def given_options(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """The options that a command line gives, without defaults."""
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return vars(parser.parse_args(list(words)))


class Folders(NamedTuple):
    """What can be loaded: the base, and the adapters on it."""

    base: Path
    adapters: Path


def find_folders(args: argparse.Namespace, given: dict[str, Any], processes: Processes) -> Folders:
    """Base and adapters as folders, converted by the first process where that has not been done; all must call this.

    Args:
        args: of `add_model_options`.
        given: see `given_options`.
        processes: of this run.

    Raises:
        CheckpointError: files are missing, damaged, or do not belong together.
        FlagError: a tower is given for a folder, which names its own.
    """
    adapters = Path(args.adapter_path)
    if args.vision_tower is not None and not adapters.is_file():
        raise FlagError(
            f"--vision_tower {args.vision_tower}: is for a .pth file; the config.json of {adapters} has its own"
        )
    if args.vicuna_weights != AUTO and not args.use_vicuna:
        raise FlagError(f"--vicuna_weights {args.vicuna_weights}: needs --use_vicuna")
    wanted = BaseWeights(args.ckpt_dir, args.llm_model, args.use_vicuna, args.vicuna_weights)
    if adapters.is_file() and wanted.use_vicuna and not wanted.adds_as_original and processes.is_first:
        print(
            f"{adapters}: if LaVIN's own code trained these adapters on Vicuna, as the published ones, they need its "
            "sum of LLaMA and the difference: pass --vicuna_weights original (see docs/lavin.md)"
        )
    with processes.first_alone():
        base = base_folder(wanted)
        if adapters.is_file():
            settings = {name: given[name] for name in SETTINGS if name in given}
            defaults = {name: getattr(args, name) for name in SETTINGS}
            adapters = ready_folder(adapters, base, args.vision_tower, defaults, **settings)
    return Folders(base, adapters)


def load_lavin(args: argparse.Namespace, given: dict[str, Any], folders: Folders, device: str) -> LoadedModel:
    """The model of a command line.

    Args:
        args: of `add_model_options`.
        given: see `given_options`.
        folders: see `find_folders`.
        device: where the model goes.

    Raises:
        FlagError: an option contradicts the checkpoint, or the device is not there.
        CheckpointError: base or adapters cannot be loaded.
    """
    bits = BITS[args.bits]
    loaded = load_model(
        str(folders.adapters),
        str(folders.base),
        device=device,
        torch_dtype=args.torch_dtype,
        load_8bit=bits == 8,
        load_4bit=bits == 4,
    )
    config = loaded.model.extensions.configs.get("mma")
    if config is None:
        raise FlagError(f"--adapter_path {args.adapter_path}: is no checkpoint of LaVIN; it has no adapters")
    projector = loaded.model.get_model().mm_projector
    described = config | {"hidden_proj": projector[0].out_features if is_bottleneck(projector) else "no such projector"}
    check_adapters({name: given[name] for name in ADAPTER_OPTIONS if name in given}, described, args.adapter_path)
    if args.shifted_decoding is not None:
        config["shifted_decoding"] = args.shifted_decoding
    loaded.model.config.tokenizer_model_max_length = args.max_seq_len - 1  # the modality token has no place here
    return loaded


def device_of(args: argparse.Namespace, processes: Processes) -> str:
    """`--device`, or a GPU for each process."""
    if args.device is None and processes.count > 1 and torch.cuda.is_available():
        return f"cuda:{processes.local_rank % torch.cuda.device_count()}"
    return choose_device(args.device)


def generation_options(args: argparse.Namespace, max_new_tokens: int) -> GenerationOptions:
    """How answers are sampled; checks what else can be wrong without the model.

    Raises:
        FlagError: a value is out of range.
    """
    check_ranges(args, MODEL_RANGES | ANSWER_RANGES)
    check_ranges(args, {"num_workers": NOT_NEGATIVE}, dashes=True)
    temperature = args.generation_temperature
    return GenerationOptions(temperature, args.top_p, max_new_tokens=max_new_tokens, seed=args.seed)


def output_folder(
    args: argparse.Namespace, name: str, reads: Sequence[Input] = (), may_contain: Sequence[Input] = ()
) -> Path:
    """`--output_dir`, or a folder in the checkpoint; next to a file of the original, one of its name holds it.

    Args:
        args: of `eval_options`.
        name: of the folder in the checkpoint.
        reads: folders that `--output_dir` must not fall on.
        may_contain: folders that it may be in, but must not be.

    Raises:
        FlagError: neither says a place, or `--output_dir` falls on what the program reads.
    """
    if args.output_dir is not None:
        refuse_folder("--output_dir", args.output_dir, [Input("--ckpt_dir", args.ckpt_dir), *reads])
        for one in (Input("--adapter_path", args.adapter_path), *may_contain):
            if one.place is not None and same_place(Path(args.output_dir), one.place):
                raise FlagError(
                    f"--output_dir {args.output_dir}: is also {one.flag} {one.path}, which the program reads; name "
                    "another folder"
                )
        return Path(args.output_dir)
    adapters = Path(args.adapter_path)
    if not adapters.exists():  # a folder of that name would pass for the checkpoint from then on
        raise FlagError(
            f"--adapter_path {adapters}: no such file or folder; for a name on a model hub, say by --output_dir where "
            "the answers go"
        )
    return (adapters.with_suffix("") if adapters.is_file() else adapters) / name


def answer_all(
    args: argparse.Namespace,
    given: dict[str, Any],
    tasks: Sequence[Task],
    image_folder: Path,
    folder: Path,
    options: GenerationOptions,
    processes: Processes,
) -> dict[str, str]:
    """The answers to `tasks` by the id of the question, in their order; continued where a run was interrupted.

    Args:
        args: of `eval_options`.
        given: see `given_options`.
        tasks: questions with ids of their own.
        image_folder: folder that image names are relative to.
        folder: where the answers go.
        options: how they are generated.
        processes: those that share the work; the model is loaded where there is something to ask.

    Raises:
        LlavaError: an image, the checkpoint or a file of answers is wrong; the message says what to do.
    """
    # Each process writes a part of its own; the parts are joined in the end, so nobody waits for a lock.
    whole, settings = folder / ANSWERS_FILE, answer_settings(args, options, processes)
    alone = processes.count == 1
    # Refused before a model is loaded: an output that would replace something that is read.
    inputs = {
        "--adapter_path": args.adapter_path,
        "--ckpt_dir": args.ckpt_dir,
        "--caption_file": getattr(args, "caption_file", None),
        "the images": image_folder,
    }
    read = [Input(flag, path) for flag, path in inputs.items()]
    refuse_file("--output_dir", whole, read, also=[settings_path(whole)])
    # A single process leaves both checks to `AnswersFile`; one of several hands it a part, not the whole file.
    if not alone:
        refuse_foreign_answers(whole)
        if not args.restart:
            refuse_other_settings(whole, settings)
    # Answers of an interrupted run are kept: only what is pending gets asked.
    answers = AnswersFile(
        whole if alone else part_of(whole, processes.rank, processes.count),
        processes.part(tasks),
        model_id=get_model_name_from_path(args.adapter_path),
        settings=settings,
        arguments=json_values(args),
        to_row=answer_row,
        restart=args.restart,
    )
    print(f"{answers.path}: {len(answers.rows)} of {len(answers.keys)} questions are answered")
    # Decided together: the first process may have to convert Meta's weights while the others wait, so all must call.
    folders = find_folders(args, given, processes) if processes.any(bool(answers.pending)) else None
    if answers.pending and folders is not None:
        speed = answer_tasks(
            answers,
            load_lavin(args, given, folders, device_of(args, processes)),
            lambda image, where: load_image(image_folder, image, row=where),
            options,
            conv_mode=CONV_MODE,
            batch_size=args.max_batch_size,
            workers=args.num_workers,
            to_prompt=make_prompt,
            to_text=continued_text,
        )
        print(f"{answers.path}: {speed}")
    answers.finish()
    if not alone:
        put_together(processes, whole)
    return {str(row["question_id"]): row["text"] for _, row in read_jsonl(whole)}


def answer_settings(args: argparse.Namespace, options: GenerationOptions, processes: Processes) -> dict[str, object]:
    """All that decides the answer to a given question; a run is continued only with the same settings."""
    device = device_of(args, processes)
    names = ("vision_tower", *SETTINGS) if Path(args.adapter_path).is_file() else ()  # a folder says these itself
    return {
        "weights": weights_fingerprint(args.adapter_path) or args.adapter_path,
        "ckpt_dir": args.ckpt_dir,
        "llm_model": args.llm_model,
        "use_vicuna": args.use_vicuna,
        "vicuna_weights": None if args.vicuna_weights == AUTO else args.vicuna_weights,
        "bits": BITS[args.bits],
        "max_seq_len": args.max_seq_len,
        "shifted_decoding": args.shifted_decoding,
        "torch_dtype": str(choose_dtype(args.torch_dtype, "cpu" if device == "cpu" else "cuda")),
        "file_read_with": {name: getattr(args, name) for name in names} or None,
        **vars(options),
    }
