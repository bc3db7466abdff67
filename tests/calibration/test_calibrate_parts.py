"""``calibrate(part=...)`` and ``join``: the same file as one process writes, bit for bit."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import requant
from requant.calibration import block_run
from requant.calibration.block_run import Calibration
from requant.calibration.blocks import NotBlockwiseError
from requant.calibration.collector import Sums
from requant.calibration.section_sums import (
    SectionSums,
    block_and_run,
    read_sums,
    section_ends,
    write_sums,
)
from requant.errors import OutputError, UsageError
from tests.support.checkpoints import MICRO_LLAMA, model

SMALL: dict[str, Any] = {"hessian": True, "window": 16, "tokens": 16 * 11}


def random_sums(seed: int) -> dict[str, Sums]:
    """Sums of a layer and of a stack of three experts, one of which saw nothing."""
    rng = np.random.default_rng(seed)
    layer, stack = Sums(1, 70, True, stacked=False), Sums(3, 5, True, stacked=True)
    layer.add(rng.standard_normal((9, 70), np.float32))
    for expert in (0, seed % 2):
        stack.add(rng.standard_normal((4, 5), np.float32), expert)
    return {"up": layer, "experts": stack} if seed % 3 else {"up": layer}


def arrays_of(sums: dict[str, Sums]) -> dict[str, list[Any]]:
    """All numbers that a statistics file has of them."""
    return {
        layer: [
            x.count.tolist(),
            x.squares.tolist(),
            x.absolutes.tolist(),
            [np.triu(x.hessian(n)).tolist() for n in range(len(x.count))],
        ]
        for layer, x in sorted(sums.items())
    }


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 8), cuts=st.sets(st.integers(1, 7)))
def test_any_cut_gives_the_same_sums(
    count: int, cuts: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each process adds its sections; what it keeps is added in another."""
    folder = tmp_path_factory.mktemp("sums")
    whole = SectionSums(folder, 1)
    for section in range(count):
        whole.add((section, section + 1), random_sums(section))
    expected = arrays_of(whole.total())
    borders = sorted({0, count, *(x for x in cuts if x < count)})
    joined = SectionSums(folder, 2)
    for number, (start, stop) in enumerate(pairwise(borders)):
        part = SectionSums(folder, 10 + number)
        for section in range(start, stop):
            part.add((section, section + 1), random_sums(section))
            part.save()
        for name in part.files():
            joined.add(block_and_run(name)[1], read_sums(folder / name))
    assert arrays_of(joined.total()) == expected


def test_sums_are_added_as_a_tree(tmp_path: Path) -> None:
    """Five sections: ((0 + 1) + (2 + 3)) + 4, in float32 as written by hand."""
    values = [np.float32(x) for x in (1, 2**-24, 2**-24, 2**-24, 2**-25)]
    sums = SectionSums(tmp_path, 0)
    for section, value in enumerate(values):
        one = Sums(1, 1, True, stacked=False)
        one.count[:], one.products = 1, [np.full((1, 1), value)]
        sums.add((section, section + 1), {"up": one})
    total = sums.total()["up"].products
    # 1 + 2^-24 rounds to 1; 2^-24 + 2^-24 is the last bit of 1, and stays; 2^-25 does not.
    assert total is not None
    assert total[0].item() == 1 + 2**-23


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_sums(tmp_path / "sums", random_sums(1))
    assert arrays_of(read_sums(tmp_path / "sums")) == arrays_of(random_sums(1))
    (tmp_path / "sums").write_bytes((tmp_path / "sums").read_bytes()[:-1])
    with pytest.raises(OSError, match="is shorter than it was written"):
        read_sums(tmp_path / "sums")


def test_sections() -> None:
    assert section_ends(64) == [8, 16, 24, 32, 40, 48, 56, 64]
    assert section_ends(11) == [1, 2, 4, 5, 6, 8, 9, 11]
    assert section_ends(3) == [1, 2, 3]


