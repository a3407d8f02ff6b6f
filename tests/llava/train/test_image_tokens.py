"""`<im_start>`, `<im_end>` and `<im_patch>`: added, trained row by row, kept in every kind of checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llava.convert.original import export_original
from llava.errors import CheckpointError, FlagError
from llava.eval.answering.answers import Task
from llava.eval.answering.loading import load_model
from llava.eval.answering.runner import make_prompt
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import bare_model
from llava.model.components import Component, components
from llava.model.formats import IMAGE_TOKENS_FILE, TOKEN_TABLE, read_tensors
from llava.model.image_tokens import BORDER_TOKENS, EmbeddingWithTrainedRows, add_image_tokens, train_image_tokens
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.train.run import Run
from llava.train.train import build_run, main, parse_args
from tests.golden import golden_dir, load_case
from tests.llava.runtime.tokenizers import make_tokenizer
from tests.llava.train.test_training import BASE, command_line, losses

LLAVA = golden_dir("llava")
WORDS = 896
BORDERS = {"mm_use_im_start_end": True, "lora_dropout": 0.0}
LORA = {"lora_enable": True, "lora_r": 4}
RECIPES: dict[str, dict[str, Any]] = {
    "projector": {"tune_mm_mlp_adapter": True},
    "full": {},
    "backbone frozen": {"freeze_backbone": True},
    "tokens alone": {"freeze_backbone": True, "freeze_mm_mlp_adapter": True},
    "lora": LORA,
    "lora, projector frozen": LORA | {"freeze_mm_mlp_adapter": True},
    "hydralora": {"use_lora": True, "lora_rank": 4, "lora_alpha": 8},
}


def logits(model: Any, start: int = WORDS) -> Tensor:
    """Logits for a prompt whose image stands between the two tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[1, 350, start, -200, start + 1, 500, 13]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, images=torch.randn(1, 3, 28, 28, generator=generator)).logits


def run_of(output: Path, **options: Any) -> Run:
    return build_run(parse_args(command_line(output, **options)))


def table_of(model: Any) -> Tensor:
    """The embedding table, trained rows included."""
    embedding = bare_model(model).get_input_embeddings()
    with torch.no_grad():
        return embedding(torch.arange(embedding.num_embeddings))


@pytest.mark.parametrize("recipe", RECIPES)
def test_tokens_are_trained_and_kept(recipe: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "out", **BORDERS | RECIPES[recipe], weight_decay=0.1)
    before, head_before = table_of(run.model), bare_model(run.model).lm_head.weight.detach().clone()
    assert before.shape == head_before.shape == (WORDS + 2, 40)
    for table in (before, head_before):
        torch.testing.assert_close(table[WORDS:], table[:WORDS].mean(0).expand(2, -1))
    run.trainer.train()
    moved = (table_of(run.model) != before).any(dim=1)
    assert moved[WORDS:].all(), "both new rows must be trained"
    if recipe != "full":
        assert not moved[:WORDS].any(), "no other row may move, by weight decay either"
        assert torch.equal(bare_model(run.model).lm_head.weight, head_before)
    expected = logits(bare_model(run.model))
    for folder in sorted((tmp_path / "out").glob("checkpoint-*")):
        names = {path.name for path in folder.iterdir()}
        assert (IMAGE_TOKENS_FILE in names) == (recipe != "full")
        tokenizer, model, _, _ = load_pretrained_model(str(folder), device="cpu")
        assert tokenizer.convert_tokens_to_ids(list(BORDER_TOKENS)) == [WORDS, WORDS + 1]
        assert model.config.vocab_size == len(tokenizer) == WORDS + 2
        assert type(model.get_input_embeddings()) is nn.Embedding
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        model.get_input_embeddings().weight[WORDS:] = before[WORDS:]
    assert not torch.allclose(logits(model), expected, atol=1e-4), "the test must see lost rows"


