"""Powers of inputs: which rows are read, and which matrix they belong to."""

from collections.abc import Iterator

import numpy as np
import pytest

from requant.checkpoints.checkpoint import StoredTensor
from requant.core.dtypes import TensorInfo
from requant.execution.chunks import Chunk
from requant.execution.input_estimates import InputPowers, powers_of_matrix
from requant.kernels.input_power import estimated_power
from requant.planning.plan import (
    EncodeParams,
    Operation,
    OutputTensor,
    RowMapping,
    RowsOf,
    Step,
)
from requant.quantization.config import Quantization

RNG = np.random.default_rng(3)


def step_of(matrices: int, rows: int, count: int, output_row: int = 0) -> Step:
    """A step of some rows of a stack of experts with 32 inputs."""
    stored = StoredTensor("up.weight", TensorInfo("F32", (count, 32)), "model.safetensors", 0)
    output = OutputTensor("up.weight", TensorInfo("U32", (matrices, rows, 4)))
    return Step(
        layer="up",
        operation=Operation.ENCODE,
        rows=RowMapping(count=count, columns=32, output_row=output_row),
        inputs={"weight": stored},
        outputs={"weight": output},
        encode=EncodeParams(
            target=Quantization.affine(32, 4), search="best", estimate=RowsOf.FEATURES
        ),
        dtype="F32",
    )


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize(("first", "count"), [(0, 60), (20, 40), (40, 20), (20, 20)])
def test_each_matrix_has_its_own_power(chunk_rows: int, first: int, count: int) -> None:
    """Three matrices of 20 rows, of which a step may have some."""
    weights = (RNG.standard_normal((60, 32)) * RNG.uniform(0.1, 3, 32)).astype(np.float32)

    def decode(chunk: Chunk) -> Iterator[tuple[Chunk, np.ndarray]]:
        for start in range(chunk.start, chunk.stop, chunk_rows):
            stop = min(start + chunk_rows, chunk.stop)
            yield Chunk(chunk.step, start, stop), weights[first + start : first + stop]

    step = step_of(3, 20, count, first)
    powers = InputPowers(2).of(Chunk(step, 0, 5, number=0), decode)
    for matrix in range(first // 20, (first + count) // 20):
        expected = estimated_power(weights[20 * matrix : 20 * matrix + 20])
        assert (powers_of_matrix(step, powers, matrix) == expected).all()


def test_long_matrices_are_sampled_each_from_its_first_row() -> None:
    read: list[tuple[int, int]] = []

    def decode(chunk: Chunk) -> Iterator[tuple[Chunk, np.ndarray]]:
        read.append((chunk.start, chunk.stop))
        yield chunk, np.ones((chunk.rows, 32), np.float32)

    InputPowers(2).of(Chunk(step_of(2, 4100, 8200), 0, 5, number=0), decode)
    assert read[:2] == [(0, 64), (128, 192)]
    assert [x for x in read if 4000 < x[0] < 4300] == [(4096, 4100), (4100, 4164), (4228, 4292)]
    assert read[-1] == (8196, 8200)
