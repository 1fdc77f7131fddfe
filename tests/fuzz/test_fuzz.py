"""The short form of `make fuzz`: a few of each, other ones than there."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import manifests, media, models
from mutate import damaged, damaged_json, damaged_table


@pytest.mark.parametrize(("kind", "count"), [(media, 63), (manifests, 30), (models, 10)])
def test_damage_ends_in_frames_or_an_error_of_ours(kind, count: int, tmp_path: Path) -> None:
    figures = kind(count, 7, tmp_path)
    assert figures.faults == []
    assert figures.cases >= count
    assert len(figures.outcomes) > 1, "nothing was damaged, or nothing survived it"


def test_a_seed_is_always_the_same_damage() -> None:
    data = bytes(range(256)) * 8
    assert damaged(data, 1) == damaged(data, 1)
    assert len({damaged(data, seed) for seed in range(100)}) > 90
    assert damaged_table("a,b\n1,2\n", 3) == damaged_table("a,b\n1,2\n", 3)
    assert damaged_json('{"a": [1, 2]}', 3) == damaged_json('{"a": [1, 2]}', 3)
