"""Layers on the CPU or on disk: every part that training adds gives the numbers of the model that is loaded whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.accelerate as placing
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava.errors import CheckpointError, FlagError
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import save_checkpoint
from llava.model.image_tokens import add_image_tokens, train_image_tokens
from llava.runtime.offloading import is_offloaded, offloaded_modules
from llava.runtime.weights.completeness import FILE_LIST
from tests.dynamic.sparse_models import sparse_llava
from tests.golden import golden_dir
from tests.llava.model.test_precision import routed_llava
from tests.mma.adapted_models import adapted_llava

LLAVA = golden_dir("llava")
BASE, VICUNA = LLAVA / "tiny-llava-v1.5", LLAVA / "tiny-vicuna"
IDS = torch.tensor([[1, 350, -200, 400, 500, 13], [1, -200, 7, 8, 9, 10]])
PIXELS = torch.linspace(-1, 1, 2 * 2352).reshape(2, 3, 28, 28)

Saved = tuple[Path, Path | None]
"""A checkpoint, and its base if it needs one."""


def written(model: Any, folder: Path) -> Saved:
    """A checkpoint of `model` on the tiny base."""
    save_checkpoint(model, folder, load_pretrained_model(str(BASE), device="cpu")[0])
    return folder, BASE


def with_image_tokens(folder: Path) -> Saved:
    """`<im_start>` and `<im_end>` with rows of their own in embeddings and head."""
    tokenizer, model, _, _ = load_pretrained_model(str(BASE), device="cpu")
    model.config.mm_use_im_start_end = True
    add_image_tokens(model, tokenizer, ["<im_start>", "<im_end>"])
    train_image_tokens(model)
    torch.manual_seed(3)
    with torch.no_grad():
        model.get_input_embeddings().rows.normal_(std=0.5)
        model.get_output_embeddings().weight[-2:].normal_(std=2.0)
    save_checkpoint(model, folder, tokenizer)
    return folder, BASE


def with_newline(folder: Path) -> Saved:
    """Full weights with the vector that ends a row of tiles."""
    tokenizer, model, _, _ = load_pretrained_model(str(BASE), device="cpu")
    model.config.mm_patch_merge_type, model.config.image_aspect_ratio = "spatial_unpad", "anyres"
    model.config.image_grid_pinpoints = [[56, 28], [28, 56]]
    torch.manual_seed(4)
    model.get_model().image_newline = torch.nn.Parameter(torch.randn(model.config.hidden_size))
    model.requires_grad_(True)
    model.get_vision_tower().requires_grad_(False)
    model.config.mm_vision_tower = str(LLAVA / "tiny-clip")
    save_checkpoint(model, folder, tokenizer)
    return folder, None


def with_trained_tower(folder: Path) -> Saved:
    """A tower whose weights are in the checkpoint, and a projector beside it."""
    _, model, _, _ = load_pretrained_model(str(BASE), device="cpu")
    torch.manual_seed(5)
    for part in (model.get_vision_tower(), model.get_model().mm_projector):
        for weight in part.requires_grad_(True).parameters():
            weight.data += 0.05 * torch.randn_like(weight)
    return written(model, folder)


def with_adapter(folder: Path, **options: Any) -> Saved:
    """LoRA of PEFT on every layer."""
    _, model, _, _ = load_pretrained_model(str(BASE), device="cpu")
    torch.manual_seed(6)
    pattern = r"model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|o_proj|down_proj)"
    model = get_peft_model(model, LoraConfig(r=4, target_modules=pattern, **options))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    return written(model, folder)


KINDS: dict[str, Callable[[Path], Saved]] = {
    "full weights": lambda folder: (BASE, None),
    "LoRA and projector": lambda folder: (LLAVA / "tiny-llava-lora", VICUNA),
    "projector": lambda folder: (LLAVA / "tiny-llava-pretrain", VICUNA),
    "LoRA": with_adapter,
    "routed blocks and LoRA": lambda folder: (golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle", BASE),
    "routed blocks and linears": lambda folder: written(routed_llava(), folder),
    "predictors": lambda folder: written(sparse_llava(), folder),
    "modality adapters": lambda folder: written(adapted_llava(), folder),
    "image tokens": with_image_tokens,
    "newline": with_newline,
    "trained tower": with_trained_tower,
}


class StandIn(str):
    """The CPU in the place of a GPU: layers on "cpu" are elsewhere, for accelerate."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    __hash__ = str.__hash__


