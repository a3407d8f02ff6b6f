r"""Show which patches and words a model keeps while it answers (upstream `dynamic_eval/visualize.py`).

python -m llava.dynamic_eval.visualize --model-path results/dynamic-llava-7b --image-file view.jpg \
    --query "What is shown?" --output-dir kept
python -m llava.dynamic_eval.visualize --model-path liuhaotian/llava-v1.5-7b --reduce divprune --keep 64 \
    --image-file view.jpg --query "What is shown?" --output-dir kept

A Dynamic-LLaVA checkpoint shows what its predictors keep, any model what a rule keeps. Writes `kept.png` and
`kept.html`: each image next to the patches that the last layers work with, the
words of the last instruction and of the answer with the forgotten ones crossed out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import CheckpointError, FlagError
from llava.eval import run_llava
from llava.eval.answering.answers import Task
from llava.inference_options import put_on
from llava.runtime.output import replace_text, replacing
from llava.runtime.places import Input, folder_problem, refuse_file
from llava.runtime.program import run_program
from llava.runtime.recognize import refuse_foreign, refuse_foreign_bytes

if TYPE_CHECKING:
    from dynamic.figures import KeptImage
    from dynamic.inspection import DecisionLog
    from llava.data.images import ProcessedImage
    from llava.eval.answering.loading import LoadedModel


def build_parser() -> argparse.ArgumentParser:
    """The options of `llava.eval.run_llava` and `--output-dir`."""
    parser = run_llava.build_parser()
    parser.prog, parser.description = "python -m llava.dynamic_eval.visualize", __doc__
    parser.add_argument("--output-dir", type=Path, default=Path("visualize"), help="folder of kept.png and kept.html")
    return parser


def kept_images(log: DecisionLog, images: Sequence[ProcessedImage], loaded: LoadedModel) -> list[KeptImage]:
    """The images of the prompt with the patches that were kept; of a tiled one its overview alone.

    Raises:
        CheckpointError: the model sees no patches, but class tokens of the tower alone.
    """
    from dynamic.figures import KeptImage
    from dynamic.inspection import patch_indices
    from llava.data.pixels import pixels_to_image

    tower = loaded.model.get_vision_tower()
    if tower.interval is not None:
        raise CheckpointError(
            f"--mm_vision_select_feature {tower.select_feature} of this model: its tokens are not patches of an image, "
            "so there is nothing to draw"
        )
    side = tower.num_patches_per_side
    first = tower.num_features - tower.num_patches  # 1 where the class token is kept, which comes before the patches
    shown = []
    for image, kept in zip(images, log.prompts[0].images(0), strict=True):
        whole = image.pixels if image.pixels.ndim == 3 else image.pixels[0]
        indices = patch_indices(kept, first, side * side)
        shown.append(KeptImage(pixels_to_image(whole, loaded.image_processor), (side, side), indices))
    return shown


def refuse_outputs(args: argparse.Namespace, images: Sequence[str]) -> None:
    """Refuse to replace an image that is shown, or files of somebody else.

    Raises:
        FlagError: one of the two output files is such a file.
    """
    from dynamic.figures import page

    folder = Path(args.output_dir)
    problem = folder_problem(folder) if not str(args.output_dir).strip() else None
    if problem is not None:
        raise FlagError(f"--output-dir '': {problem}")
    for name in ("kept.png", "kept.html"):
        refuse_file("--output-dir", folder / name, [Input("--image-file", image) for image in images])
    refuse_foreign_bytes(folder / "kept.png", b"\x89PNG")
    refuse_foreign(folder / "kept.html", page(args.query, [], []))


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program.

    Returns:
        the folder with the two files.

    Raises:
        LlavaError: a flag, an image or the checkpoint is wrong; the message says what to do.
    """
    args = build_parser().parse_args(argv)
    # Not before the options are known, so that a mistyped one is answered at once.
    import torch

    from dynamic.figures import draw_sheet, page
    from dynamic.inspection import record_decisions
    from dynamic.kept_text import answer_segment, instruction_segment
    from llava.eval.answering.conv_mode import choose_conv_mode
    from llava.eval.answering.generation import GenerationOptions, ending_arguments
    from llava.eval.answering.loading import load_model
    from llava.eval.answering.runner import image_arguments, load_images, make_prompt

    # What can be wrong without the model is said before it is loaded.
    if args.num_beams != 1:
        raise FlagError(f"--num_beams {args.num_beams}: beams are dropped and copied on the way; use --num_beams 1")
    conv_mode = choose_conv_mode(args.conv_mode, args.model_path)
    options = GenerationOptions(args.temperature, args.top_p, 1, args.max_new_tokens, args.seed)
    names = tuple(name.strip() for name in args.image_file.split(args.sep))
    task = Task(0, args.query, args.query, names, where="--query")
    refuse_outputs(args, names)
    loaded = load_model(args.model_path, args.model_base, device=args.device, torch_dtype=args.torch_dtype)
    put_on(loaded, args)
    if args.reduce is None and "dynamic" not in loaded.model.extensions.configs:
        raise CheckpointError(
            f"{args.model_path}: a dense model, which keeps everything; name a sparse one, or a rule by --reduce"
        )
    prompt, images = make_prompt("0", task, loaded, conv_mode), load_images(task, loaded, run_llava.open_image)
    # The decisions of the whole prompt and of each token of the answer are noted while the model answers.
    with record_decisions(loaded.model) as log, torch.no_grad():
        output_ids = loaded.model.generate(
            prompt.input_ids[None].to(loaded.model.device),
            **image_arguments([images], loaded),
            **options.arguments([prompt.key]),
            **ending_arguments(prompt.end, loaded.tokenizer),
        )[0].tolist()
    if not log.prompts:
        raise CheckpointError(
            f"{args.model_path}: its configuration keeps every token (vision_keep_rate 1, no text predictor)"
        )
    shown = kept_images(log, images, loaded)
    segments = [
        instruction_segment(log, prompt.input_ids, loaded.tokenizer),
        answer_segment(log, output_ids, loaded.tokenizer),
    ]
    # Each file is written whole or not at all.
    with replacing(args.output_dir / "kept.png") as partial:
        draw_sheet(shown, segments).save(partial)
    replace_text(args.output_dir / "kept.html", page(args.query, shown, segments), check=False)
    print(prompt.end.text(output_ids, loaded.tokenizer).strip())
    for part in (*shown, *segments):
        print(part.caption)
    print(f"{args.output_dir / 'kept.png'}, {args.output_dir / 'kept.html'}")
    return Path(args.output_dir)


if __name__ == "__main__":
    run_program(main)
