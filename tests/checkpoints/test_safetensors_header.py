"""Safetensors headers: every way to be bad is named, and nothing in a file makes us raise."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from requant.checkpoints import safetensors_header
from requant.checkpoints.safetensors_header import (
    HeaderEntry,
    build_header,
    header_length,
    parse_header,
)
from requant.core.dtypes import NUMPY_DTYPE, TensorInfo
from requant.core.limits import MAX_HEADER_BYTES, MAX_NAME_CHARS, MAX_TENSORS
from requant.errors import MAX_PROBLEMS, KeyCollisionError, OutOfRangeError
from tests.support.safetensors_files import entry, header, prefixed, weights

U8 = entry("U8", [4], 0, 4)


def reference_rejects(raw: bytes) -> bool:
    """Whether the safetensors package takes the file."""
    try:
        safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return True
    return False


def problems_of(head: bytes, data_bytes: int) -> list[str]:
    return [str(problem) for problem in parse_header(head, data_bytes)[2]]


def test_header_written_by_hand() -> None:
    """Out of order, with an empty tensor, a scalar, metadata and padding."""
    text = (
        b'{"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},'
        b'"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        b'"empty":{"shape":[0,7],"data_offsets":[4,4],"dtype":"F16"},'
        b'"__metadata__":{"format":"pt"}}   '
    )
    entries, metadata, problems = parse_header(struct.pack("<Q", len(text)) + text, 16)
    assert problems == []
    assert metadata == {"format": "pt"}
    assert list(entries.items()) == [
        ("b", HeaderEntry(TensorInfo("BF16", (2, 3)), 4, 16)),
        ("a", HeaderEntry(TensorInfo("F32", ()), 0, 4)),
        ("empty", HeaderEntry(TensorInfo("F16", (0, 7)), 4, 4)),
    ]


def test_build_by_hand() -> None:
    """The exact bytes: compact JSON, UTF-8, spaces up to a multiple of 8."""
    tensors = {"ä": TensorInfo("U32", (2, 1)), "b": TensorInfo("F8_E4M3", (3,))}
    head, offsets = build_header(tensors, {"format": "mlx"})
    text = (
        '{"__metadata__":{"format":"mlx"},'
        '"ä":{"dtype":"U32","shape":[2,1],"data_offsets":[0,8]},'
        '"b":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[8,11]}}'
    ).encode()
    assert head == struct.pack("<Q", 152) + text.ljust(152)
    assert offsets == {"ä": 0, "b": 8}


def test_build_rejects_the_name_of_the_metadata() -> None:
    with pytest.raises(KeyCollisionError, match="__metadata__"):
        build_header({"__metadata__": TensorInfo("U8", (1,))}, {})


def test_build_rejects_a_header_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("requant.checkpoints.safetensors_header.MAX_HEADER_BYTES", 64)
    with pytest.raises(OutOfRangeError, match="smaller shards"):
        build_header({f"t{i}": TensorInfo("U8", (1,)) for i in range(3)}, {})


# Bad entries of a tensor ``a``: (entry, bytes of data, what the message says), and bad headers:
# (header, bytes of data, where, what the message says).
ENTRIES_BY_BOTH: dict[str, tuple[object, int, str]] = {
    "entry is a list": ([], 0, "is [], expected an object with dtype"),
    "entry is null": (None, 0, "is null, expected an object"),
    "no dtype": ({"shape": [4], "data_offsets": [0, 4]}, 4, "has no dtype"),
    "no shape": ({"dtype": "U8", "data_offsets": [0, 4]}, 4, "has no shape"),
    "no offsets": ({"dtype": "U8", "shape": [4]}, 4, "has no data_offsets"),
    "dtype unknown": (entry("Q4", [4], 0, 4), 4, "dtype is 'Q4', known: BOOL,"),
    "dtype a number": (entry(7, [4], 0, 4), 4, "dtype is 7, known: BOOL,"),
    "dtype a list": (entry([], [4], 0, 4), 4, "dtype is [], known: BOOL,"),
    "shape a number": (entry("U8", 4, 0, 4), 4, "shape is 4, expected a list"),
    "shape of booleans": (entry("U8", [True, 4], 0, 4), 4, "[true, 4]"),
    "shape of floats": (entry("U8", [4.0], 0, 4), 4, "shape is [4.0]"),
    "shape of strings": (entry("U8", ["4"], 0, 4), 4, "a list of 1"),
    "shape negative": (entry("U8", [-2, -2], 0, 4), 4, "shape is [-2, -2]"),
    "shape huge": (entry("U8", [2**64 + 4], 0, 4), 4, "18446744073709551620"),
    "elements overflow": (entry("U8", [2**40, 2**40], 0, 4), 4, "has more than 2**63 - 1 elements"),
    "elements overflow to the right size": (
        entry("U8", [2**62, 4, 1], 0, 0),
        0,
        "has more than 2**63 - 1 elements",
    ),
    "offsets a number": (
        {"dtype": "U8", "shape": [4], "data_offsets": 4},
        4,
        "data_offsets is 4, expected two numbers",
    ),
    "one offset": (entry("U8", [4], 4), 4, "data_offsets is [4]"),
    "three offsets": (entry("U8", [4], 0, 4, 4), 4, "data_offsets is [0, 4, 4]"),
    "offset a boolean": (entry("U8", [1], 0, True), 1, "[0, true]"),
    "offset a float": (entry("U8", [4], 0, 4.0), 4, "[0, 4.0]"),
    "offset negative": (entry("U8", [4], -4, 0), 0, "[-4, 0]"),
    "offset huge": (entry("U8", [4], 0, 2**64), 4, str(2**64)),
    "offsets reversed": (entry("U8", [4], 4, 0), 4, "[4, 0] end before they start"),
    "size disagrees": (
        entry("BF16", [3, 5], 0, 28),
        28,
        "BF16 [3, 5] takes 30 bytes, but data_offsets [0, 28] hold 28",
    ),
    "no data at all": (U8, 0, "of which the file has 0"),
    "hole before the first": (
        entry("U8", [4], 1, 5),
        5,
        "starts at byte 1, but the data starts at 0",
    ),
}
REJECTED_BY_BOTH: dict[str, tuple[bytes, int, str, str]] = {
    **{k: (header({"a": e}), n, "a", m) for k, (e, n, m) in ENTRIES_BY_BOTH.items()},
    "empty file": (b"", 0, "header", "ends after 0 bytes, expected 8"),
    "seven bytes": (b"\2\0\0\0\0\0\0", 0, "header", "ends after 7 bytes, expected 8"),
    "length beyond the file": (
        struct.pack("<Q", 999) + b"{}",
        0,
        "header",
        "say that 999 bytes of header follow, but only 2 do",
    ),
    "length of all ones": (b"\xff" * 8 + b"{}", 0, "header", "18446744073709551615"),
    "git lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        0,
        "header",
        "Git LFS pointer",
    ),
    "length 0": (prefixed(b""), 0, "header", "not JSON"),
    "not UTF-8": (prefixed(b'{"\xff": 1}'), 0, "header", "not UTF-8: byte 2 is 0xff"),
    "not JSON": (prefixed(b'{"a": '), 0, "header", "not JSON"),
    "UTF-16": (prefixed("{}".encode("utf-16-le")), 0, "header", "not JSON"),
    "byte order mark": (prefixed(b"\xef\xbb\xbf{}"), 0, "header", "not JSON"),
    "text after the JSON": (prefixed(b"{}\0\0\0\0\0\0"), 0, "header", "not JSON"),
    "NaN": (prefixed(b'{"a": NaN}'), 0, "header", "NaN"),
    "half a surrogate pair": (
        prefixed(b'{"\\ud800": {"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'),
        4,
        "header",
        "surrogate",
    ),
    "list": (header([]), 0, "header", "is [], expected an object"),
    "string": (header("x"), 0, "header", "is 'x', expected an object"),
    "nesting bomb": (prefixed(b"[" * 200_000), 0, "header", "nested too deeply"),
    "nesting bomb inside": (
        prefixed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        0,
        "header",
        "nested too deeply",
    ),
    "number of 5000 digits": (
        prefixed(b'{"a": {"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
        4,
        "header",
        "not JSON",
    ),
    "beyond the end": (
        header({"a": U8, "b": entry("U8", [4], 4, 8)}),
        7,
        "b",
        "ends at byte 8 of the data, of which the file has 7",
    ),
    "overlap": (
        header({"a": U8, "b": entry("U8", [4], 2, 6)}),
        6,
        "b",
        "overlaps a: starts at byte 2, which ends at 4",
    ),
    "the same bytes twice": (header({"a": U8, "b": U8}), 4, "b", "overlaps a"),
    "inside another": (
        header({"a": entry("U8", [8], 0, 8), "b": entry("U8", [2], 2, 4)}),
        8,
        "b",
        "overlaps a",
    ),
    "empty tensor inside another": (
        header({"a": U8, "b": entry("U8", [0], 2, 2)}),
        4,
        "b",
        "overlaps a",
    ),
    "hole between": (
        header({"a": U8, "b": entry("U8", [4], 6, 10)}),
        10,
        "b",
        "starts at byte 6, but a ends at 4",
    ),
    "bytes after the last": (
        header({"a": U8}),
        5,
        "header",
        "end at byte 4 of the data, the file at 5",
    ),
    "data of nobody": (header({}), 3, "header", "end at byte 0 of the data, the file at 3"),
    "metadata a list": (
        header({"__metadata__": []}),
        0,
        "__metadata__",
        "is [], expected an object",
    ),
    "metadata of numbers": (
        header({"__metadata__": {"k": 1}}),
        0,
        "__metadata__",
        "'k' is 1, expected a string",
    ),
}
ENTRIES_BY_US: dict[str, tuple[object, int, str]] = {
    "rank 33": (entry("U8", [1] * 33, 0, 1), 1, "33 axes, at most 32"),
    "elements overflow next to a zero": (
        entry("U8", [0, 2**40, 2**40], 0, 0),
        0,
        "has more than 2**63 - 1 elements",
    ),
    "dtype of half a byte": (entry("F4", [8], 0, 4), 4, "dtype is 'F4', known"),
}
REJECTED_BY_US: dict[str, tuple[bytes, int, str, str]] = {
    **{k: (header({"a": e}), n, "a", m) for k, (e, n, m) in ENTRIES_BY_US.items()},
    "tensor twice": (
        prefixed(b'{"a":%(e)s,"a":%(e)s}' % {b"e": json.dumps(U8).encode()}),
        4,
        "header",
        "the key 'a' occurs more than once",
    ),
    "field twice": (
        prefixed(b'{"a":{"dtype":"I8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}'),
        4,
        "header",
        "the key 'dtype' occurs more than once",
    ),
    "name empty": (header({"": U8}), 4, "''", "name of a tensor is empty"),
    "name with a newline": (header({"a\nb": U8}), 4, "'a\\nb'", "control character U+000A"),
    "name with an escape": (header({"\x1b[2J": U8}), 4, "'\\x1b[2J'", "U+001B"),
    "name that turns the text": (header({"a\u202eb": U8}), 4, "'a\\u202eb'", "U+202E"),
}


@pytest.mark.parametrize("case", REJECTED_BY_BOTH | REJECTED_BY_US)
def test_what_is_wrong_is_said(case: str) -> None:
    head, data_bytes, where, message = (REJECTED_BY_BOTH | REJECTED_BY_US)[case]
    problems = parse_header(head, data_bytes)[2]
    assert [problem.where for problem in problems] == [where]
    assert message in problems[0].message


@pytest.mark.parametrize("case", REJECTED_BY_BOTH)
def test_the_reference_rejects_too(case: str) -> None:
    head, data_bytes, _, _ = REJECTED_BY_BOTH[case]
    assert reference_rejects(head + bytes(data_bytes))


def test_header_larger_than_any_reader_takes() -> None:
    """Only the length is looked at; a file of that size need not exist."""
    prefix = struct.pack("<Q", MAX_HEADER_BYTES + 1)
    assert header_length(prefix, 2**40) == (
        0,
        "the header takes 100000001 bytes, at most 100000000 are read",
    )
    assert header_length(struct.pack("<Q", MAX_HEADER_BYTES), 2**40) == (MAX_HEADER_BYTES, "")


def test_length_that_disagrees_with_the_bytes_given() -> None:
    assert problems_of(struct.pack("<Q", 2) + b"{} ", 8) == [
        "header: the length says 2 bytes, 3 are there"
    ]


def test_metadata_null_is_none_as_mlx_writes_it(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"a": mx.ones((2,))})
    written = (tmp_path / "a.safetensors").read_bytes()
    assert b'"__metadata__":null' in written
    entries, metadata, problems = parse_header(written[:-8], 8)
    assert (list(entries), metadata, problems) == (["a"], {}, [])


def test_every_problem_in_one_run() -> None:
    head = header(
        {
            "__metadata__": {"n": 1},
            "good": U8,
            "short": entry("F32", [2], 4, 8),
            "bare": {},
            "far": entry("U8", [4], 8, 12),
            "farther": entry("U8", [4], 12, 16),
        }
    )
    entries, _, problems = parse_header(head, 10)
    assert [problem.where for problem in problems] == [
        "__metadata__",
        "short",
        *["bare"] * 3,
        "far",
    ]
    assert "(and 1 more tensor)" in problems[-1].message
    assert list(entries) == ["good"]


def test_found_values_are_cut_short_in_messages() -> None:
    """A value of a megabyte does not become a message of a megabyte."""
    long = "x" * 1_000_000
    for bad in (entry(long, [4], 0, 4), entry("U8", long, 0, 4), long, [long] * 9):
        assert sum(map(len, problems_of(header({"a": bad}), 4))) < 500


@pytest.mark.slow
def test_many_overlaps_take_no_long() -> None:
    """Each of 50,000 tensors overlaps all others; comparing pairs would take minutes."""
    many = {f"t{i}": entry("U8", [100_000 - i], i, 100_000) for i in range(50_000)}
    problems = parse_header(header(many), 100_000)[2]
    assert len(problems) == MAX_PROBLEMS + 1
    assert "more problems" in problems[-1].message


MANY = MAX_TENSORS + 1
HOSTILE = {
    "many objects": ('{"a":{' + '"":{},' * MANY, "objects, at most"),
    "many lists": ('{"a":[' + "[]," * (16 * MANY), "JSON values"),
    "many numbers": ('{"a":[' + "0," * (16 * MANY), "JSON values"),
    "deep lists": ('{"a":' + "[" * 1_000_000, "nested too deeply"),
    "deep objects": ('{"a":' * 200_000, "nested too deeply"),
    "65 levels": ('{"a":' * 65 + "1" + "}" * 65, "at most 64 levels"),
    "a long number": ('{"a":' + "9" * 1_000_000 + "}", "Exceeds the limit"),
    "a long key": ('{"' + "a" * 1_000_000 + '":1}', "1,000,000 characters, at most 1,024"),
    "one key again and again": ("{" + '"a":1,' * 100_000 + '"a":1}', "occurs more than once"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_rejected_at_once(case: str) -> None:
    text, message = HOSTILE[case]
    began = time.process_time()
    found = problems_of(prefixed(text.encode()), 0)
    assert time.process_time() - began < 2
    assert any(message in problem for problem in found), found[:3]
    assert sum(map(len, found)) < 1000


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/../b", "..", "a/..", "a" * (MAX_NAME_CHARS + 1)]
)
def test_names_that_are_paths_or_endless(name: str) -> None:
    (found,) = problems_of(header({name: U8}), 4)
    assert "the name h" in found


@pytest.mark.parametrize("shape", [[0, 2**62], [2**40, 0], [5000, 5000, 0]])
def test_tensors_that_hold_nothing_many_times(shape: list[int]) -> None:
    """Whoever walks over the rows of such a tensor never comes home."""
    (found,) = problems_of(header({"a": entry("U8", shape, 0, 0)}), 0)
    assert "holds nothing" in found


def test_build_rejects_more_tensors_than_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("requant.checkpoints.safetensors_header.MAX_TENSORS", 1)
    tensors = {name: TensorInfo("U8", (1,)) for name in "ab"}
    with pytest.raises(OutOfRangeError, match="smaller shards"):
        build_header(tensors, {})


SAFE_NAMES = st.text(
    st.characters(exclude_categories=["Cc", "Cs", "Cf", "Zl", "Zp"]), min_size=1, max_size=20
).filter(lambda name: name != "__metadata__" and name[0] != "/" and ".." not in name)
INFOS = st.builds(
    TensorInfo,
    st.sampled_from(sorted(NUMPY_DTYPE)),
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
)


@given(
    tensors=st.dictionaries(SAFE_NAMES, INFOS, max_size=8),
    metadata=st.dictionaries(SAFE_NAMES, st.text(st.characters(exclude_categories=["Cs"]))),
)
def test_what_is_built_is_parsed_and_loads_in_the_referee(
    tensors: dict[str, TensorInfo], metadata: dict[str, str]
) -> None:
    head, offsets = build_header(tensors, metadata)
    data = bytes(i % 256 for i in range(sum(info.nbytes for info in tensors.values())))
    entries, parsed_metadata, problems = parse_header(head, len(data))
    assert problems == []
    assert parsed_metadata == metadata
    assert len(head) % 8 == 0
    assert {name: (e.info, e.start) for name, e in entries.items()} == {
        name: (tensors[name], offsets[name]) for name in tensors
    }
    assert as_seen_by_the_referee(head + data) == {
        name: (info.dtype, info.shape, data[offsets[name] :][: info.nbytes])
        for name, info in tensors.items()
    }


def as_seen_by_the_referee(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (found["dtype"], tuple(found["shape"]), bytes(found["data"]))
        for name, found in safetensors.deserialize(raw)
    }


def test_a_file_of_the_referee_is_parsed_equal() -> None:
    arrays: dict[str, Any] = {
        f"t.{name}": np.ones((2, 3), dtype)
        for name, dtype in NUMPY_DTYPE.items()
        if dtype.kind in "biufc" and dtype.isbuiltin == 1
    }
    raw = safetensors.numpy.save(arrays, metadata={"format": "np"})
    (length,) = struct.unpack("<Q", raw[:8])
    entries, metadata, problems = parse_header(raw[: 8 + length], len(raw) - 8 - length)
    data = raw[8 + length :]
    assert problems == []
    assert metadata == {"format": "np"}
    assert {
        name: (e.info.dtype, e.info.shape, data[e.start : e.stop]) for name, e in entries.items()
    } == as_seen_by_the_referee(raw)
    assert len(entries) == len(arrays) > 10


VALID = weights(
    {"a.weight": ("F32", [2, 2]), "a.scales": ("F16", [4]), "none": ("U8", [0]), "b": ("I64", [1])}
)
(VALID_LENGTH,) = struct.unpack("<Q", VALID[:8])


@settings(max_examples=500)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, 7 + VALID_LENGTH),
            st.one_of(
                st.sampled_from([bytes([c]) for c in b'0123456789{}[]",:-.eE \\\0\xff']),
                st.binary(max_size=3),
            ),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=4,
    ),
    cut=st.integers(0, 40),
)
def test_a_damaged_header_never_raises_and_never_passes(
    edits: list[tuple[int, bytes, int]], cut: int
) -> None:
    """Bytes replaced, inserted and removed: what the reference rejects, we reject."""
    damaged = VALID
    for place, new, removed in edits:
        damaged = damaged[:place] + new + damaged[place + removed :]
    damaged = damaged[: len(damaged) - cut if cut < 20 else None]
    assume(b"-0" not in damaged)  # 0 to us, no integer to the referee
    length, message = header_length(damaged[:8], len(damaged))
    head = damaged[: 8 + length]
    entries, _, problems = parse_header(head, len(damaged) - len(head))
    if message:
        assert problems
    if reference_rejects(damaged):
        assert problems
    elif not problems:
        data = damaged[len(head) :]
        assert {
            name: (e.info.dtype, e.info.shape, data[e.start : e.stop])
            for name, e in entries.items()
        } == as_seen_by_the_referee(damaged)


@given(raw=st.binary(max_size=64), data_bytes=st.integers(0, 64))
def test_any_bytes_at_all(raw: bytes, data_bytes: int) -> None:
    parse_header(raw, data_bytes)
    parse_header(prefixed(raw), data_bytes)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**64)
    | st.floats()
    | st.sampled_from(["", "U8", "BF16", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner)
    ),
    max_leaves=12,
)


@given(value=st.dictionaries(st.sampled_from(["__metadata__", "a", "b", "\x07"]), JSON))
def test_any_json_at_all(value: dict[str, Any]) -> None:
    entries, _, problems = parse_header(header(value), 8)
    assert problems or sum(e.stop - e.start for e in entries.values()) == 8


ODD_NAMES = st.sampled_from(["a.weight", 'with "quotes"', "naïve", "", "..", "b\\c"])
COUNTS = st.sampled_from([0, 1, 2, 4, 8, -1, 1.0, True, None, 1 << 64])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4", 7]),
        "shape": st.one_of(st.lists(COUNTS, max_size=3), st.just("22")),
        "data_offsets": st.one_of(st.lists(COUNTS, max_size=3), st.just({0: 0, 8: 0})),
    }
)


@given(st.dictionaries(ODD_NAMES, ENTRIES, max_size=3))
def test_ordinary_entries_are_read_as_all_others(header: dict[str, Any]) -> None:
    """The quick look at an entry accepts what the long one accepts, and nothing else."""
    text = json.dumps(header, default=list).encode()
    raw = len(text).to_bytes(8, "little") + text
    quick = safetensors_header.parse_header(raw, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_header, "_valid_entry", lambda *_: None)
        assert safetensors_header.parse_header(raw, 8) == quick


@pytest.mark.parametrize("metadata", [{}, {"format": "mlx", "ü": '"'}])
def test_a_header_is_what_json_writes(metadata: dict[str, str], tmp_path: Path) -> None:
    tensors = {
        'a "b"\\ü': TensorInfo("BF16", (2, 3)),
        "scalar": TensorInfo("F32", ()),
        "none": TensorInfo("U8", (0, 4)),
    }
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, info in tensors.items():
        span = [at, at + info.nbytes]
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": span}
        at += info.nbytes
    raw, offsets = safetensors_header.build_header(tensors, metadata)
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    assert raw[8:].rstrip(b" ") == text and len(raw) % 8 == 0
    assert offsets == {name: entries[name]["data_offsets"][0] for name in tensors}
    with (tmp_path / "sparse").open("wb") as file:
        safetensors_header.write_sparse(file, tensors, metadata)
    assert (tmp_path / "sparse").read_bytes() == raw + bytes(at)
    assert safetensors_header.build_header({}, {})[0] == b"\x08" + bytes(7) + b"{}      "
