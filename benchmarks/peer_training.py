"""Updates of LoRA and HydraLoRA by our Trainer, and of LoRA by transformers' Trainer with PEFT, on the same row.

An update is what the Trainer does between two batches: forward, backward, clipping and the optimizer's step. Reading
data is left out. Before anything is timed, losses and gradients of both formats are compared.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

from benchmarks.floors import Rates
from benchmarks.llava_models import write_rows
from benchmarks.measuring import Clock, quotient, spread, take_turns
from benchmarks.peer_models import Pair, check_equal
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.convert.hf_format import to_hf_name
from llava.model.checkpoint import bare_model
from llava.runtime.rehearsal.memory import MemoryMeter
from llava.train.train import Parts, build_run, parse_args

RANK, ALPHA, EXPERTS = 16, 32, 3
ANSWER_WORDS = 64
"""Words of an answer that is trained on."""

PEER = "transformers + PEFT"
METHODS = {
    "LoRA": f"--lora_enable True --lora_r {RANK} --lora_alpha {ALPHA}",
    "HydraLoRA": f"--use_lora True --lora_rank {RANK} --lora_alpha {ALPHA} --llm_moe True --dense_moe True "
    f"--llm_moe_num_experts {EXPERTS} --lora_modules q_proj,k_proj,v_proj,o_proj --freeze_backbone True",
}
LINEAR = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Every linear layer of the decoder: what our LoRA adapts where nothing else is said."""

TOLERANCE = 2e-5
"""Of losses and norms of gradients in float32. Measured: 3e-7 and 4e-6."""


@dataclass(frozen=True)
class Stepper:
    """A Trainer with its batch."""

    trainer: Any
    inputs: dict[str, Any]
    targets: Tensor

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        model: nn.Module = self.trainer.model
        return model

    @property
    def weights(self) -> list[Tensor]:
        """The trained parameters."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def loss(self) -> Tensor:
        """The language-model loss without dropout."""
        self.model.eval()
        output = self.model(**self.inputs)
        losses: Tensor = output.losses["lm"] if hasattr(output, "losses") else output.loss
        return losses

    def update(self) -> None:
        """As `transformers.Trainer` makes it, with one micro batch."""
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(self.model, dict(self.inputs), self.targets)
        nn.utils.clip_grad_norm_(self.weights, trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()


def ours(pair: Pair, method: str, dropout: float, work: Path, rows: int) -> Stepper:
    """Our Trainer, built from the command line of a training."""
    write_rows(work / "rows.json", [f"{number}.png" for number in range(rows)], ANSWER_WORDS)
    words = (
        f"--model_name_or_path {pair.ours} --vision_tower {pair.tower} --version v1 --data_path {work}/rows.json "
        f"--image_folder {pair.images} --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --use_cpu True "
        f"--mm_use_im_patch_token False --bf16 False --freeze_mm_mlp_adapter True --lora_dropout {dropout} "
        f"--model_max_length 2048 --image_aspect_ratio resize --report_to none "
        f"--output_dir {work}/{method} {METHODS[method]}"
    )
    with contextlib.redirect_stdout(io.StringIO()):
        run = build_run(parse_args(words.split()), None, Parts(records=False))
    batch = run.trainer.data_collator([run.dataset[number] for number in range(rows)])
    run.trainer.create_optimizer()
    return Stepper(run.trainer, dict(batch), run.trainer._get_num_items_in_batch([batch], torch.device("cpu")))


def theirs(pair: Pair, batch: dict[str, Any], dropout: float, work: Path) -> Stepper:
    """Transformers' Trainer with PEFT's LoRA, on the rows of a batch of ours."""
    model: Any = LlavaForConditionalGeneration.from_pretrained(pair.theirs, dtype=torch.float32)
    model.config.use_cache = model.config.text_config.use_cache = False
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=LINEAR, bias="none")
    adapted = get_peft_model(model, config)
    args = TrainingArguments(
        output_dir=str(work / "peer"), use_cpu=True, report_to="none", remove_unused_columns=False, weight_decay=0.0
    )
    trainer = Trainer(model=adapted, args=args)
    trainer.create_optimizer()
    inputs = expanded(batch, model.config.image_token_id, pair.shape.patches)
    return Stepper(trainer, inputs, (inputs["labels"][:, 1:] != IGNORE_INDEX).sum())


def expanded(batch: dict[str, Any], image_token: int, patches: int) -> dict[str, Any]:
    """A batch as transformers' LLaVA takes it: an image token for each patch of the image."""
    rows: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        place = int((ids == IMAGE_TOKEN_INDEX).nonzero())
        middle = torch.ones(patches, dtype=torch.long)
        for name, row, fill in (
            ("input_ids", ids, image_token),
            ("labels", labels, IGNORE_INDEX),
            ("attention_mask", mask.long(), 1),
        ):
            rows[name].append(torch.cat([row[:place], fill * middle, row[place + 1 :]]))
    return {name: torch.stack(values) for name, values in rows.items()} | {"pixel_values": batch["images"]}


