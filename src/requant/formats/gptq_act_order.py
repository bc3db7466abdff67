"""GPTQ's act-order, moved into the producing layer where that is exact.

The inputs of a ``down_proj`` are the outputs of its ``gate_proj`` and ``up_proj``, element by
element. If their rows are stored in the order of the groups of ``down_proj``, its codes can be
moved into that order too, and nothing changes but the order of a hidden vector that nobody
else sees. Valid for an MLP between whose layers there is only an elementwise function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.reasons import Reason, ReasonCode
from requant.formats.base import ActOrderFold, RowOrder, SourceLayer
from requant.packings.gptq import Gptq, group_order

# Consumer -> its producers, in one module.
_MLPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("down_proj", ("gate_proj", "up_proj")),
    ("down_proj", ("gate_up_proj",)),
    ("w2", ("w1", "w3")),
    ("fc2", ("fc1",)),
    ("down_proj", ("up_proj",)),
)


def find_folds(checkpoint: Checkpoint, layers: Sequence[SourceLayer]) -> list[ActOrderFold]:
    """Every layer in act-order whose order can be moved into the layers before it."""
    by_path = {layer.path: layer for layer in layers}
    folds: list[ActOrderFold] = []
    for layer in layers:
        packing = layer.packing
        if not (isinstance(packing, Gptq) and packing.act_order):
            continue
        producers, moved = _producers(layer, by_path), packing.in_order()
        if not producers or moved.encoding is None:
            continue
        order = group_order(checkpoint.read_small_tensor(f"{layer.path}.g_idx"), packing.groups)
        names = " and ".join(_tail(producer.path) for producer in producers)
        reason = Reason(ReasonCode.ACT_ORDER_MOVED, f"act-order moved into {names}")
        policy = replace(layer.policy, fallback=None, reason=reason, act_order=False)
        consumer = replace(layer, packing=moved, encoding=moved.encoding, policy=policy)
        rows = {p.path: RowOrder.of(order, p.shape[0] // order.size) for p in producers}
        folds.append(ActOrderFold(consumer, rows))
    return folds


def _producers(layer: SourceLayer, by_path: Mapping[str, SourceLayer]) -> list[SourceLayer]:
    """The layers (and biases) whose rows are the inputs of ``layer``; none if in doubt."""
    parent, _, name = layer.path.rpartition(".")
    n_in = layer.shape[1]
    for consumer, names in _MLPS:
        paths = [f"{parent}.{producer}" for producer in names]
        if name != consumer or not all(path in by_path for path in paths):
            continue
        rows = 2 * n_in if names == ("gate_up_proj",) else n_in
        found = [by_path[path] for path in paths]
        if any(p.shape[:-1] != (rows,) for p in found):
            return []
        found += [by_path[f"{path}.bias"] for path in paths if f"{path}.bias" in by_path]
        own = {*paths, *(f"{path}.bias" for path in paths), layer.path, f"{layer.path}.bias"}
        if _others(parent, own, n_in, by_path):
            return []
        return found
    return []


def _others(parent: str, own: set[str], n_in: int, by_path: Mapping[str, SourceLayer]) -> bool:
    """Whether something else in the module works on the hidden vector (a norm, a scale)."""
    prefix = f"{parent}."
    return any(
        path.startswith(prefix)
        and path not in own
        and len(layer.shape) == 1
        and prod(layer.shape) == n_in
        for path, layer in by_path.items()
    )


def _tail(path: str) -> str:
    return path.rpartition(".")[2] if not path.endswith(".bias") else ".".join(path.split(".")[-2:])
