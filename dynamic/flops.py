r"""FLOPs and KV-cache bytes of Dynamic-LLaVA by formula (paper, appendix; its first author's issue 4).

python -m dynamic.flops --model 7b
python -m dynamic.flops --model checkpoints/llava-sparse --text-tokens 200 --generated 500 --convention exact

One multiply-add counts 2. N tokens that attend to S positions cost a layer of width C

    in the paper's convention   8 N C^2 + 4 N S C + 24 N C^2     (an MLP of three C x 4C matrices)
    exactly                     4 N C^2 + 4 N C K + 4 N S C + 6 N C I

with MLP width I and K the width of keys and values. Norms, embeddings, the head and the vision tower are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynamic.config import SparseConfig, kept_count
from llava.errors import CheckpointError, FlagError
from llava.runtime.files import read_json
from llava.runtime.program import run_program


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder.

    Attributes:
        width: C.
        layers: number of layers.
        inner_width: I of the MLP, or None for the paper's convention.
        kv_width: K, key-value heads times head width; less than `width` with grouped heads.
        query_width: heads times head width.
    """

    width: int
    layers: int
    inner_width: int | None
    kv_width: int
    query_width: int

    def layer(self, tokens: float, positions: float) -> float:
        """FLOPs of one layer for `tokens` queries that attend to `positions` keys."""
        attention = 4 * tokens * positions * self.query_width
        if self.inner_width is None:
            return 32 * tokens * self.width**2 + attention
        projections = 4 * tokens * self.width * (self.query_width + self.kv_width)
        return projections + attention + 6 * tokens * self.width * self.inner_width

    def paper(self) -> Decoder:
        """The same decoder in the paper's convention."""
        return replace(self, inner_width=None, query_width=self.width)


DECODERS = {
    "7b": Decoder(4096, 32, 11008, 4096, 4096),
    "13b": Decoder(5120, 40, 13824, 5120, 5120),
}
"""LLaVA-1.5."""


@dataclass(frozen=True)
class Workload:
    """One prompt and its answer, in tokens.

    Attributes:
        image: tokens of the image.
        text: the other tokens of the prompt.
        generated: tokens of the answer.
        kept_output: share of the generated tokens that is remembered.
        dropped_instruction: tokens of the instruction that are dropped.
    """

    image: int = 576
    text: int = 0
    generated: int = 0
    kept_output: float = 0.5
    dropped_instruction: int = 0

    @property
    def prompt(self) -> int:
        """N."""
        return self.image + self.text

    def kept_prompt(self, keep_rate: float) -> int:
        """N', what the sparse layers work on."""
        return self.text - self.dropped_instruction + kept_count(self.image, keep_rate)


@dataclass(frozen=True)
class Cost:
    """The same of the dense and the sparse model."""

    dense: float
    sparse: float

    @property
    def reduction(self) -> float:
        """Share that is saved."""
        return 1 - self.sparse / self.dense


def prefill(decoder: Decoder, config: SparseConfig, work: Workload) -> Cost:
    """FLOPs of the prompt."""
    n, kept = work.prompt, work.kept_prompt(config.vision_keep_rate)
    return _mixed(decoder, config, decoder.layer(n, n), decoder.layer(kept, kept))


def decode(decoder: Decoder, config: SparseConfig, work: Workload, cached: bool = True) -> Cost:
    """FLOPs of the whole answer; without cache every step computes the whole sequence again."""
    dense = sparse = 0.0
    for step in range(1, work.generated + 1):
        seen = work.prompt + step
        kept = work.kept_prompt(config.vision_keep_rate) + work.kept_output * step
        cost = _mixed(
            decoder, config, decoder.layer(1 if cached else seen, seen), decoder.layer(1 if cached else kept, kept)
        )
        dense, sparse = dense + cost.dense, sparse + cost.sparse
    return Cost(dense, sparse)


def kv_bytes(decoder: Decoder, config: SparseConfig, work: Workload, bytes_per_value: int = 2) -> Cost:
    """Bytes of keys and values when the answer is complete."""
    kept = work.kept_prompt(config.vision_keep_rate) + work.kept_output * work.generated
    position = 2 * bytes_per_value * decoder.kv_width
    return _mixed(decoder, config, position * (work.prompt + work.generated), position * kept)


def _mixed(decoder: Decoder, config: SparseConfig, dense_layer: float, sparse_layer: float) -> Cost:
    below = config.sparse_layer
    return Cost(decoder.layers * dense_layer, below * dense_layer + (decoder.layers - below) * sparse_layer)


def vision_predictor_flops(decoder: Decoder, config: SparseConfig, tokens: int) -> float:
    """FLOPs of the vision predictor for one image of `tokens` tokens."""
    n, d = tokens, config.d_model
    blocks = config.num_layers * (8 * n * d**2 + 4 * n**2 * d + 4 * n * d * config.dim_feedforward)
    return 2 * n * decoder.width * d + blocks + 2 * n * (d**2 / 2 + d**2 / 8 + d / 2)


def text_predictor_flops(decoder: Decoder, config: SparseConfig) -> float:
    """FLOPs of a text predictor for one token."""
    d = config.d_model
    return 2 * (decoder.width * d + d**2 / 2 + d**2 / 8 + d / 2)


