"""Assign shards and offsets to the output's tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from requant.core.dtypes import TensorInfo
from requant.planning.plan import OutputShard, OutputTensor, Step, _header


def assign_offsets(
    steps: Sequence[Step], max_shard_bytes: int, names_of: str = "mlx"
) -> tuple[tuple[OutputShard, ...], list[Step]]:
    """Give every output tensor its file and offset.

    The tensors of a layer are in one shard. Within a shard wider dtypes come first, as other
    safetensors writers sort them, so that every tensor is aligned without holes.
    """
    buckets: list[list[OutputTensor]] = [[]]
    filled = 0
    last_layer: str | None = None
    sizes = Counter[str]()
    for step in steps:
        if not step.rows.output_row:
            sizes[step.layer] += sum(t.info.nbytes for t in step.outputs.values())
    for step in steps:
        if step.layer != last_layer:
            if buckets[-1] and filled + sizes[step.layer] > max_shard_bytes:
                buckets.append([])
                filled = 0
            filled += sizes[step.layer]
            last_layer = step.layer
        if not step.rows.output_row:  # further pieces share the tensors of the first
            buckets[-1] += step.outputs.values()

    shards: list[OutputShard] = []
    placed: dict[str, OutputTensor] = {}
    for number, bucket in enumerate(buckets, 1):
        name = f"model-{number:05d}-of-{len(buckets):05d}.safetensors"
        name = name if len(buckets) > 1 else "model.safetensors"
        ordered = sorted(bucket, key=lambda t: -TensorInfo(t.info.dtype, ()).nbytes)
        header, offsets = _header(ordered, names_of)
        tensors = tuple(
            OutputTensor(t.name, t.info, name, len(header) + offsets[t.name]) for t in ordered
        )
        placed |= {t.name: t for t in tensors}
        nbytes = len(header) + sum(t.info.nbytes for t in tensors)
        shards.append(OutputShard(name, nbytes, tensors, names_of))
    return tuple(shards), [
        replace(s, outputs={role: placed[t.name] for role, t in s.outputs.items()}) for s in steps
    ]
