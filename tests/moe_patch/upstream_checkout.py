"""A clone of the real checkout and what is done with it, for the tests that have upstream's environment.

They need LLAVA_UPSTREAM_DIR, a clone of haotian-liu/LLaVA, and LLAVA_UPSTREAM_PYTHON, the Python of an environment with
upstream's pins; `make test-upstream` makes the latter. LLAVA_UPSTREAM_LOG names a file to which the commands and their
last lines are appended, LLAVA_UPSTREAM_FLAGS has further training flags.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava.eval import model_vqa_loader
from llava.model.builder import load_pretrained_model
from tests.golden import golden_dir, load_case
from tests.moe_patch import miniature

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).parent
LLAVA, MOHLE = golden_dir("llava"), golden_dir("mllm_hydralora")
# Measured on the same weights in two versions of torch and transformers: at most 5.0e-6 at logits up to 6.4.
LOGITS = {"rtol": 1e-4, "atol": 1e-5}

NEEDS_UPSTREAM = pytest.mark.skipif(
    not (os.environ.get("LLAVA_UPSTREAM_DIR") and os.environ.get("LLAVA_UPSTREAM_PYTHON")),
    reason="LLAVA_UPSTREAM_DIR and LLAVA_UPSTREAM_PYTHON are not set; see `make test-upstream`",
)

# The published command line with the sizes of the tiny model, for a machine without GPU.
TRAIN = """--use_lora True --lora_rank 4 --lora_alpha 8 --mm_projector_lr 2e-5 --llm_moe True --dense_moe True
    --lora_modules q_proj,k_proj,v_proj,o_proj --llm_moe_num_experts 3 --moe_balance_w 0.05
    --model_name_or_path ./tiny-llava-v1.5 --version v1 --freeze_backbone True
    --data_path ./data/finetune.json --image_folder ./data/images --vision_tower ./tiny-clip
    --pretrain_mm_mlp_adapter ./tiny-llava-v1.5/mm_projector.bin --mm_projector_type mlp2x_gelu
    --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio resize
    --group_by_modality_length True --bf16 True --output_dir ./trained --num_train_epochs 1 --max_steps 3
    --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 2
    --evaluation_strategy no --save_strategy steps --save_steps 2 --save_total_limit 1 --learning_rate 2e-2
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 False
    --model_max_length 512 --gradient_checkpointing True --dataloader_num_workers 0 --lazy_preprocess True
    --no_cuda True --report_to none"""


MODALITIES = """--mma True --visual_input llava --adapter_type block --visual_adapter_type router --temperature 10
    --model_name_or_path ./tiny-llava-v1.5 --version v1 --data_path ./data/finetune.json --image_folder ./data/images
    --vision_tower ./tiny-clip --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False
    --mm_use_im_patch_token False --image_aspect_ratio pad --bf16 True --output_dir ./adapters --max_steps 3
    --per_device_train_batch_size 2 --save_strategy no --learning_rate 9e-2 --weight_decay 0.02 --logging_steps 1
    --lr_scheduler_type constant --model_max_length 512 --gradient_checkpointing True --lazy_preprocess True
    --no_cuda True --report_to none"""

# That of Dynamic-LLaVA's published run, with all three predictors and what the tiny model asks for.
SPARSE = """--dynamic True --use_vision_predictor True --use_text_predictor True --use_output_text_predictor True
    --use_instruct_predictor True --vision_keep_rate 0.3 --output_text_keep_rate 0.5 --output_text_len_for_training 3
    --instruct_len_for_training 3 --mask_loss_weight 10.0 --gumbel_start_tau 1.0 --gumbel_end_tau 0.1
    --predictor_lr 3e-2 --predictor_weight_decay 0. --sparse_layer 1 --d_model 32 --nhead 4 --dim_feedforward 64
    --model_name_or_path ./tiny-llava-v1.5 --version v1 --data_path ./data/finetune.json --image_folder ./data/images
    --vision_tower ./tiny-clip --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False
    --mm_use_im_patch_token False --image_aspect_ratio pad --group_by_modality_length False --bf16 True
    --output_dir ./sparse --max_steps 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 1
    --evaluation_strategy no --save_strategy steps --save_steps 2 --save_total_limit 1 --learning_rate 1e-2
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 False
    --model_max_length 512 --gradient_checkpointing True --dataloader_num_workers 0 --lazy_preprocess True
    --no_cuda True --report_to none"""


def losses_of(output: str) -> list[float]:
    """The losses of all steps that a run has logged, each of which must be a number."""
    found = [float(text) for text in re.findall(r"\{'loss': ([^,}]+)", output)]
    assert found, output[-3000:]
    assert all(map(math.isfinite, found)), found
    return found


def weights_of(folder: Path) -> dict[str, Tensor]:
    """What a run has written, by its name in the files, whichever method it was; all of it must be finite."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.rglob("*")):
        if "checkpoint-" in path.relative_to(folder).parts[0]:
            continue
        if path.name == "non_lora_trainables.bin":
            found |= torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            found |= load_file(path)
    assert found
    assert [name for name, tensor in found.items() if not bool(tensor.isfinite().all())] == []
    return found


