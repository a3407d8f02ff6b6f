"""Which conversation template a model is asked with: the one that it was trained with, unless another is asked for.

Only a model whose folder does not say (`llava/data/trained_template.py`) is asked by words in its name, as upstream
asks every model (`run_llava.py`, `model_vqa_loader.py`).
"""

from __future__ import annotations

from llava.conversation import conv_templates
from llava.data.trained_template import same_template, trained_template
from llava.eval.answering.options import Fallback
from llava.eval.answering.prompts import check_conv_mode, infer_conv_mode, plain_conv_mode
from llava.runtime.hub import get_model_name_from_path

OPTION = "--conv-mode"


def choose_conv_mode(wanted: str | None, model_path: str, option: str = OPTION) -> str:
    """The template for a program that talks to any model (upstream `run_llava.py`).

    Args:
        wanted: what was asked for; None: nothing. One that contradicts the training, or a name that has to do, is
            pointed out.
        model_path: folder, or id on a model hub.
        option: how `wanted` is given, for messages.

    Raises:
        FlagError: `wanted` is not the name of a template.
        CheckpointError: the folder names a template that does not exist, or the hub cannot be asked.
    """
    trained = _by_training(wanted, model_path, option)
    if trained is not None:
        return trained
    name = get_model_name_from_path(model_path)
    inferred = infer_conv_mode(name)
    if wanted is None or wanted == inferred:
        return inferred
    check_conv_mode(wanted)
    print(
        f"[WARNING] the name '{name}' suggests the template '{inferred}', but {option} asks for '{wanted}': "
        f"using '{wanted}'"
    )
    return wanted


def conv_mode_of_questions(wanted: str, model_path: str, option: str = OPTION) -> str:
    """The template for a program that answers files of questions (upstream `model_vqa*.py`).

    A model after stage 1 only, as far as its name tells, gets the `_mmtag` form of the template, if there is one.

    Args:
        wanted: what was asked for, or the program's `Fallback`; one that contradicts the training is pointed out.
        model_path: folder, or id on a model hub.
        option: how `wanted` is given, for messages.

    Raises:
        FlagError: `wanted` is not the name of a template.
        CheckpointError: the folder names a template that does not exist, or the hub cannot be asked.
    """
    trained = _by_training(wanted, model_path, option)
    if trained is not None:
        return trained
    check_conv_mode(wanted)
    name = get_model_name_from_path(model_path)
    tagged = plain_conv_mode(wanted, name)
    if tagged == wanted or tagged not in conv_templates:
        return wanted
    print(f"'{name}' looks like a model after stage 1 only: using the template '{tagged}'")
    return tagged


def conv_mode_of_turns(wanted: str, model_path: str, option: str = OPTION) -> str:
    """The template for a program on conversations with references; a name changes nothing there, as in the original.

    Arguments and errors as of `conv_mode_of_questions`.
    """
    trained = _by_training(wanted, model_path, option)
    if trained is None:
        check_conv_mode(wanted)
    return trained or wanted


def _by_training(wanted: str | None, model_path: str, option: str) -> str | None:
    """The template that was asked for or trained with; None if the folder does not say."""
    trained = trained_template(model_path)
    if trained is None:
        return None
    if wanted is None or isinstance(wanted, Fallback):
        # A second name of the template stays what it is: answers of an earlier run are continued under it.
        return wanted if wanted is not None and same_template(wanted, trained.name) else trained.name
    check_conv_mode(wanted)
    if not same_template(wanted, trained.name):
        print(
            f"[WARNING] {model_path} was trained with the template '{trained.name}' ({trained.source}), but {option} "
            f"asks for '{wanted}': using '{wanted}'"
        )
    return wanted
