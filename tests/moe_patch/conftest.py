"""One clone of upstream's checkout for each file of tests that needs it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.moe_patch.upstream_checkout import Upstream


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    from tests.moe_patch.upstream_checkout import ROOT, prepare

    folder = tmp_path_factory.mktemp("upstream")
    found = prepare(folder)
    yield found
    if os.environ.get("LLAVA_UPSTREAM_LOG"):
        text = "\n".join(found.log).replace(str(folder), ".").replace(str(ROOT), "llava-extensions")
        with Path(os.environ["LLAVA_UPSTREAM_LOG"]).open("a") as log:
            log.write(text + "\n")
