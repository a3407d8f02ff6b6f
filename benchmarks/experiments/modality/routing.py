"""What the routers of MMA have learnt: the weight of the first up-projection for each modality, layer by layer.

python -m benchmarks.experiments.modality.routing --model-path RUN --model-base BASE --output ROUTING.json

The two ways are alike at the start, so which of them serves a modality is chance. How much the adapters of the two
modalities differ in effect is the second number: |U_image - U_text| / mean(|U_image|, |U_text|) in the Frobenius norm,
where U is the linear map from the output of a norm to its update.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiments.common.steps import write_json
from llava.model.builder import load_pretrained_model
from mma.modality import routing_table
from mma.model import MODALITIES, adapters


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True, help="folder of a run with --mma True")
    parser.add_argument("--model-base", type=Path, required=True, help="folder of its base")
    parser.add_argument("--output", type=Path, required=True, help="where the weights go")
    return parser


def update_map(adapter: Any, routing: Tensor) -> Tensor:
    """The linear part (D, D) of an adapter's update under the weights `routing` (2,); inputs are rows."""
    width = adapter.conv_A.in_channels
    basis = torch.cat([torch.eye(width), torch.zeros(1, width)])[None]  # (1, D + 1, D)
    update = (adapter(basis, routing[None]) - basis)[0]  # (D + 1, D)
    return update[:-1] - update[-1:]


@torch.no_grad()
def layer_routing(model: Any) -> list[dict[str, float]]:
    """For each decoder layer the first way's weight by modality, and the relative difference of the updates.

    Args:
        model: float32, with `get_decoder()` and an adapter before attention in every layer.
    """
    decoder = model.get_decoder()
    table = routing_table(decoder, torch.float32)  # (layers, modalities, A, 2)
    rows = []
    for layer, weights in zip(decoder.layers, table, strict=True):
        adapter = adapters(layer)[0]
        maps = [update_map(adapter, weights[number, 0]) for number in range(len(MODALITIES))]
        size = sum(each.norm() for each in maps) / len(maps)
        row = {name: weights[number, 0, 0].item() for number, name in enumerate(MODALITIES)}
        row["difference"] = ((maps[0] - maps[1]).norm() / size).item()
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        LlavaError: the checkpoint does not load.
    """
    args = build_parser().parse_args(argv)
    _, model, _, _ = load_pretrained_model(str(args.model_path), str(args.model_base), device="cpu")
    rows = layer_routing(model.eval())
    write_json(args.output, rows)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
