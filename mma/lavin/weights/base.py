"""From LaVIN's names of base weights (`--llama_model_path ../data/weights --llm_model 7B --use_vicuna`) to a folder.

A folder in the layout of transformers is used as it is; Meta's files and Vicuna's differences are written once into a
folder beside them, whose name ends in `-hf`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from llava.errors import CheckpointError
from llava.runtime.hub import is_hub_id, local_folder
from llava.runtime.output import new_path
from llava.runtime.tokenizer import LlamaTokenizer
from llava.runtime.weights.derived import check_frequencies
from llava.runtime.weights.weight_files import weights_of
from mma.lavin.weights.choices import AUTO, VicunaKind
from mma.lavin.weights.meta import PARAMS_FILE, open_meta
from mma.lavin.weights.tensors import Weights, open_folder, write_folder
from mma.lavin.weights.vicuna import add_delta, kind_by_itself, kind_of, original_sum

TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class BaseWeights:
    """Which weights a run starts from.

    Attributes:
        root: folder with `7B/`, `13B/`, `vicuna_7B/`, ... and the tokenizer; or a folder or hub id in the layout of
            transformers, which is taken as it is.
        llm_model: name of the folder of the LLaMA.
        use_vicuna: start from `vicuna_<llm_model>`.
        vicuna_weights: `full`, `delta`, `original` (see `original_sum`), or `auto`: found from the weights.
        output: where converted weights go; None: next to the files, as `<name>-hf` or `<name>-original-hf`.
    """

    root: str
    llm_model: str = "7B"
    use_vicuna: bool = False
    vicuna_weights: str = AUTO
    output: Path | None = None

    @property
    def llama(self) -> Path:
        """Folder of the LLaMA."""
        return Path(self.root) / self.llm_model

    @property
    def vicuna(self) -> Path:
        """Folder of the Vicuna."""
        return Path(self.root) / f"vicuna_{self.llm_model}"

    @property
    def converted(self) -> Path:
        """Folder that is written, if anything has to be."""
        if self.output is not None:
            return self.output
        source = self.vicuna if self.use_vicuna else self.llama
        mark = "-original" if self.adds_as_original else ""  # another model than `<name>-hf`
        return source.with_name(f"{source.name}{mark}-hf")

    @property
    def adds_as_original(self) -> bool:
        """The difference is added as LaVIN's own code adds it."""
        return self.use_vicuna and self.vicuna_weights == VicunaKind.ORIGINAL


