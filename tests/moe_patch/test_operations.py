"""Applying, refusing, drifting and reverting, on a miniature checkout."""

from __future__ import annotations

import compileall
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe_patch import operations, sources
from moe_patch.__main__ import main
from moe_patch.checkout import Checkout
from moe_patch.errors import PatchError
from moe_patch.extensions import EXTENSIONS, Extension, chosen
from tests.moe_patch import miniature

TRAIN, BUILDER, LLAMA = miniature.EDITED
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return miniature.write(tmp_path / "LLaVA")


def apply(folder: Path, force: bool = False) -> None:
    operations.apply(Checkout(folder), chosen(["hydralora"]), force)


def change(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))


def state(folder: Path) -> str:
    return operations.state(Checkout(folder))[0]


class TestApply:
    def test_edits_insert_and_leave_every_line_of_upstream_alone(self, folder: Path) -> None:
        before = {name: (folder / name).read_text() for name in miniature.EDITED}
        apply(folder)
        for name, text in before.items():
            lines = (folder / name).read_text().splitlines()
            kept = [line for line in lines if not line.endswith("  # moe_patch")]
            undone = "\n".join(kept).replace("extensions_moe.Flags, ", "").replace(" elif 'lora'", " if 'lora'")
            assert undone + "\n" == text, name
            assert len(lines) > len(kept)

    def test_a_second_time_changes_nothing(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        apply(folder)
        once = miniature.snapshot(folder)
        times = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        assert main(["apply", str(folder)]) == 0
        assert "was applied already" in capsys.readouterr().out
        assert miniature.snapshot(folder) == once
        assert {path: path.stat().st_mtime_ns for path in times} == times

    def test_revert_restores_every_byte_and_leaves_nothing(self, folder: Path) -> None:
        (folder / TRAIN).chmod(0o755)
        miniature.commit(folder)
        before = miniature.snapshot(folder)
        apply(folder)
        assert miniature.snapshot(folder) != before
        assert state(folder) == "applied"
        assert compileall.compile_dir(folder / "llava" / "extensions_moe", quiet=1)
        operations.revert(Checkout(folder))
        assert miniature.snapshot(folder) == before
        assert state(folder) == "clean"
        assert not (folder / ".moe_patch").exists()
        assert not (folder / "llava" / "extensions_moe").exists()

    def test_line_ends_of_windows_stay(self, tmp_path: Path) -> None:
        folder = miniature.write(tmp_path / "LLaVA", "\r\n")
        before = miniature.snapshot(folder)
        apply(folder)
        for name in miniature.EDITED:
            assert b"\n" not in (folder / name).read_bytes().replace(b"\r\n", b"")
        operations.revert(Checkout(folder))
        assert miniature.snapshot(folder) == before

    def test_works_without_git(self, tmp_path: Path) -> None:
        folder = miniature.write(tmp_path / "LLaVA")
        shutil.rmtree(folder / ".git")
        before = miniature.snapshot(folder)
        apply(folder)
        operations.revert(Checkout(folder))
        assert miniature.snapshot(folder) == before

    def test_reformatted_code_has_the_same_anchors(self, folder: Path) -> None:
        change(folder, BUILDER, "if 'lora' in model_name.lower() and model_base is not None:",
               'if model_base is not None and "lora" in model_name.lower():')  # fmt: skip
        change(folder, TRAIN, "model_args, data_args, training_args = parser.parse_args_into_dataclasses()",
               "(model_args, data_args, training_args) = (\n        parser.parse_args_into_dataclasses())")  # fmt: skip
        miniature.commit(folder)
        apply(folder)
        assert state(folder) == "applied"

    def test_dry_run_and_check_write_nothing(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = miniature.snapshot(folder)
        assert main(["apply", str(folder), "--dry-run"]) == 0
        assert main(["check", str(folder)]) == 0
        assert f"{TRAIN}:" in capsys.readouterr().out
        assert miniature.snapshot(folder) == before
        apply(folder)
        applied = miniature.snapshot(folder)
        assert main(["revert", str(folder), "--dry-run"]) == 0
        assert miniature.snapshot(folder) == applied

    def test_patch_sh_names_a_python_that_is_too_old(self, folder: Path, tmp_path: Path) -> None:
        old = tmp_path / "python"
        old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.18\nexit 1\n')
        old.chmod(0o755)
        command = [str(ROOT / "moe_patch" / "patch.sh"), str(folder)]
        environment = os.environ | {"PYTHON": str(old)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 1
        assert "needs Python 3.10 or later" in done.stderr
        assert "Python 3.8.18" in done.stderr

    def test_a_reader_that_stops_reading(self, folder: Path) -> None:
        command = f"{sys.executable} -m moe_patch apply {folder} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT)
        assert (done.returncode, done.stderr) == (0, "")
        assert state(folder) == "applied"

    def test_patch_sh(self, folder: Path) -> None:
        script = ROOT / "moe_patch" / "patch.sh"
        done = subprocess.run([str(script), str(folder)], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("applied: hydralora")
        assert state(folder) == "applied"


class TestRefuse:
    @pytest.mark.parametrize(
        ("name", "old", "new", "times"),
        [
            (TRAIN, "class TrainingArguments(transformers.TrainingArguments)", "class TrainingArguments(Mine)", 0),
            (TRAIN, "lora_config = LoraConfig(", "configuration = LoraConfig(", 0),
            (TRAIN, 'print("adding LoRA")', "model = get_peft_model(1, 2)", 2),
            (BUILDER, "def load_pretrained_model(model_path, model_base,", "def load_pretrained_model(path, base,", 0),
            (BUILDER, "if 'lora' in model_name.lower() and model_base is not None", "if model_base is not None", 0),
            (LLAMA, "    def forward(", "    def forward_all(", 0),
        ],
    )  # fmt: skip
    def test_an_anchor_that_does_not_fit_once(
        self, folder: Path, name: str, old: str, new: str, times: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        change(folder, name, old, new)
        miniature.commit(folder)
        before = miniature.snapshot(folder)
        assert main(["apply", str(folder)]) == 1
        message = capsys.readouterr().err
        assert miniature.git(folder, "rev-parse", "HEAD").strip() in message
        assert f"{name}: anchor" in message
        assert f"fits {times} times" in message
        assert "nothing was changed" in message
        assert miniature.snapshot(folder) == before

    def test_all_failing_anchors_are_named(self, folder: Path) -> None:
        change(folder, TRAIN, "lora_config = LoraConfig(", "configuration = LoraConfig(")
        change(folder, LLAMA, "    def forward(", "    def forward_all(")
        miniature.commit(folder)
        with pytest.raises(PatchError) as error:
            apply(folder)
        assert str(error.value).count("fits 0 times") == 2

    def test_a_statement_that_shares_its_line(self, folder: Path) -> None:
        change(folder, TRAIN, "get_peft_model(model, lora_config)  #", "get_peft_model(model, lora_config); x = 1  #")
        miniature.commit(folder)
        with pytest.raises(PatchError, match="another statement stands behind it"):
            apply(folder)

    def test_uncommitted_changes_unless_forced(self, folder: Path) -> None:
        change(folder, TRAIN, '"a b"', '"my text"')
        (folder / "README.md").write_text("mine, and of no concern")
        before = miniature.snapshot(folder)
        with pytest.raises(PatchError, match=r"train\.py: has uncommitted changes"):
            apply(folder)
        assert miniature.snapshot(folder) == before
        apply(folder, force=True)
        assert '"my text"' in (folder / TRAIN).read_text()
        operations.revert(Checkout(folder))
        assert miniature.snapshot(folder) == before

    def test_a_file_of_the_user_in_our_place(self, folder: Path) -> None:
        path = folder / "llava" / "extensions_moe" / "seams.py"
        path.parent.mkdir()
        path.write_text("mine = 1\n")
        with pytest.raises(PatchError, match="is there already and not from this patch"):
            apply(folder)
        assert path.read_text() == "mine = 1\n"

    def test_a_link_that_leads_out_of_the_checkout(self, folder: Path, tmp_path: Path) -> None:
        outside = tmp_path / "train.py"
        (folder / TRAIN).rename(outside)
        (folder / TRAIN).symlink_to(outside)
        with pytest.raises(PatchError, match="symbolic link"):
            apply(folder, force=True)
        assert "moe_patch" not in outside.read_text()

    @pytest.mark.parametrize("names", ["unheard", "hydralora,unheard", ""])
    def test_unknown_extensions(self, folder: Path, names: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["apply", str(folder), "--extensions", names]) == 1
        assert "known: hydralora" in capsys.readouterr().err

    def test_a_folder_that_is_no_checkout(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["apply", str(tmp_path)]) == 1
        assert "not a LLaVA checkout" in capsys.readouterr().err

    def test_edits_whose_manifest_is_gone(self, folder: Path) -> None:
        apply(folder)
        shutil.rmtree(folder / ".moe_patch")
        miniature.commit(folder)
        with pytest.raises(PatchError, match=r"contains edits of moe_patch, but \.moe_patch/manifest\.txt is gone"):
            apply(folder)


class TestDrift:
    def test_a_change_after_the_patch(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = miniature.snapshot(folder)
        apply(folder)
        change(folder, TRAIN, '"a b"', '"my text"')
        assert main(["status", str(folder)]) == 1
        assert f"{TRAIN}: changed after the patch" in capsys.readouterr().out
        changed = miniature.snapshot(folder)
        for command in ("apply", "revert"):
            assert main([command, str(folder)]) == 1
            assert f"{TRAIN}: was changed after the patch" in capsys.readouterr().err
            assert miniature.snapshot(folder) == changed
        assert main(["revert", str(folder), "--force"]) == 0
        after = miniature.snapshot(folder)
        kept = after.pop(f"{TRAIN}{operations.KEPT}")
        assert after == before
        assert b'"my text"' in kept[0]

    def test_our_file_changed_or_gone(self, folder: Path) -> None:
        before = miniature.snapshot(folder)
        apply(folder)
        ours = folder / "llava" / "extensions_moe"
        (ours / "seams.py").unlink()
        assert operations.state(Checkout(folder)) == (
            "drifted", [operations.state(Checkout(folder))[1][0], "llava/extensions_moe/seams.py: gone"]
        )  # fmt: skip
        (ours / "hydralora" / "layer.py").write_text("mine = 1\n")
        with pytest.raises(PatchError, match=r"hydralora/layer.py: was changed after the patch"):
            operations.revert(Checkout(folder))
        operations.revert(Checkout(folder), force=True)
        (ours / "hydralora" / f"layer.py{operations.KEPT}").unlink()
        assert miniature.snapshot(folder) == before

    def test_files_of_the_user_in_our_folder_stay(self, folder: Path) -> None:
        apply(folder)
        mine = folder / "llava" / "extensions_moe" / "mine.py"
        mine.write_text("mine = 1\n")
        operations.revert(Checkout(folder))
        assert [path.name for path in mine.parent.iterdir()] == ["mine.py"]

    def test_edits_taken_back_by_git_are_made_again(self, folder: Path) -> None:
        apply(folder)
        applied = miniature.snapshot(folder)
        miniature.git(folder, "checkout", "--", TRAIN)
        assert state(folder) == "drifted"
        apply(folder)
        assert miniature.snapshot(folder) == applied

    def test_a_newer_upstream_under_the_patch(self, folder: Path) -> None:
        """Git stash, git pull: the file that git brought is the original from now on."""
        apply(folder)
        miniature.git(folder, "checkout", "--", *miniature.EDITED)
        change(folder, TRAIN, '"a b"', '"a newer text"')
        miniature.git(folder, "add", TRAIN)
        miniature.git(folder, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-q", "-m", "newer")
        newer = {name: (folder / name).read_bytes() for name in miniature.EDITED}
        assert state(folder) == "drifted"
        apply(folder)
        assert state(folder) == "applied"
        operations.revert(Checkout(folder))
        assert {name: (folder / name).read_bytes() for name in miniature.EDITED} == newer

    def test_a_damaged_copy_of_an_original(self, folder: Path) -> None:
        apply(folder)
        (folder / ".moe_patch" / "original" / TRAIN).write_text("damaged")
        applied = miniature.snapshot(folder)
        with pytest.raises(PatchError, match="the copy of the original is damaged"):
            operations.revert(Checkout(folder), force=True)
        assert miniature.snapshot(folder) == applied

    @pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}'])
    def test_a_manifest_that_cannot_be_read(self, folder: Path, content: str) -> None:
        apply(folder)
        (folder / ".moe_patch" / "manifest.txt").write_text(content)
        with pytest.raises(PatchError, match=r"manifest\.txt: "):
            operations.revert(Checkout(folder))


def later_version() -> list[Extension]:
    """The extension as a later version may have it: one edit with another text, one gone, one module less."""
    entry = EXTENSIONS["hydralora"]
    first, *others = entry.edits
    edits = (replace(first, text=("from llava import extensions_moe as later",)), *others[:-2])
    return [replace(entry, edits=edits, modules=tuple(name for name in entry.modules if name != "hydralora.layer"))]


class TestVersions:
    @pytest.fixture
    def renewed(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, tuple[bytes, int]]]:
        before = miniature.snapshot(folder)
        apply(folder)
        first = json.loads((folder / ".moe_patch" / "manifest.txt").read_text())
        monkeypatch.setattr(sources, "rewritten", lambda source, modules: source.read_bytes() + b"# later\n")
        operations.apply(Checkout(folder), later_version())
        second = json.loads((folder / ".moe_patch" / "manifest.txt").read_text())
        assert first["version"] != second["version"]
        return folder, before

    def test_status_tells_that_there_is_a_later_version(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        apply(folder)
        main(["status", str(folder)])
        assert "apply renews it" not in capsys.readouterr().out
        monkeypatch.setattr(sources, "rewritten", lambda source, modules: source.read_bytes() + b"# later\n")
        assert main(["status", str(folder)]) == 0
        assert "apply renews it" in capsys.readouterr().out

    def test_a_later_version_replaces_an_earlier_one(self, renewed: tuple[Path, dict]) -> None:
        folder, before = renewed
        assert state(folder) == "applied"
        assert "extensions_moe as later" in (folder / TRAIN).read_text()
        assert (folder / LLAMA).read_bytes() == before[LLAMA][0]
        assert not (folder / "llava" / "extensions_moe" / "hydralora" / "layer.py").exists()

    def test_revert_after_a_later_version(self, renewed: tuple[Path, dict]) -> None:
        folder, before = renewed
        operations.revert(Checkout(folder))
        assert miniature.snapshot(folder) == before


class TestExtensions:
    """Each choice of extensions leaves what belongs to it, and nothing of the one before."""

    def test_one_after_the_other(self, folder: Path) -> None:
        before, seen = miniature.snapshot(folder), {}
        for names in (["hydralora"], ["hydralora", "mma"], ["mma"], ["hydralora"]):
            operations.apply(Checkout(folder), chosen(names))
            ours = folder / "llava" / "extensions_moe"
            shared = {"runtime"} if "mma" in names else set()  # what mma's configuration is made of
            assert {path.name for path in ours.iterdir() if path.is_dir()} == {*names, *shared}
            assert {path.stem for path in ours.glob("*_glue.py")} == {f"{name}_glue" for name in names}
            assert ((folder / LLAMA).read_bytes() != before[LLAMA][0]) == ("hydralora" in names)
            assert state(folder) == "applied"
            found = miniature.snapshot(folder)
            assert seen.setdefault(tuple(names), found) == found
        operations.revert(Checkout(folder))
        assert miniature.snapshot(folder) == before


class TestErrors:
    def test_an_error_while_writing_puts_everything_back(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = miniature.snapshot(folder)
        write, calls = Checkout.write, []

        def full_disk(self: Checkout, name: str, content: bytes) -> None:
            calls.append(name)
            if name == LLAMA and len([n for n in calls if n == LLAMA]) == 1:
                raise OSError("no space left on the disk")
            write(self, name, content)

        monkeypatch.setattr(Checkout, "write", full_disk)
        with pytest.raises(OSError, match="no space"):
            apply(folder)
        assert miniature.snapshot(folder) == before
