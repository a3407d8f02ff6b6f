"""A training step of every extension, and generation, on a CUDA device that is not there: one device, counted waits.

`FakeTensorMode` refuses an operation on tensors of two devices. In training the weights have no numbers; generation,
which follows its own tokens, is computed for real.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import varlen

from llava.model.checkpoint import bare_model
from llava.model.language_model import packed_attention
from llava.runtime.rehearsal.fake_device import FakeDevice, UnknownValueError, on_device
from llava.runtime.tokenizer import load_tokenizer
from llava.train.plan.command import read_command
from llava.train.plan.model import planned_model
from llava.train.plan.update import measure
from playground.draw import IMAGE_SIZE
from playground.tiny import Sizes, build_tiny

CUDA = torch.device("cuda", 0)
EXTENSIONS = {
    "none": "",
    "block": "--use_lora True --lora_rank 4 --llm_moe_num_experts 3",
    "tuner": "--peft_config {folder}/tuner.json",
    "dynamic": "--dynamic True",
    "mma": "--mma True --visual_input llava",
}
ATTACHED = {"block": ["hydralora"], "dynamic": ["dynamic"], "mma": ["mma"]}
WAITS_OF_A_STEP = 2  # whether the loss is finite, and one more
WAITS_OF_A_TOKEN = 4  # measured below; the prompt's are in PROMPT
each_extension = pytest.mark.parametrize("name", EXTENSIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fake-cuda")
    build_tiny(root, sizes=Sizes(width=64, mlp_width=128, layers=3, heads=4, tower_width=32, tower_layers=2))
    (root / "rows.json").write_text("[]", encoding="utf-8")
    settings = '{"peft_type": "HYDRALORA", "r": 4, "lora_nums": 3, "target_modules": ["q_proj", "v_proj"]}'
    (root / "tuner.json").write_text(settings, encoding="utf-8")
    return root


def words(folder: Path, name: str) -> list[str]:
    common = (
        f"--model_name_or_path {folder}/tiny-vicuna --version v1 --data_path {folder}/rows.json "
        f"--image_folder {folder} --vision_tower {folder}/tiny-clip --mm_use_im_patch_token False "
        f"--output_dir {folder}/out --per_device_train_batch_size 2 --model_max_length 96 "
    )
    return (common + EXTENSIONS[name].format(folder=folder)).split()


@each_extension
def test_a_training_step_stays_on_one_device(name: str, folder: Path) -> None:
    update = measure(read_command([*words(folder, name), "--bf16", "True", "--gradient_checkpointing", "True"]), 2)
    assert update.flops > 0
    assert sum(update.waits.values()) <= WAITS_OF_A_STEP, update.waits


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_packed_rows_take_the_bounds_of_their_samples(
    precision: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer calls torch's kernel, and no mask is made; in float32, which it does not take, it is the mask."""
    called: list[tuple[str, torch.dtype, int, tuple[int, int]]] = []
    masks: list[torch.Size] = []
    kernel, make = varlen.varlen_attn, packed_attention._block_mask

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        called.append((q.device.type, q.dtype, args[2], kwargs["window_size"]))
        return kernel(q, k, v, *args, **kwargs)

    def noted(*args: Any) -> torch.Tensor:
        mask = make(*args)
        masks.append(mask.shape)
        return mask

    monkeypatch.setattr(varlen, "varlen_attn", spy)
    monkeypatch.setattr(packed_attention, "_block_mask", noted)
    half = ["--bf16", "True"] if precision == "bf16" else []
    update = measure(read_command([*words(folder, "none"), *half, "--packing", "True"]), 2)
    assert sum(update.waits.values()) <= WAITS_OF_A_STEP, update.waits
    if half:
        assert set(called) == {("cuda", torch.bfloat16, 96, (-1, 0))}
        assert len(called) % 3 == 0  # layers
        assert not masks
    else:
        assert not called
        assert set(masks) == {(2, 1, 96, 96)}


@each_extension
def test_generation_stays_on_one_device(name: str, folder: Path) -> None:
    command = read_command(words(folder, name))
    tokenizer = load_tokenizer(str(folder / "tiny-vicuna"), model_max_length=96)
    fake = FakeDevice(CUDA, known_up_to=None)
    prompts = torch.tensor([[1, 5, -200, 7, 9], [1, -200, 6, 8, 0]])
    shown = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with on_device(fake):
        with torch.device(CUDA):
            model = bare_model(planned_model(command.args, tokenizer, None, None)).eval()
        assert [item.extension.name for item in model.extensions] == ATTACHED.get(name, [])
        ids, mask, images = map(fake.put, (prompts, shown, pixels))
        waits = []
        for tokens in (2, 6):
            fake.waits.clear()
            found = model.generate(
                ids, images=images, attention_mask=mask, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
            )
            waits.append(sum(fake.waits.values()))
            assert found.shape == (2, tokens)
            assert found.device == CUDA
    assert (waits[1] - waits[0]) / 4 <= WAITS_OF_A_TOKEN


# The fake device itself


def test_two_devices_are_noticed() -> None:
    """The negative control: a tensor that was left on the CPU."""
    with on_device(FakeDevice(CUDA)):
        x = torch.ones(2, device=CUDA)
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(2, device="cpu")


def test_waits_are_counted_and_values_are_right() -> None:
    fake, known = FakeDevice(CUDA), torch.tensor([3, 1, 2])
    with on_device(fake):
        ids = fake.put(known)
        assert isinstance(ids, FakeTensor)
        assert ids.device == CUDA
        assert int((ids * 2).sum()) == 12
        assert ids[ids > 1].tolist() == [3, 2]
        ids.add_(1)
        ids.cpu()
        ids.to(CUDA)  # where it is: no copy
        assert (ids > 2).nonzero().shape == (2, 1)
        with pytest.raises(UnknownValueError):
            float(torch.randn(2, device=CUDA).sum())
    assert fake.waits == {"a number is read": 3, "a mask as index": 1, "a copy to the host": 1, "nonzero": 1}


def test_autocast_rounds_as_on_a_gpu() -> None:
    with on_device(FakeDevice(CUDA)), torch.device(CUDA):
        weight = torch.nn.Linear(4, 4)
        x = torch.randn(2, 4)
        assert weight(x).dtype == torch.float32
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert weight(x).dtype == torch.bfloat16
            assert torch.softmax(weight(x), -1).dtype == torch.float32
        weight(x).sum().backward()
        assert weight.weight.grad is not None
        assert weight.weight.grad.device == CUDA
