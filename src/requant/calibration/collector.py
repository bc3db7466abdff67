"""Sums over the inputs of linear layers, collected while a model runs.

The layers are observed through their classes' ``__call__``: MLX's ``Linear``, the libraries'
``SwitchLinear`` (experts, each by its own tokens) and the embedding where it is the head. Sums are
of float64, Hessians of float32; their size does not depend on the length of the text. On a CPU
NumPy's BLAS makes the Hessians, on a GPU MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from requant.importance.layer_names import layer_key, same_input
from requant.importance.reader import LayerStatistics
from requant.nn.blas_products import by_expert, expert_layers, in_parallel, on_cpu, rows_of_experts

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx.nn.layers.base import Module

    from requant.calibration.text_model import TextModel

_COLUMNS = 192  # of a Hessian that are summed at a time
_PENDING = 64  # sums on a GPU that are fetched at a time


def hessian_bytes(matrices: int, n_in: int) -> int:
    """Bytes of the Hessians of a layer's matrices."""
    return 4 * matrices * n_in * n_in


class Sums:
    """Sums over the inputs of one layer, or of a stack of experts.

    Of ``x^T x`` only the upper triangle is complete. On a GPU it stays there, and the other sums
    are fetched when they are read, or some at a time: a fetch waits for all work before it.
    """

    def __init__(self, experts: int, n_in: int, with_hessian: bool, stacked: bool) -> None:
        self.stacked = stacked
        self.count = np.zeros(experts, np.float64)
        self.squares = np.zeros((experts, n_in), np.float64)
        self.absolutes = np.zeros((experts, n_in), np.float64)
        # By expert, float32 ``(in, in)``; None before its first token.
        self.products: list[Any] | None = None
        # Experts, and the sums of squares and of magnitudes of one window, ``(2, in)``, on a GPU.
        self._pending: list[tuple[int, mx.array]] = []
        if with_hessian:
            self.products = [None] * experts

    def add(self, x: np.ndarray, expert: int = 0) -> None:
        """Add inputs, float32 ``(tokens, in)``, of one matrix."""
        self.count[expert] += len(x)
        self.squares[expert] += np.square(x).sum(0)
        self.absolutes[expert] += np.abs(x).sum(0)
        if self.products is not None:
            total = self.products[expert]
            if total is None:
                total = self.products[expert] = np.zeros(2 * x.shape[1:], np.float32)
            _add_products(total, x)

    def add_on_device(self, x: mx.array, expert: int = 0) -> list[mx.array]:
        """The same for an array on a GPU, of any floating dtype.

        Returns:
            The sums, for the caller to evaluate.
        """
        import mlx.core as mx

        self.count[expert] += len(x)
        values = x.astype(mx.float32)
        sums = [mx.stack([mx.square(values).sum(0), mx.abs(values).sum(0)])]
        if len(self._pending) == _PENDING:
            self._fetch()
        self._pending.append((expert, sums[0]))
        if self.products is not None:
            total, product = self.products[expert], values.T @ values
            self.products[expert] = product if total is None else total + product
            sums.append(self.products[expert])
        return sums

    def _fetch(self) -> None:
        """Add what is pending to the sums."""
        if not self._pending:
            return
        import mlx.core as mx

        experts, sums = zip(*self._pending, strict=True)
        for expert, both in zip(experts, np.array(mx.stack(list(sums))), strict=True):
            self.squares[expert] += both[0]
            self.absolutes[expert] += both[1]
        self._pending.clear()

    def merge(self, before: Sums) -> None:
        """Add the sums of earlier windows."""
        self.count += before.count
        self.squares += before.squares
        self.absolutes += before.absolutes
        for expert, product in enumerate(before.products or ()):
            if product is None:
                continue
            assert self.products is not None
            own = self.products[expert]
            if own is None:
                self.products[expert] = product
            else:
                own = self.products[expert] = np.require(own, requirements="W")
                own += product

    def are_finite(self) -> bool:
        """Whether none is NaN or infinite."""
        self._fetch()
        return bool(np.isfinite(self.squares).all())

    def statistics(self) -> LayerStatistics:
        """The means; zeros where nothing was seen."""
        self._fetch()
        over = np.maximum(self.count, 1.0)[:, None]
        means = [(sums / over).astype(np.float32) for sums in (self.squares, self.absolutes)]
        if not self.stacked:
            means = [mean[0] for mean in means]
        return LayerStatistics(means[0], self.count, means[1])

    def hessian(self, expert: int) -> np.ndarray:
        """The mean of ``x x^T``, ``(in, in)``, of which the upper triangle is to be read."""
        assert self.products is not None
        products, n_in = self.products[expert], self.squares.shape[1]
        if products is None:
            return np.zeros((n_in, n_in), np.float32)
        return np.asarray(products) / np.float32(self.count[expert])


def _add_products(total: np.ndarray, x: np.ndarray) -> None:
    """Add the upper triangle of ``x^T x`` in place, some columns at a time."""

    def add(start: int) -> None:
        columns = slice(start, start + _COLUMNS)
        total[columns, start:] += x[:, columns].T @ x[:, start:]

    in_parallel(add, range(0, x.shape[1], _COLUMNS))


@dataclass(frozen=True, slots=True)
class _Note:
    """An input of a layer; not evaluated yet."""

    path: str
    x: mx.array
    experts: mx.array | None
    matrices: int


