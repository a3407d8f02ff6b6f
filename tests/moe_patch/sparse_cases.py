"""A program for a patched checkout in upstream's environment: the golden cases of Dynamic-LLaVA, run by its code.

    python sparse_cases.py GOLDEN OUTPUT

GOLDEN has the cases. What the checkout computes for them goes to OUTPUT.safetensors, by `<case>/<name>`, and to
OUTPUT.json. It may import nothing of ours but what the checkout carries.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from llava import extensions_moe
from llava.extensions_moe import dynamic_glue, sparse_llava
from llava.extensions_moe.dynamic import training
from llava.extensions_moe.segments import Segments, Span
from llava.extensions_moe.sparse_inputs import splice
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.train.llava_trainer import LLaVATrainer
from llava.train.train import TrainingArguments

GOLDEN, OUTPUT = Path(sys.argv[1]), Path(sys.argv[2])
TOWER = "model.vision_tower.vision_tower.vision_model."
TRAINED = ("tau1", "tau01", "tau1_instruct", "tau01_instruct", "vision_only", "text_only", "e2e")
SEGMENTS = ("train_single_right", "train_multi_right", "train_left", "trunc_answer", "trunc_image", "infer_single")
SEGMENTS += ("infer_multi", "infer_left_batch")

ARCH = json.loads((GOLDEN / "weights_a.json").read_text())["arch"]
WEIGHTS = {name[2:]: tensor for name, tensor in load_file(GOLDEN / "weights_a.safetensors").items()}
found: dict[str, Tensor] = {}
facts: dict[str, Any] = {}


class Recorded(training.MaskedPass):
    """A pass with a loss that is remembered with its policy."""

    last: Any = None

    def decide(self, *args: Any) -> Tensor | None:
        Recorded.last, self.policy = self, super().decide(*args)
        return self.policy


sparse_llava.MaskedPass = Recorded


def case_of(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / f"case_{name}.json").read_text()), load_file(GOLDEN / f"case_{name}.safetensors")


def write_tower(folder: Path) -> Path:
    config = CLIPVisionConfig(**ARCH["vision"])
    tower = CLIPVisionModel(config)
    stored = {f"vision_model.{k[len(TOWER) :]}": v for k, v in WEIGHTS.items() if k.startswith(TOWER)}
    result = tower.load_state_dict(stored, strict=False)
    assert not result.missing_keys
    tower.save_pretrained(folder)
    side = config.image_size
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def model_of(tower: Path, case: dict[str, Any]) -> Any:
    """The tiny model with the predictors of a case, everything but the tower trainable."""
    overrides = case["hp"].get("config_override") or {}
    own = {"mm_vision_tower": str(tower), "use_mm_proj": True, "user_marker_ids": ARCH["special_text"]["USER:"]}
    model: Any = LlavaLlamaForCausalLM(LlavaConfig(**ARCH["llama"] | ARCH["mm"] | own | overrides))
    model.get_vision_tower().load_model()
    result = model.load_state_dict(WEIGHTS, strict=False)
    assert not [key for key in result.missing_keys if "vision_tower" not in key], result.missing_keys
    settings = dynamic_glue.SparseConfig.from_dict(case["sparse_config"])
    names = {
        "model.image_score_predictor.": settings.use_vision_predictor,
        "model.output_text_score_predictor.": settings.judges_output_text,
        "model.instruct_score_predictor.": settings.judges_instruction,
    }
    on = tuple(name for name, exists in names.items() if exists)
    predictors = {name: tensor for name, tensor in WEIGHTS.items() if name.startswith(on)}
    dynamic_glue.Dynamic().attach(model, case["sparse_config"], predictors)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".vision_tower." not in name)
    model.generation_config.eos_token_id = None
    return model.eval()


def segments_of(rows: list[dict[str, list[int]]]) -> list[Segments]:
    return [
        Segments(
            images=(Span(*row["image"]),),
            **{name: Span(*row[name]) for name in ("system", "instruct", "last_instruct", "answer")},
        )
        for row in rows
    ]


def as_rows(segments: list[Segments]) -> list[dict[str, list[int]]]:
    names = ("system", "instruct", "answer", "last_instruct")
    return [{n: list(getattr(s, n)) for n in names} | {"image": list(s.images[0])} for s in segments]


def use_noise(noise: Iterator[Tensor]) -> None:
    def draw(shape: Any, device: Any = None) -> Tensor:
        drawn = next(noise)
        assert drawn.shape == shape
        return drawn

    training.gumbel_noise = draw


def segments_case(tower: Path, name: str) -> None:
    case, tensors = case_of(f"segments_{name}")
    inputs = {key: tensors.get(f"in/{key}") for key in ("position_ids", "attention_mask", "labels", "images")}
    spliced = splice(model_of(tower, case), tensors["in/input_ids"], image_sizes=None, **inputs)
    facts[f"segments_{name}"] = as_rows(spliced.segments)
    for key in ("inputs_embeds", "labels", "attention_mask"):
        value = getattr(spliced, key)
        if value is not None:
            found[f"segments_{name}/{key}"] = value.detach()


def training_case(tower: Path, name: str, checkpointing: bool) -> None:
    case, tensors = case_of(f"train_{name}")
    model, key = model_of(tower, case), f"train_{name}{'.checkpointed' if checkpointing else ''}"
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.dynamic_sparsity.schedule.tau = case["hp"]["tau"]
    names = ("image", "output_text", "instruct")
    use_noise(iter([tensors[f"noise/{n}"] for n in names if f"noise/{n}" in tensors]))
    batch: dict[str, Any] = {n: tensors[f"in/{n}"] for n in ("labels", "attention_mask")}
    if case["hp"]["input_embeds_indices"] is None:
        batch |= {n: tensors[f"in/{n}"] for n in ("input_ids", "images")}
    else:
        embeds = tensors["in/inputs_embeds"].clone().requires_grad_()
        batch |= {"inputs_embeds": embeds, "segments": segments_of(case["hp"]["input_embeds_indices"])}
    output = model(**batch)
    output.loss.backward()
    masked = Recorded.last
    found[f"{key}/logits"], found[f"{key}/loss_total"] = output.logits.detach(), output.loss.detach()
    if masked.policy is not None:
        found[f"{key}/policy"] = masked.policy.detach()
    for predictor, decision in masked.decisions.items():
        found[f"{key}/{predictor}_logits"] = decision.logits.detach()
        found[f"{key}/{predictor}_kept"] = decision.kept.detach()
        found[f"{key}/loss_{predictor}"] = model.dynamic_sparsity.losses[predictor]
    gradients = {n: parameter.grad for n, parameter in model.named_parameters() if parameter.grad is not None}
    if "inputs_embeds" in batch:
        gradients["inputs_embeds"] = batch["inputs_embeds"].grad
    found.update({f"{key}/grad/{n}": g for n, g in gradients.items() if f"grad/{n}" in tensors})


def lengths_of(cache: Any) -> list[int]:
    return [cache.get_seq_length(layer) for layer in range(len(cache))]


@torch.no_grad()
def prompt_case(tower: Path, name: str) -> None:
    """Prefill, and decoding with the stored tokens where there are some."""
    case, tensors = case_of(name)
    model = model_of(tower, case)
    segments = segments_of(case["hp"]["input_embeds_indices"])
    output = model(inputs_embeds=tensors["in/inputs_embeds"], segments=segments, use_cache=True)
    cache, logits, lengths = output.past_key_values, [output.logits[:, -1]], []
    found[f"{name}/logits"] = output.logits
    found[f"{name}/prompt_key_cache_last"] = cache.key_cache[-1].clone()
    lengths.append(lengths_of(cache))
    tokens = tensors.get("out/tokens", torch.zeros(1, 1))
    for step in range(tokens.shape[1] - 1):
        output = model(input_ids=tokens[:, step : step + 1], past_key_values=cache, use_cache=True)
        logits.append(output.logits[:, -1])
        lengths.append(lengths_of(cache))
    found[f"{name}/steps"] = torch.stack(logits)
    found[f"{name}/key_cache_last"] = cache.key_cache[-1]
    facts[name] = lengths


def generation_case(tower: Path) -> None:
    case, tensors = case_of("generate_b1")
    model = model_of(tower, case)
    options = {"do_sample": False, "max_new_tokens": 24, "output_scores": True, "return_dict_in_generate": True}
    output = model.generate(tensors["in/input_ids"], images=tensors["in/images"], use_cache=True, **options)
    found["generate_b1/sequences"], found["generate_b1/scores"] = output.sequences, torch.stack(output.scores)
    for what, call in {
        "batch": lambda: model.generate(
            tensors["in/input_ids"].repeat(2, 1), images=tensors["in/images"].repeat(2, 1, 1, 1)
        ),
        "beams": lambda: model.generate(tensors["in/input_ids"], images=tensors["in/images"], num_beams=2),
        "no cache": lambda: model.generate(tensors["in/input_ids"], images=tensors["in/images"], use_cache=False),
        "attentions": lambda: model(tensors["in/input_ids"], images=tensors["in/images"], output_attentions=True),
        "no segments": lambda: model(inputs_embeds=torch.zeros(1, 3, 64)),
        "images": lambda: model(torch.tensor([[1, -200, -200]]), images=tensors["in/images"].repeat(2, 1, 1, 1)),
        "other cache": lambda: model(torch.tensor([[1]]), past_key_values=((torch.zeros(1, 4, 2, 16),) * 2,) * 4),
        "twice": lambda: dynamic_glue.Dynamic().attach(model, case["sparse_config"], {}),
    }.items():
        try:
            call()
            facts[f"refused/{what}"] = "not refused"
        except ValueError as error:
            facts[f"refused/{what}"] = str(error)


@torch.no_grad()
def turns_case(tower: Path, name: str) -> None:
    case, tensors = case_of(name)
    model, cache, call, lengths, chosen = model_of(tower, case), None, 0, [], []
    for turn, steps in enumerate(case["hp"]["steps"]):
        ids = tensors[f"in/round{turn}_input_ids"]
        for _ in range(steps):
            images = tensors["in/images"] if call == 0 else None
            output = model(input_ids=ids, images=images, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found[f"{name}/call{call}_logits"] = output.logits
            lengths.append(lengths_of(cache))
            ids = output.logits[:, -1:].argmax(-1)
            chosen.append(ids.flatten().tolist())
            call += 1
    facts[name] = {"lengths": lengths, "argmax": chosen}


def updates_case(tower: Path, folder: Path) -> None:
    """Four updates by upstream's Trainer."""
    case, tensors = case_of("trainer_steps")
    model = model_of(tower, case)
    use_noise(iter([tensors[f"noise/{n}"] for n in case["hp"]["noise_order"]]))
    batch = {key[len("in/batch_") :]: value for key, value in tensors.items() if key.startswith("in/batch_")}
    settings = case["hp"]["training_arguments"] | {"dynamic": True, "output_dir": str(folder), "save_strategy": "no"}
    args = TrainingArguments(**settings, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = LLaVATrainer(model=model, args=args, train_dataset=[0, 1], data_collator=lambda rows: batch)
    extensions_moe.prepare_trainer(trainer, None)
    trainer.train()
    facts["trainer_steps"] = trainer.state.log_history
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    facts["groups"] = [
        {"names": [names[id(p)] for p in g["params"]], "lr": g["initial_lr"], "weight_decay": g["weight_decay"]}
        for g in trainer.optimizer.param_groups
    ]
    parameters = dict(model.named_parameters())
    found.update({f"trainer_steps/{n}": parameters[n].detach() for n in case["hp"]["saved_parameters"]})


def main() -> None:
    """Run everything."""
    with tempfile.TemporaryDirectory() as folder:
        tower = write_tower(Path(folder) / "tower")
        for name in SEGMENTS:
            segments_case(tower, name)
        for name in TRAINED:
            training_case(tower, name, checkpointing=False)
        training_case(tower, "tau1_instruct", checkpointing=True)
        for name in ("prefill_b1_k02", "prefill_b1_k05", "prefill_b1_instruct", "decode_b1"):
            prompt_case(tower, name)
        for row in range(2):
            prompt_case(tower, f"decode_b2_alone_{row}")
        generation_case(tower)
        for name in ("multiround_instruct", "multiround_noinstruct"):
            turns_case(tower, name)
        updates_case(tower, Path(folder) / "out")
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, OUTPUT.with_suffix(".safetensors"))
    OUTPUT.with_suffix(".json").write_text(json.dumps(facts))
    print(f"{len(found)} tensors of {len({key.partition('/')[0] for key in found})} cases")


if __name__ == "__main__":
    main()
