"""Give a checkpoint's layers the names and shapes that a library gives its tensors.

Tensors that the library only moves (renames, stacks, splits) stay bytes of the source files; those
that its model class computes are computed during the conversion, one at a time.

A quantized layer is shown to the library as the dense weight that it represents. Where its rule
moves whole rows of such weights, the rows of codes, scales and biases are moved in the same way;
members that are stored in different ways get an encoding that holds all of them
(``formats.members``). Where it does anything else, the layer is decoded and by default
requantized to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from requant.checkpoints.byte_ranges import FileRange
from requant.checkpoints.checkpoint import (
    Checkpoint,
    ComputedTensor,
    SourceTensor,
    cut,
    with_changes,
)
from requant.core.dtypes import KERNEL_FLOATS, TensorInfo
from requant.core.reasons import Reason, ReasonCode
from requant.errors import CheckpointError, Problem, RequantError, UsageError
from requant.formats.base import DefaultPolicy, RowRange, SourceLayer, SourceLayout, dense_layer
from requant.formats.members import in_float32, members_joined, recomputed
from requant.formats.nvfp4_layers import has_tensor_scale, kept_separate
from requant.formats.quantization_block import without_blocks
from requant.layouts.load_check import find_load_error
from requant.layouts.outputs import ByteCopy
from requant.layouts.row_ranges import (
    MAX_RANGES,
    coalesced_tensor,
    in_whole_units,
    row_byte_ranges,
    row_runs,
    stacked_global_scales,
    strided_view,
)
from requant.libraries import NO_CLASS_HINT, Library, Request, UnknownModelError
from requant.quantization.config import PerLayerQuantization
from requant.text import os_error_text

if TYPE_CHECKING:
    from requant.layouts.layout import LibraryLayout


ReadValues = Callable[[str, memoryview], None]
"""Writes the values of a source tensor or decoded layer, by the name that the library was shown."""


class LibraryLayoutError(CheckpointError):
    """A library's layout cannot be made of a checkpoint.

    Attributes:
        why: The reason, with the tensor that it is about, without the advice that the message adds.
    """

    def __init__(
        self, checkpoint: Checkpoint, library: Library, why: str, advice: str = "", tensor: str = ""
    ) -> None:
        self.why = f"{tensor}: {why}" if tensor else why
        message = f"{why}. {advice}" if advice else why
        where = tensor or f"--layout {library.name}"
        super().__init__(str(checkpoint.source), [Problem(where, message)])


@dataclass(eq=False)
class Relayout:
    """A library's layout of a checkpoint, and its layers under the library's names.

    Not data: it holds the library's functions and caches.

    Attributes:
        layout: The library's names, choice of layers and config.
        source_layers: Name -> the source's layer that the library was shown under it, as dense
            values.
        source: The source's layers as they are stored.
        extra_tensors: Names of the shown tensors that the library does not use, and that are kept.
        load_error: Why the library would not load the output with these; "" where it does.
        form: How the experts were converted for the class; "" where they were not.
    """

    layout: LibraryLayout
    source_layers: Mapping[str, SourceLayer]
    source: SourceLayout
    extra_tensors: tuple[str, ...] = ()
    load_error: str = ""
    form: str = ""

    @property
    def library(self) -> Library:
        """The library whose layout it is."""
        return self.layout.library

    @cached_property
    def layers(self) -> SourceLayout:
        """The layers with renamed, joined, cut and computed tensors."""
        layers = [self._layer(name) for name in self.layout.tensors]
        layers += (self.source_layers[name] for name in self.extra_tensors)
        quantization = self.source.quantization
        if quantization is not None:  # its entries are the source's names
            quantization = PerLayerQuantization(quantization.quantization, {})
        dropped = (*self.source.dropped, *self._dropped())
        return replace(
            self.source, layers=tuple(layers), quantization=quantization, dropped=dropped
        )

    def _dropped(self) -> Iterator[tuple[str, str]]:
        """The source's tensors that the library does not use, each with the reason."""
        library = self.library.name
        for name in self.layout.dropped:
            if name in self.extra_tensors:
                continue
            reason = f"{library}'s class has no use for them; --keep-extra keeps them"
            if name in self.layout.tensors:
                reason = f"{library} makes another tensor of this name"
            for part in self.source_layers[name].parts.values():
                yield part.name, reason

    @cached_property
    def keeps_row_orders(self) -> bool:
        """Whether every layer whose rows change their order is moved as a whole."""
        for name, output in self.layout.tensors.items():
            ordered = [x for x in map(self.source_layers.__getitem__, output.inputs) if x.row_order]
            if not ordered:
                continue
            runs = self._runs(name)
            if runs is None and len(output.inputs) == 1 and output.info.shape == ordered[0].shape:
                continue  # a bias
            if runs is None or any(r.start or r.count != prod(r.layer.shape[:-1]) for r in runs):
                return False
            if len(runs) > 1 and any(run.layer.packing is None for run in runs):
                return False
        return True

    def compute_tensor(self, name: str, fill: ReadValues) -> np.ndarray:
        """The bytes of a computed tensor.

        Args:
            name: Its name.
            fill: Called for each source that is needed.
        """
        output = self.layout.tensors[name]
        if isinstance(output, ByteCopy):
            return self._gather(output, fill)
        from requant.kernels.mlx_backend import empty, raw_bytes
        from requant.layouts.conversion_trace import MLX_DTYPE

        def load(source: str) -> Any:
            layer = self.source_layers[source]
            array, view = empty(layer.shape, MLX_DTYPE[layer.dtype])
            fill(source, view)
            return array

        return raw_bytes(self.layout.compute(name, load))

    def _gather(self, output: ByteCopy, fill: ReadValues) -> np.ndarray:
        """A tensor of moved bytes that are not whole rows of one encoding; source by source."""
        result = np.empty(output.info.nbytes, np.uint8)
        starts = [0, *accumulate(extent.nbytes for extent in output.extents)]
        for source in output.inputs:
            layer = self.source_layers[source]
            dense = np.empty(TensorInfo(layer.dtype, layer.shape).nbytes, np.uint8)
            fill(source, dense.data)
            for extent, start in zip(output.extents, starts, strict=False):
                if extent.tensor == source:
                    run = extent.stop - extent.start
                    into = result[start : start + extent.nbytes].reshape(-1, run)
                    into[:] = strided_view(dense, extent.start, run, extent.stride, extent.times)
        return result

    # -- one layer under its new name ----------------------------------------------------

    def _layer(self, name: str) -> SourceLayer:
        output = self.layout.tensors[name]
        sources = [self.source_layers[source] for source in output.inputs]
        if any(layer.is_quantized for layer in sources):
            return self._moved_codes(name, sources) or self._decoded(name, sources)
        if any(layer.packing is not None for layer in sources):
            return self._in_other_order(name, sources)
        if isinstance(output, ByteCopy):
            strided = sum(extent.times for extent in output.extents if extent.times > 1)
            if strided <= MAX_RANGES:
                layer = dense_layer(coalesced_tensor(name, output.info, self._stored(output)))
                return replace(layer, row_order=sources[0].row_order if sources else None)
        return dense_layer(ComputedTensor(name, output.info, output.inputs))

    def _in_other_order(self, name: str, sources: Sequence[SourceLayer]) -> SourceLayer:
        """A dense tensor whose values a packing reorders."""
        output, first = self.layout.tensors[name], sources[0]
        whole = isinstance(output, ByteCopy) and len(sources) == len(output.extents) == 1
        if not whole or output.info != TensorInfo(first.dtype, first.shape):
            return dense_layer(ComputedTensor(name, output.info, output.inputs))
        is_weight = name.endswith(".weight")
        path = name.removesuffix(".weight") if is_weight else name
        return replace(first, path=path, name="" if is_weight else name)

    def _stored(self, output: ByteCopy) -> Iterator[FileRange]:
        for extent in output.extents:
            part = self.source_layers[extent.tensor].parts["weight"]
            for start, stop in extent.ranges:
                yield from cut(part, start, stop)

    def _runs(self, name: str) -> tuple[RowRange, ...] | None:
        """The rows of source layers that an output consists of; None if it is not made of rows."""
        output = self.layout.tensors[name]
        if not isinstance(output, ByteCopy) or not name.endswith(".weight"):
            return None
        return row_runs(output, self.source_layers)

    def _moved_codes(self, name: str, sources: Sequence[SourceLayer]) -> SourceLayer | None:
        """The codes of the sources as rows of one layer; None where they must be decoded."""
        path, shape = name.removesuffix(".weight"), self.layout.tensors[name].info.shape
        runs = self._runs(name)
        if runs is None:
            return None
        first = sources[0]
        if self._keeps_tensor_scales(path, sources):
            stack = kept_separate(first, path, shape, runs)
            if stack is not None:
                return stack
        if not all(map(in_whole_units, runs)):
            return None
        if len({_merge_key(layer) for layer in sources}) > 1:
            return members_joined(path, shape, runs)
        if len({tuple(x.name for x in layer.rotation_tensors.values()) for layer in sources}) > 1:
            return None  # rows of one layer cannot have their inputs rotated differently
        if first.packing is None and sum(run.count for run in runs if run.step > 1) > MAX_RANGES:
            return members_joined(path, shape, runs)
        layer = replace(first, path=path, name="", as_named=None, shape=shape)
        if first.packing is not None:
            return replace(layer, row_ranges=runs)
        parts = self._moved_parts(path, shape, runs)
        return None if parts is None else replace(layer, parts=parts)

    def _moved_parts(
        self, path: str, shape: tuple[int, ...], runs: Sequence[RowRange]
    ) -> dict[str, SourceTensor] | None:
        """Weight, scales and biases of rows in MLX's encoding.

        None where they have a global scale and the class has no place for it.
        """
        parts: dict[str, SourceTensor] = {}
        for role, part in runs[0].layer.parts.items():
            if role == "global_scale":
                scales = stacked_global_scales(path, shape, runs)
                if scales is None or path not in self.layout.with_global_scale:
                    return None
                parts[role] = scales
                continue
            info = TensorInfo(part.info.dtype, (*shape[:-1], part.info.shape[-1]))
            ranges = (piece for run in runs for piece in row_byte_ranges(run, role))
            parts[role] = coalesced_tensor(f"{path}.{role}", info, ranges)
        return parts

    def _keeps_tensor_scales(self, path: str, sources: Sequence[SourceLayer]) -> bool:
        """Whether NVFP4's tensor scales are kept as tensors of their own.

        They are where they cannot be multiplied into the group scales, and the class loads them.
        """
        if path not in self.layout.with_global_scale:
            return False
        return all(map(has_tensor_scale, sources)) and any(x.encoding is None for x in sources)

    def _decoded(self, name: str, sources: Sequence[SourceLayer]) -> SourceLayer:
        """A layer that is computed from decoded values; by default requantized to 8 bits."""
        output = self.layout.tensors[name]
        layer = dense_layer(ComputedTensor(name, output.info, output.inputs))
        quantizable = layer.path in self.layout.quantizable
        choices = [x.policy.requires_choice for x in sources]
        return replace(
            layer,
            is_decoded=True,
            stored_description=" and ".join(dict.fromkeys(x.stored_as for x in sources)),
            policy=DefaultPolicy(
                fallback=recomputed(sources, layer.shape[-1]) if quantizable else None,
                reason=Reason(
                    ReasonCode.REENCODED_BY_RULE,
                    f"{self.library.name}'s rule for this model works on its values",
                ),
                requires_choice=next(filter(None, choices), ""),
            ),
        )


