"""The base: a Llama of about 0.8 million parameters, trained from random weights on the families of `tasks.BASE`.

    python -m benchmarks.experiments.text.base --data ROWS.json --output-dir FOLDER

A tokenizer of whole words, the untrained model, and transformers' Trainer; the folder loads as any Llama.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from benchmarks.experiments.common.sizes import Sizes
from benchmarks.experiments.common.tiny import save_language_model
from benchmarks.experiments.text.recipe import Recipe
from benchmarks.experiments.text.tasks import vocabulary
from hydralora.text.dataset import InstructionCollator, InstructionDataset
from hydralora.text.samples import read_samples, tokenize

SPECIAL = ("<unk>", "<s>", "</s>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word; ids 0, 1, 2 are unknown, start and end, as in Llama's."""
    words = {word: number for number, word in enumerate((*SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(WordLevel(words, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words["<s>"])])
    unknown, start, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=start, eos_token=end, pad_token=unknown
    )


def save_untrained(folder: Path, sizes: Sizes, seed: int) -> None:
    """Write the untrained model with its tokenizer."""
    save_language_model(folder, sizes, seed)
    build_tokenizer().save_pretrained(folder)


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="rows to train on")
    parser.add_argument("--output-dir", type=Path, required=True, help="where model and tokenizer go")
    parser.add_argument("--seed", type=int, default=0, help="of the weights at the start and of the order of rows")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        BadSampleError: a row is malformed.
    """
    args = build_parser().parse_args(argv)
    recipe = Recipe()
    save_untrained(args.output_dir / "untrained", recipe.sizes, args.seed)
    tokenizer = build_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(args.output_dir / "untrained")
    training = TrainingArguments(
        output_dir=str(args.output_dir / "training"),
        num_train_epochs=1,
        per_device_train_batch_size=recipe.base_batch,
        learning_rate=recipe.base_rate,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        logging_steps=100,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        seed=args.seed,
    )
    rows = tokenize(read_samples(args.data), tokenizer, recipe.sizes.max_length)
    collator = Collator(tokenizer.pad_token_id)
    Trainer(model, training, collator, InstructionDataset(rows)).train()
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"base: {args.output_dir}; next: python -m benchmarks.experiments.text.evaluate --help")


class Collator(InstructionCollator):
    """Batches without the task numbers, which a plain model does not take."""

    def __call__(self, examples: Sequence) -> dict:
        """`input_ids`, `labels` and `attention_mask`, (B, T) int64."""
        batch = super().__call__(examples)
        del batch["task_types"]
        return batch


if __name__ == "__main__":
    main()
