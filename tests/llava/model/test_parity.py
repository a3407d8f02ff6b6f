"""The model against the original's numbers: tower, projector, splicing, forward, gradients, generation.

Tolerances are those of `tests/golden/llava/README.md`; our measured worst cases are two to ten times smaller.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.model import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from tests.golden import golden_dir, load_case

CHECKPOINT = golden_dir("llava") / "tiny-llava-v1.5"

# Variants that the original refuses or gets wrong, and what happens here: None means that it works.
DIFFERENT = {
    "not_enough_images": "needs 2 images .* but 1 were given",
    "too_many_images": "needs 1 images .* but 3 were given",
    "im_start_end_pretrain": None,
    "spatial_square": "only with --image_aspect_ratio anyres",
}


def variants(case: str, key: str) -> list[Any]:
    content = json.loads((golden_dir("llava") / f"case_{case}.json").read_text())
    return [pytest.param(variant, id=variant["name"]) for variant in content[key]]


@pytest.fixture(scope="module")
def loaded() -> LlavaLlamaForCausalLM:
    model = LlavaLlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    model.get_model().load_vision_tower([CHECKPOINT])
    return model.eval()


@pytest.fixture
def model(loaded: LlavaLlamaForCausalLM) -> Any:
    """The tiny checkpoint, its configuration restored afterwards."""
    before = dict(vars(loaded.config))
    feature = loaded.get_vision_tower().select_feature
    yield loaded
    vars(loaded.config).clear()
    vars(loaded.config).update(before)
    loaded.get_vision_tower().select_feature = feature
    loaded.requires_grad_(False)
    loaded.zero_grad(set_to_none=True)


def images(pool: Tensor, images: dict[str, Any] | None) -> Any:
    """Images of a case: a batch, or a list of single and tiled ones."""
    if images is None:
        return None
    if "tensor" in images:
        return pool[torch.tensor(images["tensor"])]
    return [pool[torch.tensor(index)] for index in images["list"]]


def configure(model: LlavaLlamaForCausalLM, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(model.config, name, value)
    model.get_vision_tower().select_feature = model.config.mm_vision_select_feature


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("layer", [-1, -2, -3, 0])
def test_tower(feature: str, layer: int) -> None:
    _, tensors = load_case("llava", "arch_vision")
    tower = CLIPVisionTower(str(golden_dir("llava") / "tiny-clip"), layer, feature)
    tower.load_model()
    torch.testing.assert_close(
        tower(tensors["in/images"]), tensors[f"out/tower/{feature}/{layer}"], rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "identity"])
def test_projector(kind: str) -> None:
    case, tensors = load_case("llava", "arch_vision")
    settings = dict(case["projectors"][kind])
    if kind == "identity":
        settings["hidden_size"] = settings["mm_hidden_size"]  # the original lets unequal widths through
    projector = build_vision_projector(SimpleNamespace(**settings))
    prefix = f"w/{kind}/"
    projector.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    result = projector(tensors["out/tower/patch/-2"])
    torch.testing.assert_close(result, tensors[f"out/projected/{kind}"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("variant", variants("arch_prepare", "variants"))
def test_splice(model: LlavaLlamaForCausalLM, variant: dict[str, Any]) -> None:
    case, tensors = load_case("llava", "arch_prepare")
    name = variant["name"]
    configure(model, case["config_defaults"] | variant["config"])
    model.get_model().image_newline = torch.nn.Parameter(tensors["w/image_newline"])

    def run() -> tuple[Any, ...]:
        return model.prepare_inputs_labels_for_multimodal(
            tensors[f"in/{name}/input_ids"],
            None,
            tensors.get(f"in/{name}/attention_mask"),
            None,
            tensors.get(f"in/{name}/labels"),
            images(tensors["in/pool"], variant["images"]),
            variant["image_sizes"],
        )

    if DIFFERENT.get(name):
        with pytest.raises(ValueError, match=DIFFERENT[name]):
            run()
        return
    results = dict(
        zip(
            ("input_ids", "position_ids", "attention_mask", "cache", "inputs_embeds", "labels"),
            run(),
            strict=True,
        )
    )
    if name in DIFFERENT:
        assert results["inputs_embeds"] is not None
        return
    assert sum(value is not None for value in results.values()) == sum(
        value is not None for value in case["out"][name].values()
    )
    for part, value in results.items():
        expected = tensors.get(f"out/{name}/{part}")
        if value is None or part == "cache":
            assert expected is None
            continue
        assert value.dtype == expected.dtype
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=2e-5)


def test_forward_and_gradients(model: LlavaLlamaForCausalLM) -> None:
    case, tensors = load_case("llava", "arch_forward")
    model.requires_grad_(True)
    model.get_vision_tower().requires_grad_(False)
    batch = {name: tensors[f"in/{name}"] for name in ("input_ids", "attention_mask", "labels", "images")}
    output = model(**batch)
    assert output.loss.item() == pytest.approx(case["out"]["loss"], abs=1e-5)
    valid = tensors["out/attention_mask"].bool()
    stride = case["logit_stride"]
    torch.testing.assert_close(
        output.logits[..., ::stride][valid], tensors["out/logits_strided"][valid], rtol=0, atol=1e-4
    )
    assert torch.equal(output.logits.argmax(-1)[valid], tensors["out/argmax"][valid])
    output.loss.backward()
    parameters = dict(model.named_parameters())
    names = [name for name in tensors if name.startswith("grad/")]
    assert len(names) == len(case["grads"]) + 1
    for name in names:
        if name.endswith("/rows"):
            gradient = parameters[name.removeprefix("grad/").removesuffix("/rows")].grad[case["embed_rows"]]
        else:
            gradient = parameters[name.removeprefix("grad/")].grad
        torch.testing.assert_close(gradient, tensors[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("variant", variants("arch_generate", "cases"))
def test_generate(model: LlavaLlamaForCausalLM, variant: dict[str, Any]) -> None:
    case, tensors = load_case("llava", "arch_generate")
    configure(model, case["config_defaults"] | variant["config"])
    model.get_model().image_newline = torch.nn.Parameter(tensors["w/image_newline"])
    expected = next(result for result in case["out"]["results"] if result["name"] == variant["name"])
    tokens = model.generate(
        tensors[f"in/{variant['name']}/input_ids"],
        images=images(tensors["in/pool"], variant["images"]),
        image_sizes=variant["image_sizes"],
        max_new_tokens=variant["max_new_tokens"],
        num_beams=variant["num_beams"],
        do_sample=False,
    )
    # The original's result begins with a dummy BOS that was never generated.
    assert tokens.tolist() == [row[1:] for row in expected["tokens"]]


def test_batched_generation_equals_single(model: LlavaLlamaForCausalLM) -> None:
    """Rows with one image, two images and none, of different length, padded on the left."""
    case, tensors = load_case("llava", "arch_generate")
    configure(model, case["config_defaults"])
    pool = tensors["in/pool"]
    rows = [tensors[f"in/{name}/input_ids"][0] for name in ("one_image", "two_images", "text_only")]
    images = [pool[0:1], pool[1:3], pool[3:4]]  # the text-only row takes a dummy
    longest = max(map(len, rows))
    batch = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    together = model.generate(batch, images=torch.cat(images), attention_mask=mask, **options)
    for row, image, result in zip(rows, images, together, strict=True):
        alone = model.generate(row[None], images=image, **options)
        assert torch.equal(alone[0], result)
    other = model.generate(batch, images=torch.cat(images).flip(0), attention_mask=mask, **options)
    assert not torch.equal(other[0], together[0]), "the images must matter"