def build_relayout(
    checkpoint: Checkpoint,
    source: SourceLayout,
    library: Library,
    request: Request,
    keep_extra: bool = False,
) -> Relayout:
    """Make a library's layout of a checkpoint.

    Args:
        checkpoint: The source.
        source: Its layers as they are stored.
        library: The library.
        request: The target of its choice of layers (None for a dense model, and for a quantized
            one that keeps its codes), recipe and dtype.
        keep_extra: Keep the tensors that the library's class does not use, under their own names.

    Raises:
        CheckpointError: The library is not installed, has no class for the model, or would itself
            fail on this checkpoint.
    """
    if why := library.missing_class_reason(checkpoint.config):
        hint = NO_CLASS_HINT.format(library=library.name)
        raise LibraryLayoutError(checkpoint, library, why, hint)
    from requant.layouts.any_form import layout_in_any_form
    from requant.layouts.conversion_trace import Shown

    layers = {x.dense_name: x for x in (layer.as_named or layer for layer in source.layers)}
    infos = {name: TensorInfo(layer.dtype, layer.shape) for name, layer in layers.items()}
    with _layout_errors(checkpoint, library):
        config = without_blocks(
            with_changes(deepcopy(dict(checkpoint.config)), checkpoint.corrections)
        )
        shown = Shown(config, infos, _side_files(checkpoint), _folder_name(checkpoint))
        layout, form = layout_in_any_form(library, shown, request)
        if narrow := _narrow_members(layout, layers):
            layers |= {name: in_float32(layers[name]) for name in narrow}
            infos |= {name: TensorInfo("F32", infos[name].shape) for name in narrow}
            layout, form = layout_in_any_form(library, replace(shown, tensors=infos), request)
    if not keep_extra:
        return Relayout(layout, layers, source, form=form)
    extra = tuple(name for name in layout.dropped if name not in layout.tensors)
    infos = {name: x.info for name, x in layout.tensors.items()} | {x: infos[x] for x in extra}
    return Relayout(
        layout=layout,
        source_layers=layers,
        source=source,
        extra_tensors=extra,
        load_error=find_load_error(layout, infos),
        form=form,
    )