GPU = StandIn("cpu")
HERE = ("model.layers.0", "model.rotary_emb")


def spread(place: str, *, but: tuple[str, ...] = HERE, newline: bool) -> dict[str, str]:
    names = ["model.embed_tokens", *(f"model.layers.{number}" for number in range(3)), "model.norm", "lm_head"]
    names += ["model.rotary_emb", "model.mm_projector", *(["model.image_newline"] if newline else [])]
    return {name: "cpu" if name in but else place for name in names}


def one_layer(newline: bool) -> dict[str, str]:
    return spread("cpu", newline=newline) | {"model.layers.1": "disk"}


def parts_of_layers(newline: bool) -> dict[str, str]:
    whole = spread("cpu", newline=newline)
    fine = {f"model.layers.1.{part}": "cpu" for part in ("self_attn", "input_layernorm", "post_attention_layernorm")}
    layers = {"model.layers.1.mlp": "disk"} | {name: "disk" for name in ("model.norm", "model.layers.2")}
    return {name: place for name, place in whole.items() if name != "model.layers.1"} | fine | layers


PLACES: dict[str, Callable[[bool], Any]] = {
    "one layer on disk": one_layer,
    "parts of layers on disk": parts_of_layers,
    "nearly all on disk": lambda newline: spread("disk", newline=newline),
    "on the CPU and on disk beside a GPU": lambda newline: spread("cpu", newline=newline) | {"model.norm": "disk"},
    "auto": lambda newline: "auto",
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Loads a checkpoint with layers elsewhere."""
    dispatch = placing.dispatch_model

    def dispatched(model: Any, device_map: dict[str, Any], skip_keys: Any = None, **options: Any) -> Any:
        if "GPU" in request.param:
            device_map = {name: GPU if name in HERE else place for name, place in device_map.items()}
            options["main_device"] = GPU
        return dispatch(model, device_map, skip_keys=skip_keys, **options)

    monkeypatch.setattr(placing, "dispatch_model", dispatched)

    def load(saved: Saved, newline: bool = False, **options: Any) -> Any:
        if request.param == "auto":
            options["max_memory"] = {"cpu": 200_000}
        return loaded(saved, device="cuda", device_map=PLACES[request.param](newline), **options, **offload(tmp_path))

    return load


def offload(folder: Path) -> dict[str, str]:
    return {"offload_folder": str(folder / "offloaded")}


def loaded(saved: Saved, **options: Any) -> Any:
    checkpoint, base = saved
    options = {"torch_dtype": torch.float32, **options}
    return load_pretrained_model(str(checkpoint), base and str(base), **options)[1]


def numbers(model: Any) -> tuple[Tensor, list[list[int]]]:
    """Logits (B, L, V) of two prompts with images, and what follows them."""
    sizes = {"image_sizes": [(28, 28)] * 2}
    ids = IDS
    if model.get_model().image_token_ids:
        start, end = model.get_model().image_token_ids.values()
        ids = torch.tensor([[1, 350, start, -200, end, 13], [1, start, -200, end, 9, 10]])
    pixels: Any = PIXELS.to(model.dtype)
    if hasattr(model.get_model(), "image_newline"):
        pixels = [each.repeat(3, 1, 1, 1) for each in pixels.split(1)]
        sizes = {"image_sizes": [(56, 28)] * 2}
    with torch.no_grad():
        logits = model(ids, images=pixels, **sizes).logits
    limits = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    return logits, model.generate(ids, images=pixels, **sizes, **limits).tolist()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Saved, tuple[Tensor, list[list[int]]]]]:
    """The checkpoint of a kind, and the numbers of the model loaded whole."""

    @cache
    def get(kind: str) -> tuple[Saved, tuple[Tensor, list[list[int]]]]:
        saved = KINDS[kind](tmp_path_factory.mktemp("kind") / "checkpoint")
        return saved, numbers(loaded(saved, device="cpu"))

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_the_model_loaded_whole(kind: str, place: Callable[..., Any], kinds: Callable[..., Any]) -> None:
    saved, (logits, tokens) = kinds(kind)
    model = place(saved, newline=kind == "newline")
    assert offloaded_modules(model), "nothing is elsewhere: the test would say nothing"
    assert not [name for name, weight in model.extensions.named_parameters(model).items() if weight.is_meta]
    assert model.device == torch.device("cpu")
    for _ in range(2):
        found, following = numbers(model)
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
        assert following == tokens


@pytest.mark.parametrize("kind", ["full weights", "routed blocks and linears", "predictors", "modality adapters"])
def test_half_precision(kind: str, place: Callable[..., Any], kinds: Callable[..., Any]) -> None:
    """The base is stored in float32 and computes in bfloat16; extensions keep float32."""
    saved, _ = kinds(kind)
    whole, model = loaded(saved, device="cpu", torch_dtype=torch.bfloat16), place(saved, torch_dtype=torch.bfloat16)
    types = {name: weight.dtype for name, weight in whole.named_parameters()}
    assert {name: weight.dtype for name, weight in model.named_parameters()} == types
    (expected, tokens), (found, following) = numbers(whole), numbers(model)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert following == tokens


def test_each_kind_matters(kinds: Callable[..., Any], tmp_path: Path) -> None:
    """The negative control: without what training added, the numbers are others."""
    plain, _ = numbers(loaded((BASE, None), device="cpu"))
    for kind in KINDS:
        logits = kinds(kind)[1][0]
        assert kind == "full weights" or logits.shape != plain.shape or not torch.allclose(logits, plain, atol=1e-2), (
            kind
        )


def test_the_base_is_not_written(place: Callable[..., Any], kinds: Callable[..., Any]) -> None:
    """An adapter whose layers are elsewhere stays unmerged; merged weights would be stored next to the base."""
    saved, _ = kinds("LoRA")
    before = {path: path.stat().st_mtime_ns for path in LLAVA.rglob("*")}
    model = place(saved)
    adapted = [name for name in offloaded_modules(model) if name.endswith(".base_layer")]
    assert adapted
    assert all(is_offloaded(model.get_submodule(name)) for name in adapted)
    assert {path: path.stat().st_mtime_ns for path in LLAVA.rglob("*")} == before


def test_adapters_that_need_the_weights_of_the_base_are_refused(tmp_path: Path) -> None:
    saved = with_adapter(tmp_path / "dora", use_dora=True)
    assert numbers(loaded(saved, device="cpu"))
    with pytest.raises(CheckpointError, match=r"not plain LoRA.*model\.layers\.1\.self_attn\.q_proj"):
        loaded(saved, device="cuda", device_map=one_layer(False), **offload(tmp_path))


def test_layers_without_any_place_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "dispatch_model", lambda model, **options: None)
    with pytest.raises(
        CheckpointError, match=r"without memory: model\.layers\.1\.input_layernorm, model\.layers\.1\.mlp"
    ):
        loaded((BASE, None), device="cuda", device_map=one_layer(False), **offload(tmp_path))


def test_a_vector_that_alone_is_on_disk_is_refused(tmp_path: Path) -> None:
    """Nothing says where it is stored."""
    saved, place = with_newline(tmp_path / "checkpoint"), spread("cpu", newline=True) | {"model.image_newline": "disk"}
    with pytest.raises(CheckpointError, match=r"1 tensors without memory: model\.image_newline; give"):
        loaded(saved, device="cuda", device_map=place, **offload(tmp_path))


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"model": "cpu", "lm_head": "disk"}, "provide an `offload_folder`"),
        ("everywhere", "found everywhere"),
    ],
)
def test_maps_that_cannot_be_used_are_errors_of_the_flag(device_map: Any, message: str) -> None:
    with pytest.raises(FlagError, match=f"tiny-llava-v1.5 cannot be placed by device_map .*{message}"):
        loaded((BASE, None), device="cuda", device_map=device_map)


QUANTISED_MAPS: dict[str, tuple[dict[str, Any], str]] = {
    "a layer on disk": ({"device_map": one_layer(False)}, r"leaves 1 of 8 parts .*: model\.layers\.1 \(disk\);"),
    "more than a message names": (
        {"device_map": {f"model.layers.{number}": "cpu" for number in range(7)} | {"lm_head": 0}},
        r"leaves 7 of 8 parts .*: model\.layers\.0 \(cpu\), .*, model\.layers\.4 \(cpu\) and 2 more;",
    ),
    "a torch device": (
        {"device_map": {"model": torch.device("cuda", 0), "lm_head": torch.device("cpu")}},
        r"leaves 1 of 2 parts .*: lm_head \(cpu\);",
    ),
    **{
        word: (
            {"device_map": word, "max_memory": {"cpu": 340_000}},
            rf"device_map '{word}' leaves [56] of 8 parts .*model\.layers\.2 \(disk\), model\.norm \(disk\)",
        )
        for word in ("auto", "balanced", "balanced_low_0", "sequential")
    },
    "no room for anything": (
        {"device_map": "auto", "max_memory": {"cpu": 10_000}},
        r"leaves 1 of 1 parts .*: all layers \(disk\);",
    ),
}


@pytest.fixture(scope="module", params=["load_4bit", "load_8bit"])
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The flag, and a folder with weights that were quantised so before they were saved."""
    folder = tmp_path_factory.mktemp("quantised") / "checkpoint"
    tokenizer, model, _, _ = load_pretrained_model(str(BASE), device="cpu", **{request.param: True})
    model.config.mm_vision_tower = str(LLAVA / "tiny-clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert loaded((folder, None), device="cpu").is_quantized
    return request.param, folder


@pytest.mark.parametrize("saved", [False, True], ids=["quantised on loading", "saved quantised"])
@pytest.mark.parametrize("kind", QUANTISED_MAPS)
def test_quantised_layers_elsewhere_are_refused_by_name(
    kind: str, saved: bool, quantised: tuple[str, Path], tmp_path: Path
) -> None:
    """The map may be the caller's, or the one that transformers computes from the memory that there is."""
    options, message = QUANTISED_MAPS[kind]
    source, flags = (quantised[1], {}) if saved else (BASE, {quantised[0]: True})
    with pytest.raises(FlagError, match=message) as refused:
        loaded((source, None), device="cuda", **options, **flags, **offload(tmp_path))
    assert "raise max_memory or give these parts a device in device_map" in str(refused.value)


def test_quantised_layers_that_fit_are_not_refused(quantised: tuple[str, Path]) -> None:
    room: Any = {"device_map": "auto", "max_memory": {"cpu": 10_000_000}}
    for source, flags in ((BASE, {quantised[0]: True}), (quantised[1], {})):
        assert loaded((source, None), device="cuda", **room, **flags).is_quantized


def test_a_projector_that_is_nowhere_is_still_missed(tmp_path: Path) -> None:
    """Weights that the base lacks are not replaced by zeros."""
    folder, _ = with_trained_tower(tmp_path / "checkpoint")
    path = folder / "mm_projector.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)
    (folder / FILE_LIST).unlink()  # by which the change would be noticed before
    with pytest.raises(CheckpointError, match="does not fit the model; 1 tensors are missing"):
        loaded((folder, VICUNA), device="cuda", device_map=spread("disk", newline=False), **offload(tmp_path))
