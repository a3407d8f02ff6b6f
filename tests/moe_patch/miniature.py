"""A miniature of an upstream checkout: files of our own wording with the anchors that moe_patch looks for.

It is small but works: `llava/train/train.py` trains on token ids and, with a tower, on pictures, and
`llava/model/builder.py` loads the result, so the inserted lines are run and not only compared. Nothing in it is
upstream's text.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

TRAIN = '''\
"""Trains on made-up token ids; every second row has a picture if there is a tower."""
import os
from dataclasses import dataclass, field

import torch
import transformers

from llava.train.llava_trainer import LLaVATrainer
from llava.model import *


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="base")
    tune_mm_mlp_adapter: bool = field(default=False)
    freeze_backbone: bool = field(default=False)
    vision_tower: str = field(default=None)


@dataclass
class DataArguments:
    text: str = field(default="a b")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    lora_enable: bool = False
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_bias: str = "none"
    freeze_mm_mlp_adapter: bool = False


def get_peft_state_non_lora_maybe_zero_3(named):
    return {key: value.detach().clone() for key, value in named if value.requires_grad and "lora_" not in key}


def train(attn_implementation=None):
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    model = LlavaLlamaForCausalLM.from_pretrained(model_args.model_name_or_path)
    if training_args.lora_enable:
        from peft import LoraConfig, get_peft_model
        lora_config = LoraConfig(
            r=training_args.lora_r,
            lora_alpha=training_args.lora_alpha,
            target_modules=["q_proj", "gate_proj"],
        )
        if True:
            print("adding LoRA")
        model = get_peft_model(model, lora_config)  # it freezes the rest
        model.get_base_model().model.mm_projector.requires_grad_(True)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(3, 43).reshape(8, 5)]
    if model_args.vision_tower is not None:
        model.config.mm_vision_tower = model_args.vision_tower
        vision_tower = model.get_vision_tower()
        vision_tower.name = model_args.vision_tower
        vision_tower.load_model()
        vision_tower.to(dtype=torch.float32)
        size = vision_tower.vision_tower.config.image_size
        for number, row in enumerate(rows):
            row["images"] = torch.randn(3, size, size)
            row["input_ids"] = torch.where(torch.tensor([number % 2, 0, 0, 0, 0]) == 1, -200, row["input_ids"])
            row["labels"] = row["input_ids"].where(row["input_ids"] != -200, -100)
    trainer = LLaVATrainer(model=model,
                           args=training_args, train_dataset=rows)
    resumed = any(name.startswith("checkpoint-") for name in os.listdir(training_args.output_dir)) \\
        if os.path.isdir(training_args.output_dir) else False
    trainer.train(resume_from_checkpoint=resumed)
    if training_args.lora_enable:
        non_lora_state_dict = get_peft_state_non_lora_maybe_zero_3(
            model.named_parameters()
        )
        model.config.save_pretrained(training_args.output_dir)
        model.save_pretrained(training_args.output_dir)
        torch.save(non_lora_state_dict, os.path.join(training_args.output_dir, "non_lora_trainables.bin"))
    else:
        raise RuntimeError("the miniature's own way of saving")


if __name__ == "__main__":
    train()
'''

BUILDER = '''\
"""Loads what train.py has written."""
from transformers import AutoTokenizer
import torch
from llava.model import *


def load_pretrained_model(model_path, model_base, model_name, device="cuda", **kwargs):
    """Tokenizer, model, image processor, context length."""
    kwargs = {"torch_dtype": torch.float32, **kwargs}
    if 'llava' in model_name.lower():
        if 'lora' in model_name.lower() and model_base is None:
            print("a base is needed")
        if 'lora' in model_name.lower() and model_base is not None:
            raise RuntimeError("the miniature's own way of loading")
        else:
            tokenizer = AutoTokenizer.from_pretrained(model_path, use_fast=False)
            model = LlavaLlamaForCausalLM.from_pretrained(model_path, **kwargs)
    else:
        raise RuntimeError("no LLaVA")
    model.get_vision_tower().load_model()
    return tokenizer, model, None, 2048
'''

LLAMA = '''\
"""The model."""
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ..llava_arch import LlavaMetaForCausalLM, Tower


class LlavaConfig(LlamaConfig):
    model_type = "llava_llama"


class LlavaLlamaForCausalLM(LlamaForCausalLM, LlavaMetaForCausalLM):
    config_class = LlavaConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        layers = [nn.Linear(config.mm_hidden_size, width), nn.GELU(), nn.Linear(width, width)]
        self.model.mm_projector = nn.Sequential(*layers)
        self.model.vision_tower = Tower(config.mm_vision_tower, config.mm_vision_select_layer)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        labels=None,
        images=None,
        inputs_embeds=None,
        **kwargs,
    ):
        if inputs_embeds is None:
            inputs_embeds, labels = self.prepare_inputs_labels_for_multimodal(input_ids, labels, images)
        return super().forward(inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **kwargs)

    @torch.no_grad()
    def generate(self, inputs=None, images=None, **kwargs):
        if inputs is not None:
            kwargs["inputs_embeds"], _ = self.prepare_inputs_labels_for_multimodal(inputs, None, images)
        return super().generate(**kwargs)


AutoConfig.register("llava_llama", LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
'''

ARCH = '''\
"""Tower and splicing; the rows of a batch are of one length and kind."""
import torch
from torch import nn
from transformers import CLIPVisionModel


class Tower(nn.Module):
    def __init__(self, name, select_layer):
        super().__init__()
        self.name, self.select_layer, self.is_loaded = name, select_layer, False

    def load_model(self):
        if not self.is_loaded:
            self.vision_tower = CLIPVisionModel.from_pretrained(self.name).requires_grad_(False)
            self.is_loaded = True

    @property
    def hidden_size(self):
        return self.vision_tower.config.hidden_size

    @torch.no_grad()
    def forward(self, images):
        return self.vision_tower(images, output_hidden_states=True).hidden_states[self.select_layer][:, 1:]


class LlavaMetaForCausalLM:
    def get_model(self):
        return self.model

    def get_vision_tower(self):
        return self.model.vision_tower

    def prepare_inputs_labels_for_multimodal(self, input_ids, labels, images):
        embeds, targets = [], []
        for number, ids in enumerate(input_ids):
            embed = self.model.embed_tokens(ids.clamp(min=0))
            target = None if labels is None else labels[number]
            for place in (ids == -200).nonzero()[:, 0].tolist():
                picture = self.model.mm_projector(self.model.vision_tower(images[number : number + 1])[0])
                embed = torch.cat([embed[:place], picture, embed[place + 1 :]])
                if target is not None:
                    ignored = target.new_full((len(picture),), -100)
                    target = torch.cat([target[:place], ignored, target[place + 1 :]])
            embeds.append(embed)
            targets.append(target)
        return torch.stack(embeds), None if labels is None else torch.stack(targets)
'''

FILES = {
    "llava/__init__.py": "from .model import LlavaLlamaForCausalLM\n",
    "llava/model/__init__.py": "from .language_model.llava_llama import LlavaLlamaForCausalLM, LlavaConfig\n",
    "llava/model/llava_arch.py": ARCH,
    "llava/model/language_model/llava_llama.py": LLAMA,
    "llava/model/language_model/__init__.py": "",
    "llava/model/builder.py": BUILDER,
    "llava/train/train.py": TRAIN,
    "llava/train/llava_trainer.py": "from transformers import Trainer\n\n\nclass LLaVATrainer(Trainer):\n    pass\n",
    "README.md": "A miniature.\n",
}

EDITED = ("llava/train/train.py", "llava/model/builder.py", "llava/model/language_model/llava_llama.py")


def write(folder: Path, newline: str = "\n") -> Path:
    """The miniature as a git repository with one commit, in `folder`."""
    write_files(folder, newline)
    git(folder, "init", "-q")
    commit(folder)
    return folder


def write_files(folder: Path, newline: str = "\n") -> None:
    """The miniature without a repository."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.replace("\n", newline).encode())


def commit(folder: Path) -> None:
    """Commit everything as it is."""
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-q", "-m", "state", "--no-verify")


def git(folder: Path, *arguments: str) -> str:
    """Output of a git command, with the files' bytes left alone and nothing read from the user's settings."""
    command = ["git", "-c", "core.autocrlf=false", "-C", str(folder), *arguments]
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and permissions of every file, git's own aside."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mode)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".git" not in path.relative_to(folder).parts
    }