def run_parts(source: Path, output: Path, parts: list[str], **options: Any) -> None:
    for part in parts:
        done = requant.calibrate(source, output, part=part, **options)
        assert str(done.part) == part
        assert not output.exists()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("micro-llama", ["3/3", "1/3", "1/3", "2/3"]),
        pytest.param("micro-moe", ["2/5", "5/5", "1/5", "4/5", "3/5"], marks=pytest.mark.slow),
        pytest.param("micro-llama", ["1/1"], marks=pytest.mark.slow),
        pytest.param("micro-llama", ["2/2", "2/4", "1/4"], marks=pytest.mark.slow),
    ],
)
def test_parts_give_the_file_of_one_process(name: str, parts: list[str], tmp_path: Path) -> None:
    source, one, output = model(name), tmp_path / "one.safetensors", tmp_path / "out.safetensors"
    whole = requant.calibrate(source, one, **SMALL)
    run_parts(source, output, parts, **SMALL)
    joined = requant.join(output)
    assert output.read_bytes() == one.read_bytes()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["one.safetensors", "out.safetensors"]
    assert isinstance(joined, Calibration)
    differ = {"output", "elapsed_s"}
    assert {k: v for k, v in joined.to_dict().items() if k not in differ} == {
        k: v for k, v in whole.to_dict().items() if k not in differ
    }


def test_a_model_that_runs_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rejected(*_: object) -> None:
        raise NotBlockwiseError("it is a test")

    monkeypatch.setattr(block_run, "run_blockwise", rejected)
    one, output = tmp_path / "one.safetensors", tmp_path / "out.safetensors"
    requant.calibrate(MICRO_LLAMA, one, **SMALL)
    run_parts(MICRO_LLAMA, output, ["2/2", "1/2"], **SMALL)
    joined = requant.join(output)
    assert isinstance(joined, Calibration)
    assert joined.reason == "it is a test"
    assert output.read_bytes() == one.read_bytes()


def test_a_part_that_was_stopped_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, output = tmp_path / "one.safetensors", tmp_path / "out.safetensors"
    requant.calibrate(MICRO_LLAMA, one, **SMALL)
    run_parts(MICRO_LLAMA, output, ["1/2"], **SMALL)
    seen: list[int] = []

    def stop(what: str, done: int, of: int) -> None:
        seen.append(done)
        if what.startswith("block 2") and len(seen) < 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        requant.calibrate(MICRO_LLAMA, output, part="2/2", **SMALL, progress=stop)
    with pytest.raises(OutputError, match="the part 2/2 is not done"):
        requant.join(output)
    seen[:] = [0] * 20
    requant.calibrate(MICRO_LLAMA, output, part="2/2", **SMALL, progress=stop)
    assert min(seen[20:]) > 0
    requant.join(output)
    assert output.read_bytes() == one.read_bytes()


def test_what_does_not_fit_together(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    with pytest.raises(OutputError, match="no part of a calibration is done"):
        requant.join(output)
    with pytest.raises(UsageError, match="can be cut into 8 parts at most"):
        requant.calibrate(MICRO_LLAMA, output, part="1/9", **SMALL)
    run_parts(MICRO_LLAMA, output, ["1/2"], **SMALL)
    with pytest.raises(OutputError, match="the part 2/2 is not done"):
        requant.join(output)
    with pytest.raises(OutputError, match=r"requant join .* completes it"):
        requant.calibrate(MICRO_LLAMA, output, **SMALL)
    run_parts(MICRO_LLAMA, output, ["2/2"], **{**SMALL, "hessian": False})
    with pytest.raises(OutputError, match="2/2 is of another calibration than part 1/2"):
        requant.join(output)
    requant.calibrate(MICRO_LLAMA, output, **SMALL, resume=False)
    with pytest.raises(OutputError, match="--force replaces it"):
        requant.join(output)
