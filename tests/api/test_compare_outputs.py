"""``compare_outputs``: several outputs in one run, against ``compare`` of each."""

from pathlib import Path
from typing import Any

import pytest

import requant
from requant.calibration import blocks, predictions
from requant.errors import CheckpointError, OutputError, UsageError
from requant.mlx_lm.evaluation import Evaluation

pytest.importorskip("mlx_lm")

EXAMPLE = Path(__file__).parents[2] / "examples" / "micro-llama"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A tensor is a run of bytes with a shape, and a file holds many. " * 20)
    return path


@pytest.fixture
def outputs(tmp_path: Path) -> list[Path]:
    for bits in (3, 4):
        requant.convert(EXAMPLE, tmp_path / f"{bits}bit", bits=bits)
    return [tmp_path / "3bit", tmp_path / "4bit", EXAMPLE]


def assert_close(a: Evaluation, b: Evaluation) -> None:
    for name in Evaluation.__slots__:
        one, other = getattr(a, name), getattr(b, name)
        if isinstance(one, int):
            assert one == other
        else:
            assert one.value == pytest.approx(other.value, rel=1e-4, abs=1e-6), name
            assert one.error == pytest.approx(other.error, rel=1e-3, abs=1e-6), name


def test_each_is_compared_as_alone(
    text: Path, outputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with the cache, and for a model that cannot be run block by block."""
    options: dict[str, Any] = {"tokens": 192, "window": 48}
    plain = requant.compare_outputs(EXAMPLE, outputs, text, **options)
    for score in plain.scores:
        alone = requant.compare(EXAMPLE, score.output, text=text, **options)
        assert alone.evaluation is not None
        assert_close(score.evaluation, alone.evaluation)
        assert score.bits_per_weight == alone.bits_per_weight_b
    three, four, same = (x.evaluation.divergence.value for x in plain.scores)
    assert three > four > 1e-4 > same
    assert plain.scores[0].nbytes < plain.scores[1].nbytes < plain.nbytes

    cache = tmp_path / "cache"
    filled = requant.compare_outputs(EXAMPLE, outputs[:1], text, cache=cache, **options)
    (kept,) = cache.iterdir()
    assert kept.suffix == ".hidden"
    with monkeypatch.context() as patched:
        patched.delattr(predictions.DensePredictions, "_run")
        again = requant.compare_outputs(EXAMPLE, outputs[:1], text, cache=cache, **options)
    assert filled.scores == again.scores == plain.scores[:1]
    kept.write_bytes(kept.read_bytes()[:-4])
    assert requant.compare_outputs(EXAMPLE, outputs[:1], text, cache=cache, **options) == filled

    def rejects(*_: object) -> None:
        raise blocks.NotBlockwiseError("of the test")

    monkeypatch.setattr(blocks.BlockwiseModel, "load_rest", rejects)
    whole = requant.compare_outputs(EXAMPLE, outputs[:1], text, **options)
    assert_close(whole.scores[0].evaluation, plain.scores[0].evaluation)


def test_another_text_is_not_found_in_the_cache(text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokens": 96, "window": 48, "cache": tmp_path / "cache"}
    one = requant.compare_outputs(EXAMPLE, [EXAMPLE], text, **options)
    text.write_text("Another text, which is about something else. " * 20)
    other = requant.compare_outputs(EXAMPLE, [EXAMPLE], text, **options)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert one.text_sha256 != other.text_sha256


def test_bad_input_is_named(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name the outputs"):
        requant.compare_outputs(EXAMPLE, [], text)
    with pytest.raises(CheckpointError, match="nowhere") as caught:
        requant.compare_outputs(EXAMPLE, [tmp_path / "nowhere"], text)
    assert caught.value.action == "compared"
    with pytest.raises(OutputError, match=r"text\.txt"):
        requant.compare_outputs(EXAMPLE, [EXAMPLE], text, tokens=96, window=48, cache=text)
