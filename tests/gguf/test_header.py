"""The reader of GGUF headers: the package's own files, damaged files, any bytes at all."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.errors import Problem
from requant.gguf.header import Header, read_header
from requant.gguf.unsupported_types import _INTERNAL, _NEWER, _OF_FORK, _REMOVED, unsupported_type
from requant.kernels.gguf import TYPES

KINDS = gguf.GGMLQuantizationType
BLOCKY = [KINDS.Q4_0, KINDS.Q8_0, KINDS.Q4_K, KINDS.IQ2_XXS, KINDS.TQ1_0, KINDS.NVFP4]
MANY = settings(max_examples=60)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def entry(name: str, shape: list[int], kind: int, offset: int = 0) -> bytes:
    """A line of the tensor table; ``shape`` innermost first, as files have it."""
    axes = b"".join(struct.pack("<Q", size) for size in shape)
    return string(name) + struct.pack("<I", len(shape)) + axes + struct.pack("<IQ", kind, offset)


def built(
    table: list[bytes], pairs: list[bytes] | None = None, data: int = 4096, **changes: Any
) -> bytes:
    """A file written by hand: header, entries, table, padding, data."""
    declared = {
        "magic": b"GGUF",
        "version": 3,
        "tensors": len(table),
        "keys": len(pairs or ()),
    } | changes
    head = declared["magic"] + struct.pack(
        "<IQQ", declared["version"], declared["tensors"], declared["keys"]
    )
    head += b"".join(pairs or ()) + b"".join(table)
    return head + b"\0" * (-len(head) % 32) + bytes(data)


def read(path: Path, data: bytes) -> tuple[Header | None, list[Problem]]:
    path.write_bytes(data)
    return read_header(path.parent, path.name, len(data))


def message(path: Path, data: bytes) -> str:
    header, problems = read(path, data)
    assert problems, header
    return "\n".join(map(str, problems))


@MANY
@given(data=st.data())
def test_files_of_the_package(data: st.DataObject, tmp_path: Path) -> None:
    """Metadata of all types and tensors of all kinds: as GGUFReader reads them."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    scalars = {
        "uint32": st.integers(0, 2**32 - 1),
        "int64": st.integers(-(2**63), 2**63 - 1),
        "bool": st.booleans(),
        "string": st.text(max_size=9),
        "array": st.lists(st.integers(-9, 9), min_size=1, max_size=9),
    }
    for number in range(data.draw(st.integers(0, 6))):
        kind = data.draw(st.sampled_from(sorted(scalars)))
        getattr(writer, f"add_{kind}")(f"k.{number}", data.draw(scalars[kind]))
    writer.add_array("words", data.draw(st.lists(st.text(max_size=5), min_size=1, max_size=5)))
    for number in range(data.draw(st.integers(1, 5))):
        rows = data.draw(st.integers(1, 4))
        kind = data.draw(st.sampled_from([None, *BLOCKY]))
        if kind is None:
            writer.add_tensor(f"t.{number}", np.ones((rows, 3), np.float32))
        else:
            nbytes = gguf.GGML_QUANT_SIZES[kind][1]
            writer.add_tensor(f"t.{number}", np.ones((rows, nbytes), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header, problems = read_header(tmp_path, "m.gguf", path.stat().st_size)
    assert header is not None and not problems
    peer = gguf.GGUFReader(path)
    assert [t.name for t in header.tensors] == [t.name for t in peer.tensors]
    for mine, theirs in zip(header.tensors, peer.tensors, strict=True):
        assert mine.kind.name == theirs.tensor_type.name
        assert list(mine.shape) == theirs.shape.tolist()[::-1]
        assert (mine.offset, mine.nbytes) == (theirs.data_offset, theirs.n_bytes)
    for key, value in header.metadata.items():
        wanted = peer.fields[key].contents()
        assert (list(value) if isinstance(value, (tuple, np.ndarray)) else value) == wanted


def test_a_file_written_by_hand(tmp_path: Path) -> None:
    key = string("general.architecture") + struct.pack("<I", 8) + string("llama")
    data = built([entry("w", [32, 2], 2), entry("v", [3], 0, 64)], [key])
    header, problems = read(tmp_path / "m.gguf", data)
    assert header is not None and not problems
    assert header.metadata == {"general.architecture": "llama"}
    first, second = header.tensors
    start = len(data) - 4096
    assert (first.name, first.kind.name, first.shape) == ("w", "Q4_0", (2, 32))
    assert (first.offset, first.nbytes) == (start, 36)
    assert (second.shape, second.offset, second.nbytes) == ((3,), start + 64, 12)


W = entry("w", [32, 2], 2)
KEY = string("k") + struct.pack("<I", 4) + struct.pack("<I", 7)
HUGE = 2**63


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not a GGUF file: it is empty"),
        (b"GG", "is not a GGUF file: it starts with 47 47, expected 47 47 55 46"),
        (
            built([W], magic=b"GGML"),
            "it starts with 47 47 4d 4c, expected 47 47 55 46, the word GGUF",
        ),
        (b"GGUF", "the version takes 4 bytes from byte 4 on, but the file ends at 4"),
        (built([W], version=1), "is version 1 of GGUF, known are 2 and 3"),
        (built([W], version=3 << 24), "is big-endian"),
        (built([W], tensors=HUGE), "9,223,372,036,854,775,808 tensors, at most"),
        (built([W], keys=HUGE), "9,223,372,036,854,775,808 keys, at most"),
        (built([W], tensors=2**17), "was the download complete?"),
        (built([struct.pack("<Q", HUGE)]), "a tensor's name is a string of 9,223"),
        (built([W], [string("k") + struct.pack("<I", 13)]), "has a value of unknown type 13"),
        (built([W], [KEY, KEY]), "m.gguf: 'k': occurs twice in the metadata"),
        (
            built([W], [string("k") + struct.pack("<IIQ", 9, 9, 1)]),
            "'k' is an array of arrays, which no known key has",
        ),
        (
            built([W], [string("k") + struct.pack("<IIQ", 9, 4, HUGE)]),
            "'k' has 9,223,372,036,854,775,808 items, at most",
        ),
        (
            built([W], [string("k") + struct.pack("<IIQ", 9, 4, 2**21)]),
            "was the download complete?",
        ),
        (
            built([W], [string("general.alignment") + struct.pack("<II", 4, 48)]),
            "general.alignment is not a power of two",
        ),
        (
            built([W], [string("general.alignment") + struct.pack("<II", 4, 0)]),
            "general.alignment is not a power of two",
        ),
        (built([entry("w", [1] * 5, 0)]), "'w' has 5 axes, at most 4 are known"),
        (built([entry("w", [32, 2], 99)]), "m.gguf: w: is stored as type 99: Q8_2_X4 of"),
        (built([entry("w", [32, 2], 15)]), "is stored as type 15"),
        (built([entry("w", [0, 2], 0)]), "has the impossible shape [2, 0]"),
        (built([entry("w", [2**40, 2**40], 0)]), "has the impossible shape"),
        (built([entry("w", [33, 2], 2)]), "a row is not a multiple of the 32 values of a block"),
        (built([entry("w", [], 2)]), "a row is not a multiple of the 32 values of a block"),
        (built([entry("w", [2**20], 0)]), "m.gguf: w: ends at byte"),
        (built([entry("w", [32, 2], 2, HUGE)]), "m.gguf: w: ends at byte"),
        (built([entry("w", [32, 2], 2, 8)]), "w: begins at no multiple of the alignment 32"),
        (built([W, entry("v", [32], 0, 32)]), "m.gguf: v: overlaps w"),
        (built([W, entry("w", [3], 0, 64)]), "m.gguf: w: occurs twice in the tensor table"),
        (built([entry("../w", [3], 0)]), "the name holds parts of a path"),
        (built([entry("w\n", [3], 0)]), "the name holds the control character U+000A"),
    ],
)
def test_damaged_files_are_rejected_by_name(data: bytes, words: str, tmp_path: Path) -> None:
    assert words in message(tmp_path / "m.gguf", data)


