"""Read and write statistics files: requant's own form, and llama.cpp's forms by ``imatrix``.

Our own form is a safetensors file. For a layer ``L`` with ``in`` inputs, or a stack of ``E``
experts, it holds ``L.mean_square`` and perhaps ``L.mean_absolute``, float32 ``[in]`` or
``[E, in]``; ``L.count``, float32 ``[1]`` or ``[E]``, the number of tokens; and perhaps the mean of
``x x^T``: ``L.hessian_triangle``, float32 ``[in * (in + 1) / 2]`` or ``[E, in * (in + 1) / 2]``,
the upper triangle row by row, or as older files have it ``L.hessian``, ``[in, in]`` or
``[E, in, in]``. The metadata hold ``format`` and ``version``.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from requant.checkpoints.safetensors_header import (
    PREFIX_BYTES,
    HeaderEntry,
    build_header,
    format_tensor_name,
    header_length,
    parse_header,
    read_raw_header,
)
from requant.core.dtypes import TensorInfo
from requant.core.files import open_regular
from requant.errors import MAX_PROBLEMS, Problem
from requant.importance import imatrix
from requant.importance.statistics_file import (
    FileIdentity,
    StatisticsEntry,
    StatisticsFile,
    file_stamp,
    statistics_error,
    triangle,
    unreadable,
)
from requant.text import format_value

FORMAT, VERSION = "requant-statistics", "1"
_ROLES = ("mean_square", "mean_absolute", "count", "hessian", "hessian_triangle")
_CHUNK_BYTES = 4 << 20
_ROWS = 64  # of a triangle that are written at a time


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Statistics of the inputs of one layer or of a stack of experts, to be written."""

    mean_square: np.ndarray  # float32, ``[in]`` or ``[E, in]``
    count: np.ndarray  # ``[1]`` or ``[E]``: number of tokens; an expert with 0 has no statistics
    mean_absolute: np.ndarray | None = None  # like ``mean_square``, or None


def read_statistics(path: str | os.PathLike[str]) -> StatisticsFile:
    """Read a statistics file: ours, or llama.cpp's imatrix in either form.

    All numbers are checked once, a few MB at a time; none is kept in memory.

    Raises:
        CheckpointError: It cannot be read, or with all of its problems.
    """
    place = Path(path)
    try:
        fd = open_regular(place)
    except OSError as error:
        raise unreadable(str(place), error) from error
    try:
        return _read(str(place), file_stamp(fd))
    finally:
        os.close(fd)


