"""JSON in pieces against ``json.dumps`` and ``dataclasses.asdict``."""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import pytest

from requant.core.json_pieces import Rows, as_data, compact_pieces, indented_pieces


class Kind(StrEnum):
    A = "a"


@dataclass(frozen=True, slots=True)
class Inner:
    name: str
    shape: tuple[int, ...]
    kind: Kind = Kind.A


ITEM = {"b": [], "a": {}, "c": [1, 2.5, None, True], 'q"\né': ("x", Kind.A), "d": [{"z": [[]]}]}
ROWS: list[Any] = [ITEM, [], {}, "x", 1e300, False, float("inf")]


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS])
def test_pieces_are_the_text_of_json(rows: list[Any]) -> None:
    document = {"rows": Rows(lambda: iter(rows)), "plain": ITEM, "a": rows, "n": None}
    whole = document | {"rows": rows}
    compact = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    assert "".join(compact_pieces(document)) == compact
    assert "".join(indented_pieces(document)) == json.dumps(whole, indent=2)
    assert "".join(indented_pieces(document)) == json.dumps(whole, indent=2), "a second pass"
    assert "".join(indented_pieces({})) == "".join(compact_pieces({})) == "{}"


def test_other_keys_than_strings_are_written_as_json_writes_them() -> None:
    document = {"x": {2: 2, None: 3, True: 4}}
    assert "".join(indented_pieces(document)) == json.dumps(document, indent=2)


def test_data_of_a_dataclass_is_that_of_asdict() -> None:
    @dataclass
    class Outer:
        inner: Inner
        several: tuple[Inner, ...]
        named: dict[str, Inner]
        listed: list[Any]

    one = Inner("up", (8, 64))
    value = Outer(one, (one, Inner("down", ())), {"x": one}, [one, 1.5])
    assert as_data(value) == asdict(value)
