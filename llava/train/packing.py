"""`--packing True`: what it cannot be combined with, said before anything is loaded.

The samples of a micro batch share rows (`llava/data/packing.py`), so what acts on a whole row must know of it: every
extension says whether it does, and so does a method of PEFT that looks at more than single tokens.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from llava.errors import FlagError
from llava.extension import installed_extensions
from llava.model.language_model.packed_attention import PACKABLE
from llava.train.options import RunArguments
from llava.train.peft_file import FLAG, read_file


def packing_problems(args: RunArguments) -> list[str]:
    """Why the run cannot pack, one line each; nothing without the flag."""
    if not args.data.packing:
        return []
    problems = []
    if args.training.per_device_train_batch_size < 2:
        problems.append(
            "--packing True with --per_device_train_batch_size 1: samples of one micro batch share rows, and there is "
            "one; raise it (and lower --gradient_accumulation_steps by the same factor)"
        )
    attention = args.model.attn_implementation
    if attention is not None and attention not in PACKABLE:
        problems.append(
            f"--packing True and --attn_implementation {attention}: it does not keep the samples of a row apart; use "
            f"one of {', '.join(PACKABLE)}"
        )
    for name, extension in installed_extensions(list(args.extensions)).items() if args.extensions else ():
        reason = extension.packing_problem(args.extensions[name])
        if reason is not None:
            problems.append(f"--packing True and the extension '{name}': {reason}; leave one of them out")
    reason = None if args.training.peft_config is None else _adapter_problem(args.training.peft_config)
    if reason is not None:
        problems.append(f"--packing True and {FLAG} {args.training.peft_config}: {reason}")
    return problems


def _adapter_problem(path: str) -> str | None:
    """Why the adapter that a file describes cannot be trained on packed rows; None also for a file that is wrong."""
    try:
        settings = read_file(path)
    except FlagError:  # reported by the check of that option
        return None
    config = PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]]
    ask = getattr(config, "packing_problem", None)
    reason: str | None = None if ask is None else ask(settings)
    return reason