@dataclass
class Upstream:
    """The checkout, the folder in which its programs run, and what they printed."""

    checkout: Path
    work: Path
    before: dict[str, tuple[bytes, int]]
    log: list[str] = field(default_factory=list)

    def run(self, title: str, *command: str, path: str | None = None, cwd: Path | None = None) -> str:
        """Output of a command, which must succeed; PYTHONPATH is the checkout unless given."""
        environment = os.environ | {
            **{"PYTHONPATH": path or str(self.checkout), "PYTHON": os.environ["LLAVA_UPSTREAM_PYTHON"]},
            **{
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONDONTWRITEBYTECODE": "",
            },
        }
        done = subprocess.run(
            command, cwd=cwd or self.work, env=environment, capture_output=True, text=True, check=False
        )
        output = done.stdout + done.stderr
        lines = [line[:120] for line in done.stdout.replace("\r", "\n").splitlines() if line.strip()]
        skipped = ("it/s]", "get_accelerator")  # progress, and what DeepSpeed says whenever it is imported
        self.log.append("\n".join([f"$ {title}", *[n for n in lines if not any(s in n for s in skipped)][-4:]]))
        assert done.returncode == 0, f"{title}\n{output[-6000:]}"
        return output

    def program(self, title: str, *arguments: str, path: str | None = None) -> str:
        """Output of a Python program in upstream's environment."""
        return self.run(title, os.environ["LLAVA_UPSTREAM_PYTHON"], *arguments, path=path)

    def moe_patch(self, command: str, *options: str) -> str:
        """Output of `python -m moe_patch` in upstream's environment."""
        title = " ".join(["python -m moe_patch", command, "LLaVA", *options])
        return self.program(title, "-m", "moe_patch", command, str(self.checkout), *options, path=str(ROOT))

    def base_of(self, folder: str) -> str:
        """The base of a checkpoint by its name here; empty for one with the weights of the whole model."""
        return "" if (self.work / folder / "model.safetensors").is_file() else "tiny-llava-v1.5"

    def logits(self, folder: str, inputs: str = "inputs") -> tuple[Tensor, int]:
        """Of a checkpoint, by the checkout's own loader, and how many routed blocks it has."""
        output = self.work / f"{folder}.safetensors"
        arguments = ("--cpu", "logits", f"./{folder}", self.base_of(folder), f"{inputs}.safetensors", str(output))
        self.program(f"python in_checkout.py --cpu logits ./{folder}", str(HERE / "in_checkout.py"), *arguments)
        found = load_file(output)
        return found["logits"], int(found["blocks"])

    def close(self, what: str, found: Tensor, expected: Tensor) -> None:
        """Compare logits, and note how far they are apart."""
        apart = (found - expected).abs().max()
        self.log.append(f"  {what}: largest difference {apart:.1e} at logits up to {expected.abs().max():.1f}")
        torch.testing.assert_close(found, expected, **LOGITS)


def training_flags(output: str) -> list[str]:
    """The command line of a run into a folder."""
    return [*TRAIN.replace("./trained", f"./{output}").split(), *os.environ.get("LLAVA_UPSTREAM_FLAGS", "").split()]


def clone(target: Path) -> Path:
    """The package `llava` of upstream's checkout at its commit, as a git checkout of its own."""
    source = os.environ["LLAVA_UPSTREAM_DIR"]
    commit = miniature.git(Path(source), "rev-parse", "HEAD").strip()
    miniature.git(target.parent, "clone", "-q", "--shared", "--no-checkout", "--sparse", source, str(target))
    miniature.git(target, "sparse-checkout", "set", "llava", "scripts")
    miniature.git(target, "checkout", "-q", commit)
    return target