@pytest.mark.parametrize("recipe", ["projector", "full", "lora"])
def test_resume_is_exact(recipe: str, tmp_path: Path) -> None:
    options = BORDERS | RECIPES[recipe] | {"max_steps": 4, "save_steps": 2}
    main(command_line(tmp_path / "whole", **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    main(command_line(tmp_path / "cut", **options))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for folder in (tmp_path / "whole", tmp_path / "cut"):
        assert torch.equal(
            logits(load_pretrained_model(str(folder), device="cpu")[1]),
            logits(load_pretrained_model(str(tmp_path / "whole" / "checkpoint-4"), device="cpu")[1]),
        )


def test_prompts_have_the_tokens_around_images(tmp_path: Path) -> None:
    run = run_of(tmp_path / "out", **BORDERS, **RECIPES["projector"])
    ids = run.dataset[0]["input_ids"].tolist()
    place = ids.index(-200)
    assert ids[place - 1 : place + 2] == [WORDS, -200, WORDS + 1]
    run.trainer.save_model()
    loaded = load_model(str(tmp_path / "out"), device="cpu")
    prompt = make_prompt("0", Task(0, "What?", "What?", ("im0.png",), "q:1"), loaded, "v1")
    ids = prompt.input_ids.tolist()
    place = ids.index(-200)
    assert ids[place - 1 : place + 2] == [WORDS, -200, WORDS + 1]


def test_the_second_stage_begins_with_the_tokens_of_the_first(tmp_path: Path) -> None:
    first = run_of(tmp_path / "first", **BORDERS, **RECIPES["projector"])
    first.trainer.train()
    first.trainer.save_model()
    rows = table_of(first.model)[WORDS:]
    projector = tmp_path / "first" / "mm_projector.safetensors"
    options = BORDERS | {"model_name_or_path": LLAVA / "tiny-vicuna"}
    second = run_of(tmp_path / "second", **options, pretrain_mm_mlp_adapter=projector)
    assert torch.equal(table_of(second.model)[WORDS:], rows)
    (tmp_path / "first" / IMAGE_TOKENS_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"neither .*mm_projector.safetensors nor .* holds the tokens"):
        run_of(tmp_path / "second", **options, pretrain_mm_mlp_adapter=projector)


@pytest.mark.parametrize("rows", [2, WORDS + 2])
def test_projector_files_of_the_original_hold_the_tokens(
    rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original's stage 1 writes its whole table; files with the two rows alone exist as well."""
    table = torch.randn(rows, 40)
    folder = tmp_path / "tiny-pretrain"
    shutil.copytree(LLAVA / "tiny-llava-pretrain", folder, copy_function=shutil.copyfile)
    weights = read_tensors(folder / "mm_projector.bin") | {TOKEN_TABLE: table}
    torch.save(weights, folder / "mm_projector.bin")
    config = json.loads((folder / "config.json").read_text()) | {
        "mm_use_im_start_end": True,
        "mm_vision_tower": str(LLAVA / "tiny-clip"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = load_pretrained_model(str(folder), str(LLAVA / "tiny-vicuna"), device="cpu")[1]
    assert torch.equal(table_of(model)[WORDS:], table[-2:])
    options = BORDERS | {"model_name_or_path": LLAVA / "tiny-vicuna"}
    run = run_of(tmp_path / "out", **options, pretrain_mm_mlp_adapter=folder / "mm_projector.bin")
    assert torch.equal(table_of(run.model)[WORDS:], table[-2:])
    assert "is used by" not in capsys.readouterr().out
    options["mm_use_im_start_end"] = False
    run_of(tmp_path / "without", **options, pretrain_mm_mlp_adapter=folder / "mm_projector.bin")
    assert f"{TOKEN_TABLE} is used by --mm_use_im_start_end True alone" in capsys.readouterr().out
    torch.save(weights | {TOKEN_TABLE: table[:1]}, folder / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="has 1 rows; the model has 898"):
        load_pretrained_model(str(folder), str(LLAVA / "tiny-vicuna"), device="cpu")


def test_lora_folders_of_the_original_get_the_rows_they_were_trained_with(tmp_path: Path) -> None:
    """The original freezes the new rows at their mean in a LoRA run and does not save them."""
    folder = tmp_path / "tiny-lora"
    shutil.copytree(LLAVA / "tiny-llava-lora", folder, copy_function=shutil.copyfile)
    config = json.loads((folder / "config.json").read_text())
    config |= {"mm_use_im_start_end": True, "mm_use_im_patch_token": True, "vocab_size": WORDS + 3}
    config["mm_vision_tower"] = str(LLAVA / "tiny-clip")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer, model, _, _ = load_pretrained_model(str(folder), str(LLAVA / "tiny-vicuna"), device="cpu")
    added = load_case("llava", "tokenizer")[0]["added_ids"]
    assert tokenizer.get_added_vocab() == added
    table = table_of(model)
    torch.testing.assert_close(table[WORDS:], table[:WORDS].mean(0).expand(3, -1))


@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_the_patch_token_is_added_and_never_trained_alone(recipe: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "out", mm_use_im_patch_token=True, **RECIPES[recipe], save_steps=3)
    assert components(run.model)[Component.IMAGE_TOKENS] == {}
    run.trainer.train()
    tokenizer, model, _, _ = load_pretrained_model(str(tmp_path / "out" / "checkpoint-3"), device="cpu")
    assert tokenizer.convert_tokens_to_ids("<im_patch>") == WORDS == model.config.vocab_size - 1
    torch.testing.assert_close(table_of(model), table_of(run.model))
    if recipe == "lora":
        export_original(tmp_path / "out" / "checkpoint-3", tmp_path / "original")


def test_a_second_run_on_a_model_that_has_the_tokens_keeps_their_rows(tmp_path: Path) -> None:
    main(command_line(tmp_path / "base", **BORDERS, save_strategy="no"))
    base = load_pretrained_model(str(tmp_path / "base"), device="cpu")[1]
    run = run_of(tmp_path / "out", **BORDERS, **LORA, model_name_or_path=tmp_path / "base")
    assert torch.equal(table_of(run.model), table_of(base))
    assert not torch.allclose(table_of(base)[WORDS], table_of(base)[:WORDS].mean(0), atol=1e-4)
    run.trainer.train()
    with pytest.raises(CheckpointError, match="no place for the rows"):
        export_original(tmp_path / "out" / "checkpoint-3", tmp_path / "original")


def test_resuming_without_the_tokens_is_refused(tmp_path: Path) -> None:
    main(command_line(tmp_path, **BORDERS, **LORA))
    with pytest.raises(FlagError, match="--mm_use_im_start_end: True then, False now"):
        main(command_line(tmp_path, **LORA, max_steps=4))
    for name in ("run.json", "checkpoint_files.json"):  # a folder without records is judged by its weights
        for path in tmp_path.rglob(name):
            path.unlink()
    with pytest.raises(CheckpointError, match=r"holds the token '<im_(start|end)>', which this model does not use"):
        main(command_line(tmp_path, **LORA, max_steps=4))


def tiny_model(**options: Any) -> LlavaLlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlavaLlamaForCausalLM(LlavaConfig(vocab_size=WORDS, **sizes, **options))


def test_only_the_trained_rows_have_a_gradient() -> None:
    table = nn.Embedding(6, 3).requires_grad_(False)
    embedding = EmbeddingWithTrainedRows(table, [4, 2])
    ids = torch.tensor([[0, 2, 2, 5]])
    assert torch.equal(embedding(ids), table(ids))
    embedding(ids).sum().backward()
    assert embedding.rows.grad.tolist() == [[0, 0, 0], [2, 2, 2]]
    assert embedding.weight.grad is None


def test_a_table_that_is_large_enough_is_not_made_smaller() -> None:
    model = tiny_model()
    model.resize_token_embeddings(1000, mean_resizing=False)
    tokenizer = make_tokenizer.__wrapped__()
    assert add_image_tokens(model, tokenizer, BORDER_TOKENS) == list(BORDER_TOKENS)
    table = model.get_input_embeddings().weight
    assert len(table) == model.config.vocab_size == 1000
    torch.testing.assert_close(table[WORDS : WORDS + 2], table[:WORDS].mean(0).expand(2, -1))
    assert add_image_tokens(model, tokenizer, BORDER_TOKENS) == []


def test_tied_embeddings_are_refused_beside_a_frozen_model() -> None:
    model = tiny_model(tie_word_embeddings=True)
    add_image_tokens(model, make_tokenizer.__wrapped__(), BORDER_TOKENS)
    with pytest.raises(FlagError, match="ties its head to its embeddings"):
        train_image_tokens(model)


def test_the_tokens_need_a_tower(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="--mm_use_im_start_end needs --vision_tower"):
        parse_args(command_line(tmp_path, **BORDERS, vision_tower="none"))


def test_a_quantised_base_keeps_them_too(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run = run_of(tmp_path / "out", **BORDERS, **LORA, bits=4)
    before = table_of(run.model)
    run.trainer.train()
    after = table_of(run.model)
    assert (after != before).any(dim=1).tolist() == [False] * WORDS + [True, True]
    _, model, _, _ = load_pretrained_model(str(tmp_path / "out" / "checkpoint-3"), str(BASE), device="cpu")
    torch.testing.assert_close(table_of(model)[WORDS:], after[WORDS:])


@pytest.mark.parametrize("recipe", ["projector", "lora"])
def test_gradient_checkpointing_changes_nothing(recipe: str, tmp_path: Path) -> None:
    tables = []
    for checkpointing in (False, True):
        run = run_of(tmp_path / str(checkpointing), **BORDERS | RECIPES[recipe], gradient_checkpointing=checkpointing)
        run.trainer.train()
        tables.append(table_of(run.model))
    torch.testing.assert_close(*tables, rtol=0, atol=1e-6)


def test_rows_are_trained_in_fp32_beside_a_base_in_half_precision(tmp_path: Path) -> None:
    run = run_of(tmp_path / "out", **BORDERS, **LORA, bf16=True)
    embedding = bare_model(run.model).get_input_embeddings()
    assert (embedding.weight.dtype, embedding.rows.dtype) == (torch.bfloat16, torch.float32)
    before = embedding.rows.detach().clone()
    run.trainer.train()
    assert (embedding.rows != before).any(dim=1).all()
    saved = read_tensors(tmp_path / "out" / "checkpoint-3" / IMAGE_TOKENS_FILE)
    assert torch.equal(saved["embed_tokens/<im_start>"], embedding.rows[0])


def test_merged_weights_hold_the_rows(tmp_path: Path) -> None:
    """A LoRA checkpoint merged with its base is a full checkpoint like any other."""
    main(command_line(tmp_path / "lora", **BORDERS, **LORA, save_strategy="no"))
    tokenizer, model, _, _ = load_pretrained_model(str(tmp_path / "lora"), str(BASE), device="cpu")
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    merged = load_pretrained_model(str(tmp_path / "merged"), device="cpu")[1]
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-6)
