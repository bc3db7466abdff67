"""What a step costs: processor time on one core, to cut a plan into parts of equal cost.

The constants are those of ``benchmarks/kernels.py``, ``search.py`` and ``convert.py`` on an x86-64
core with AVX-512. Only their ratios matter, and only for how evenly parts are cut.
"""

from __future__ import annotations

from requant.planning.plan import Operation, Step

_READ = 0.3  # nanoseconds for each byte read
_WRITE = 1.0  # for each byte written, its hash included
_VALUE = {  # nanoseconds for each value
    Operation.COPY: 0.0,
    Operation.CAST: 0.3,
    Operation.DECODE: 0.3,
    Operation.REPACK: 0.5,
    Operation.ENCODE: 0.9,  # the error is measured too
    Operation.RECODE: 1.2,
}
_SEARCH = {"off": 0.0, "fast": 1.3, "best": 5.0}
_GPTQ_VALUE = 0.047  # for each value and column after it
_FACTOR = 0.042  # for the cube of the columns


def step_cost(step: Step) -> float:
    """Nanoseconds of one core, roughly."""
    values = step.rows.count * step.rows.columns
    bytes_out = sum(step.row_bytes(out) for out in step.outputs.values()) * step.rows.count
    cost = step.bytes_in * _READ + bytes_out * _WRITE
    cost += values * (_VALUE[step.operation] + _SEARCH[step.search])
    if step.gptq and step.importance is not None:
        cost += gptq_cost(step, len(step.importance.entries))
    return cost


def gptq_cost(step: Step, hessians: int = 1) -> float:
    """Nanoseconds that GPTQ adds to a step that encodes, with so many Hessians."""
    columns = step.rows.columns
    values = step.rows.count * columns
    return (
        0.0
        if step.encode is None
        else (values * _GPTQ_VALUE + hessians * columns**2 * _FACTOR) * columns
    )
