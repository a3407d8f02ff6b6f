"""Convert adapters of the original text HydraLoRA to PEFT folders, and back, and routed adapters to plain LoRA.

    python -m hydralora.convert from-original ORIGINAL_ADAPTER OUR_ADAPTER
    python -m hydralora.convert to-original OUR_ADAPTER ORIGINAL_ADAPTER
    python -m hydralora.convert to-lora ADAPTER_OR_LLAVA_CHECKPOINT LORA

The LLaVA checkpoints of MLLM-HydraLoRA are read and written in place, see `original.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hydralora.choices import UNIFORM, Weights
from llava.errors import FlagError, LlavaError
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(prog="python -m hydralora.convert", description="Convert adapters of HydraLoRA.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (
        ("from-original", "write an adapter of the original (adapter_model.bin) as a PEFT folder"),
        ("to-original", "write a HydraLoRA adapter of PEFT in the original's layout"),
        ("to-lora", "write an adapter, or the routed layers of a LLaVA checkpoint, as plain LoRA for servers"),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text.capitalize() + ".")
        command.add_argument("source", type=Path, help="folder to read")
        command.add_argument("target", type=Path, help="folder to create")
        if name == "to-lora":
            _add_weights(command)
    return parser


def _add_weights(command: argparse.ArgumentParser) -> None:
    """The options of `to-lora`."""
    command.add_argument(
        "--weights",
        nargs="+",
        type=_named_weights,
        help=f"constant weights of the experts: '{UNIFORM}', 'expert:N', or numbers as 0.2,0.5,0.3. With NAME= in "
        "front, several may be given, a folder each. Not needed for one expert",
    )
    command.add_argument(
        "--base", help="model that the adapter was trained on, to measure the mean routing on --records"
    )
    command.add_argument("--records", type=Path, help="records to measure on, as of hydralora.finetune")
    command.add_argument(
        "--by", choices=["whole", "task", "cluster"], default="whole", help="of what the mean routing is taken"
    )
    command.add_argument("--clusters", type=int, default=4, help="number of clusters of --by cluster")
    command.add_argument("--max-length", type=int, default=512, help="longest record in tokens")


def _named_weights(text: str) -> tuple[str, Weights]:
    """Name, which may be empty, and weights in one value of --weights."""
    name, _, value = text.rpartition("=")
    if value == UNIFORM:
        return name, UNIFORM
    try:
        if value.startswith("expert:"):
            return name, int(value.removeprefix("expert:"))
        return name, [float(number) for number in value.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected '{UNIFORM}', 'expert:N' or numbers as 0.2,0.5,0.3, with NAME= in front or not"
        ) from error


def _to_lora(args: argparse.Namespace) -> None:
    """Write plain LoRA, and print what was written.

    Raises:
        ValueError: the options contradict each other, or something cannot be converted.
    """
    if (args.base is None) != (args.records is None):
        raise FlagError("--base and --records belong together: the mean routing is measured by the one on the other")
    if args.base is not None:
        if args.weights:
            raise FlagError("--weights and --records are two choices of weights; pass one of them")
        from hydralora.to_lora import convert_measured

        for found in convert_measured(
            args.source, args.target, args.base, args.records, args.by, args.clusters, args.max_length
        ):
            report = found.report
            if report is not None:
                print(
                    f"{found.folder}: on {report.tokens} tokens the logits move by {report.relative_error:.2%}, "
                    f"{report.divergence:.4f} nats, and {report.agreement:.1%} of the next tokens stay"
                )
        return
    from hydralora.to_lora import convert_files

    named = args.weights or []
    if len({name for name, _ in named}) < len(named) or (len(named) > 1 and any(not name for name, _ in named)):
        raise FlagError("several --weights need a different NAME= each")
    single = named[0][1] if named else None
    several = bool(named) and bool(named[0][0])
    for folder in convert_files(args.source, args.target, dict(named) if several else single):
        print(f"{folder}: plain LoRA; load it with PeftModel.from_pretrained, or serve it")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; a folder that cannot be converted ends it with a message and status 1."""
    args = build_parser().parse_args(argv)
    from hydralora.tuner.original import export_adapter, import_adapter

    try:
        if args.command == "from-original":
            config = import_adapter(args.source, args.target)
            print(
                f"{args.target}: {config.lora_nums} experts of rank {config.r}; load it with PeftModel.from_pretrained"
            )
        elif args.command == "to-lora":
            _to_lora(args)
        else:
            export_adapter(args.source, args.target)
            print(f"{args.target}: written for the original's PEFT")
    except (ValueError, OSError, LlavaError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_program(main)
