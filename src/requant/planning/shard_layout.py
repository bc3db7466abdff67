"""Assign shards and offsets to the output's tensors."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from requant.core.dtypes import NUMPY_DTYPE
from requant.planning.plan import OutputShard, OutputTensor, Step, _header


def assign_offsets(
    steps: list[Step], max_shard_bytes: int, names_of: str = "mlx"
) -> tuple[tuple[OutputShard, ...], tuple[Step, ...]]:
    """Give every output tensor its file and offset.

    The tensors of a layer are in one shard. Within a shard wider dtypes come first, as other
    safetensors writers sort them, so that every tensor is aligned without holes.

    The list is emptied: a plan may have 100,000 steps, and only one set of them is held.
    """
    sizes = Counter[str]()
    for step in steps:
        if not step.rows.output_row:  # further pieces share the tensors of the first
            sizes[step.layer] += sum(t.info.nbytes for t in step.outputs.values())
    starts, filled = [0], 0  # the first step of each shard, and bytes of the last shard
    last_layer: str | None = None
    for index, step in enumerate(steps):
        if step.layer != last_layer:
            if index > starts[-1] and filled + sizes[step.layer] > max_shard_bytes:
                starts.append(index)
                filled = 0
            filled += sizes[step.layer]
            last_layer = step.layer

    shards: list[OutputShard] = []
    for number, (start, stop) in enumerate(pairwise([*starts, len(steps)]), 1):
        name = f"model-{number:05d}-of-{len(starts):05d}.safetensors"
        name = name if len(starts) > 1 else "model.safetensors"
        own = (step for step in steps[start:stop] if not step.rows.output_row)
        tensors = [tensor for step in own for tensor in step.outputs.values()]
        tensors.sort(key=lambda t: -NUMPY_DTYPE[t.info.dtype].itemsize)
        header, offsets = _header(tensors, names_of)
        placed = {
            t.name: OutputTensor(t.name, t.info, name, len(header) + offsets[t.name])
            for t in tensors
        }
        nbytes = len(header) + sum(t.info.nbytes for t in tensors)
        shards.append(OutputShard(name, nbytes, tuple(placed.values()), names_of))
        for index in range(start, stop):
            step = steps[index]
            outputs = {role: placed[tensor.name] for role, tensor in step.outputs.items()}
            steps[index] = step.with_outputs(outputs)
    done = tuple(steps)
    steps.clear()
    return tuple(shards), done