def _is_hf(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def ready_folder(wanted: BaseWeights) -> Path | None:
    """The folder that can be loaded at once; None if weights have to be converted first.

    Raises:
        CheckpointError: the weights are not where they should be.
    """
    root = Path(wanted.root)
    if not wanted.llama.is_dir() and not wanted.vicuna.is_dir() and (_is_hf(root) or is_hub_id(wanted.root)):
        if wanted.adds_as_original:
            raise CheckpointError(
                f"{wanted.root}: holds one set of weights, but --vicuna_weights original needs a folder with "
                f"{wanted.llm_model} (LLaMA) and vicuna_{wanted.llm_model} (the published difference)"
            )
        if wanted.use_vicuna:
            print(f"--use_vicuna: {wanted.root} holds one set of weights, which is taken as it is")
        return local_folder(wanted.root)
    if _is_hf(wanted.converted) and not (wanted.use_vicuna and wanted.vicuna_weights == VicunaKind.FULL):
        return wanted.converted
    if not wanted.use_vicuna:
        _check_there(wanted.llama)
        return wanted.llama if _is_hf(wanted.llama) else None
    if not _is_hf(wanted.vicuna):
        raise CheckpointError(f"{wanted.vicuna}: --use_vicuna needs a folder with Vicuna's config.json and weights")
    return wanted.vicuna if vicuna_kind(wanted) is VicunaKind.FULL else None


def _check_there(folder: Path) -> None:
    if not _is_hf(folder) and not (folder / PARAMS_FILE).is_file():
        raise CheckpointError(
            f"{folder}: holds neither Meta's {PARAMS_FILE} and consolidated.*.pth nor a config.json with weights; "
            "look at --llama_model_path and --llm_model"
        )


def vicuna_kind(wanted: BaseWeights) -> VicunaKind:
    """What the folder of Vicuna holds: what the options say, or what its weights say.

    Raises:
        CheckpointError: the weights do not say it, or the LLaMA to compare them with is missing.
    """
    if wanted.vicuna_weights != AUTO:
        return VicunaKind(wanted.vicuna_weights)
    vicuna = open_folder(wanted.vicuna)
    if wanted.llama.is_dir():
        return kind_of(vicuna, _open_llama(wanted.llama)[0], wanted.vicuna)
    kind = kind_by_itself(vicuna)
    if kind is not VicunaKind.FULL:
        seen = "is the difference to LLaMA" if kind else "does not say what it is"
        raise CheckpointError(
            f"{wanted.vicuna}: by its norms it {seen}, and there is no {wanted.llama} to add it to; put LLaMA's "
            "weights there, or pass --vicuna_weights full if these are full weights"
        )
    return kind


def _open_llama(folder: Path) -> tuple[Weights, LlamaConfig]:
    _check_there(folder)
    if _is_hf(folder):
        config = LlamaConfig.from_pretrained(folder)
        check_frequencies(LlamaForCausalLM, config, weights_of(folder))
        return open_folder(folder), config
    return open_meta(folder)


def _tokenizer(folders: list[Path], config: LlamaConfig) -> LlamaTokenizer:
    """Meta's tokenizer, from the first folder that has one."""
    found = next((folder / TOKENIZER for folder in folders if (folder / TOKENIZER).is_file()), None)
    if found is None:
        raise CheckpointError(f"no {TOKENIZER} in {' or '.join(map(str, folders))}; it belongs to the weights")
    # As Meta's own programs use it; Vicuna's folder may ask for the corrected form.
    tokenizer = LlamaTokenizer(str(found), legacy=True, model_max_length=config.max_position_embeddings)
    tokenizer.pad_token = tokenizer.unk_token
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{found}: has {len(tokenizer)} pieces, but the embeddings have {config.vocab_size} rows; they do not "
            "belong together"
        )
    return tokenizer


def convert(wanted: BaseWeights, max_shard_size: str = "5GB") -> Path:
    """Write the weights in the layout of transformers; the folder appears whole or not at all.

    Raises:
        CheckpointError: files are missing or damaged or do not belong together, or the folder cannot be written or
            exists already.
    """
    weights, config = _open_llama(wanted.llama)
    folders = [wanted.llama, Path(wanted.root)]
    if wanted.use_vicuna:
        delta = open_folder(wanted.vicuna)
        check_frequencies(LlamaForCausalLM, config, weights_of(wanted.vicuna), difference=True)
        if wanted.adds_as_original:
            weights = original_sum(weights, delta, config, wanted.vicuna)
        else:
            weights = add_delta(weights, delta, wanted.vicuna)
        config.vocab_size = weights["model.embed_tokens.weight"].shape[0]
        folders.insert(0, wanted.vicuna)
    tokenizer = _tokenizer(folders, config)
    print(f"{wanted.converted}: writing the weights in the layout of transformers")
    try:
        with new_path(wanted.converted, [wanted.llama, wanted.vicuna]) as folder:
            folder.mkdir()
            with torch.no_grad():
                write_folder(weights, folder, max_shard_size)
            config.save_pretrained(folder)
            GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise CheckpointError(
            f"{wanted.converted}: cannot be written ({os.strerror(error.errno) if error.errno else error}); choose "
            "another place with: python -m mma.weights --out FOLDER"
        ) from error
    return wanted.converted


def base_folder(wanted: BaseWeights) -> Path:
    """The folder to load, converted now if that has not been done before.

    Raises:
        CheckpointError: see `convert` and `ready_folder`.
    """
    return ready_folder(wanted) or convert(wanted)
