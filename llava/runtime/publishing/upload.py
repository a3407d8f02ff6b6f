"""One commit with a whole folder, to a repository that is created if it does not exist.

Files of an earlier publication that this one lacks are deleted in the same commit, as its own record of files names
them; whatever else is in the repository stays. A README.md that somebody has written there stays too.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from llava.errors import PublishingError
from llava.runtime.publishing.access import HUB_ERRORS, Destination, describe_error, hub_api, repository_id
from llava.runtime.publishing.card import CARD, is_ours
from llava.runtime.weights.completeness import FILE_LIST


def upload(staged: Path, destination: Destination, again: str) -> str:
    """Publish a staged folder.

    Args:
        staged: what is published, its card included.
        destination: where.
        again: the command that publishes it again, for the message of a failure.

    Returns:
        Address of the repository.

    Raises:
        PublishingError: the hub refuses or cannot be reached; what is on this machine is not touched.
    """
    api, name = hub_api(destination.token), destination.repository
    try:
        name = repository_id(name, api.whoami()) if "/" not in name else name
        url = api.create_repo(name, private=destination.private, exist_ok=True)
        if destination.revision is not None:
            api.create_branch(name, branch=destination.revision, exist_ok=True)
        names = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
        there = set(api.list_repo_files(name, revision=destination.revision))
        if CARD in there and not is_ours(_text(api, name, CARD, destination)):
            names.remove(CARD)
        gone = sorted((_published(api, name, destination) if FILE_LIST in there else set()) & there - {*names, CARD})
        api.create_commit(
            name,
            [
                *(CommitOperationAdd(path_in_repo=each, path_or_fileobj=staged / each) for each in names),
                *(CommitOperationDelete(path_in_repo=each) for each in gone),
            ],
            commit_message="Finished run",
            revision=destination.revision,
        )
    except HUB_ERRORS as error:
        raise PublishingError(
            f"{name}: could not be published ({describe_error(error)}). The run is finished and its folder is "
            f"complete; nothing is lost. This uploads it again:\n{again}"
        ) from error
    return str(url)


def _text(api: HfApi, name: str, file: str, destination: Destination) -> str:
    """A text file of the repository as it is there now."""
    return Path(api.hf_hub_download(name, file, revision=destination.revision)).read_text(encoding="utf-8")


def _published(api: HfApi, name: str, destination: Destination) -> set[str]:
    """The files of the earlier publication, by its own record; none if that is damaged."""
    try:
        record = json.loads(_text(api, name, FILE_LIST, destination))
    except json.JSONDecodeError:
        return set()
    sections = record.values() if isinstance(record, dict) else ()
    return {file for section in sections if isinstance(section, dict) for file in section}
