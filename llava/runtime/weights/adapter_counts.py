"""Does a file of low-rank updates have what its configuration or its model says: every layer, every part, the rank?

A converter that copies tensors cannot ask the model; a lost layer would pass as an adapter of fewer layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor

from llava.errors import CheckpointError
from llava.runtime.weights.tensors import check_numbers, read_tensors

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


def check_layers(layers: Collection[str], source: str | Path, targets: Collection[str] | None = None) -> None:
    """Refuse names of layers with gaps: each kind of layer must be in every decoder layer from the first to the last.

    Args:
        layers: full names, as `model.layers.3.mlp.up_proj`.
        source: file that they come from.
        targets: last names that the configuration lists; None for a pattern.

    Raises:
        CheckpointError: names the kind and the numbers, or the target without a layer.
    """
    numbers: dict[str, set[int]] = defaultdict(set)
    for layer in layers:
        parts = layer.split(".")
        place = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
        if place is not None:
            numbers[".".join([*parts[:place], "N", *parts[place + 1 :]])].add(int(parts[place]))
    for kind, found in sorted(numbers.items()):
        groups = {name: others for name, others in numbers.items() if name.split(".N.")[0] == kind.split(".N.")[0]}
        every = set(range(max(max(others) for others in groups.values()) + 1))
        if found != every:
            raise CheckpointError(
                f"{source}: has no tensors of '{kind}' for N = {sorted(every - found)[:5]}; {len(found)} of "
                f"{len(every)} layers are there"
            )
    if targets is None:
        return
    lasts = {layer.rpartition(".")[2] for layer in layers}
    lacking = sorted(target for target in targets if not any(layer.endswith(target) for layer in layers))
    strange = sorted(last for last in lasts if not any(target.endswith(last) for target in targets))
    if lacking or strange:
        raise CheckpointError(
            f"{source}: does not have the layers of its adapter_config.json; no tensors for {lacking[:3]}, unknown are "
            f"{strange[:3]}"
        )


def check_lora(tensors: Mapping[str, Tensor], rank: int, source: str | Path) -> None:
    """Refuse a LoRA file in which a layer lacks A or B, or has another rank than `rank`.

    Raises:
        CheckpointError: names the tensor.
    """
    layers = {name.removesuffix(end) for name in tensors for end in (LORA_A, LORA_B) if name.endswith(end)}
    for layer in sorted(layers):
        for end, place in ((LORA_A, 0), (LORA_B, 1)):
            tensor = tensors.get(layer + end)
            if tensor is None:
                raise CheckpointError(f"{source}: lacks '{layer + end}'")
            if tensor.dim() != 2 or tensor.shape[place] != rank:
                raise CheckpointError(
                    f"{source}: '{layer + end}' has shape {tuple(tensor.shape)}, expected rank {rank}"
                )
    check_layers(layers, source)


def check_adapter(model: PeftModel, path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter file, of today or of an earlier version of its method; they fit that of a PEFT model.

    Raises:
        CheckpointError: names or shapes in the file differ from those of the adapter, or a tensor is not of finite
            floating-point numbers.
    """
    tensors = read_tensors(path)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    # Compared as the method loads them; what it writes today is named as in a file.
    there, here = _as_loaded(model, expected), _as_loaded(model, tensors)
    names = dict(zip(there, expected, strict=True))
    missing = sorted(names[key] for key in there.keys() - here.keys())
    unknown = sorted(here.keys() - there.keys())
    wrong = [names[key] for key in there if key in here and there[key].shape != here[key].shape]
    if missing or unknown or wrong:
        raise CheckpointError(
            f"{path}: does not fit the adapter that adapter_config.json describes; missing {missing[:3]}, unknown "
            f"{unknown[:3]}, other shape {wrong[:3]}"
        )
    check_numbers(tensors, path)
    return tensors


def _as_loaded(model: PeftModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by their names in the model, after what the active adapter's method does to them."""
    name = model.active_adapter
    config = model.peft_config[name]
    method = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    return (
        dict(tensors) if method is None else method._remap_adapter_state_dict_for_load(model, config, name, {**tensors})
    )
