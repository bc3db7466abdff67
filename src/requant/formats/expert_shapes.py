"""Orientation of the matrices of fused experts, by their shapes and the sizes in the config.

Most models store ``(experts, out, in)``, Llama 4 and gpt-oss ``(experts, in, out)``. Scales for
groups or for outputs tell; one scale for a matrix does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

_GATES: Final = ("gate_up_proj", "w13", "gate_proj", "up_proj", "w1", "w3")
_DOWNS: Final = ("down_proj", "w2")
Shape = Sequence[int]


class Orientation:
    """Tells stacks ``(experts, in, out)`` from ``(experts, out, in)``.

    ``shapes`` is layer path -> shape of its codes, one element each.
    """

    def __init__(self, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
        self._hidden = frozenset(_hidden_sizes(config))
        self._stacks: dict[str, dict[str, Shape]] = {}  # path of the experts -> name -> shape
        for path, shape in shapes.items():
            experts, _, name = path.rpartition(".")
            if len(shape) == 3 and name in (*_GATES, *_DOWNS):
                self._stacks.setdefault(experts, {})[name] = shape

    def is_transposed(self, path: str, shape: Shape) -> bool:
        """Whether a stack is stored ``(experts, in, out)``; what nothing tells is not."""
        if len(shape) != 3:
            return False
        stacks = self._stacks.get(path.rpartition(".")[0], {})
        gate = next((stacks[name] for name in _GATES if name in stacks), None)
        down = next((stacks[name] for name in _DOWNS if name in stacks), None)
        if gate is not None and down is not None:
            usual, transposed = _fits(gate, down), _fits(_exchanged(gate), _exchanged(down))
            if usual != transposed:
                return transposed
        by_hidden = {
            (stack[1] in self._hidden) == (stack is gate)
            for stack in (gate, down)
            if stack is not None and (stack[1] in self._hidden) != (stack[2] in self._hidden)
        }
        return by_hidden == {True}


def _fits(gate: Shape, down: Shape) -> bool:
    """Whether gate ``(_, out, in)`` gives what down takes, and takes what down gives."""
    return gate[2] == down[1] and gate[1] in (down[2], 2 * down[2])


def _exchanged(shape: Shape) -> Shape:
    return (shape[0], shape[2], shape[1])


def _hidden_sizes(config: Mapping[str, Any]) -> Iterator[int]:
    for part in (config, *config.values()):
        size = part.get("hidden_size") if isinstance(part, Mapping) else None
        if isinstance(size, int):
            yield size
