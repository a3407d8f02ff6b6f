"""The `generation_config.json` of a base model: what of it can be saved, and the tokens at which generation ends.

transformers reads an invalid one but refuses to write it. Vicuna's is: it sets `temperature` and `top_p` without
sampling, so a run would fail when it first saves full weights.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from llava.conversation import TOKENIZER_VERSION
from llava.data.answer_end import turn_end
from llava.data.templates import template_of_mode
from llava.data.trained_template import TEMPLATE_KEY
from llava.runtime.tokenizer import add_ends

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def mend_generation_config(model: Any, source: str) -> None:
    """Leave out what the chosen way of decoding never reads, and say so; what `generate` does is not changed.

    Args:
        model: its `generation_config` is replaced if it is invalid.
        source: folder or hub id that it came from, for the message.
    """
    problem = _problem(model.generation_config)
    if problem is None:
        return
    values = model.generation_config.to_dict()
    sampling = values.get("do_sample") is True
    beams = (values.get("num_beams") or 1) > 1
    idle = [name for name in (() if sampling else SAMPLING) + (() if beams else BEAMS) if values.get(name) is not None]
    mended = GenerationConfig(**{name: value for name, value in values.items() if name not in idle})
    if _problem(mended) is not None:  # wrong in another way: keep the ids alone
        idle = sorted(name for name, value in values.items() if value is not None and name not in TOKENS)
        mended = GenerationConfig(**{name: values.get(name) for name in TOKENS})
    model.generation_config = mended
    print(f"{source}: its generation_config.json is invalid and could not be saved; left out: {', '.join(idle)}")


def add_trained_end(model: Any, tokenizer: Any) -> None:
    """Make generation end where the template of the training ends an answer; earlier versions saved no such token.

    Args:
        model: loaded, its configuration with the template (`take_trained_template`); other models stay as they are.
        tokenizer: of the model.
    """
    name = getattr(model.config, TEMPLATE_KEY, None)
    if name is None or (name == TOKENIZER_VERSION and not tokenizer.chat_template):
        return
    turn = turn_end(template_of_mode(name, tokenizer), tokenizer)
    if turn is not None and turn.token is not None:
        add_ends(model.generation_config, [turn.token])


def _problem(config: GenerationConfig | None) -> str | None:
    try:
        if config is not None:
            config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return None
