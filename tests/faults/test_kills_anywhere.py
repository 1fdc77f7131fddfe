"""`kill -9` of any process of a run at any moment; the long form is `make faults`."""

from __future__ import annotations

from pathlib import Path

import pytest
from batches import batch, options

ROWS, KILLS = 24, 12


@pytest.mark.timeout(600)
def test_kills_of_any_process_at_any_moment_lose_and_double_nothing(prefect_api: str, tmp_path: Path) -> None:
    killed = batch(tmp_path / "batch", ROWS, prefect_api, seed=1)
    killed.kill_until(KILLS, options)
    assert killed.tally.kills.total() == KILLS, f"all was done after {killed.tally.kills}: give it more rows"
    killed.check_end()
