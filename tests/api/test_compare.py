"""``compare``: figures of layers by hand, names across layouts, and the evaluator's own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import requant
from requant.api.compare import LayerComparison
from requant.errors import CheckpointError, ParseError, UsageError
from requant.mlx_lm.documents import read_documents
from requant.mlx_lm.evaluation import Estimate, evaluate, read_tokens
from tests.support.number_formats import bf16

EXAMPLE = Path(__file__).parents[2] / "examples" / "micro-llama"


def test_figures_of_a_layer_by_hand(checkpoint: Callable[..., Path]) -> None:
    """3, 4 and 0 against 3, 0 and 0: difference 4 of norm 5, cosine 9 / 15."""
    a = checkpoint({"x.weight": np.array([3, 4, 0], np.float32)}, name="a")
    b = checkpoint({"x.weight": np.array([3, 0, 0], np.float16)}, name="b")
    (layer,) = requant.compare(a, b).layers
    assert (layer.relative_rms, layer.max_error, layer.cosine) == (0.8, 4.0, pytest.approx(0.6))
    assert (layer.a, layer.b, layer.nonfinite) == ("F32", "F16", 0)


def test_zeros_and_values_that_are_not_numbers(checkpoint: Callable[..., Path]) -> None:
    nan = np.array([1, np.nan, 2], np.float32)
    a = checkpoint({"zero": np.zeros(3, np.float32), "nan": nan}, name="a")
    b = checkpoint({"zero": np.ones(3, np.float32), "nan": nan}, name="b")
    zero, nonfinite = requant.compare(a, b).layers
    assert (zero.relative_rms, zero.cosine, zero.max_error) == (None, None, 1.0)
    assert (nonfinite.relative_rms, nonfinite.cosine, nonfinite.nonfinite) == (0.0, 1.0, 1)
    json.dumps(requant.compare(a, b).to_dict(), allow_nan=False)


def test_an_output_against_its_source_has_the_error_of_its_report(dense: Path, tmp_path: Path):
    """Which is that of values in the layer's dtype; compare decodes in float32."""
    report = requant.convert(dense, tmp_path / "out", bits=4, layout="keep")
    found = {layer.name.removesuffix(".weight"): layer for layer in _kept(dense, tmp_path / "out")}
    assert report.errors
    for name, error in report.errors.items():
        assert found[name].relative_rms == pytest.approx(error.relative_rms, rel=1e-2)
    assert found["model.layers.0.input_layernorm"].max_error == 0.0


def test_bits_per_weight_are_those_of_the_report(dense: Path, tmp_path: Path) -> None:
    """Tensors count, the headers of files do not."""
    report = requant.convert(dense, tmp_path / "out", bits=4, layout="keep")
    comparison = requant.compare(dense, tmp_path / "out")
    assert comparison.bits_per_weight_b == report.bits_per_weight
    assert comparison.bits_per_weight_a == 8 * report.plan.bytes_in / report.plan.parameters


def test_a_faulty_model_is_named_and_cannot_be_compared(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing cannot be compared:\n.*no such folder"):
        requant.compare(dense, tmp_path / "nothing")


def _kept(a: Path, b: Path) -> tuple[LayerComparison, ...]:
    return requant.compare(a, b).layers


def test_what_only_one_has_and_shapes_that_differ(checkpoint: Callable[..., Path]) -> None:
    a = checkpoint({"x": bf16(4, 8), "y": bf16(4, 8), "z": bf16(4)}, name="a")
    b = checkpoint({"x": bf16(4, 8), "w": bf16(4)}, name="b")
    comparison = requant.compare(a, b)
    assert (comparison.only_a, comparison.only_b) == (("y", "z"), ("w",))
    c = checkpoint({"x": bf16(8, 4), "y": bf16(4, 9)}, name="c")
    with pytest.raises(CheckpointError) as rejected:
        requant.compare(a, c)
    assert [p.where for p in rejected.value.problems] == ["x", "y"]
    assert "[8, 4], expected [4, 8]" in str(rejected.value)
    with pytest.raises(UsageError, match="share no name"):
        requant.compare(a, checkpoint({"q": bf16(2)}, name="d"))


def test_documents_of_a_text(tmp_path: Path) -> None:
    lines = tmp_path / "text.jsonl"
    lines.write_text('"one"\n\n{"text": "two", "more": 1}\n')
    assert list(read_documents(lines)) == ["one", "two"]
    plain = tmp_path / "text.txt"
    plain.write_text("a\nb\n")
    assert list(read_documents(plain)) == ["a\nb\n"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2 is not valid JSON"),
        (b"[1]", r"line 2 is \[1\], expected"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_bad_texts_are_named(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'"good"\n' + line)
    with pytest.raises(ParseError, match=message):
        list(read_documents(path))


class _Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def test_a_text_is_cut_into_windows(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefg")
    assert read_tokens(path, _Letters(), 100, 3).tolist() == [[97, 98, 99], [100, 101, 102]]
    with pytest.raises(UsageError, match="has 7 tokens"):
        read_tokens(path, _Letters(), 100, 4)


def test_an_estimate_and_its_standard_error() -> None:
    found = Estimate.of(np.array([1.0, 2.0, 3.0]))
    assert found == Estimate(2.0, pytest.approx(1 / 3**0.5))
    assert found.raised().value == pytest.approx(np.e**2)


def test_two_models_by_hand() -> None:
    """One answers 3:1 for token 1 wherever it is, the other is undecided."""

    def reports(odds: list[float]) -> Callable[[mx.array], mx.array]:
        logits = mx.log(mx.array(odds))
        return lambda ids: mx.broadcast_to(logits, (*ids.shape, len(odds)))

    ids = np.array([[0, 1, 1], [0, 0, 1]])
    found = evaluate(reports([1, 3]), reports([2, 2]), list(ids))
    surprise = -np.log([0.25, 0.75])
    assert found.loss_a.value == pytest.approx((3 * surprise[1] + surprise[0]) / 4, abs=1e-6)
    assert found.loss_b.value == pytest.approx(np.log(2), abs=1e-6)
    assert found.divergence.value == pytest.approx(
        0.25 * np.log(0.5) + 0.75 * np.log(1.5), abs=1e-6
    )
    assert (found.tokens, found.windows, found.same_top.value) == (4, 2, 0.0)
    with pytest.raises(UsageError, match="vocabularies differ"):
        evaluate(reports([1, 3]), reports([1, 1, 1]), list(ids))


@pytest.mark.slow
def test_command_with_a_text(tmp_path: Path) -> None:
    requant.convert(EXAMPLE, tmp_path / "out", bits=4)
    text = tmp_path / "text.txt"
    text.write_text((EXAMPLE.parents[1] / "docs" / "architecture.md").read_text()[:3000])
    command = [sys.executable, "-m", "requant", "compare", str(EXAMPLE), str(tmp_path / "out")]
    command += ["--text", str(text), "--window", "64", "--tokens", "256", "--threads", "1"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "KL divergence" in shown.stdout and "relative RMS" in shown.stdout
    answer = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout)
    assert found["schema"] == 1 and found["evaluation"]["divergence"]["value"] > 0
    assert found["evaluation"]["windows"] == 4
    same = requant.compare(EXAMPLE, EXAMPLE, text=text, tokens=128, window=64).evaluation
    assert same is not None
    assert (same.divergence.value, same.gap.value, same.same_top.value) == (0.0, 0.0, 1.0)