def use_model_type(config: Path, checkout: Path) -> None:
    """Let a config.json name the kind of model as this version does; until v1.1.3 it was `llava`."""
    source = (checkout / "llava/model/language_model/llava_llama.py").read_text()
    kind = re.findall(r'model_type = "(\w+)"', source)[0]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": kind}))


def prepare(folder: Path) -> Upstream:
    """A clone, and beside it the tiny models and data on which its programs run."""
    checkout, work = clone(folder / "LLaVA"), folder / "work"
    for name in ("tiny-llava-v1.5", "tiny-clip", "data"):
        shutil.copytree(LLAVA / name, work / name)
    shutil.copytree(LLAVA / "tiny-llava-lora", work / "tiny-llava-lora")
    shutil.copytree(MOHLE / "tiny-llava-v1.5-lora-mohle", work / "golden")
    for name in ("tiny-llava-v1.5", "tiny-llava-lora", "golden"):
        use_model_type(work / name / "config.json", checkout)
    _, tensors = load_case("mllm_hydralora", "checkpoint")
    save_file({"input_ids": tensors["in/input_ids"], "images": tensors["in/images"]}, work / "inputs.safetensors")
    text = tensors["in/input_ids"].where(tensors["in/input_ids"] >= 0, 7)
    save_file({"input_ids": text, "images": tensors["in/images"]}, work / "text.safetensors")
    found = Upstream(checkout, work, miniature.snapshot(checkout))
    code = "import platform, torch, transformers, peft; print('Python', platform.python_version()); "
    code += "; ".join(f"print('{name}', {name}.__version__)" for name in ("torch", "transformers", "peft"))
    found.program("python -c 'print the versions'", "-c", code)
    return found


def our_logits(upstream: Upstream, folder: str, name: str = "inputs") -> Tensor:
    inputs = load_file(upstream.work / f"{name}.safetensors")
    if name == "text":  # upstream gives a row without image an image all the same
        del inputs["images"]
    base = upstream.base_of(folder) and str(upstream.work / upstream.base_of(folder))
    _, model, _, _ = load_pretrained_model(str(upstream.work / folder), base or None, device="cpu")
    with torch.no_grad():
        return model(**inputs).logits.float()


def answers(upstream: Upstream, folder: str) -> list[str]:
    """What the checkout's own evaluation answers, with a checkpoint."""
    image = next((upstream.work / "data" / "images").iterdir()).name
    rows = [{"question_id": number, "image": image, "text": "What is this?"} for number in range(2)]
    (upstream.work / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    base = f"--model-base ./{upstream.base_of(folder)}" if upstream.base_of(folder) else ""
    arguments = f"""--cpu run llava.eval.model_vqa_loader --model-path ./{folder} {base}
        --question-file questions.jsonl --image-folder data/images --answers-file answers/{folder}.jsonl
        --temperature 0 --conv-mode vicuna_v1"""
    title = f"python -m llava.eval.model_vqa_loader --model-path ./{folder} ..."
    upstream.program(title, str(HERE / "in_checkout.py"), *arguments.split())
    found = [json.loads(line) for line in (upstream.work / "answers" / f"{folder}.jsonl").read_text().splitlines()]
    assert [answer["question_id"] for answer in found] == [0, 1]
    upstream.log.append(f"  {len(found)} answers, the first begins with {found[0]['text'][:20]!r}")
    return [answer["text"] for answer in found]


def our_answers(upstream: Upstream, folder: str) -> list[str]:
    """The same by our evaluation."""
    path = upstream.work / "our-answers" / f"{folder}.jsonl"
    arguments = ["--model-path", str(upstream.work / folder)]
    if upstream.base_of(folder):
        arguments += ["--model-base", str(upstream.work / upstream.base_of(folder))]
    arguments += ["--question-file", str(upstream.work / "questions.jsonl"), "--answers-file", str(path)]
    arguments += ["--image-folder", str(upstream.work / "data" / "images"), "--device", "cpu"]
    model_vqa_loader.main([*arguments, "--temperature", "0", "--conv-mode", "vicuna_v1"])
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]
