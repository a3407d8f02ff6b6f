"""Extensions that the base of a run was trained with already: their weights are trained on, never silently replaced.

Upstream has no such case; Dynamic-LLaVA's `train_sparse.py` trains on predictors that lie in the base's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llava.errors import CheckpointError, FlagError
from llava.extension import Config, installed_extensions
from llava.model.checkpoint import load_extension_tensors, read_extensions
from llava.model.formats import EXTENSIONS_FOLDER, inspect_checkpoint
from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.runtime.hub import local_folder
from llava.runtime.weights.weight_files import check_base


@dataclass(frozen=True)
class Recorded:
    """An extension as the base was trained with it.

    Attributes:
        config: its configuration then.
        tensors: by their name in the LLaVA model.
        source: where they were read.
        claimed: names of tensors among the base's full weights that are these.
    """

    config: Config
    tensors: dict[str, Tensor]
    source: Path
    claimed: frozenset[str] = frozenset()


def recorded_extensions(base: str | Path, cache_dir: str | None = None) -> dict[str, Recorded]:
    """The extensions in a folder of our own layout, or of the layout of an extension's original.

    Args:
        base: folder, or id on a model hub.
        cache_dir: where files from the hub are kept.

    Raises:
        CheckpointError: the folder is damaged, or a model on a hub was trained with extensions.
    """
    folder = Path(base)
    if not (folder / "config.json").is_file():
        _refuse_on_hub(str(base), cache_dir)
        return {}
    check_base(folder)
    contents = inspect_checkpoint(folder)
    if contents.extensions:
        return {
            name: Recorded(config, tensors, contents.extensions[name] / "model.safetensors")
            for name, (config, tensors) in read_extensions(contents).items()
        }
    imported = {name: extension.import_checkpoint(folder) for name, extension in installed_extensions().items()}
    return {
        name: Recorded(state.config, state.tensors, folder, state.claimed)
        for name, state in imported.items()
        if state is not None
    }


def _refuse_on_hub(base: str, cache_dir: str | None) -> None:
    """Refuse a model on a hub whose small files say that an extension was trained into it."""
    folder = local_folder(base, ("config.json", f"{EXTENSIONS_FOLDER}/*/config.json"), cache_dir=cache_dir)
    if not (folder / "config.json").is_file():
        return
    found = {path.parent.name for path in folder.glob(f"{EXTENSIONS_FOLDER}/*/config.json")}
    for name, extension in installed_extensions().items():
        try:
            state = extension.import_checkpoint(folder)
        except CheckpointError:  # known by its configuration, while its weights were not fetched
            found.add(name)
        else:
            found |= {name} if state is not None else set()
    if found:
        raise CheckpointError(
            f"{base} was trained with {sorted(found)}, and only a folder can be trained on; fetch it (hf download "
            f"{base} --local-dir FOLDER) and give that folder as --model_name_or_path"
        )


def check_recorded(base: str | Path, recorded: dict[str, Recorded], wanted: dict[str, Config]) -> None:
    """Refuse to train a base without what it was trained with.

    Raises:
        FlagError: `wanted`, what the options switch on, lacks an extension of the base.
    """
    dropped = sorted(set(recorded) - set(wanted))
    if dropped:
        raise FlagError(
            f"--model_name_or_path {base} was trained with {dropped}, which the options of this run do not switch on; "
            "give the options that it was trained with (see its run.json), or the base from before"
        )


def train_on(llava: LlavaForCausalLM, recorded: dict[str, Recorded], announce: bool) -> None:
    """Fill the attached extensions with what the base holds of them.

    Args:
        llava: the bare model, extensions attached.
        recorded: what the base holds.
        announce: print what is taken over, and which settings are others than then.

    Raises:
        CheckpointError: the options ask for other names or shapes than the base has.
    """
    for name, then in recorded.items():
        load_extension_tensors(llava, name, then.tensors, then.source)
        now = llava.extensions.configs[name]
        changed = [
            f"{key} {then.config.get(key)} -> {now.get(key)}"
            for key in sorted(then.config.keys() | now.keys())
            if then.config.get(key) != now.get(key)
        ]
        if announce:
            print(f"{name}: trained on from {then.source}" + (f"; changed: {', '.join(changed)}" if changed else ""))