@lru_cache(maxsize=4)
def _read(source: str, stamp: tuple[int, int]) -> StatisticsFile:
    """Read a file of this size and time of change; cached, since planning reads it repeatedly."""
    try:
        with open(open_regular(Path(source)), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            start = os.pread(file.fileno(), PREFIX_BYTES + 1, 0)
            if len(start) <= PREFIX_BYTES:
                problem = Problem("statistics", f"has {stamp[0]} bytes, too few for any form")
                raise statistics_error(source, [problem])
            nbytes, wrong = header_length(start[:PREFIX_BYTES], stamp[0])
            if start[:4] == b"GGUF":
                seen, problems = imatrix.read_gguf(source, stamp[0])
            elif start[PREFIX_BYTES:] == b"{" and wrong:
                seen, problems = [], [Problem("header", wrong)]
            elif start[PREFIX_BYTES:] == b"{":
                header = os.pread(file.fileno(), PREFIX_BYTES + nbytes, 0)
                seen, problems = _own(file, header, stamp[0])
            else:
                seen, problems = imatrix.read_older(file, stamp[0])
            if not problems:
                problems = list(_bad_numbers(file.fileno(), seen))
    except OSError as error:
        raise unreadable(source, error) from error
    if not problems and not seen:
        problems = [Problem("statistics", "holds no layer")]
    if problems:
        raise statistics_error(source, problems[:MAX_PROBLEMS])
    return StatisticsFile(FileIdentity(source, digest, stamp), seen)


def _bad_numbers(fd: int, seen: list[StatisticsEntry]) -> Iterator[Problem]:
    """Layers whose mean squares or counts are negative or not finite."""
    for entry in seen:
        name = format_tensor_name(entry.name)
        if not np.isfinite(entry.divisors).all() or entry.divisors.min(initial=0) < 0:
            yield Problem(name, "has counts that are negative or no numbers")
            continue
        left, offset = 4 * entry.size, entry.offset
        while left:
            data = os.pread(fd, min(left, _CHUNK_BYTES), offset)
            values = np.frombuffer(data[: len(data) & ~3], "<f4")
            if not values.size or not np.isfinite(values).all() or values.min() < 0:
                yield Problem(name, "holds values that are negative or no numbers")
                break
            left, offset = left - values.nbytes, offset + values.nbytes


def _own(file: BinaryIO, raw: bytes, size: int) -> imatrix.Found:
    entries, metadata, problems = parse_header(raw, size - len(raw))
    for key, wanted in (("format", FORMAT), ("version", VERSION)):
        if not problems and metadata.get(key) != wanted:
            message = f"{key} is {format_value(metadata.get(key))}, expected {wanted!r}"
            if key == "format":
                message += ": not a statistics file, but other tensors"
            problems = [Problem("__metadata__", message)]
    layers: dict[str, dict[str, HeaderEntry]] = {}
    for name, entry in entries.items():
        layer, _, role = name.rpartition(".")
        if not layer or role not in _ROLES:
            problems.append(Problem(name, f"is none of LAYER.{', LAYER.'.join(_ROLES)}"))
        layers.setdefault(layer, {})[role] = entry
    seen: list[StatisticsEntry] = []
    for layer, parts in layers.items() if not problems else ():
        if wrong := _wrong(parts):
            problems.append(Problem(layer, wrong))
            continue
        square = parts["mean_square"]
        hessian = parts.get("hessian_triangle", parts.get("hessian"))
        experts = 1 if len(square.info.shape) == 1 else square.info.shape[0]
        file.seek(len(raw) + parts["count"].start)
        counts = np.frombuffer(file.read(4 * experts), "<f4")
        with np.errstate(invalid="ignore"):  # a NaN of any kind is reported later
            divisors = np.where(counts > 0, 1.0, counts.astype(np.float64))  # means already
        seen.append(
            StatisticsEntry(
                name=layer,
                size=square.info.size,
                offset=len(raw) + square.start,
                divisors=divisors,
                experts=experts,
                hessian=None if hessian is None else len(raw) + hessian.start,
                has_triangles="hessian_triangle" in parts,
            )
        )
    return seen, problems


def _wrong(parts: Mapping[str, HeaderEntry]) -> str:
    """The contradiction between the tensors of one layer; "" if there is none."""
    missing = [role for role in ("mean_square", "count") if role not in parts]
    if missing:
        return f"lacks {' and '.join(missing)}"
    square = parts["mean_square"].info
    if square.dtype != "F32" or len(square.shape) not in (1, 2) or not square.size:
        return f"mean_square is {square}, expected F32 [in] or [E, in]"
    experts = 1 if len(square.shape) == 1 else square.shape[0]
    wanted = {
        "count": TensorInfo("F32", (experts,)),
        "mean_absolute": square,
        "hessian": TensorInfo("F32", (*square.shape, square.shape[-1])),
        "hessian_triangle": TensorInfo("F32", (*square.shape[:-1], triangle(square.shape[-1]))),
    }
    for role, info in wanted.items():
        if role in parts and parts[role].info != info:
            return f"{role} is {parts[role].info}, expected {info}"
    return ""


def write_statistics(
    path: str | os.PathLike[str],
    layers: Mapping[str, LayerStatistics],
    hessians: Mapping[str, Callable[[int], np.ndarray]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a statistics file; it is renamed to ``path`` when it is complete.

    By layer, ``hessians`` has a function that returns the Hessian of an expert, ``(in, in)``, of
    which the upper triangle is written. ``metadata`` are further entries: model, text, seed.

    Raises:
        OSError: It cannot be written.
    """
    tensors: dict[str, tuple[TensorInfo, Iterable[np.ndarray]]] = {}
    for layer, statistics in layers.items():
        for role in ("count", "mean_square", "mean_absolute"):
            array = getattr(statistics, role)
            if array is not None:
                array = np.ascontiguousarray(array, "<f4")
                tensors[f"{layer}.{role}"] = TensorInfo("F32", array.shape), [array]
    for layer, hessian in (hessians or {}).items():
        *stack, n_in = layers[layer].mean_square.shape
        info = TensorInfo("F32", (*stack, triangle(n_in)))
        tensors[f"{layer}.hessian_triangle"] = info, map(hessian, range(prod(stack)))

    def data() -> Iterator[memoryview]:
        for name, (_, arrays) in tensors.items():
            for array in arrays:
                rows = _triangle_rows(array) if name.endswith("_triangle") else [array]
                for row in rows:
                    yield np.ascontiguousarray(row, "<f4").reshape(-1).view(np.uint8).data

    _write(Path(path), {name: info for name, (info, _) in tensors.items()}, data(), metadata)


def _triangle_rows(matrix: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of a matrix from its diagonal on, some at a time."""
    for start in range(0, len(matrix), _ROWS):
        rows = range(start, min(start + _ROWS, len(matrix)))
        yield np.concatenate([matrix[row, row:] for row in rows])


def merge_statistics(
    parts: Sequence[Path], path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Write one statistics file of several, with no layer in two of them, a few MB at a time.

    Raises:
        OSError: It cannot be written.
    """
    places: list[tuple[str, TensorInfo, Path, int]] = []
    for part in parts:
        size = part.stat().st_size
        with part.open("rb") as file:
            raw, _ = read_raw_header(file, size)
        entries, _, problems = parse_header(raw, size - len(raw))
        if problems:
            raise statistics_error(str(part), problems)
        places += [(name, e.info, part, len(raw) + e.start) for name, e in entries.items()]

    def data() -> Iterator[memoryview]:
        for _, info, part, offset in places:
            with part.open("rb") as file:
                file.seek(offset)
                left = info.nbytes
                while left:
                    piece = file.read(min(left, _CHUNK_BYTES))
                    if not piece:
                        raise OSError(errno.EIO, "was cut while it was read", str(part))
                    yield memoryview(piece)
                    left -= len(piece)

    _write(Path(path), {name: info for name, info, _, _ in places}, data(), metadata)


def _write(
    place: Path,
    infos: Mapping[str, TensorInfo],
    data: Iterator[memoryview],
    metadata: Mapping[str, str] | None,
) -> None:
    header, _ = build_header(infos, {**(metadata or {}), "format": FORMAT, "version": VERSION})
    hidden = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with hidden.open("wb") as file:
            file.write(header)
            for piece in data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(place)
    finally:
        hidden.unlink(missing_ok=True)
