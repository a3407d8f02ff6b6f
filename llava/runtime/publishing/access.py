"""May this run publish its result? Asked before anything is loaded, so that no finished run fails at its last step.

`hub_problems` needs no network. `check_access` asks the hub who the token belongs to and what it may do; it creates
nothing, so a run that breaks off leaves no empty repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from llava.errors import FlagError

HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, ValueError)
"""What calls of the hub raise: the base class of the HTTP library's errors, `OSError`, and refused names."""

AT_END = "end"
"""The value of `--hub_strategy` that is supported."""

WITHOUT_EFFECT = ("hub_model_id", "hub_revision", "hub_base_model", "hub_license")
"""Options that say nothing without `--push_to_hub`."""

WRITING_ROLES = ("admin", "write", "contributor")
"""Roles in an organization whose members may create repositories."""


@dataclass(frozen=True)
class Destination:
    """Where a folder is published, and what its card cannot know from the folder.

    Attributes:
        repository: `owner/name`, or a name, which is one of the token's owner.
        private: for a new repository; None: as the hub has it for the owner.
        revision: branch to publish on; None: the main one.
        token: None: the stored login.
        base_model: id of the base on the hub, where the run read it from a folder.
        license: of the result; None: that of the base's card.
    """

    repository: str
    private: bool | None = None
    revision: str | None = None
    token: str | None = None
    base_model: str | None = None
    license: str | None = None


def destination_of(training: Any) -> Destination:
    """Where the options of a run say that it is published.

    Args:
        training: with the options `output_dir` and `hub_...`.
    """
    return Destination(
        training.hub_model_id or Path(training.output_dir).absolute().name,
        training.hub_private_repo,
        training.hub_revision,
        training.hub_token,
        training.hub_base_model,
        training.hub_license,
    )


def hub_problems(training: Any) -> list[str]:
    """What is wrong with the options of publishing, one line each; asks no server."""
    if not training.push_to_hub:
        given = [name for name in WITHOUT_EFFECT if getattr(training, name) is not None]
        return [f"--{name} {getattr(training, name)}: has no effect without --push_to_hub True" for name in given]
    problems = []
    strategy = getattr(training.hub_strategy, "value", training.hub_strategy)
    if strategy != AT_END:
        problems.append(
            f"--hub_strategy {strategy}: uploads while the run trains would publish unfinished weights under the "
            f"model's name, and read checkpoints that --save_total_limit deletes meanwhile; pass {AT_END}, which "
            "publishes the finished folder once"
        )
    if constants.is_offline_mode():
        problems.append("--push_to_hub True: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the hub; unset it")
    elif not (training.hub_token or get_token()):
        problems.append("--push_to_hub True: there is no token; run `hf auth login`, set HF_TOKEN or pass --hub_token")
    names = {"--hub_model_id": destination_of(training).repository, "--hub_base_model": training.hub_base_model}
    for flag, name in names.items():
        try:
            validate_repo_id(name or "none")
        except HFValidationError as error:
            problems.append(f"{flag} {name}: is not the name of a repository ({str(error).splitlines()[0]})")
    return problems


def hub_api(token: str | None) -> HfApi:
    """The hub, asked with a token; None: the stored login."""
    return HfApi(token=token)


def check_access(destination: Destination) -> str:
    """Ask the hub whether the token may write the repository.

    Returns:
        `owner/name`.

    Raises:
        FlagError: the hub cannot be reached, refuses the token, or the token may not write there.
    """
    api = hub_api(destination.token)
    try:
        owner = api.whoami()
        name = repository_id(destination.repository, owner)
        problem = _problem(name, owner)
        if problem is None and api.repo_exists(name):
            api.auth_check(name, write=True)
    except HUB_ERRORS as error:
        raise FlagError(
            f"--push_to_hub True: the hub at {api.endpoint} does not allow it for {destination.repository} "
            f"({describe_error(error)}). Nothing has been trained; check the network, the token and --hub_model_id"
        ) from error
    if problem is not None:
        raise FlagError(f"--push_to_hub True: {problem}")
    return name


def describe_error(error: Exception) -> str:
    """Class and first line of an error of the hub."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def repository_id(repository: str, owner: Mapping[str, Any]) -> str:
    """`owner/name` of a repository that may be named without its owner.

    Args:
        repository: as given.
        owner: of the token, as the hub describes them.
    """
    return repository if "/" in repository else f"{owner['name']}/{repository}"


def _problem(repository: str, owner: Mapping[str, Any]) -> str | None:
    """Why a token cannot write a repository, as far as the description of its owner says."""
    namespace = repository.partition("/")[0]
    token = (owner.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        return "the token may only read; make one with write access"
    roles = {one.get("name"): one.get("roleInOrg") for one in owner.get("orgs") or []}
    if namespace != owner.get("name") and namespace not in roles:
        return f"{repository}: the token is {owner.get('name')}'s, who is not a member of {namespace}"
    role = roles.get(namespace)
    if namespace != owner.get("name") and role is not None and role not in WRITING_ROLES:
        return f"{repository}: the role of {owner.get('name')} in {namespace} is {role}, which may not write"
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and isinstance(scopes, list):
        allowed = [one for one in scopes if (one.get("entity") or {}).get("name") in (namespace, repository)]
        if not any("repo.write" in (one.get("permissions") or []) for one in allowed):
            return f"{repository}: the token has no write permission (repo.write) there"
    return None