def check_same(steppers: dict[str, Stepper]) -> dict[str, float]:
    """Compare losses of all methods, and of LoRA with the same adapters on both sides the gradients.

    Returns:
        Losses, for the record.

    Raises:
        FlagError: they differ.
    """
    losses = {name: stepper.loss().item() for name, stepper in steppers.items()}  # adapters that do nothing yet
    for name, loss in losses.items():
        check_equal(f"loss of {name}", [loss], [losses[PEER]], TOLERANCE)
    here, there = steppers["LoRA"], steppers[PEER]
    peers = dict(there.model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    pairs = []
    with torch.no_grad():
        for name, weight in here.model.named_parameters():
            if weight.requires_grad:
                prefix = "base_model.model."
                other = peers[prefix + to_hf_name(name.removeprefix(prefix))]
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
                other.copy_(weight)
                pairs.append((weight, other))
    changed = {name: steppers[name].loss() for name in ("LoRA", PEER)}
    for loss in changed.values():
        loss.backward()
    numbers = [[changed[name].item() for name in ("LoRA", PEER)]]
    numbers += [[weight.grad.norm().item() for weight in pair] for pair in pairs]
    check_equal("loss and gradients of LoRA", *zip(*numbers, strict=True), TOLERANCE)
    for stepper in (here, there):
        stepper.model.zero_grad()
    sizes = [sum(map(torch.numel, stepper.weights)) for stepper in (here, there)]
    check_equal("trained parameters of LoRA", sizes[:1], sizes[1:])
    return losses | {"LoRA, adapters that act": changed["LoRA"].item()}


def counted(stepper: Stepper) -> dict[str, int]:
    """Operations of an update, and the most bytes of tensors at once: of all, and beyond the weights."""
    vocabulary = bare_model(stepper.model).config.vocab_size if hasattr(stepper.trainer, "run") else 0
    meter = MemoryMeter(torch.device("cpu"), vocabulary)
    with meter:
        meter.watch(stepper.model)
        stepper.update()  # makes the states of the optimizer
        meter.watch_optimizer(stepper.trainer.optimizer)
        meter.forget_peak()
        stepper.update()
    meter.close()
    weights = sum(weight.untyped_storage().nbytes() for weight in stepper.model.parameters())
    return {"flops": meter.flops, "peak_bytes": meter.peak_bytes, "peak_beyond_weights": meter.peak_bytes - weights}


def measure(
    pair: Pair, work: Path, dropout: float, batch: int, clock: Clock, rounds: int, rates: Rates
) -> dict[str, Any]:
    """Everything about the updates with one dropout."""
    steppers = {}
    for method in METHODS:
        folder = work / f"{method}-{dropout}"
        folder.mkdir(parents=True)
        steppers[method] = ours(pair, method, dropout, folder, batch)
    steppers[PEER] = theirs(pair, steppers["LoRA"].inputs, dropout, work)
    losses = check_same(steppers)
    counts = {name: counted(stepper) for name, stepper in steppers.items()}
    ways: dict[str, Callable[[], object]] = {name: stepper.update for name, stepper in steppers.items()}
    times = take_turns(ways, clock, rounds)
    fewest = min(count["flops"] for count in counts.values())
    peer = counts[PEER]
    return {
        "dropout": dropout,
        "rows": batch,
        "positions": int(steppers[PEER].inputs["input_ids"].shape[1]),
        "losses": losses,
        "counts": counts,
        "seconds": {name: spread(values) for name, values in times.items()},
        "floor": {"flops": fewest, "seconds": rates.floor(fewest)},
        "peer_over_ours": {
            name: {
                "time": quotient(times[PEER], times[name]),
                "memory": peer["peak_beyond_weights"] / counts[name]["peak_beyond_weights"],
            }
            for name in METHODS
        },
    }
