"""The options that LaVIN's `eval.py` and `eval_mme.py` share, and ours.

The originals take Python literals (`--use_vicuna True`); a bare `--use_vicuna` is true as well. What describes the
adapters is in the checkpoint: such an option may be left out, and is refused if it contradicts.
"""

from __future__ import annotations

import argparse
from typing import Any

from llava.errors import FlagError
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, POSITIVE, Range
from mma.lavin.data.prompts import OPTIONS
from mma.lavin.weights.choices import AUTO, VICUNA_CHOICES, VICUNA_HELP
from mma.lavin.weights.choices import BITS as TRAINING_BITS

BITS = {"16bits": 16, **TRAINING_BITS}
"""The original's evaluation has another word for the full precision than its training."""

ADAPTER_OPTIONS = ("adapter_type", "visual_adapter_type", "adapter_dim", "adapter_scale", "temperature", "hidden_proj")
"""Options that describe the adapters, by the names in their configuration, and the projector."""

SAME_TYPES = {"repattn": "attn"}
"""The default of the original, which means the same as the other."""


MODEL_RANGES = {
    "adapter_dim": COUNT,
    "adapter_scale": POSITIVE,
    "temperature": POSITIVE,
    "hidden_proj": COUNT,
    "max_seq_len": Range(2, hint="the modality token takes one position"),
    "max_batch_size": COUNT,
}
"""What the numbers of `add_model_options` may be, and the size of a batch."""

ANSWER_RANGES = {
    "generation_temperature": NOT_NEGATIVE,
    "top_p": Range(0, 1, hint="0 keeps the most probable token"),
    "max_new_tokens": COUNT,
    "limit": COUNT,
}
"""What the numbers of `add_answer_options` may be, and the longest answer."""


def boolean(text: str) -> bool:
    """A Python literal, True or False."""
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return values[text.lower()]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Base, adapters and how they are loaded."""
    add = parser.add_argument_group("model").add_argument
    # LaVIN's own names and defaults: its commands work as they are. Those that name an unused value say so.
    add("--ckpt_dir", type=str, required=True, help="folder with 7B/, vicuna_7B/, ...; or one that transformers reads")
    add("--llm_model", type=str, default="7B", help="name of the folder of the LLaMA weights")
    add(
        "--adapter_path", type=str, required=True, help="what python -m mma.train wrote, or a .pth file of the original"
    )
    add("--tokenizer_path", type=str, default=None, help="without effect: the tokenizer lies with the weights")
    add("--use_vicuna", type=boolean, nargs="?", const=True, default=False, help="the base is vicuna_<llm_model>")
    add("--vicuna_weights", choices=VICUNA_CHOICES, default=AUTO, help=VICUNA_HELP)
    add("--bits", type=str, default="16bits", choices=list(BITS), help="precision of the language model")
    add("--cpu_load", type=boolean, nargs="?", const=True, default=False, help="without effect: files are mapped")
    # The shape of the adapters. A `.pth` file of the original does not say it; a checkpoint of ours does.
    add("--adapter_type", type=str, default="repattn", help="attn (also called repattn) or block")
    add("--visual_adapter_type", type=str, default="normal", help="normal, router or router_block")
    add("--adapter_dim", type=int, default=8, help="hidden width of the adapters")
    add(
        "--adapter_scale",
        type=float,
        default=1,
        help="factor of the update of a routed adapter; default: what the checkpoint says, else 1",
    )
    add("--temperature", type=float, default=10.0, help="of the routing; default: what the checkpoint says")
    add("--hidden_proj", type=int, default=128, help="hidden width of the projector")
    # What a prompt may hold, and the tower; in a checkpoint of ours the tower is part of the configuration.
    add("--n_prompt", type=int, default=10, help="without effect: the tower says how many features an image has")
    add("--max_seq_len", type=int, required=True, help="positions of a prompt, the modality token included")
    add(
        "--vision_tower",
        type=str,
        default=None,
        help="tower of a .pth file, and of nothing else; default: CLIP ViT-L/14",
    )
    # Not in the original, which runs in half precision on the current GPU.
    add("--device", type=str, default=None, help="cuda, cuda:1, cpu, ...; default: a GPU if there is one")
    add(
        "--torch-dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="dtype of the weights"
    )
    add(
        "--shifted_decoding",
        type=boolean,
        nargs="?",
        const=True,
        default=None,
        help="decode with the positions of the original, one too low after the prompt",
    )


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """How answers are generated, and where they go."""
    add = parser.add_argument_group("answers").add_argument
    add("--max_batch_size", type=int, required=True, help="questions answered together; no effect on the answers")
    add("--generation_temperature", type=float, default=0.1, help="of sampling; 0: the most probable token each time")
    add("--top_p", type=float, default=0.75, help="sample from the best tokens up to this mass; 0: the best one")
    add("--seed", type=int, default=0, help="seed of sampling; each question has a stream of its own")
    add("--output_dir", type=str, default=None, help="where answers and scores go; default: a folder in the checkpoint")
    add("--limit", type=int, default=None, help="answer only this many questions, the first ones")
    add("--num-workers", type=int, default=4, help="threads that read images")
    add("--restart", action="store_true", help="replace existing answers instead of continuing them")


def add_scienceqa_options(parser: argparse.ArgumentParser) -> None:
    """Data and prompts; MME's original takes them too and reads none of them."""
    add = parser.add_argument_group("data").add_argument
    add("--data_root", type=str, required=True, help="folder with problems.json, pid_splits.json, images/")
    add("--caption_file", type=str, default=None, help="captions, read with --use_caption")
    add("--split", type=str, default="val", help="list of pid_splits.json")
    add("--prompt_format", type=str, default="QCM-ALE", help="lines of the prompt; see python -m mma.train --help")
    add("--use_caption", type=boolean, nargs="?", const=True, default=False, help="put captions into the context")
    add("--options", type=list, default=list(OPTIONS), help="letters of the choices, as ABCDE")


def check_adapters(given: dict[str, Any], config: dict[str, Any], checkpoint: str) -> None:
    """Refuse options that contradict the checkpoint.

    Args:
        given: those of `ADAPTER_OPTIONS` that the command line gives.
        config: configuration of the adapters in the checkpoint, and `hidden_proj`.
        checkpoint: for messages.

    Raises:
        FlagError: names every contradiction.
    """
    wanted = {name: SAME_TYPES.get(value, value) for name, value in given.items() if name in ADAPTER_OPTIONS}
    wrong = [f"--{name} {value}, but {config[name]}" for name, value in wanted.items() if config[name] != value]
    if wrong:
        raise FlagError(f"{checkpoint}: was not trained so: {'; '.join(wrong)}; leave the options out")
