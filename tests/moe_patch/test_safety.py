"""A checkout of a stranger: nothing outside it is touched, nothing of it is run, and a patched one is seen as such."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_patch import operations
from moe_patch.__main__ import main
from moe_patch.checkout import Checkout, digest
from moe_patch.errors import PatchError
from moe_patch.extensions import chosen
from tests.moe_patch import miniature

TRAIN, BUILDER, LLAMA = miniature.EDITED
ROOT = Path(__file__).resolve().parent.parent.parent
UPSTREAM_IGNORES = "__pycache__\n*.pyc\n*.json\n*.jsonl\n*.log\noutput\ncheckpoints\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return miniature.write(tmp_path / "LLaVA")


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patched checkout without git, to be copied."""
    folder = tmp_path_factory.mktemp("applied") / "LLaVA"
    miniature.write_files(folder)
    apply(folder)
    return folder


def apply(folder: Path, *names: str) -> None:
    operations.apply(Checkout(folder), chosen(list(names) or ["hydralora"]))


def state(folder: Path) -> str:
    return operations.state(Checkout(folder))[0]


def write_manifest(folder: Path, **changes: object) -> None:
    path = folder / ".moe_patch" / "manifest.txt"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestManifest:
    """Names in a manifest that the patch never writes: refused, with nothing changed anywhere."""

    @pytest.mark.parametrize("part", ["added", "edited", "replaced"])
    @pytest.mark.parametrize(
        "name",
        [
            "../outside.py",
            "{outside}",
            "llava/../../outside.py",
            "llava/extensions_moe/../../../outside.py",
            "llava/model/llava_arch.py",
            "README.md",
            ".git/config",
            "llava/extensions_moe/",
            "llava/extensions_moe/notes.md",
            "llava\\extensions_moe\\layer.py",
        ],
    )
    def test_names_of_other_files(
        self, applied: Path, tmp_path: Path, name: str, part: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder, outside = shutil.copytree(applied, tmp_path / "LLaVA"), tmp_path / "outside.py"
        outside.write_text("mine\n")
        name = name.replace("{outside}", str(outside))
        target = folder / name
        content = target.read_bytes() if target.is_file() else b"mine\n"
        entry = {"before": digest(b"theirs"), "after": digest(content), "earlier": []}
        values: dict[str, object] = {"added": digest(content), "edited": entry, "replaced": [digest(content)]}
        found = json.loads((folder / ".moe_patch" / "manifest.txt").read_text())
        write_manifest(folder, **{part: {**found[part], name: values[part]}})
        before = miniature.snapshot(tmp_path)
        for command in (["revert"], ["revert", "--force"], ["apply"], ["status"], ["apply", "--extensions", "mma"]):
            assert main([*command, str(folder)]) == 1
            assert "was not written by moe_patch" in capsys.readouterr().err
            assert miniature.snapshot(tmp_path) == before

    @pytest.mark.parametrize(
        "changes",
        [
            {"version": "\x1b[31m"},
            {"commit": 3},
            {"extensions": ["a b"]},
            {"extensions": [[]]},
            {"finished": "no"},
            {"added": []},
            {"added": {"llava/extensions_moe/seams.py": 3}},
            {"edited": {TRAIN: {"before": "x", "after": "y"}}},
            {"unheard": 1},
            {"format": 3},
            {"format": []},
        ],
        ids=str,
    )
    def test_other_values(
        self, applied: Path, tmp_path: Path, changes: dict[str, object], capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = shutil.copytree(applied, tmp_path / "LLaVA")
        write_manifest(folder, **changes)
        before = miniature.snapshot(folder)
        for command in ("status", "apply", "revert"):
            assert main([command, str(folder)]) == 1
            assert "manifest.txt: " in capsys.readouterr().err
        assert miniature.snapshot(folder) == before

    def test_the_first_format_is_read_and_replaced(self, folder: Path) -> None:
        before = miniature.snapshot(folder)
        apply(folder)
        path = folder / ".moe_patch" / "manifest.txt"
        values = json.loads(path.read_text()) | {"format": 1}
        values.pop("replaced")
        path.rename(path.with_name("manifest.json")).write_text(json.dumps(values))
        assert state(folder) == "applied"
        apply(folder, "hydralora", "mma")
        assert path.is_file()
        assert not path.with_name("manifest.json").exists()
        operations.revert(Checkout(folder))
        assert miniature.snapshot(folder) == before

    @pytest.mark.parametrize("link", [".moe_patch", "llava/extensions_moe", "llava/extensions_moe/__pycache__"])
    def test_links_that_lead_out(self, folder: Path, tmp_path: Path, link: str) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "seams.cpython-311.pyc").write_text("mine")
        if link.endswith("__pycache__"):
            apply(folder)
            (folder / link).symlink_to(outside)
            operations.revert(Checkout(folder))
        else:
            (folder / link).symlink_to(outside)
            with pytest.raises(PatchError, match="symbolic link"):
                apply(folder)
        assert [path.name for path in outside.iterdir()] == ["seams.cpython-311.pyc"]


class TestRepository:
    """Settings, hooks and filters of the checkout's `.git`."""

    def test_nothing_of_it_is_run(self, folder: Path, tmp_path: Path) -> None:
        sign, program = tmp_path / "was-run", tmp_path / "program"
        program.write_text(f"#!/bin/sh\necho $0 >> {sign}\ncat\n")
        program.chmod(0o755)
        (folder / ".gitattributes").write_text("*.py filter=theirs diff=theirs merge=theirs\n")
        miniature.commit(folder)
        hooks = folder / ".git" / "hooks"
        hooks.mkdir(exist_ok=True)
        for name in ("post-index-change", "fsmonitor-watchman", "reference-transaction", "post-checkout", "pre-commit"):
            shutil.copy(program, hooks / name)
        for key in (
            *("core.fsmonitor", "core.pager", "core.editor", "core.sshCommand", "core.askPass", "core.gitProxy"),
            *("filter.theirs.clean", "filter.theirs.smudge", "filter.theirs.process", "diff.theirs.textconv"),
            *("diff.external", "pager.status", "pager.cat-file", "pager.rev-parse", "alias.cat-file", "uploadpack.x"),
        ):
            miniature.git(folder, "config", key, str(program))
        miniature.git(folder, "config", "filter.theirs.required", "true")
        with (folder / ".git" / "config").open("a") as file:
            file.write(f'[remote "origin"]\n\turl = ext::{program}\n\tpromisor = true\n\tuploadpack = {program}\n')
            file.write("[extensions]\n\tpartialClone = origin\n[protocol]\n\tallow = always\n")
        for name in miniature.EDITED:
            os.utime(folder / name)  # what git does not know by time and size, it reads through the filter
        for command in ("status", "check", "apply", "status", "apply", "revert", "status"):
            assert main([command, str(folder)]) == 0
        assert not sign.exists()
        subprocess.run(["git", "-C", str(folder), "status", "--porcelain"], check=False, capture_output=True)
        assert sign.exists()  # git itself does run them

    def test_the_callers_own_git_variables_lead_nowhere(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GIT_DIR", str(miniature.write(tmp_path / "other") / ".git"))
        assert Checkout(folder).changed_by_user([TRAIN]) == []
        (folder / TRAIN).write_text("mine\n")
        assert Checkout(folder).changed_by_user([TRAIN]) == [TRAIN]

    @pytest.mark.parametrize("kind", ["sha256", "packed", "shared clone", "worktree", "inside another"])
    def test_kinds_of_repositories(self, tmp_path: Path, kind: str) -> None:
        source, folder = tmp_path / "source", tmp_path / "LLaVA"
        miniature.write_files(source)
        miniature.git(source, "init", "-q", f"--object-format={'sha256' if kind == 'sha256' else 'sha1'}")
        miniature.commit(source)
        if kind == "packed":
            miniature.git(source, "gc", "-q")
        if kind == "shared clone":
            miniature.git(source, "clone", "-q", "--shared", str(source), str(folder))
        elif kind == "worktree":
            miniature.git(source, "worktree", "add", "-q", str(folder))
        elif kind == "inside another":
            shutil.rmtree(source / ".git")
            miniature.git(tmp_path, "init", "-q")
            miniature.commit(tmp_path)
        folder = folder if folder.exists() else source
        checkout = Checkout(folder)
        assert checkout.commit() == miniature.git(folder, "rev-parse", "HEAD").strip()
        assert checkout.changed_by_user(miniature.EDITED) == []
        (folder / BUILDER).write_text("mine\n")
        (folder / LLAMA).unlink()
        assert checkout.changed_by_user(miniature.EDITED) == [BUILDER, LLAMA]
        assert checkout.is_committed(TRAIN)
        assert not checkout.is_committed(BUILDER)

    def test_line_ends_that_git_has_changed_are_not_the_users(self, folder: Path) -> None:
        (folder / TRAIN).write_bytes((folder / TRAIN).read_bytes().replace(b"\n", b"\r\n"))
        assert Checkout(folder).changed_by_user([TRAIN]) == []

    def test_a_repository_without_a_commit(self, tmp_path: Path) -> None:
        miniature.write_files(tmp_path)
        miniature.git(tmp_path, "init", "-q")
        with pytest.raises(PatchError, match="git names no commit"):
            apply(tmp_path)
        operations.apply(Checkout(tmp_path), chosen(["hydralora"]), force=True)
        assert state(tmp_path) == "applied"


class TestManifestGone:
    """The record is gone and the edits are there: never `clean`."""

    def test_after_git_clean(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = miniature.snapshot(folder)
        for then in ("revert", "apply"):
            apply(folder)
            applied = miniature.snapshot(folder)
            miniature.git(folder, "clean", "-qfdx")
            assert main(["status", str(folder)]) == 1
            output = capsys.readouterr().out
            assert "\ndrifted: " in f"\n{output}"
            assert f"{TRAIN}: contains edits of moe_patch" in output
            assert main([then, str(folder)]) == 0
            assert miniature.snapshot(folder) == (before if then == "revert" else applied)
        operations.revert(Checkout(folder))
        assert miniature.snapshot(folder) == before

    def test_a_clone_of_a_commit_of_everything_is_applied(self, folder: Path, tmp_path: Path) -> None:
        (folder / ".gitignore").write_text(UPSTREAM_IGNORES)
        miniature.commit(folder)
        before = miniature.snapshot(folder)
        apply(folder, "hydralora", "mma")
        miniature.commit(folder)
        clone = tmp_path / "clone"
        miniature.git(folder, "clone", "-q", str(folder), str(clone))
        assert state(clone) == "applied"
        apply(clone, "hydralora", "mma")
        operations.revert(Checkout(clone))
        assert miniature.snapshot(clone) == before

    def test_a_clone_that_lost_it(self, folder: Path, tmp_path: Path) -> None:
        """As the first format lost it: the copies of the originals are in the commit, the manifest is not."""
        before = miniature.snapshot(folder)
        apply(folder)
        miniature.commit(folder)
        clone = tmp_path / "clone"
        miniature.git(folder, "clone", "-q", str(folder), str(clone))
        (clone / ".moe_patch" / "manifest.txt").unlink()
        assert state(clone) == "drifted"
        operations.revert(Checkout(clone))
        assert miniature.snapshot(clone) == before

    def test_with_changes_of_the_user_on_top(self, folder: Path) -> None:
        before = miniature.snapshot(folder)
        apply(folder)
        shutil.rmtree(folder / ".moe_patch")
        text = (folder / TRAIN).read_text()
        (folder / TRAIN).write_text(text.replace('"a b"', '"my text"'))
        (folder / "llava" / "extensions_moe" / "seams.py").write_text("mine = 1\n")
        changed = miniature.snapshot(folder)
        for command in ("apply", "revert"):
            assert main([command, str(folder)]) == 1
            assert miniature.snapshot(folder) == changed
        kept = operations.revert(Checkout(folder), force=True)
        assert kept == [f"{TRAIN}.moe_patch-kept", "llava/extensions_moe/seams.py.moe_patch-kept"]
        after = miniature.snapshot(folder)
        assert after[kept[0]] == changed[TRAIN]
        assert after[kept[1]] == changed["llava/extensions_moe/seams.py"]
        assert after[TRAIN][0].decode() == before[TRAIN][0].decode().replace('"a b"', '"my text"')
        assert {n: v for n, v in after.items() if n not in kept and n != TRAIN} == {
            name: value for name, value in before.items() if name != TRAIN
        }

    def test_our_files_alone(self, folder: Path) -> None:
        before = miniature.snapshot(folder)
        apply(folder)
        shutil.rmtree(folder / ".moe_patch")
        miniature.git(folder, "checkout", "--", *miniature.EDITED)
        assert state(folder) == "drifted"
        operations.revert(Checkout(folder))
        assert miniature.snapshot(folder) == before
        assert state(folder) == "clean"


class TestFurtherExtensions:
    def applied(self, folder: Path) -> list[str]:
        return json.loads((folder / ".moe_patch" / "manifest.txt").read_text())["extensions"]

    def test_a_further_apply_keeps_those_that_are_in(self, folder: Path) -> None:
        for options, expected in (
            (["--extensions", "mma"], ["mma"]),
            ([], ["mma"]),
            (["--extensions", "hydralora"], ["hydralora", "mma"]),
            (["--extensions", "mma"], ["hydralora", "mma"]),
            ([], ["hydralora", "mma"]),
            (["--extensions", "mma", "--only"], ["mma"]),
            (["--extensions", "dynamic"], ["mma", "dynamic"]),
            (["--extensions", "dynamic", "--only"], ["dynamic"]),
        ):
            assert main(["check", str(folder), *options]) == 0
            assert main(["apply", str(folder), *options]) == 0
            assert self.applied(folder) == expected
            assert state(folder) == "applied"

    def test_one_that_this_version_does_not_know(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        apply(folder)
        write_manifest(folder, extensions=["hydralora", "later"])
        assert main(["apply", str(folder)]) == 1
        assert "['later'] of a later moe_patch" in capsys.readouterr().err

    @pytest.mark.parametrize("names", ["dynamic,xformers", "lavin"])
    def test_one_that_does_not_exist(self, folder: Path, names: str, capsys: pytest.CaptureFixture[str]) -> None:
        before = miniature.snapshot(folder)
        assert main(["apply", str(folder), "--extensions", names]) == 1
        unknown = names.rpartition(",")[2]
        assert f"unknown ['{unknown}']; known: hydralora, mma, dynamic" in capsys.readouterr().err
        assert miniature.snapshot(folder) == before

    def test_only_needs_names(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["apply", str(folder), "--only"]) == 1
        assert "pass --extensions too" in capsys.readouterr().err


class TestCurrentDirectory:
    def patch_sh(self, cwd: Path, *options: str) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / "moe_patch" / "patch.sh"), *options]
        environment = os.environ | {"PYTHON": sys.executable}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    def test_patch_sh_takes_it(self, folder: Path) -> None:
        (folder / "argparse.py").write_text("raise SystemExit('a file of the checkout was imported')\n")
        done = self.patch_sh(folder, "--extensions", "mma")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("applied: mma on")
        assert state(folder) == "applied"

    def test_another_directory_is_refused(self, tmp_path: Path) -> None:
        done = self.patch_sh(tmp_path)
        assert done.returncode == 1
        assert f"{tmp_path}: is not a LLaVA checkout" in done.stderr
        assert "change into it" in done.stderr
        assert not list(tmp_path.iterdir())

    def test_the_other_commands_take_it_too(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)
        for command in ("check", "apply", "status", "revert"):
            assert main([command]) == 0
