"""Reading the weights of a language model through transformers, with every weight looked at.

transformers converts integers to floats, fills what does not fit with random numbers and reports the rest in its log; a
configuration with a wrong size may ask for terabytes. So the files' own descriptions are compared with the model first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from llava.errors import CheckpointError, FlagError, LlavaError
from llava.runtime.files import read_json, reading
from llava.runtime.offloading import check_quantised_map, computed_map
from llava.runtime.tokenizer import add_ends, eos_ids
from llava.runtime.weights.derived import check_derived
from llava.runtime.weights.settings import GENERATION, check_settings
from llava.runtime.weights.tensors import Entry, check_dtype, check_finite
from llava.runtime.weights.weight_files import weights_of

GENERATION_FILE = "generation_config.json"


def _nobodys(name: str) -> bool:
    """Whether a weight is read by somebody else: no."""
    return False


def read_base(
    cls: Any, source: str | Path, config: Any, elsewhere: Callable[[str], bool] = _nobodys, **options: Any
) -> tuple[Any, set[str]]:
    """`cls.from_pretrained`, refusing weights that do not fit or are not numbers.

    Args:
        cls: class of the model.
        source: folder, or id on a model hub, whose files transformers fetches.
        config: its configuration.
        elsewhere: of the name of a weight in the files, whether the caller reads it by other means.
        options: as `from_pretrained` takes them.

    Returns:
        The model, and the names of its weights that the files do not have.

    Raises:
        CheckpointError: a file is damaged; a weight has another shape than `config.json` says, is not of a
            floating-point type, contains NaN or infinite values, or belongs to no part of the model. The file and the
            weight are named.
        FlagError: the model cannot be placed as `device_map` says; of quantised layers for which there is no room on
            the device, the names.
    """
    folder = Path(source)
    quantised = _stays_on_device(options.get("quantization_config") or getattr(config, "quantization_config", None))
    if quantised:
        check_quantised_map(options.get("device_map"))
    entries = weights_of(folder) if (folder / "config.json").is_file() else {}
    check_generation(folder)
    if entries:
        check_fit(cls, config, entries, folder)
    try:
        with reading(source, "its weights cannot be read"):
            model, report = cls.from_pretrained(
                source, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except CheckpointError as error:
        cause = error.__cause__
        if "device_map" not in options or not isinstance(cause, ValueError) or isinstance(cause, LlavaError):
            raise
        if quantised:
            check_quantised_map(computed_map(cause), asked=options["device_map"])
        raise FlagError(f"{source} cannot be placed by device_map {options['device_map']!r}: {cause}") from error
    if report["mismatched_keys"]:  # of a model on a hub, or under other names in the files
        name, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise CheckpointError(
            f"{_file_of(entries, name, source)}: '{name}' has shape {tuple(stored)}, but {folder / 'config.json'} asks "
            f"for {tuple(wanted)}"
        )
    missing = set(report["missing_keys"])
    check_known({name for name in report["unexpected_keys"] if not elsewhere(name)}, model, entries, source)
    check_derived(model, {name: entry for name, entry in entries.items() if not elsewhere(name)})
    check_model(model, entries, source, missing)
    return model, missing


def check_known(unknown: Collection[str], model: nn.Module, entries: Mapping[str, Entry], source: str | Path) -> None:
    """Refuse weights that a model has no place for: without them it would be another model.

    Args:
        unknown: their names.
        model: what was made of the other weights.
        entries: of the files.
        source: folder or id.

    Raises:
        CheckpointError: there are any; names the file, the class and the weights.
    """
    if unknown:
        names = sorted(unknown)
        raise CheckpointError(
            f"{_file_of(entries, names[0], source)}: {len(names)} weights belong to no part of a "
            f"{type(model).__name__}, as which config.json is read (first: {names[:3]}); without them it would be "
            "another model. Correct 'architectures' and 'model_type', or remove these weights if they are not needed"
        )


def _stays_on_device(settings: Any) -> bool:
    """Whether these settings, an object or what `config.json` has of one, make bitsandbytes quantise all layers."""
    if settings is None:
        return False
    values = settings if isinstance(settings, Mapping) else settings.to_dict()
    here = values.get("load_in_4bit") or values.get("load_in_8bit")
    return bool(here) and not values.get("llm_int8_enable_fp32_cpu_offload")


def check_generation(folder: Path) -> None:
    """Refuse a `generation_config.json` that cannot be read or has an impossible value.

    Raises:
        CheckpointError: names it.
    """
    path = folder / GENERATION_FILE
    if path.is_file():
        check_settings(read_json(path), GENERATION, path)
        with reading(path):
            GenerationConfig.from_pretrained(folder)


def read_ends(config: GenerationConfig, folder: Path) -> None:
    """Make generation end at what a checkpoint without full weights was trained to end its answers with.

    Args:
        config: of the base; changed.
        folder: of the checkpoint. Those of upstream and of earlier versions do not say.

    Raises:
        CheckpointError: its file cannot be read, or has an impossible value.
    """
    if (folder / GENERATION_FILE).is_file():
        check_generation(folder)
        add_ends(config, eos_ids(GenerationConfig.from_pretrained(folder)))


def expected_weights(cls: Any, config: Any, folder: Path) -> dict[str, nn.Parameter]:
    """The parameters that a configuration asks for, without memory.

    Raises:
        CheckpointError: no model can be made of it.
    """
    path = folder / "config.json"
    problem = "no model can be made with these settings"
    try:
        with reading(path, problem), torch.random.fork_rng(devices=[]), torch.device("meta"):
            return dict(cls(config).named_parameters())
    except FlagError as error:  # of a part whose settings are flags in training
        raise CheckpointError(f"{path}: {error}") from error


def check_fit(cls: Any, config: Any, entries: Mapping[str, Entry], folder: Path) -> None:
    """Compare what files of weights say about their tensors with what a configuration asks for.

    Args:
        cls: class of the model.
        config: its configuration.
        entries: of the files, by name.
        folder: of the files.

    Raises:
        CheckpointError: a weight has another shape, or is not of a floating-point type.
    """
    expected = expected_weights(cls, config, folder)
    if "quantization_config" in read_json(folder / "config.json"):  # integers belong there, in shapes of their own
        return
    for name in sorted(entries.keys() - expected.keys()):  # transformers knows some weights by older names
        if name.endswith((".weight", ".bias")):
            check_dtype(name, entries[name].dtype, entries[name].path)
    for name, weight in expected.items():
        entry = entries.get(name)
        if entry is None:
            continue
        check_dtype(name, entry.dtype, entry.path)
        if entry.shape != tuple(weight.shape):
            raise CheckpointError(
                f"{entry.path}: '{name}' has shape {entry.shape}, but {folder / 'config.json'} asks for "
                f"{tuple(weight.shape)}"
            )


def check_model(
    model: nn.Module, entries: Mapping[str, Entry], source: str | Path, missing: Collection[str] = ()
) -> None:
    """Refuse a model whose weights are not all finite.

    Weights in memory are looked at there; those that were quantised, or are left on the disk, in their files. Weights
    that are `missing` from the files may be uninitialized memory, which the caller fills or refuses.

    Raises:
        CheckpointError: names the file and the weight.
    """
    for name, weight in model.named_parameters():
        if name in missing:
            continue
        entry = entries.get(name)
        value: Tensor | None = getattr(weight, "ds_tensor", weight).detach()  # ZeRO-3: this process's share
        if not value.is_floating_point() or value.is_meta:
            value = None if entry is None else entry.read(name)
        if value is not None and value.is_floating_point():
            check_finite(name, value, _file_of(entries, name, source))


def _file_of(entries: Mapping[str, Entry], name: str, source: str | Path) -> str | Path:
    """The file of a weight, also where it has another prefix there: that of the longest common end of the names."""
    if name in entries:
        return entries[name].path
    parts = name.split(".")[::-1]

    def common(stored: str) -> int:
        pairs = zip(parts, stored.split(".")[::-1], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    closest = max(entries, key=common, default=None)
    return source if closest is None or common(closest) < 2 else entries[closest].path