class Collector:
    """Observes layers, and sums over their inputs."""

    def __init__(
        self,
        paths: Mapping[int, str],
        with_hessians: bool,
        most_hessian_bytes: int,
    ) -> None:
        """Watch the layers of ``paths``: ``id`` of a module -> its path."""
        self.paths, self.with_hessians, self.most = paths, with_hessians, most_hessian_bytes
        self.sums: dict[str, Sums] = {}  # of layers that read one input, the first represents all
        self.too_wide: set[str] = set()  # layers whose Hessian is more than ``most_hessian_bytes``
        self.called: set[str] = set()
        self._notes: list[_Note] = []

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Note the inputs of the layers inside the context."""
        from mlx.nn.layers.embedding import Embedding
        from mlx.nn.layers.linear import Linear

        kinds: tuple[tuple[type, str, Callable[..., None]], ...] = (
            (Linear, "__call__", self._linear),
            *((kind, "__call__", self._experts) for kind in expert_layers()),
            (Embedding, "as_linear", self._linear),
        )
        before = [getattr(kind, name) for kind, name, _ in kinds]
        try:
            for (kind, name, watch), original in zip(kinds, before, strict=True):
                setattr(kind, name, _watched(original, watch))
            yield
        finally:
            for (kind, name, _), original in zip(kinds, before, strict=True):
                setattr(kind, name, original)

    def take(self) -> dict[str, Sums]:
        """The sums so far; those that follow begin at zero."""
        sums, self.sums = self.sums, {}
        return sums

    def _linear(self, layer: Module, x: mx.array) -> None:
        path = self.paths.get(id(layer))
        if path is not None:
            self._note(_Note(path, x, None, 1))

    def _experts(self, layer: Module, x: mx.array, indices: mx.array, *_: Any, **__: Any) -> None:
        path = self.paths.get(id(layer))
        if path is not None:
            self._note(_Note(path, x, indices, layer.weight.shape[0]))

    def _note(self, note: _Note) -> None:
        self.called.add(note.path)
        if not any(_share(note, other) for other in self._notes):
            self._notes.append(note)

    def flush(self, *others: mx.array) -> None:
        """Evaluate ``others`` together with the noted inputs, and add these to the sums.

        On a GPU the evaluation is begun, and not waited for.
        """
        import mlx.core as mx

        if on_cpu():
            arrays = [a for note in self._notes for a in (note.x, note.experts) if a is not None]
            mx.eval(*arrays, *others)
            for note in self._notes:
                self._add(note)
        else:
            sums = [x for note in self._notes for x in self._add_on_device(note)]
            mx.async_eval(*others, *sums)  # type: ignore[no-untyped-call]
        self._notes.clear()

    def _sums(self, note: _Note) -> Sums:
        """The sums that a note is added to."""
        n_in = note.x.shape[-1]
        if note.path not in self.sums:
            wide = hessian_bytes(note.matrices, n_in) > self.most
            if self.with_hessians and wide:
                self.too_wide.add(note.path)
            wanted = self.with_hessians and not wide
            stacked = note.experts is not None
            self.sums[note.path] = Sums(note.matrices, n_in, wanted, stacked)
        return self.sums[note.path]

    def _add(self, note: _Note) -> None:
        import mlx.core as mx

        sums = self._sums(note)
        if note.experts is None:
            x = np.array(note.x.astype(mx.float32), copy=False)
            sums.add(x.reshape(-1, x.shape[-1]))
            return
        rows = np.array(rows_of_experts(note.x, note.experts).astype(mx.float32), copy=False)
        for expert, places in by_expert(note.x, note.experts):
            sums.add(rows[places], expert)

    def _add_on_device(self, note: _Note) -> Iterator[mx.array]:
        import mlx.core as mx

        sums = self._sums(note)
        if note.experts is None:
            yield from sums.add_on_device(note.x.reshape(-1, note.x.shape[-1]))
            return
        rows = rows_of_experts(note.x, note.experts)
        for expert, places in by_expert(note.x, note.experts):
            yield from sums.add_on_device(mx.take(rows, mx.array(places), axis=0), expert)


def observed_layers(model: TextModel) -> dict[int, str]:
    """``id`` -> path of the layers to watch; embeddings too, since one may be the head."""
    from mlx.nn.layers.linear import Linear

    kinds = (Linear, *expert_layers())
    layers = {id(m): path for path, m in model.named_modules() if isinstance(m, kinds)}
    return layers | embedding_layers(model)


def embedding_layers(model: TextModel) -> dict[int, str]:
    """``id`` -> path of the embeddings."""
    from mlx.nn.layers.embedding import Embedding

    return {id(m): path for path, m in model.named_modules() if isinstance(m, Embedding)}


def unobserved_layers(model: TextModel) -> list[str]:
    """Layers of other classes that are quantized all the same."""
    watched = observed_layers(model)
    return [
        path
        for path, m in model.named_modules()
        if hasattr(m, "to_quantized") and id(m) not in watched
    ]


def _share(note: _Note, other: _Note) -> bool:
    """Whether two layers read one input, and are found under each other's names."""
    if note.x is not other.x or note.experts is not other.experts:
        return False
    mine, theirs = layer_key(note.path), layer_key(other.path)
    return mine is not None and theirs is not None and theirs in same_input(mine)


def _watched(original: Callable[..., Any], watch: Callable[..., None]) -> Callable[..., Any]:
    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        watch(layer, *args, **kwargs)
        return original(layer, *args, **kwargs)

    return call
