"""The order in which rows are pulled."""

from __future__ import annotations

import threading
from collections import deque

import pytest

from t2vz.manifest import Row
from t2vz.plan import Job
from t2vz.spec import JobSpec
from t2vz.window import Closed, Group, Window, cost


def job(name: str, model: str = "a", evaluations: int = 1, **columns) -> Job:
    spec = JobSpec(id=name, prompt="a boat", **columns)
    return Job(name, Row(1, name, spec), 0, model, None, 8, evaluations)


def filled(*jobs: Job, size: int = 100) -> Window:
    window = Window(size)
    for one in jobs:
        window.put(one)
    return window


def drained(window: Window) -> list[str]:
    """The names in the order of one worker."""
    names, loaded = [], None
    while (one := window.take(loaded)) is not None:
        names.append(one.row.id)
        loaded = Group.of(one)
    return names


def test_longest_first_then_as_read():
    window = filled(job("short", evaluations=1), job("long", evaluations=9), job("b", evaluations=5), job("c", "a", 5))
    assert drained(window) == ["long", "b", "c", "short"]


def test_size_counts_as_steps_do():
    assert cost(job("x", evaluations=10, width=128, height=64)) == 10 * 128 * 64
    window = filled(job("small", evaluations=9, width=64, height=64), job("big", width=1024, height=1024))
    assert drained(window) == ["big", "small"]


def test_a_group_is_finished_before_the_next_and_the_biggest_comes_first():
    window = filled(*(job(f"{model}{i}", model) for i in range(3) for model in ("a", "b")), job("b3", "b", 50))
    assert drained(window) == ["b3", "b0", "b1", "b2", "a0", "a1", "a2"]


def test_what_shares_the_base_model_comes_next():
    window = filled(job("other", "y", 100), job("plain", "x"), job("with a LoRA", "x lora-1"))
    assert window.take(Group.of(job("", "x control-1"))).row.id == "plain"
    assert window.take(Group.of(job("", "x"))).row.id == "with a LoRA"
    assert window.take(Group.of(job("", "x lora-1"))).row.id == "other"
    assert window.take() is None


def test_workers_keep_to_groups_of_their_own_while_there_are():
    a, b = Group.of(job("", "a")), Group.of(job("", "b"))
    window = filled(job("a1", "a", 9), job("b1", "b"), job("a2", "a", 9))
    assert window.take(None, [a]).row.id == "b1"
    assert window.take(b, [a]).row.id == "a1"  # rather than idle
    assert Group.of(job("", dtype="float16")) != a


def test_reading_waits_for_room():
    window = filled(job("1"), job("2"), size=2)
    third = threading.Thread(target=window.put, args=(job("3"),))
    third.start()
    assert len(window) == 2
    window.take()
    third.join(30)
    assert not third.is_alive()
    assert drained(window) == ["2", "3"]


def test_no_row_waits_for_ever():
    """A short row of a model of its own, among endless ones that would always be preferred."""
    size = 4
    window = Window(size)
    window.put(job("lonely", "lonely"))
    rows = deque(job(str(i), "common", 9) for i in range(100))
    loaded, order = Group.of(rows[0]), []
    while "lonely" not in order:
        while rows and window._has_room():
            window.put(rows.popleft())
        one = window.take(loaded)
        loaded = Group.of(one)
        order.append(one.row.id)
    assert len(order) <= 2 * size


def test_closing_lets_the_reader_go():
    window = filled(job("1"), size=1)
    left = []

    def put() -> None:
        with pytest.raises(Closed):
            window.put(job("2"))
        left.append(True)

    reader = threading.Thread(target=put)
    reader.start()
    window.close()
    reader.join(30)
    assert left == [True]
