"""values: every Python value is one JSON value."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import math
import time
from typing import Any

import pytest
from pydantic import BaseModel

from dspy_bridge.wire.json_values import encode_value


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: float
    tags: set[str]


class Person(BaseModel):
    name: str
    born: datetime.date


class Raises:
    def __str__(self) -> str:
        raise RuntimeError("no")


class Exits:
    def __str__(self) -> str:
        raise SystemExit(3)


class Odd:
    def __str__(self) -> str:
        return "odd"


CYCLE: list[Any] = [1]
CYCLE.append(CYCLE)
DEEP: Any = 1
for _ in range(100_000):
    DEEP = [DEEP]

VALUES = [
    (math.nan, None),
    ([math.inf, -math.inf], [None, None]),
    (b"\xff\x00", "/wA="),
    ({b"\xff\x00": b"\xff\x00"}, {"/wA=": "/wA="}),
    (bytearray(b"ab"), "YWI="),
    (datetime.date(2026, 1, 2), "2026-01-02"),
    (datetime.datetime(2026, 1, 2, 3, 4, 5), "2026-01-02T03:04:05"),
    (Person(name="Ada", born=datetime.date(1815, 12, 10)), {"name": "Ada", "born": "1815-12-10"}),
    (Point(1.5, {"a"}), {"x": 1.5, "tags": ["a"]}),
    (Point(math.nan, set()), {"x": None, "tags": []}),
    ({3}, [3]),
    (frozenset("a"), ["a"]),
    ((1, 2), [1, 2]),
    (Colour.RED, "red"),
    (decimal.Decimal("1.50"), "1.50"),
    (Odd(), "odd"),
    (int, "<class 'int'>"),
    (2**64, 2**64),
    (
        [2**64, b"x", {1}, math.nan, Colour.RED, Point(2**70, set())],
        [2**64, "eA==", [1], None, "red", {"x": 2**70, "tags": []}],
    ),
    ({datetime.datetime(2026, 1, 2, 3, 4, 5): 1}, {"2026-01-02T03:04:05": 1}),
    ({datetime.date(2026, 1, 2): 2**70, Colour.RED: 1}, {"2026-01-02": 2**70, "red": 1}),
    ({datetime.datetime(2026, 1, 2): {(1, 2): 1}}, {"2026-01-02T00:00:00": {"(1, 2)": 1}}),
    ({1: "a", None: 2, False: 3, 1.5: 4, (1, 2): 5}, {"1": "a", "null": 2, "false": 3, "1.5": 4, "(1, 2)": 5}),
    ("\ud800x", "?x"),
    ({"\ud800": "\udfff"}, {"?": "?"}),
    (Raises(), "<Raises: its str() raised RuntimeError>"),
    (Exits(), "<Exits: its str() raised SystemExit>"),
    ([2**64, Exits()], [2**64, "<Exits: its str() raised SystemExit>"]),
    (CYCLE, [1, "<list that contains itself>"]),
    (10**4300, hex(10**4300)),
]


@pytest.mark.parametrize(("value", "wanted"), VALUES, ids=lambda v: type(v).__name__)
def test_values_that_json_lacks(value: Any, wanted: Any) -> None:
    assert json.loads(encode_value(value)) == wanted


def test_a_value_of_any_depth_has_a_form() -> None:
    assert b"nested deeper than" in encode_value(DEEP)
    assert b"nested deeper than" in encode_value({"deep": DEEP})


def test_one_key_that_is_a_number_does_not_make_a_reply_slow() -> None:
    """Ten thousand results with one took 20 times as long, as all were copied value by value."""
    results = [{"success": True, "result": {"counts": {"a": n, "b": n, "c": n}}} for n in range(10_000)]

    def seconds() -> float:
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            encode_value(results)
            times.append(time.perf_counter() - begin)
        return min(times)

    plain = seconds()
    results[-1]["result"] = {"counts": {1: 2}}
    assert seconds() < 6 * plain
    assert encode_value(results).endswith(b'{"counts":{"1":2}}}]')
