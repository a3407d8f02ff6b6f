"""A miniature of an upstream checkout: files of our own wording with the anchors that moe_patch looks for.

It is small but works: `llava/train/train.py` trains a text-only model and `llava/model/builder.py` loads the result, so
the inserted lines are run and not only compared. Nothing in it is upstream's text.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

TRAIN = '''\
"""Trains on two sentences."""
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
    return tokenizer, model, None, 2048
'''

LLAMA = '''\
"""The text-only model."""
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ..llava_arch import LlavaMetaForCausalLM


class LlavaConfig(LlamaConfig):
    model_type = "llava_llama"


class LlavaLlamaForCausalLM(LlamaForCausalLM, LlavaMetaForCausalLM):
    config_class = LlavaConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        layers = [nn.Linear(config.mm_hidden_size, width), nn.GELU(), nn.Linear(width, width)]
        self.model.mm_projector = nn.Sequential(*layers)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        labels=None,
        **kwargs,
    ):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


AutoConfig.register("llava_llama", LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
'''

FILES = {
    "llava/__init__.py": "from .model import LlavaLlamaForCausalLM\n",
    "llava/model/__init__.py": "from .language_model.llava_llama import LlavaLlamaForCausalLM, LlavaConfig\n",
    "llava/model/llava_arch.py": "class LlavaMetaForCausalLM:\n    pass\n",
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
