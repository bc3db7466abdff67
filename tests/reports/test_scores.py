"""Scores of ``compare --json``: the plot and the tables made of them."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from requant.errors import ParseError
from requant.reports.scores import markdown, plot, read_scores, section


def document(**divergences: float) -> dict[str, Any]:
    def evaluation(value: float) -> dict[str, Any]:
        estimates = ("divergence", "divergence_median", "divergence_p99", "same_top")
        return {"tokens": 510} | {x: {"value": value, "error": 0.01} for x in estimates}

    return {
        "dense": "models/dense",
        "text": "held|out.txt",
        "scores": [
            {
                "output": f"out/{name}",
                "nbytes": 1000 * 10**number,
                "bits_per_weight": 4.5,
                "evaluation": evaluation(value),
            }
            for number, (name, value) in enumerate(divergences.items())
        ],
    }


def written(tmp_path: Path, data: object) -> Path:
    (tmp_path / "s.json").write_text(json.dumps(data))
    return tmp_path / "s.json"


def test_smaller_divergence_is_lower_and_larger_size_is_right(tmp_path: Path) -> None:
    scores = read_scores(written(tmp_path, document(**{"3<b": 0.5, "4b": 0.05, "dense": 0.0})))
    root = ET.fromstring(plot(scores.scores))
    dots = [(float(x.attrib["cx"]), float(x.attrib["cy"])) for x in root.iter("circle")]
    assert len(dots) == 3
    assert [x for x, _ in dots] == sorted(x for x, _ in dots)
    assert [y for _, y in dots] == sorted(y for _, y in dots)
    names = [x.text for x in root.iter("text")]
    assert {"3<b", "4b", "dense", "1.00 kB", "100 kB", "0.1"} <= set(names)


def test_one_output_is_drawn(tmp_path: Path) -> None:
    scores = read_scores(written(tmp_path, document(one=1.0)))
    root = ET.fromstring(plot(scores.scores))
    (dot,) = root.iter("circle")
    _, _, width, height = map(int, root.attrib["viewBox"].split())
    assert 0 < float(dot.attrib["cx"]) < width and 0 < float(dot.attrib["cy"]) < height


def test_tables(tmp_path: Path) -> None:
    scores = read_scores(written(tmp_path, document(**{"a|b": 0.25})))
    text = markdown(scores)
    assert r"held\|out.txt" in text
    row = text.splitlines()[-1]
    assert row == r"| a\|b | 1.00 kB | 4.50 | 0.2500 ± 0.0100 | 0.2500 | 0.250 | 25.0 % |"
    assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"\|", text.splitlines()[2])) == 8
    assert "<td>a|b</td>" in section(scores)


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {"scores": []},
        document(x=float("nan")),
        {"dense": "d", "text": "t", "scores": [1]},
    ],
)
def test_other_documents_are_named(data: object, tmp_path: Path) -> None:
    with pytest.raises(ParseError, match=r"s\.json: is not what requant compare DENSE"):
        read_scores(written(tmp_path, data))
    with pytest.raises(ParseError, match="No such file"):
        read_scores(tmp_path / "missing.json")