_READ_BY_LIBRARIES = (".json", ".yaml", ".txt", ".model", ".jinja", ".tiktoken")


def _side_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Files next to the weights that a library may read for its own config."""
    if checkpoint.gguf is not None:
        return {}
    return {
        name: checkpoint.path.resolve() / name
        for name in checkpoint.side_files
        if "/" not in name
        and name.endswith(_READ_BY_LIBRARIES)
        and name not in checkpoint.quantization_files  # the library is shown dense weights
        and (checkpoint.path / name).is_file()
    }


def _folder_name(checkpoint: Checkpoint) -> str:
    """The name by which some libraries recognize a model."""
    if checkpoint.repository is not None:
        return checkpoint.repository[0].rpartition("/")[2]
    return checkpoint.path.resolve().name or "model"


@contextmanager
def _layout_errors(checkpoint: Checkpoint, library: Library) -> Iterator[None]:
    """Translate the errors of a library's layout to LibraryLayoutError."""
    try:
        yield
    except UsageError:
        raise
    except UnknownModelError as error:
        hint = NO_CLASS_HINT.format(library=library.name)
        raise LibraryLayoutError(checkpoint, library, error.why, hint) from error
    except RequantError as error:
        raise LibraryLayoutError(checkpoint, library, str(error)) from error
    except OSError as error:  # the placeholders are written to a temporary folder
        message = f"{library.name} cannot be shown the model: {os_error_text(error)}"
        raise LibraryLayoutError(checkpoint, library, message) from error


def _narrow_members(layout: LibraryLayout, shown: Mapping[str, SourceLayer]) -> list[str]:
    """Inputs of outputs that join quantized layers of several dtypes, but for float32 ones.

    float32 holds the values of all of them.
    """
    narrow: list[str] = []
    for output in layout.tensors.values():
        layers = [shown[name] for name in output.inputs]
        dtypes = {layer.dtype for layer in layers}
        if len(dtypes) > 1 and dtypes <= set(KERNEL_FLOATS) and any(x.is_quantized for x in layers):
            narrow += (name for name in output.inputs if shown[name].dtype != "F32")
    return narrow


def _merge_key(layer: SourceLayer) -> tuple[object, ...]:
    """The properties that layers must share for their rows to be in one layer."""
    dtypes = tuple((role, part.info.dtype) for role, part in layer.parts.items())
    stored_kind = None if layer.packing is None else layer.packing.stored_kind
    return layer.encoding, layer.policy.fallback, layer.dtype, stored_kind, dtypes
