"""A model hub in a folder, behind the methods of huggingface_hub's `HfApi` that publishing calls.

Every call is bound to the signature of the real method, so a stand-in cannot accept what the library would not.
"""

from __future__ import annotations

import functools
import inspect
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import EntryNotFoundError

from llava.runtime.publishing import access, upload

USER = "somebody"


@dataclass
class FakeHub:
    """What is stored, and who asks.

    Attributes:
        root: a folder for each repository, and in it one for each branch.
        whoami: what the hub says of the token's owner.
        writable: whether an existing repository may be written.
        reachable: False: every call fails as without a network.
        uploads: False: the commit fails, everything before succeeds.
        commits: paths of every commit, those that it deleted with a minus sign in front.
        private: what each repository was created with.
    """

    root: Path
    whoami: dict[str, Any] = field(default_factory=lambda: {"name": USER, "orgs": [], "auth": {}})
    writable: bool = True
    reachable: bool = True
    uploads: bool = True
    commits: list[list[str]] = field(default_factory=list)
    private: dict[str, bool | None] = field(default_factory=dict)

    def folder(self, name: str, revision: str | None = None) -> Path:
        return self.root / name / (revision or "main")

    def files(self, name: str) -> set[str]:
        folder = self.folder(name)
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def bound(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose arguments are given by name, as the real one of that name calls them."""
    signature = inspect.signature(getattr(HfApi, method.__name__))

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.hub.reachable:
            raise OSError("no network")
        values = signature.bind(self, *args, **kwargs).arguments
        return method(**values)

    return call


class FakeApi(HfApi):
    def __init__(self, hub: FakeHub, token: str | None) -> None:
        super().__init__(token=token)
        self.hub = hub

    @bound
    def whoami(self) -> dict[str, Any]:
        return self.hub.whoami

    @bound
    def repo_exists(self, repo_id: str) -> bool:
        return (self.hub.root / repo_id).is_dir()

    @bound
    def auth_check(self, repo_id: str, write: bool = False) -> None:
        if write and not self.hub.writable:
            raise OSError("403 Forbidden")

    @bound
    def create_repo(self, repo_id: str, private: bool | None = None, exist_ok: bool = False) -> str:
        assert exist_ok
        self.hub.private.setdefault(repo_id, private)
        self.hub.folder(repo_id).mkdir(parents=True, exist_ok=True)
        return f"https://hub.invalid/{repo_id}"

    @bound
    def create_branch(self, repo_id: str, branch: str, exist_ok: bool = False) -> None:
        if not self.hub.folder(repo_id, branch).is_dir():
            shutil.copytree(self.hub.folder(repo_id), self.hub.folder(repo_id, branch))

    @bound
    def list_repo_files(self, repo_id: str, revision: str | None = None) -> list[str]:
        folder = self.hub.folder(repo_id, revision)
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    @bound
    def hf_hub_download(self, repo_id: str, filename: str, revision: str | None = None) -> str:
        return str(self.hub.folder(repo_id, revision) / filename)

    @bound
    def model_info(self, repo_id: str) -> Any:
        raise OSError(f"{repo_id}: {EntryNotFoundError.__name__}")

    @bound
    def create_commit(
        self, repo_id: str, operations: list[Any], commit_message: str, revision: str | None = None
    ) -> None:
        assert commit_message
        if not self.hub.uploads:
            raise OSError("connection lost")
        folder, names = self.hub.folder(repo_id, revision), []
        for operation in operations:
            target = folder / operation.path_in_repo
            if isinstance(operation, CommitOperationAdd):
                target.parent.mkdir(parents=True, exist_ok=True)
                with operation.as_file() as content:
                    target.write_bytes(content.read())
                names.append(operation.path_in_repo)
            else:
                target.unlink()
                names.append(f"-{operation.path_in_repo}")
        self.hub.commits.append(names)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A reachable hub in place of the real one, with a token of `USER`."""
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(access, "HfApi", lambda token: FakeApi(hub, token))
    monkeypatch.setattr(upload, "hub_api", access.hub_api)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "of-the-test")
    return hub