def test_every_problem_is_found_in_one_run(tmp_path: Path) -> None:
    table = [entry("a", [33], 2), entry("b", [3], 99), entry("c", [2**30], 0)]
    assert message(tmp_path / "m.gguf", built(table)).count("\n") == 2


@MANY
@given(cut=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255))))
def test_any_damage_ends_in_problems_or_a_header(
    cut: float, flips: list[tuple[float, int]], tmp_path: Path
) -> None:
    key = string("general.architecture") + struct.pack("<I", 8) + string("llama")
    words = string("t") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("b")
    good = built([W, entry("v", [3], 0, 64)], [key, words, KEY], data=128)
    data = bytearray(good[: int(len(good) * cut)])
    for at, value in flips:
        if data:
            data[int(at * len(data))] = value
    header, problems = read(tmp_path / "m.gguf", bytes(data))
    assert header is not None or problems
    for tensor in header.tensors if header and not problems else ():
        assert 0 < tensor.offset <= tensor.offset + tensor.nbytes <= len(data)


@MANY
@given(noise=st.binary(max_size=400))
def test_noise_behind_the_magic(noise: bytes, tmp_path: Path) -> None:
    for data in (noise, b"GGUF" + noise, b"GGUF\x03\0\0\0" + noise):
        header, problems = read(tmp_path / "m.gguf", data)
        assert header is not None or problems


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (4, "Q4_2, removed from llama.cpp"),
        (31, "Q4_0_4_4, removed from llama.cpp, which repacks rows while it loads them"),
        (33, "Q4_0_8_8, removed"),
        (36, "IQ4_NL_4_4 (in ik_llama.cpp I2_S), removed"),
        (38, "IQ4_NL_8_8, removed"),
        (9, "Q8_1, which llama.cpp keeps for products in memory"),
        (15, "Q8_K, which llama.cpp keeps"),
        (42, "Q2_0 of llama.cpp, not read here yet; known are Q4_0"),
        (137, "IQ2_K of the fork ik_llama.cpp"),
        (139, "IQ4_K of the fork ik_llama.cpp"),
        (144, "IQ4_KS of the fork ik_llama.cpp"),
        (155, "IQ4_KT of the fork ik_llama.cpp"),
        (212, "Q4_K_R4 of the fork ik_llama.cpp"),
        (399, "Q8_K_R8 of the fork ik_llama.cpp"),
        (1234, "which llama.cpp does not have"),
    ],
)
def test_types_of_others_are_named_with_a_way_out(number: int, words: str, tmp_path: Path) -> None:
    found = message(tmp_path / "m.gguf", built([entry("w", [256, 2], number)]))
    assert f"m.gguf: w: is stored as type {number}" in found and words in found
    if number != 42:
        assert "take a file of the model in another type" in found


def test_every_type_of_the_package_is_read_or_named() -> None:
    for kind in KINDS:
        if kind not in TYPES:
            assert kind.name in unsupported_type(kind), kind
    numbers = {*_REMOVED, *_INTERNAL, *_NEWER, *_OF_FORK}
    assert not numbers & set(TYPES)
    assert len(numbers) == sum(map(len, (_REMOVED, _INTERNAL, _NEWER, _OF_FORK)))
