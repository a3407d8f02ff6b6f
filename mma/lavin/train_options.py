"""The options of LaVIN's `train.py`, with its names, types, choices and defaults.

What each becomes stands in `train_arguments.py`. Options that the original never reads are here so that its commands
run; their help says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.runtime.config_files.words import add_config
from mma.config import TOWER, MmaConfig
from mma.lavin.data.prompts import FORMATS, OPTIONS
from mma.lavin.weights.choices import AUTO, BITS, VICUNA_CHOICES, VICUNA_HELP


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--batch_size", type=int, default=64, help="samples in one batch of one process")
    add("--epochs", type=int, default=400, help="epochs of the whole run")
    add("--bits", type=str, default="16bit", choices=list(BITS), help="precision of the frozen language model")
    add("--accum_iter", type=int, default=1, help="batches of one update")
    add("--gradient_checkpointing", action="store_true", help="compute layers again in the backward pass")
    add("--cpu_load", action="store_true", help="without effect: weights are always read from mapped files")
    add("--output_dir", default="./output_dir", help="where checkpoints go; one that holds any is resumed")
    add("--log_dir", default="./output_dir", help="write TensorBoard files here; none are written if it is not given")
    add("--device", default="cuda", help="cuda, or cpu")
    add("--seed", type=int, default=0, help="seed of everything that is drawn")
    add("--resume", default="", help="folder of a checkpoint to resume, if not the newest in --output_dir")
    add("--start_epoch", type=int, default=0, help="only 0: a resumed run continues where its checkpoint says")
    add("--num_workers", type=int, default=10, help="processes that prepare data")
    add("--pin_mem", action="store_true", default=True, help="keep batches in pinned memory (the default)")
    add("--no_pin_mem", action="store_false", dest="pin_mem", help="do not")
    add("--world_size", type=int, default=1, help="without effect: the launcher decides")
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    add("--dist_on_itp", action="store_true", help="refused: a cluster of the authors; use torchrun")
    add("--dist_url", default="env://", help="only env://, what launchers set up")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add(
        "--llama_model_path",
        type=str,
        default="./llama",
        help="folder with 7B/, vicuna_7B/, ... and tokenizer.model; or a folder or hub id that transformers reads",
    )
    add("--llm_model", type=str, default="7B", help="name of the folder of the LLaMA weights")
    add("--use_vicuna", action="store_true", help="start from vicuna_<llm_model>, full weights or the difference")
    add("--vicuna_weights", choices=VICUNA_CHOICES, default=AUTO, help=VICUNA_HELP)
    add(
        "--adapter_type",
        type=str,
        default=MmaConfig.adapter_type,
        choices=["block", "attn"],
        help="adapters of the decoder layers",
    )
    add(
        "--visual_adapter_type",
        type=str,
        default=MmaConfig.visual_adapter_type,
        choices=["normal", "router", "router_block"],
        help="adapters of the vision tower",
    )
    add("--adapter_dim", type=int, default=MmaConfig.adapter_dim, help="hidden width of the adapters")
    add("--hidden_proj", type=int, default=128, help="hidden width of the projector")
    add("--temperature", type=float, default=MmaConfig.temperature, help="temperature of the routing")
    add("--n_prompt", type=int, default=10, help="without effect: the original never reads it in training")
    add("--adapter_scale", type=float, default=MmaConfig.adapter_scale, help="factor of the update of a routed adapter")
    add(
        "--drop_path",
        type=float,
        default=MmaConfig.drop_path,
        help="probability of skipping a part of a layer for a sample",
    )
    add("--max_seq_len", type=int, default=512, help="positions of a sample, the modality token included")


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimizer").add_argument
    add("--weight_decay", type=float, default=0.05, help="weight decay; biases have none")
    add("--lr", type=float, default=None, help="learning rate; default: --blr * samples per update / 256")
    add("--clip_grad", type=float, default=None, help="largest norm of the gradient; default: not clipped")
    add("--blr", type=float, default=1e-3, help="learning rate for 256 samples per update")
    add("--min_lr", type=float, default=0.0, help="learning rate at the end")
    add("--warmup_epochs", type=float, default=40, help="epochs, or a part of one, in which the rate rises")


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--data_path", type=str, default="/instruction_dataset/", help="without effect: the original never reads it")
    add("--prompt_format", type=str, default="CQM-A", choices=list(FORMATS), help="lines of prompt and answer")
    add("--options", type=list, default=list(OPTIONS), help="letters of the choices, as ABCDE")
    add("--caption_file", type=str, default="../data/captions.json", help="captions, read with --use_caption")
    add("--data_root", type=str, default="../data", help="folder with problems.json, pid_splits.json, images/")
    add("--eval_split", type=str, default=None, help="split of ScienceQA whose loss --eval_strategy logs: val")
    add("--use_caption", action="store_true", help="put the captions of images into the context")
    add("--do_pretrain", action="store_true", help="train on the chatbot's data: all_data.json of --data_root")


def build_parser() -> argparse.ArgumentParser:
    """The options; what it does not know belongs to llava's training."""
    parser = argparse.ArgumentParser(
        prog="python -m mma.train",
        usage="%(prog)s --llama_model_path WEIGHTS --data_root DATA --output_dir OUTPUT [options]",
        description="Train LaVIN on ScienceQA or on the chatbot's data, with the command lines of the original.",
        epilog="Every option of python -m llava.train.train may be given too; --help-all lists them (--bf16 True, "
        f"--max_steps 10, --vision_tower FOLDER; default tower: {TOWER}), unless one of the above means the same.",
        allow_abbrev=False,
    )
    for add in (_add_run, _add_model, _add_optimizer, _add_data):
        add(parser)
    add_config(parser)
    return parser


def given(words: Sequence[str]) -> set[str]:
    """Names of the options that a command line gives."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_known_args(list(words))[0]))
