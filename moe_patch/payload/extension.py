"""What an extension does in a patched checkout. Each hook stands for one line that was inserted into upstream's files.

The counterpart of `llava.extension.Extension` for a LLaVA that has no seams of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

State = dict[str, Tensor]


class Extension:
    """Base class; every hook does nothing.

    Attributes:
        name: the name of its folder in a checkpoint of llava-extensions.
        options: dataclass of its command-line flags; it becomes a base of upstream's `TrainingArguments`.
        weights_of_its_own: patterns of names among the full weights that `read_original` takes from there.
    """

    name: ClassVar[str]
    options: ClassVar[type]
    weights_of_its_own: ClassVar[tuple[str, ...]] = ()

    def configure(self, model_args: Any, training_args: Any) -> None:
        """Check the flags, and set those of upstream that follow from them.

        Raises:
            ValueError: a flag is contradictory or not carried out.
        """

    def is_active(self, training_args: Any) -> bool:
        """True if the flags switch the extension on."""
        return False

    def lora_modules(self, training_args: Any) -> list[str] | None:
        """Last names of the decoder's linear layers that get LoRA; None leaves upstream's choice."""
        return None

    def attach_for_training(self, model: Any, training_args: Any) -> None:
        """Put new modules into a model that PEFT has wrapped already.

        Args:
            model: the bare model.
            training_args: with the flags.
        """

    def attach_beside_tower(self, model: Any, training_args: Any) -> None:
        """Put new modules into a bare model whose vision tower is loaded, and say what is trained."""

    def prepare_trainer(self, trainer: Any) -> None:
        """Change upstream's Trainer before it makes the optimizer."""

    def take_tokenizer(self, model: Any, tokenizer: Any) -> None:
        """Look up in the tokenizer what the modules of a bare model need to know of it."""

    def writes_itself(self, training_args: Any) -> bool:
        """True if the run's result is written in the layout of llava-extensions instead of upstream's."""
        return False

    def own_config(self, model: Any) -> dict[str, Any] | None:
        """Configuration of the modules in a bare model; None if there are none."""
        return None

    def to_ours(self, model: Any, state: State) -> State:
        """The extension's share of what is trained, by its names in llava-extensions.

        Args:
            model: the bare model.
            state: everything trained, by its name in the model.
        """
        return {}

    def refuse(self, config: Any) -> None:
        """Look at a checkpoint's LLaVA configuration.

        Raises:
            ValueError: it asks for what upstream's LLaVA does not do.
        """

    def attach(self, model: Any, config: Mapping[str, Any], tensors: State) -> None:
        """Put modules into a bare model as a checkpoint has them.

        Raises:
            ValueError: configuration or weights do not fit.
        """

    def to_saved(self, model: Any, state: State) -> State:
        """Tensors of `non_lora_trainables.bin`, in the layout of the extension's original code.

        Args:
            model: the bare model.
            state: everything trained beside LoRA, by its name in PEFT's wrapper.
        """
        return state

    def from_saved(self, model: Any, state: State) -> State:
        """The inverse of `to_saved` for a model that carries the extension, for resuming."""
        return state

    def write_settings(self, model: Any, training_args: Any, folder: Path) -> None:
        """Write the files beside the weights that the original layout needs."""

    def read_original(self, folder: Path) -> tuple[dict[str, Any], State] | None:
        """Configuration and tensors of a checkpoint in the original layout; None if the folder is none.

        Raises:
            ValueError: it is one and is damaged.
        """
        return None

    def owns(self, key: str) -> bool:
        """True if `key` of a `non_lora_trainables.bin` is one that `to_saved` gives."""
        return False

    def metrics(self, model: Any) -> dict[str, float]:
        """Numbers for the log line."""
        return {}
