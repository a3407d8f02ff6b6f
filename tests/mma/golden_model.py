"""The tiny model of the golden cases in our parts: Meta-format LLaMA and OpenAI's CLIP turned into transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from mma.config import MmaConfig
from mma.extension import MmaExtension
from mma.original import original_names
from tests.golden import golden_dir, load_case

IMAGE = -200
ROW = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
       "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
       "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
       "ffn_norm": "post_attention_layernorm"}  # fmt: skip


def base_weights() -> dict[str, Tensor]:
    """The frozen parameters by the original's names."""
    stored = load_file(golden_dir("lavin") / "weights_base.safetensors")
    return {name.removeprefix("w/"): value for name, value in stored.items()}


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of wq or wk from interleaved rotary pairs to halves."""
    return weight.view(heads, len(weight) // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def llama_tensors(heads: int) -> dict[str, Tensor]:
    """The language model by transformers' names."""
    found: dict[str, Tensor] = {}
    single = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    for name, value in base_weights().items():
        parts = name.split(".")
        if parts[0] == "layers":
            inner = ".".join(parts[2:-1])
            if inner in ("attention.wq", "attention.wk"):
                value = half_split(value, heads)
            found[f"model.layers.{parts[1]}.{ROW[inner]}.weight"] = value
        elif parts[0] in single:
            found[f"{single[parts[0]]}.weight"] = value
    return found


def write_tower(folder: Path, config: dict[str, Any]) -> Path:
    """Write the vision tower with an image processor as a CLIP folder."""
    vision = config["vision"]
    width, size = vision["width"], vision["image_size"]
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=vision["layers"],
            num_attention_heads=vision["heads"], image_size=size, patch_size=vision["patch_size"],
            hidden_act="quick_gelu", layer_norm_eps=1e-5,
        )
    )  # fmt: skip
    prefix = "backbone.visual."
    source = {name.removeprefix(prefix): v for name, v in base_weights().items() if name.startswith(prefix)}
    tensors = {
        "embeddings.class_embedding": source["class_embedding"],
        "embeddings.patch_embedding.weight": source["conv1.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
    }
    for kind in ("weight", "bias"):
        tensors[f"pre_layrnorm.{kind}"] = source[f"ln_pre.{kind}"]
        for layer in range(vision["layers"]):
            block, target = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
            for part, value in zip("qkv", source[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True):
                tensors[f"{target}.self_attn.{part}_proj.{kind}"] = value
            tensors[f"{target}.self_attn.out_proj.{kind}"] = source[f"{block}.attn.out_proj.{kind}"]
            for theirs, ours in {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
                                 "mlp.c_proj": "mlp.fc2"}.items():  # fmt: skip
                tensors[f"{target}.{ours}.{kind}"] = source[f"{block}.{theirs}.{kind}"]
    known = clip.state_dict()
    prefix = "vision_model." if "vision_model.pre_layrnorm.weight" in known else ""
    result = clip.load_state_dict({f"{prefix}{name}": value for name, value in tensors.items()}, strict=False)
    assert not result.unexpected_keys
    assert {name.split(".")[-2] for name in result.missing_keys} <= {"post_layernorm", "embeddings"}
    clip.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder
    )
    return folder


def llava_config(config: dict[str, Any], tower: Path, **changes: Any) -> LlavaConfig:
    """Configuration of the golden LLaVA around `tower`."""
    llama = config["llama"]
    settings = {
        "hidden_size": llama["dim"], "num_hidden_layers": llama["n_layers"], "num_attention_heads": llama["n_heads"],
        "vocab_size": llama["vocab_size"], "intermediate_size": llama["ffn_hidden"], "rms_norm_eps": llama["norm_eps"],
        "max_position_embeddings": 256, "mm_vision_tower": str(tower), "mm_hidden_size": config["vision"]["width"],
        "mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_every_4", "use_mm_proj": True,
        "mm_projector_type": f"bottleneck{llama['hidden_proj']}_silu", "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": llama["max_seq_len"] - 1, "pad_token_id": 0,
    }  # fmt: skip
    return LlavaConfig(**settings | changes)


def golden_model(name: str, folder: Path, **changes: Any) -> tuple[LlavaLlamaForCausalLM, dict, dict[str, Tensor]]:
    """The model of a case with all its weights in evaluation mode, the JSON of the case, and its tensors.

    Args:
        name: of the case.
        folder: where the tower is written.
        changes: of the configuration of the adapters.
    """
    case, tensors = load_case("lavin", name)
    config = case["config"]
    tower = write_tower(folder / "tower", config)
    model = LlavaLlamaForCausalLM(llava_config(config, tower))
    model.get_model().load_vision_tower([tower])
    adapter = MmaConfig.from_dict({**config["adapter"], **changes})
    model.extensions.attach(model, MmaExtension(), adapter.to_dict())
    weights = {ours: tensors[f"w/{theirs}"] for ours, theirs in original_names(model).items()}
    stored = {key for key in tensors if key.startswith("w/")}
    assert stored == {f"w/{theirs}" for theirs in original_names(model).values()}, "every tensor of the file is used"
    result = model.load_state_dict(weights | llama_tensors(config["llama"]["n_heads"]), strict=False)
    assert not result.unexpected_keys
    assert all("vision_tower" in key for key in result.missing_keys)
    return model.float().eval(), case, tensors


def spliced_rows(case: dict, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Ids with image tokens, and labels, of the rows of a training case; both (B, T), rows of text padded by 0."""
    rows, labels = [], []
    zipped = zip(tensors["in/examples"], tensors["in/labels"], tensors["in/img_indicators"].tolist(), strict=True)
    for example, label, has_image in zipped:
        prefix = tensors["in/prefix_img"] if has_image else tensors["in/prefix_nonimg"]
        middle = torch.cat([prefix, torch.tensor([IMAGE] * has_image, dtype=torch.long)])
        rows.append(torch.cat([example[:1], middle, example[1:]]))
        labels.append(torch.cat([label[:1], torch.zeros_like(middle), label[1:]]))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True)
    return ids, targets.masked_fill(targets == 0, -100)
