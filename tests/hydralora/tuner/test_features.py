"""The table of features in `hydralora/README.md` says what the features do."""

from __future__ import annotations

import pytest

from tests.hydralora.tuner.features import FEATURES, found, needs_bitsandbytes, row, written

pytestmark = pytest.mark.versions


@pytest.mark.parametrize("feature", FEATURES)
def test_the_row_of_a_feature(feature: str) -> None:
    if needs_bitsandbytes(feature):
        pytest.skip("the extra `quant` is not installed")
    assert row(feature, found(feature)) in written()


def test_the_table_has_these_rows_alone() -> None:
    lines = written().splitlines()[2:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == list(FEATURES)
    assert sum(line.endswith("| yes |") for line in lines) >= 25
