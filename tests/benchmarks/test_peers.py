"""The benchmark next to peers on a tiny model: what is compared is the same work, and the record is complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peer_report, peer_sparse, peer_training, peers
from benchmarks import sparse_models as models
from benchmarks.fastv import FastV
from llava.errors import FlagError

ROOT = Path(__file__).resolve().parents[2]
TINY = "--small --layers 3 --rounds 1 --dropout 0.05 --batch-sizes 2 --tokens 3 --sparse-batches 2 --clients 2"
SIZE = models.Size(layers=4, width=32, inner=64, heads=2, patches=16)


def test_parts_are_recorded_and_others_kept(tmp_path: Path) -> None:
    """Everything but the servers, which are processes."""
    output, page = tmp_path / "peers.json", tmp_path / "page.md"
    page.write_text(f"before\n{peer_report.BEGIN}\nold\n{peer_report.END}\nafter\n", encoding="utf-8")
    words = [*TINY.split(), "--output", str(output)]
    peers.main([*words, "--sections", "train"])
    record = peers.main([*words, "--sections", "eval", "sparse", "--docs", str(page)])
    assert json.loads(output.read_text(encoding="utf-8")) == json.loads(json.dumps(record))
    assert {section: list(parts) for section, parts in record["parts"].items()} == {
        "train": ["dropout 0.05"],
        "eval": ["batch 2"],
        "sparse": ["batch 2"],
    }
    trained = record["parts"]["train"]["dropout 0.05"]["found"]
    ours, theirs = (trained["counts"][name] for name in ("LoRA", peer_training.PEER))
    assert ours["flops"] < theirs["flops"], "the head works on trained positions alone"
    assert ours["peak_beyond_weights"] < theirs["peak_beyond_weights"]
    assert trained["losses"]["LoRA, adapters that act"] != trained["losses"]["LoRA"]
    rows = peer_report.rows_of(record)
    kinds = {row.goal for row in rows}
    assert kinds == {"LoRA", "LoRA, memory", "HydraLoRA", "HydraLoRA, memory", "answers, batch", "prefill", "decoding"}
    table = peer_report.table(record)
    assert table in output.with_suffix(".md").read_text(encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    assert table in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    with pytest.raises(FlagError, match="name another file"):
        peers.main([*words, "--width", "128"])


def test_other_answers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = peers.peer_answers.in_generate
    monkeypatch.setattr(peers.peer_answers, "in_generate", lambda *given: [text + "!" for text in real(*given)])
    with pytest.raises(FlagError, match="nothing is timed"):
        peers.main([*TINY.split(), "--sections", "eval"])


def test_another_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer whose pixels differ does other work."""
    real = peer_training.expanded

    def brighter(*given: Any) -> dict[str, Any]:
        batch = real(*given)
        return batch | {"pixel_values": batch["pixel_values"] + 1}

    monkeypatch.setattr(peer_training, "expanded", brighter)
    with pytest.raises(FlagError, match=r"loss of .*nothing is timed"):
        peers.main([*TINY.split(), "--sections", "train"])


def test_fastv_prunes_by_the_attention_of_the_last_token() -> None:
    """Ranks of the image tokens are those of the attention matrix that transformers gives."""
    dense = models.build(SIZE, None, torch.device("cpu"), torch.float32)
    prompt = models.make_prompt(dense, SIZE, 2)
    seen: list[torch.Tensor] = []
    rule = FastV(dense, layer=2, keep=0.25)
    kept = FastV._kept

    class Watched(FastV):
        def _kept(self, scores: torch.Tensor, *given: Any) -> torch.Tensor:
            seen.append(scores)
            return kept(self, scores, *given)

    _, cache = Watched(dense, rule.layer, rule.keep).prefill(prompt)
    lengths = [layer.keys.shape[2] for layer in cache.cache.layers]
    assert lengths == [18, 18, 6, 6]
    # The same layer with all weights of attention at hand.
    dense.set_attn_implementation("eager")
    matrices: list[torch.Tensor] = []
    handle = dense.get_decoder().layers[1].self_attn.register_forward_hook(lambda _, __, out: matrices.append(out[1]))
    models.prefill(dense, prompt)
    handle.remove()
    torch.testing.assert_close(seen[0], matrices[0].mean(dim=1)[:, -1], rtol=1e-4, atol=1e-6)


def test_equality_of_the_sparse_section_can_fail() -> None:
    dense = models.build(SIZE, None, torch.device("cpu"), torch.float32)
    prompt, ids = models.make_prompt(dense, SIZE, 1), models.random_ids(dense, 1, 3)
    static = peer_sparse.Static(dense, 32)
    peer_sparse.check_same(dense, [static], prompt, ids)
    static.model = models.build(models.Size(4, 32, 96, 2, 16), None, torch.device("cpu"), torch.float32)
    with pytest.raises(FlagError, match="logits with a static cache"):
        peer_sparse.check_same(dense, [static], prompt, ids)


def test_the_page_shows_the_committed_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "peers-cpu.json").read_text(encoding="utf-8"))
    assert peer_report.table(record) in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert set(record["parts"]) == set(peers.SECTIONS)


@pytest.mark.parametrize(
    ("words", "message"), [(["--docs", "page.md"], "pass --output"), (["--output", "peers.txt"], "ends in .json")]
)
def test_refused(words: list[str], message: str) -> None:
    with pytest.raises(FlagError, match=message):
        peers.main([*TINY.split(), *words])
