"""LaVIN's own command line: its options, what they become, and a run from Meta's files to a checkpoint."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava.data.images import load_image
from llava.data.pixels import process_images
from llava.errors import FlagError
from llava.model.builder import load_pretrained_model
from llava.runtime import checkpointing
from llava.runtime.tokenizer import load_tokenizer
from llava.train.train import Parts, build_run
from mma.lavin import demo, train_arguments
from mma.lavin import eval as mma_eval
from mma.lavin.eval_options import BITS as EVAL_BITS
from mma.lavin.train import dataset_maker, next_command, prepare_base
from mma.lavin.train_arguments import INSTEAD, parse_args
from mma.lavin.train_options import build_parser
from mma.lavin.trainer import WholeUpdates, epoch_of
from tests.golden import load_case
from tests.llava.train.launching import finish, start, torchrun
from tests.mma.lavin.lavin_files import LavinFiles, save_lavin_files, tiny_words, train_tiny
from tests.mma.lavin.test_data import lavin_processor

FLAGS = load_case("lavin", "cli_flags")[0]


@pytest.fixture
def files(lavin_files: LavinFiles) -> LavinFiles:
    return lavin_files


def described(action: argparse.Action) -> dict[str, Any]:
    kinds = {argparse._StoreTrueAction: "store_true", argparse._StoreFalseAction: "store_false"}
    return {
        "flags": list(action.option_strings),
        "dest": action.dest,
        "action": kinds.get(type(action), "store"),
        "default": action.default,
        "choices": None if action.choices is None else list(action.choices),
    }


def test_options_are_those_of_the_original() -> None:
    ours = {action.option_strings[0]: action for action in build_parser()._actions if action.dest != "help"}
    added = {"--vicuna_weights", "--config", "--eval_split"}
    assert ours.keys() - {flag["flags"][0] for flag in FLAGS["train_py"]} == added
    for flag in FLAGS["train_py"]:
        action = ours[flag["flags"][0]]
        assert described(action) == {key: flag[key] for key in ("flags", "dest", "action", "default", "choices")}
        if flag["action"] == "store":
            kind = str if action.type is None else action.type
            assert kind.__name__ == flag["type"].removesuffix(" (argparse default)")


def words_of(script: str) -> list[str]:
    arguments = FLAGS["scripts"][script][0]["arguments"]
    return [word for flag, value in arguments.items() for word in ([flag] if value is True else [flag, value])]


TRAINING = [name for name, calls in FLAGS["scripts"].items() if calls[0]["program"] == "train.py"]


@pytest.mark.parametrize("script", TRAINING)
def test_what_the_options_become(
    script: str, files: LavinFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The values of each script, as llava's options."""
    effective, given = FLAGS["effective"][script], FLAGS["scripts"][script][0]["arguments"]
    monkeypatch.setattr(train_arguments, "launched_processes", lambda: effective["gpus"])
    (files.data / "all_data.json").touch()
    args = parse_args([*words_of(script), *files.words, "--output_dir", str(tmp_path / "out")])
    training, mma = args.run.training, args.run.extensions["mma"]
    assert training.learning_rate == pytest.approx(effective["absolute_lr"])
    assert args.schedule.warmup_epochs == float(given["--warmup_epochs"])
    assert training.num_train_epochs == int(given["--epochs"])
    assert training.per_device_train_batch_size == int(given["--batch_size"])
    assert training.gradient_accumulation_steps == int(given["--accum_iter"])
    assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.95)
    assert training.weight_decay == 0.02
    assert training.max_grad_norm == 0
    assert training.model_max_length == 511
    assert training.bits == int(given.get("--bits", "16bit").removesuffix("bit"))
    assert checkpointing.is_checkpointed(training) is ("--gradient_checkpointing" in given)
    assert args.run.model.freeze_backbone
    assert (mma["adapter_type"], mma["visual_adapter_type"], mma["adapter_dim"]) == ("attn", "router", 8)
    assert mma["temperature"] == float(given["--temperature"])
    assert args.base.use_vicuna is ("--use_vicuna" in given)
    assert args.base.llm_model == given["--llm_model"]
    assert args.run.data.image_aspect_ratio == "stretch"
    assert args.run.model.mm_projector_type == "bottleneck128_silu"
    name = "all_data.json" if "--do_pretrain" in given else "problems.json"
    assert [Path(path).name for path in args.run.data.data_path] == [name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate", "1e-4"], "--learning_rate: use --lr or --blr"),
        (["--num_train_epochs=3"], "--num_train_epochs: use --epochs"),
        (["--streaming", "True", "--max_steps", "3"], "--streaming: use no option: LaVIN's data are one file"),
        (["--dist_on_itp"], "--dist_on_itp"),
        (["--dist_url", "tcp://x"], "--dist_url"),
        (["--start_epoch", "3"], "--start_epoch 3"),
        (["--resume", "checkpoint-3.pth"], r"--resume checkpoint-3\.pth: is no folder"),
        (["--epochs", "2"], "--warmup_epochs 40"),
        (["--learning-rate", "1e-4"], "--learning_rate: use --lr or --blr"),
        (["--num-train-epochs=3"], "--num_train_epochs: use --epochs"),
        (["--no_dataloader_pin_memory"], "--no_dataloader_pin_memory: use --no_pin_mem"),
        (["--lr", "0"], r"--lr 0\.0: must be more than 0"),
        (["--mm_use_im_start_end", "True"], "--mm_use_im_start_end True"),
        (["--visual_input", "llava", "--hidden_proj", "128"], "--hidden_proj 128"),
        (["--image_aspect_ratio", "square"], "--image_aspect_ratio square: --visual_input lavin has stretch"),
        (["--mm-vision-select-feature", "patch"], "--mm_vision_select_feature patch: --visual_input lavin"),
        (["--no_such_flag", "1"], "unknown options"),
        (["--image_aspect_ratio", "pad"], "--image_aspect_ratio pad"),
        (["--data_root", "nowhere"], "--data_root nowhere: has no problems.json, pid_splits.json, images"),
        (["--do_pretrain", "--data_root", "nowhere"], "--data_root nowhere: has no all_data.json, images"),
        (["--use_caption", "--caption_file", "none.json"], "--caption_file none.json"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(words: list[str], message: str, files: LavinFiles) -> None:
    with pytest.raises(FlagError, match=message):
        parse_args([*files.words, *words])


def test_options_may_be_written_with_hyphens(files: LavinFiles) -> None:
    """Llava's parser takes both forms; LaVIN's options mean the same in either."""
    words = ["--batch-size", "3", "--adapter-type=block", "--output-dir", "a-b", "--max-steps", "2", "--bf16", "False"]
    args = parse_args([*files.words, *words])
    assert (args.own.output_dir, args.run.training.output_dir) == ("a-b", "a-b")
    assert args.run.training.per_device_train_batch_size == 3
    assert args.run.extensions["mma"]["adapter_type"] == args.own.adapter_type == "block"
    assert args.run.training.max_steps == 2


@pytest.mark.parametrize("words", [["--use_cpu"], ["--use-cpu", "True"], ["--use_cpu=yes"], ["--no_cuda", "True"]])
def test_the_cpu_may_be_asked_for_as_in_llava(words: list[str], files: LavinFiles) -> None:
    position = files.words.index("--device")
    assert parse_args([*files.words[:position], *words]).run.training.use_cpu


@pytest.mark.parametrize("ratio", ["stretch", "pad", "square", "anyres"])
def test_training_sees_the_images_of_the_evaluation(ratio: str, files: LavinFiles, tmp_path: Path) -> None:
    """The aspect ratio in the checkpoint, which evaluation obeys, is that of the training's images."""
    words = ["--visual_input", "llava", "--image_aspect_ratio", ratio] if ratio != "stretch" else []
    if ratio == "anyres":
        words += ["--image_grid_pinpoints", "[(84, 42), (42, 84)]"]
    args = parse_args([*files.words, "--output_dir", str(tmp_path / "out"), "--visual_adapter_type", "router", *words])
    prepare_base(args)
    run = build_run(args.run, parts=Parts(dataset=dataset_maker(args)))
    assert run.model.config.image_aspect_ratio == ratio
    number = next(n for n, length in enumerate(run.dataset.modality_lengths) if length > 0)
    name, ours = run.dataset.rows[number]["image"], run.dataset[number]["image"]
    image = load_image(run.dataset.image_folder, name)
    assert image.width != image.height
    processor = run.model.get_vision_tower().image_processor
    (expected,) = process_images([image], processor, run.model.config)
    assert torch.equal(ours[0] if ratio == "anyres" else ours, expected)


def test_rows_without_image_can_be_left_out(
    files: LavinFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = parse_args([*files.words, "--output_dir", str(tmp_path / "out"), "--requires_image", "True"])
    prepare_base(args)
    tokenizer = load_tokenizer(args.run.model.model_name_or_path, model_max_length=511)
    model = SimpleNamespace(
        get_vision_tower=lambda: SimpleNamespace(image_processor=lavin_processor()),
        config=SimpleNamespace(image_grid_pinpoints=None),
        image_length=lambda: None,
    )
    dataset = dataset_maker(args)(args.run, tokenizer, model)
    assert 0 < len(dataset) == sum(length > 0 for length in dataset.modality_lengths) < 18
    assert f"{18 - len(dataset)} rows without image are left out" in capsys.readouterr().out


def test_every_option_that_is_refused_exists(files: LavinFiles) -> None:
    """The table of other names must not refuse what nobody could give."""
    known = vars(parse_args(files.words).run.training).keys() | vars(parse_args(files.words).run.model).keys()
    known |= vars(parse_args(files.words).run.data).keys() | {"mma", "warmup_ratio"}
    known |= vars(parse_args(files.words).run.evaluation).keys()
    assert set(INSTEAD) <= known


def test_idle_options_say_so(files: LavinFiles, capsys: pytest.CaptureFixture[str]) -> None:
    parse_args([*files.words, "--cpu_load", "--data_path", "x.json", "--n_prompt", "6"])
    printed = capsys.readouterr().out
    assert [word for word in ("--cpu_load", "--data_path", "--n_prompt") if f"{word} is ignored" in printed] == [
        *("--cpu_load", "--data_path", "--n_prompt")
    ]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--use_caption", "--options", "ABCDEFG", "--bits", "8bit", "--max_seq_len", "300"),
        ("--do_pretrain", "--bits", "4bit", "--max_seq_len", "300"),
    ],
)
def test_the_next_command_asks_as_the_training_did(words: tuple[str, ...], files: LavinFiles, tmp_path: Path) -> None:
    """Prompts, precision and length of the training, in words that the next program reads."""
    (files.data / "all_data.json").touch()
    args = parse_args([*files.words, "--output_dir", str(tmp_path / "a name"), "--prompt_format", "QCM-ALE", *words])
    module, *flags = shlex.split(next_command(args).removeprefix("python -m "))
    given = {"mma.eval": mma_eval, "mma.demo": demo}[module].build_parser().parse_args(flags)
    assert given.adapter_path == str(tmp_path / "a name")
    assert given.max_seq_len == args.own.max_seq_len
    assert EVAL_BITS[given.bits] == args.run.training.bits
    if module == "mma.eval":
        assert given.prompt_format == "QCM-ALE"
        assert given.options == args.own.options
        assert given.use_caption is args.own.use_caption
        assert given.caption_file == (args.own.caption_file if given.use_caption else None)


def test_epochs_are_whole_updates() -> None:
    """18 samples on two processes: 9 each, two batches of 4, one update of two batches; the ninth is left out."""
    epoch = epoch_of(18, batch_size=4, accum_iter=2, world_size=2)
    assert (epoch.batches, epoch.updates) == (2, 1)
    assert epoch_of(7, 4, 1, 2).updates == 1  # evened out: one sample twice
    assert list(WholeUpdates([3, 1, 2], 4)) == [3, 1, 2, 3]
    assert list(WholeUpdates([3, 1, 2], 2)) == [3, 1]
    with pytest.raises(FlagError, match="18 samples are too few for one update of 64"):
        epoch_of(18, 64, 1, 1)


def test_a_run_from_metas_files_to_a_checkpoint(
    files: LavinFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = train_tiny(files, tmp_path / "out", "--use_caption")
    command = capsys.readouterr().out.splitlines()[-1]
    asked = mma_eval.build_parser().parse_args(shlex.split(command)[3:])
    assert command.startswith("python -m mma.eval --ckpt_dir")
    assert (asked.adapter_path, asked.use_caption) == (str(output), True)
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 4  # two whole updates of 8 in each epoch of 18 samples
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert rates == pytest.approx([0.0, 0.01, 0.0075, 0.0025], abs=1e-4)
    assert (output / "checkpoint-2").is_dir()
    base = files.weights / "7B-hf"
    _, model, processor, _ = load_pretrained_model(str(output), str(base), device="cpu")
    assert model.extensions.configs["mma"]["visual_adapter_type"] == "router"
    assert processor.image_mean == [0.485, 0.456, 0.406]
    assert model.config.image_aspect_ratio == "stretch"
    moved = {
        name: bool(weight.abs().max() > 0)
        for name, weight in model.extensions.named_parameters(model).items()
        if name.endswith("conv_B.weight")  # zero before training
    }
    assert len(moved) == 2 + 8  # decoder layers and blocks of the tower
    assert all(moved.values()), moved


def test_the_loss_on_another_split_is_logged(files: LavinFiles, tmp_path: Path) -> None:
    """By modality and subject, with the prompts of the training; the training does not notice it."""
    plain = train_tiny(files, tmp_path / "plain")
    evaluated = train_tiny(files, tmp_path / "evaluated", "--eval_split", "val", "--eval_strategy", "epoch")
    assert logged(evaluated) == logged(plain)
    assert all(torch.equal(*pair) for pair in zip(trained(evaluated), trained(plain), strict=True))
    history = json.loads((evaluated / "trainer_state.json").read_text())["log_history"]
    found = [entry for entry in history if "eval_loss" in entry]
    assert len(found) == 2
    assert found[0]["eval_loss"] != found[1]["eval_loss"]
    problems = json.loads((files.data / "problems.json").read_text())
    split = json.loads((files.data / "pid_splits.json").read_text())["val"]
    subjects = {f"eval_task_{'_'.join(problems[str(pid)]['subject'].split())}_loss" for pid in split}
    assert subjects
    assert subjects <= found[0].keys()
    assert found[0]["eval_rows"] == len(split)


def test_an_evaluation_of_other_rows_is_refused(files: LavinFiles, tmp_path: Path) -> None:
    for words in (["--eval_data_path", "x.json"], ["--eval_questions", "pope"]):
        with pytest.raises(FlagError, match=f"{words[0]}: use --eval_split"):
            parse_args([*files.words, "--output_dir", str(tmp_path / "out"), *words])
    with pytest.raises(FlagError, match="--eval_split val: the data of --do_pretrain has no splits"):
        parse_args([*files.words, "--output_dir", str(tmp_path / "out"), "--eval_split", "val", "--do_pretrain"])


def test_an_interrupted_run_goes_on(files: LavinFiles, tmp_path: Path) -> None:
    whole = train_tiny(files, tmp_path / "whole")
    first, last = sorted(whole.glob("checkpoint-*"))
    shutil.copytree(first, tmp_path / "parts" / first.name)  # of a run that was stopped in its second epoch
    parts = train_tiny(files, tmp_path / "parts")
    assert (parts / last.name).is_dir()
    for path in sorted((whole / "extensions" / "mma").glob("*.safetensors")):
        assert path.read_bytes() == (parts / "extensions" / "mma" / path.name).read_bytes()


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """The same updates from the same samples; the first process converts the base weights while the other waits."""
    files, same = save_lavin_files(tmp_path), ("--adapter_dropout", "0", "--loss_reduction", "target")
    words = [*tiny_words(files, tmp_path / "two", *same), "--batch_size", "2"]
    program = tmp_path / "program.py"
    program.write_text("import runpy\nrunpy.run_module('mma.train', run_name='__main__', alter_sys=True)\n")
    status = finish(start(torchrun(2), program, words, tmp_path / "log"), limit=300)
    log = (tmp_path / "log").read_text()
    assert status == 0, log[-3000:]
    assert log.count("writing the weights in the layout of transformers") == 1
    train_tiny(files, tmp_path / "one", *same)
    ours, theirs = (logged(tmp_path / name) for name in ("one", "two"))
    assert ours == pytest.approx(theirs, abs=1e-4)
    for one, two in zip(*(trained(tmp_path / name) for name in ("one", "two")), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-3)


def logged(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history for key in ("loss", "learning_rate") if key in entry]


def trained(output: Path) -> list[torch.Tensor]:
    tensors = load_file(output / "extensions" / "mma" / "model.safetensors")
    return [tensors[name] for name in sorted(tensors)]
