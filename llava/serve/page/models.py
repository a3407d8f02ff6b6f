"""The models that the page offers: asked for once, when it starts, or for each visitor."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from llava.serve.page.client import Model, Server, ServerError, list_models

NONE = "(none)"
"""Choice of a column that is not used."""


class ModelList:
    """What the servers serve.

    Args:
        servers: that are asked.

    Attributes:
        models: as of the last look.
        problems: of the servers that did not say theirs.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = tuple(servers)
        self.models: list[Model] = []
        self.problems: list[ServerError] = []

    async def look(self) -> None:
        """Ask the servers."""
        self.models, self.problems = await list_models(self.servers)

    def look_now(self) -> None:
        """Ask the servers, where no event loop runs."""
        asyncio.run(self.look())

    @property
    def choices(self) -> list[str]:
        """Labels of the models, and the choice of none."""
        return [*(model.label for model in self.models), NONE]

    def default(self, column: int) -> str:
        """What a column offers first."""
        return self.choices[min(column, len(self.models))]

    def find(self, label: object) -> Model:
        """The model of a label.

        Raises:
            ServerError: no server has it now.
        """
        for model in self.models:
            if model.label == label:
                return model
        raise ServerError(f"no server has the model {str(label)[:80]!r} now; choose another one")