def table(decoder: Decoder, config: SparseConfig, work: Workload) -> str:
    """Every cost, dense and sparse, as text."""
    rows = [("prompt", prefill(decoder, config, work), 1e12, "TFLOPs")]
    if work.generated:
        rows.append(("answer, with cache", decode(decoder, config, work), 1e12, "TFLOPs"))
        rows.append(("answer, without cache", decode(decoder, config, work, cached=False), 1e12, "TFLOPs"))
    rows.append(("KV cache at the end, 16 bit", kv_bytes(decoder, config, work), 2**20, "MiB"))
    lines = [f"{'':<28}{'dense':>12}{'sparse':>12}{'saved':>9}"]
    lines += [
        f"{name:<28}{cost.dense / unit:>12.2f}{cost.sparse / unit:>12.2f}{cost.reduction:>9.1%}  {label}"
        for name, cost, unit, label in rows
    ]
    image = vision_predictor_flops(decoder, config, work.image) / 1e12
    text = text_predictor_flops(decoder, config) / 1e12
    lines.append(f"predictors, not counted above: {image:.4f} TFLOPs an image, {text:.7f} TFLOPs a text token")
    return "\n".join(lines)


def decoder_of(stored: Mapping[str, Any]) -> Decoder:
    """Sizes of a decoder by its configuration.

    Raises:
        KeyError: a size is missing.
    """
    width, heads = stored["hidden_size"], stored["num_attention_heads"]
    head = stored.get("head_dim") or width // heads
    kv_heads = stored.get("num_key_value_heads") or heads
    return Decoder(width, stored["num_hidden_layers"], stored["intermediate_size"], head * kv_heads, head * heads)


def read_model(name: str) -> tuple[Decoder, SparseConfig]:
    """Sizes of "7b", "13b" or of a checkpoint folder, with the folder's predictors if it has some.

    Raises:
        FlagError: it is neither.
        CheckpointError: the configuration in the folder is no JSON object or lacks a size, or that of the predictors
            is refused.
    """
    if name in DECODERS:
        return DECODERS[name], SparseConfig()
    path = Path(name) / "config.json"
    if not path.is_file():
        raise FlagError(f"--model {name}: neither one of {sorted(DECODERS)} nor a folder with a config.json")
    stored = read_json(path)
    predictors = (stored.get("extensions") or {}).get("dynamic") or stored.get("sparse_config") or {}
    try:
        decoder = decoder_of(stored)
        config = SparseConfig.from_dict(predictors)
        return decoder, config if config.use_vision_predictor else replace(config, vision_keep_rate=1.0)
    except KeyError as error:
        raise CheckpointError(f"{path}: has no {error}, which the formula needs") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def build_parser() -> argparse.ArgumentParser:
    """The options of the program."""
    parser = argparse.ArgumentParser(
        prog="python -m dynamic.flops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="7b", help="7b or 13b (LLaVA-1.5), or a checkpoint folder")
    parser.add_argument("--image-tokens", type=int, default=576, help="tokens of the image")
    parser.add_argument("--text-tokens", type=int, default=64, help="tokens of the prompt beside the image")
    parser.add_argument("--dropped-instruction", type=int, default=0, help="how many of them are dropped")
    parser.add_argument("--generated", type=int, default=1000, help="tokens of the answer")
    parser.add_argument(
        "--kept-output", type=float, help="share of the answer that is remembered (default: as trained)"
    )
    parser.add_argument(
        "--vision-keep-rate", type=float, help="share of image tokens that is kept (default: as trained)"
    )
    parser.add_argument("--sparse-layer", type=int, help="first layer with kept tokens only (default: as trained)")
    parser.add_argument("--convention", choices=("paper", "exact"), default="paper", help="what an MLP counts")
    return parser


def main(argv: Sequence[str] | None = None) -> str:
    """Run the program.

    Returns:
        What was printed.

    Raises:
        LlavaError: an option is out of range, or the model is unknown.
    """
    args = build_parser().parse_args(argv)
    decoder, config = read_model(args.model)
    chosen = {"vision_keep_rate": args.vision_keep_rate, "sparse_layer": args.sparse_layer}
    try:
        config = replace(config, **{name: value for name, value in chosen.items() if value is not None})
    except ValueError as error:
        raise FlagError(str(error)) from error
    if config.sparse_layer > decoder.layers:
        raise FlagError(f"--sparse-layer {config.sparse_layer}: the model has {decoder.layers} layers")
    kept_output = config.output_text_keep_rate if config.judges_output_text else 1.0
    if args.kept_output is not None:
        kept_output = args.kept_output
    work = Workload(args.image_tokens, args.text_tokens, args.generated, kept_output, args.dropped_instruction)
    if min(work.image, work.text, work.generated, work.dropped_instruction) < 0 or not 0 <= work.kept_output <= 1:
        raise FlagError("numbers of tokens must not be negative, and --kept-output lies between 0 and 1")
    if work.dropped_instruction > work.text or not work.prompt:
        raise FlagError(
            f"--dropped-instruction {work.dropped_instruction} with --text-tokens {work.text} and --image-tokens "
            f"{work.image}: nothing is left of the prompt"
        )
    text = table(decoder.paper() if args.convention == "paper" else decoder, config, work)
    print(text)
    return text


if __name__ == "__main__":
    run_program(main)
