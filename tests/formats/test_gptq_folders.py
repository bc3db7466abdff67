"""GPTQ's folders against GPTQModel's own values."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import requant
from tests.support.fixture_checks import check_fixture
from tests.support.fixture_folders import fixture
from tests.support.safetensors_files import read_folder

pytestmark = pytest.mark.sweep(2)

FLOAT16 = 2**-11  # half a unit in the last place


@pytest.mark.parametrize(
    "name",
    [
        "b2-g64-sym-v2",
        "b3-g64-sym-v1",
        "b3-g64-planar",
        "b4-g128-sym-v1",
        "b4-g64-sym-v2",
        "b4-g64-lmhead-v1",
        "b4-gm1-sym-v1",
        "b8-g64-sym-v1",
        "dynamic-mixed-v1",
    ],
)
def test_symmetric_layers_are_exact(name: str, tmp_path: Path) -> None:
    check_fixture(f"gptq-{name}", tmp_path, "exact")


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("b2-g64-asym-v1", 2),
        ("b3-g64-asym-v1", 3),
        ("b3-g64-asym-v2", 3),
        ("b4-g64-asym-v1", 4),
        ("b4-g64-asym-v1-bias", 4),
        ("b4-g128-asym-v2", 4),
        ("b5-g64-planar", 5),
        ("b8-gm1-asym-v2", 8),
    ],
)
def test_asymmetric_layers_round_the_bias(name: str, bits: int, tmp_path: Path) -> None:
    check_fixture(f"gptq-{name}", tmp_path, "rounded", bound=(2**bits - 1) * FLOAT16)


def folded(names: list[str]) -> Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], None]:
    """What the fold does to the values.

    Inputs of down_proj are sorted by group, and the rows of the layers that feed it likewise.
    """

    def change(source: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> None:
        for path in names:
            g_idx = source[f"{path}.g_idx"]
            order = sorted(range(len(g_idx)), key=lambda k: (g_idx[k], k))
            values[path] = values[path][:, order]
            for producer in ("gate_proj", "up_proj"):
                name = path.replace("down_proj", producer)
                values[name] = values[name][order]

    return change


@pytest.mark.parametrize(
    ("name", "exactness", "bound"),
    [
        ("b4-g64-actorder-v1", "exact", 0.0),
        ("b3-g64-actorder-v1", "exact", 0.0),
        ("b4-g32-actorder-asym-v2", "rounded", 15 * FLOAT16),
        ("b8-g32-actorder-v1", "exact", 0.0),
    ],
)
def test_act_order(name: str, exactness: str, bound: float, tmp_path: Path) -> None:
    """down_proj keeps its codes, and its producers give their rows in its order.

    The rest is encoded again at 8 bits unless its order is the sequential one.
    """
    source = read_folder(_checkpoint(name))
    layers = [n.removesuffix(".g_idx") for n in source if n.endswith(".g_idx")]
    moved = [path for path in layers if _shuffled(source, path)]
    downs = [path for path in moved if path.endswith("down_proj")]
    assert downs
    classes = {path: "re-encoded" for path in moved if path not in downs}
    check_fixture(
        f"gptq-{name}",
        tmp_path,
        {"": exactness, **classes},
        bound=bound,
        largest_rms=0.012,
        stored_as=folded(downs),
    )


def test_other_ways_with_act_order() -> None:
    source = _checkpoint("b4-g32-actorder-asym-v2")
    tensors = read_folder(source)
    moved = {n[:-6] for n in tensors if n.endswith(".g_idx") and _shuffled(tensors, n[:-6])}
    elsewhere = {path for path in moved if not path.endswith("down_proj")}
    assert elsewhere
    plan = requant.plan(source, layout="keep", act_order="dense")
    assert {x.layer for x in plan.layers if x.treatment == "dequantized"} == elsewhere
    with pytest.raises(requant.UsageError, match="act-order") as caught:
        requant.plan(source, layout="keep", act_order="refuse")
    assert all(path in str(caught.value) for path in elsewhere)


def test_folding_keeps_the_model(tmp_path: Path) -> None:
    """The hidden vector of the MLP comes in another order; its output does not change."""
    source = _checkpoint("b4-g64-actorder-v1")
    found = check_fixture(
        "gptq-b4-g64-actorder-v1",
        tmp_path,
        "exact",
        stored_as=folded([f"model.layers.{n}.mlp.down_proj" for n in (0, 1)]),
    )
    before = read_folder(source)
    for n in (0, 1):
        path = f"model.layers.{n}.mlp"
        order = np.argsort(before[f"{path}.down_proj.g_idx"], kind="stable")
        assert not np.array_equal(order, np.arange(order.size))
        x = np.random.default_rng(n).standard_normal(64).astype(np.float32)
        values = found.expected
        gate, up = values[f"{path}.gate_proj"] @ x, values[f"{path}.up_proj"] @ x
        plain = values[f"{path}.down_proj"] @ (np.tanh(gate) * up)
        moved = values[f"{path}.down_proj"][:, order] @ (np.tanh(gate[order]) * up[order])
        np.testing.assert_allclose(plain, moved, rtol=1e-4, atol=1e-5)


def _checkpoint(name: str) -> Path:
    return fixture(f"gptq-{name}") / "checkpoint"


def _shuffled(source: dict[str, np.ndarray], path: str) -> bool:
    """Whether a layer's groups are not consecutive inputs."""
    g_idx, groups = source[f"{path}.g_idx"], source[f"{path}.scales"].shape[0]
    return not np.array_equal(g_idx, np.arange(g_idx.size) * groups // g_idx.size)
