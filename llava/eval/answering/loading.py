"""The model of an evaluation program: from path, device and dtype on the command line to a model that can generate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from llava.data.answer_end import AnswerEnd, TurnEnd, answer_end, turn_end
from llava.errors import FlagError
from llava.eval.answering.prompts import new_conversation
from llava.model.builder import load_pretrained_model
from llava.model.stored_dtype import DTYPES
from llava.runtime.finite_logits import no_answer
from llava.runtime.hub import get_model_name_from_path


@dataclass(frozen=True)
class LoadedModel:
    """What `load_pretrained_model` gives, and the model's name.

    Attributes:
        name: from the last parts of the path; the `model_id` of answer rows.
        image_processor: None if the model has no vision tower.
        dtype_option: how the program is told of another dtype, with braces in its place; for messages.
    """

    name: str
    tokenizer: Any
    model: Any
    image_processor: Any
    dtype_option: str = "--torch-dtype {}"
    _turn_ends: dict[str, TurnEnd | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def answer_end(self, conv_mode: str | None = None) -> AnswerEnd:
        """What ends an answer to a prompt of the template `conv_mode`; None stands for prompts without template.

        Raises:
            FlagError: the template is not known.
        """
        if conv_mode is not None and conv_mode not in self._turn_ends:  # once, since a chat template has to be rendered
            self._turn_ends[conv_mode] = turn_end(new_conversation(conv_mode, self.tokenizer), self.tokenizer)
        turn = None if conv_mode is None else self._turn_ends[conv_mode]
        return answer_end(turn, self.tokenizer, self.model.generation_config)

    def no_answer(self, where: str) -> str:
        """The message where the logits of a question, named by `where`, are not numbers."""
        return no_answer(where, self.model.dtype, self.dtype_option)

    @property
    def patches_per_image(self) -> int:
        """Positions that one image of the crop size takes in the sequence; 0 without a vision tower."""
        tower = self.model.get_vision_tower()
        return 0 if tower is None else int(tower.num_features)


def choose_device(device: str | None) -> str:
    """`device`, or if None: cuda if there is one, else cpu.

    Raises:
        FlagError: cuda is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if device is None:
        return "cuda" if available else "cpu"
    if device.startswith("cuda") and not available:
        raise FlagError(f"--device {device}: torch finds no CUDA device here; use --device cpu")
    return device


def choose_dtype(name: str, device: str) -> torch.dtype:
    """The dtype named by `--torch-dtype`; `auto` is float16 on a GPU, as upstream, and float32 on a CPU.

    Raises:
        FlagError: unknown name.
    """
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.float16
    if name not in DTYPES:
        raise FlagError(f"--torch-dtype {name}: must be one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    model_path: str,
    model_base: str | None = None,
    *,
    device: str | None = None,
    torch_dtype: str = "auto",
    load_8bit: bool = False,
    load_4bit: bool = False,
) -> LoadedModel:
    """Load a checkpoint of any known format for evaluation.

    Args:
        model_path: checkpoint folder.
        model_base: base model, for a checkpoint that holds only adapters or a projector.
        device: as `--device`.
        torch_dtype: as `--torch-dtype`.
        load_8bit: quantise the weights to 8 bits.
        load_4bit: quantise the weights to 4 bits.

    Raises:
        FlagError: device or dtype is not available.
        CheckpointError: the folder cannot be loaded.
    """
    device = choose_device(device)
    name = get_model_name_from_path(model_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        model_path,
        model_base,
        name,
        load_8bit=load_8bit,
        load_4bit=load_4bit,
        device=device,
        torch_dtype=choose_dtype(torch_dtype, device),
    )
    return LoadedModel(name, tokenizer, model.eval(), image_processor)
