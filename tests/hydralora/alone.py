"""Everything that a user of PEFT does with HydraLoRA, with torch, transformers and peft alone (`make test-core`).

Runs in an environment of its own without pytest, so it is a program: it fails if `llava`, torchvision or another
package that none of the three requires can be imported. With `--hide` these are hidden from an environment that has
them. It works on a copy of `hydralora/`, since the folder next to it is `llava/`. Start it with `python -P`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HYDRALORA = Path(__file__).resolve().parents[2] / "hydralora"
PACKAGES = ("torch", "transformers", "peft")
ABSENT = ("llava", "torchvision", "sentencepiece", "PIL", "bitsandbytes", "deepspeed", "datasets", "pytest")
"""What this project has with `llava` and its extras, and none of the three requires."""


def required(names: tuple[str, ...]) -> set[str]:
    """Canonical names of the installed distributions `names` and of all that they require."""
    found: set[str] = set()
    waiting: list[tuple[str, frozenset[str]]] = [(name, frozenset()) for name in names]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = entry = waiting.pop()
        if entry in seen:
            continue
        seen.add(entry)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        found.add(canonicalize_name(name))
        for requirement in map(Requirement, lines):
            wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in (extras or {""})
            )
            if wanted:
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return found


class Without:
    """A finder of modules that does not find some top-level packages; transformers asks it what is installed."""

    def __init__(self, finder: Any, hidden: set[str]) -> None:
        self.finder, self.hidden = finder, hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """None for a package that is hidden."""
        return None if name.partition(".")[0] in self.hidden else self.finder.find_spec(name, path, target)


def hide_the_rest() -> None:
    """Let this process find no package but the three, what they require, and `hydralora`."""
    kept = required(PACKAGES)
    hidden = set(ABSENT)
    for package, distributions in importlib.metadata.packages_distributions().items():
        if not kept & {canonicalize_name(name) for name in distributions}:
            hidden.add(package)
    hidden.discard("hydralora")
    sys.meta_path[:] = [Without(finder, hidden) for finder in sys.meta_path]


def use_the_method(folder: Path) -> None:
    """Configure, train, save, load, generate and merge adapters of a tiny model; numbers are compared."""
    import torch
    from peft import PeftConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import hydralora

    def base() -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=2)).eval()

    ids = torch.tensor([[5, 9, 31, 7, 60, 2], [8, 3, 44, 12, 7, 9]])
    targets = ["q_proj", "gate_proj", "down_proj"]

    def logits(model: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=ids).logits

    plain = logits(base())
    for routing in ("token", "sequence"):
        config = hydralora.HydraLoraConfig(
            r=4, lora_nums=3, target_modules=targets, task_type="CAUSAL_LM", routing=routing
        )
        model = get_peft_model(base(), config)
        model.gradient_checkpointing_enable()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses = []
        for _ in range(8):
            loss = model.train()(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1, losses
        after = logits(model.eval())
        assert (after - plain).abs().max() > 1e-2
        answer = model.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False)
        assert answer.shape[1] > ids.shape[1]

        model.save_pretrained(folder / routing)
        assert PeftConfig.from_pretrained(folder / routing).routing == routing
        again = PeftModel.from_pretrained(base(), folder / routing).eval()
        torch.testing.assert_close(logits(again), after)
        torch.testing.assert_close(again.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False), answer)
        with again.disable_adapter():
            torch.testing.assert_close(logits(again), plain)
        report = again.merge("mean-routing", [{"input_ids": ids}])
        assert report.tokens == ids.numel()

    lora = hydralora.HydraLoraConfig(r=4, lora_nums=1, target_modules=targets, init_weights=False)
    model = get_peft_model(base(), lora).eval()
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-4, atol=1e-4)
    assert hydralora.LlavaPatch is not None
    refused = ""
    try:
        hydralora.HydraLoraConfig(r=0)
    except ValueError as error:
        refused = str(error)
    assert "r is 0" in refused


def main() -> None:
    """Use the method; the first thing that is wrong ends the program with status 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hide", action="store_true", help="hide what an environment has besides the three packages")
    if parser.parse_args().hide:
        hide_the_rest()
    present = [name for name in ABSENT if importlib.util.find_spec(name)]
    if present:
        sys.exit(f"this environment has more than {', '.join(PACKAGES)}: {', '.join(present)} can be imported")
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(HYDRALORA, Path(scratch) / "packages" / "hydralora")
        sys.path.insert(0, str(Path(scratch) / "packages"))
        use_the_method(Path(scratch))
    print(f"hydralora works with {', '.join(PACKAGES)} alone")


if __name__ == "__main__":
    main()
