"""What the fuzzer feeds: seeds, ways to damage them, and readers that must survive.

A reader may return, or raise a ``RequantError``. Anything else is a finding: another exception,
more than ``SLOW_S`` seconds, or more memory than the process is allowed.
"""

import copy
import json
import random
import shutil
import struct
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from requant.api.convert import convert
from requant.api.verify import verify
from requant.checkpoints.safetensors_header import parse_header
from requant.core.dtypes import NUMPY_DTYPE
from requant.core.regex import Pattern
from requant.errors import RequantError
from requant.importance.reader import read_statistics
from requant.output.record import record_hash
from requant.planning.planner import make_plan
from requant.quantization.options import ConvertOptions
from requant.reports.record_summary import read_figures
from requant.sources.open import read_checkpoint
from tests.support.safetensors_files import prefixed

HERE = Path(__file__).parent
SEEDS = HERE / "seeds"
SLOW_S = 5.0

# A folder without its data: JSON files by name, and tensors as [dtype, shape], or with the
# data of small ones that readers look at.
Folder = dict[str, Any]

_ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    16,
    33,
    64,
    2**31,
    2**32,
    2**63,
    -(2**63),
    2**64,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    "",
    " ",
    "x",
    "0",
    "-1",
    "4bit",
    "awq",
    "gptq",
    "fp8",
    "mxfp4",
    "compressed-tensors",
    "re:(a|a)*b",
    "re:(",
    "re:.*",
    "-:.*",
    "(",
    "\ud800",
    "\x00",
    "../..",
    "é" * 300,
    "9" * 5000,
    "1.0.0",
    [],
    [[]],
    [0],
    [-1, 128],
    [128, 128],
    ["re:(a+)+$"],
    {},
    {"": None},
)
_SUFFIXES = (
    "weight",
    "scales",
    "biases",
    "bias",
    "qweight",
    "qzeros",
    "g_idx",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "scale",
    "absmax",
    "gate_up_proj_blocks",
    "gate_up_proj_scales",
    "weight.absmax",
    "global_scale",
    "é",
    "\ud7ff",
)
_AXES = (0, 1, 2, 3, 7, 8, 16, 31, 32, 64, 96, 128, 1000, 4096, 2**20, 2**31, 2**40, 2**62)


_SMALL = 200  # elements: the JSON of a quant_state, scales of a layer


def corpus() -> list[Folder]:
    """One small folder a published form of every format."""
    return json.loads((HERE / "corpus.json").read_text())


def reduced(folder: Path) -> Folder:
    """A checkpoint as the corpus holds it: its JSON and the tensors of a few layers."""
    with (folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in header))
    kept = {x for x in layers if not x.startswith("model.layers.")}
    kept |= set([x for x in layers if x.startswith("model.layers.")][:5])
    names = [name for name in header if name.rpartition(".")[0] in kept]
    tensors = {name: [header[name]["dtype"], header[name]["shape"]] for name in names}
    data = (folder / "model.safetensors").read_bytes()[8 + length :]
    for name in names:  # what readers look at while they plan
        small = prod(header[name]["shape"]) <= _SMALL and ".weight_packed" not in name
        if small or name.endswith(("weight_shape", "global_scale", "g_idx")):
            start, stop = header[name]["data_offsets"]
            tensors[name].append(b64encode(zlib.compress(data[start:stop], 9)).decode())
    found = {p.name: json.loads(p.read_text()) for p in sorted(folder.glob("*config*.json"))}
    found.pop("generation_config.json", None)
    made = {"files": found, "tensors": tensors}
    kept_metadata = {x: text for x, text in metadata.items() if x.rpartition(".")[0] in kept}
    return made | ({"metadata": kept_metadata} if kept_metadata else {})


# -- damage ----------------------------------------------------------------------------
def damage_json(value: Any, rng: random.Random) -> Any:
    """The value with one place changed; objects and lists are gone into."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.08:
            del value[key]
        elif kind < 0.16:
            new = rng.choice(
                [*value, *_SUFFIXES, "bits", "group_size", "ignore", "dynamic", "mode"]
            )
            value[new] = copy.deepcopy(value[key])
        else:
            value[key] = damage_json(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            value.insert(at, copy.deepcopy(rng.choice(_ODD)))
        elif rng.random() < 0.2:
            del value[at]
        else:
            value[at] = damage_json(value[at], rng)
        return value
    return copy.deepcopy(rng.choice(_ODD))


def damage_tensors(tensors: dict[str, Any], rng: random.Random) -> None:
    """Change a tensor's dtype, shape or name; take one away, or add one."""
    kind = rng.random()
    name = rng.choice(list(tensors)) if tensors else "x.weight"
    dtype, shape, *_ = tensors.get(name, ["F32", [2, 2]])
    if kind < 0.2:
        tensors.pop(name, None)
    elif kind < 0.4:
        tensors[name] = [rng.choice(list(NUMPY_DTYPE)), shape]
    elif kind < 0.7:
        shape = list(shape) or [1]
        at = rng.randrange(len(shape))
        pick = rng.random()
        if pick < 0.6:
            shape[at] = rng.choice((*_AXES, shape[at] + 1, shape[at] * 2, shape[at] // 2))
        elif pick < 0.8:
            del shape[at]
        else:
            shape.insert(at, rng.choice(_AXES))
        tensors[name] = [dtype, shape]
    else:
        layer = rng.choice(
            [name.rpartition(".")[0], "lm_head", "new", "model.layers.0.mlp.experts"]
        )
        tensors[f"{layer}.{rng.choice(_SUFFIXES)}"] = [dtype, list(shape)]


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes replaced, inserted, removed, or a run of them said twice."""
    raw = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        kind = rng.random()
        if kind < 0.4:
            raw[at : at + rng.randint(0, 3)] = rng.choice(
                [
                    b"-",
                    b"9" * rng.randint(1, 30),
                    b"[",
                    b"]",
                    b"{",
                    b"}",
                    b'"',
                    b",",
                    b":",
                    b"\\u0000",
                    b"null",
                    b"1e9",
                    b"\xff",
                    b"\x00",
                    b"\\ud800",
                    b"18446744073709551615",
                ]
            )
        elif kind < 0.6:
            raw[at : at + 1] = bytes([rng.randrange(256)])
        elif kind < 0.8:
            del raw[at : at + rng.randint(1, 20)]
        else:
            stop = min(len(raw), at + rng.randint(1, 200))
            raw[at:at] = raw[at:stop]
    return bytes(raw)


def damage_words(folder: Folder, rng: random.Random) -> None:
    """Change what small tensors and the metadata say of a layer."""
    declared = [name for name, (_, _, *packed) in folder["tensors"].items() if packed]
    metadata = folder.get("metadata", {})
    if metadata and (not declared or rng.random() < 0.5):
        name = rng.choice(list(metadata))
        try:
            metadata[name] = json.dumps(damage_json(json.loads(metadata[name]), rng))
        except ValueError:
            metadata[name] = "{"
    elif declared:
        tensor = folder["tensors"][rng.choice(declared)]
        data = zlib.decompress(b64decode(tensor[2]))
        if data[:1] == b"{" and rng.random() < 0.8:
            try:
                data = json.dumps(damage_json(json.loads(data), rng)).encode()
            except ValueError:
                data = b"{"
            tensor[1] = [len(data)]
        elif data:
            data = damage_bytes(data, rng)
        tensor[2] = b64encode(zlib.compress(data)).decode()


def header_of(tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> tuple[bytes, int]:
    """A header for tensors one after the other, and the bytes they take."""
    value: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for name, (dtype, shape, *_) in tensors.items():
        stop = start + prod(shape) * NUMPY_DTYPE[dtype].itemsize
        value[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    return json.dumps(value).encode(), start


# -- readers ---------------------------------------------------------------------------
def read_header(data: bytes) -> None:
    """A header as a file holds it, length prefix included; it may not even raise."""
    entries, _, problems = parse_header(data, 4096)
    assert all(entry.stop <= 4096 for entry in entries.values())
    assert all(str(problem) for problem in problems)


class FolderReader:
    """Writes a folder and plans two conversions of it; the weights are holes."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def write(self, folder: Folder) -> None:
        """Write the folder again."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        text, size = header_of(folder["tensors"], folder.get("metadata"))
        with (self.place / "model.safetensors").open("wb") as file:
            file.write(prefixed(text))
            # Beyond what a file system holds the header is rejected by size: as well.
            file.truncate(min(8 + len(text) + size, 1 << 42))
            header = json.loads(text)
            for name, (_, _, *packed) in folder["tensors"].items():
                start, stop = header[name]["data_offsets"]
                if packed and stop < 1 << 40:
                    file.seek(8 + len(text) + start)
                    file.write(zlib.decompress(b64decode(packed[0]))[: stop - start])
        for name, content in folder["files"].items():
            raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else None
            (self.place / name).write_bytes(raw or json.dumps(content).encode())

    def __call__(self, folder: Folder) -> None:
        """Plan to keep what is there, and to make it dense."""
        self.write(folder)
        for options in (
            ConvertOptions(layout="keep"),
            ConvertOptions(layout="keep", dequantize=True),
        ):
            try:
                plan = make_plan(read_checkpoint(self.place), options)
                assert len(plan.hash) == 64
            except RequantError as error:
                assert str(error)


class GgufReader:
    """Plans two conversions of a GGUF file that ends where its header does, or soon after."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __call__(self, data: bytes) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        (self.place / "m.gguf").write_bytes(data)
        for options in (
            ConvertOptions(layout="keep"),
            ConvertOptions(layout="keep", dequantize=True),
        ):
            try:
                checkpoint = read_checkpoint(self.place / "m.gguf")
                plan = make_plan(checkpoint, options)
                assert len(plan.hash) == 64
                for make in checkpoint.opened.generated_files.values():
                    json.loads(make())
            except RequantError as error:
                assert str(error)


class IndexReader:
    """Reads a folder of three small shards whose index is damaged; a fourth lies outside."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        (place.parent / "outside.safetensors").write_bytes(_shard(["outside"]))
        (place / "config.json").write_text("{}")
        for number, names in enumerate(SHARDS):
            (place / f"{number}.safetensors").write_bytes(_shard(names))

    def __call__(self, index: bytes) -> None:
        (self.place / "model.safetensors.index.json").write_bytes(index)
        try:
            tensors = read_checkpoint(self.place).tensors
            assert "outside" not in tensors
        except RequantError as error:
            assert str(error)


class RecordReader:
    """Verifies an output, and reads its figures, where ``requant.json`` is untrusted."""

    def __init__(self, place: Path) -> None:
        self.source, self.output = place.with_name("original"), place.with_name("output")

    def __call__(self, record: dict[str, Any]) -> None:
        if not self.output.exists():
            self.source.mkdir()
            (self.source / "config.json").write_text("{}")
            (self.source / "model.safetensors").write_bytes(_shard(["x.weight"]))
            convert(self.source, self.output, bits=4, layout="keep")
            (self.output / "extra.json").write_text("{}")
        text = json.dumps(record | {"sha256": record_hash(record)})
        (self.output / "requant.json").write_text(text)
        for read in (
            lambda: verify(self.output, threads=1),
            lambda: verify(self.source, self.output, threads=1),
            lambda: read_figures(self.output),
        ):
            try:
                read()
            except RequantError as error:
                assert str(error)


class StatisticsReader:
    """Reads a statistics file, and asks for what it says of every layer."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __call__(self, data: bytes) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        path = self.place / "statistics"
        path.write_bytes(data)
        try:
            statistics = read_statistics(path)
        except RequantError as error:
            assert str(error)
            return
        for name, entry in statistics.seen.items():
            answer = statistics.find(
                name, (entry.experts or 1, 1, entry.size // (entry.experts or 1))
            )
            if answer is not None and not isinstance(answer, str):
                for matrix in range(min(len(answer.entries), 8)):
                    weights = answer.weights(matrix)
                    assert weights is None or np.isfinite(weights).all()


def statistics_file(rng: random.Random) -> bytes:
    """Ours, or llama.cpp's in either form; each small and mostly sound."""
    sizes = [rng.choice((0, 1, 4, 32)) if rng.random() < 0.1 else 32 for _ in range(3)]
    names = [f"blk.{n}.{rng.choice(('attn_q', 'ffn_up', 'output', ''))}.weight" for n in range(3)]
    values = [struct.pack(f"<{size}f", *(rng.random() for _ in range(size))) for size in sizes]
    form = rng.random()
    if form < 0.35:
        data = struct.pack("<i", rng.choice((3, 3, 3, 0, -1, 1 << 30)))
        for name, size, floats in zip(names, sizes, values, strict=True):
            calls = rng.choice((1, 7, 0, -1, 1 << 31 - 1))
            data += struct.pack("<i", len(name)) + name.encode()
            data += struct.pack("<ii", max(min(calls, 2**31 - 1), -1), size) + floats
        return data + struct.pack("<i", 3)
    if form < 0.7:
        tensors: dict[str, Any] = {}
        for name, size in zip(names, sizes, strict=True):
            tensors[f"{name}.mean_square"] = ["F32", [size]]
            tensors[f"{name}.count"] = ["F32", [1]]
            if rng.random() < 0.3:
                tensors[f"{name}.hessian"] = ["F32", [size, size]]
            elif rng.random() < 0.3:
                tensors[f"{name}.hessian_triangle"] = ["F32", [size * (size + 1) // 2]]
        if rng.random() < 0.3:
            damage_tensors(tensors, rng)
        text, nbytes = header_of(tensors, {"format": "requant-statistics", "version": "1"})
        body = (
            rng.randbytes(nbytes % (1 << 16)) if rng.random() < 0.5 else bytes(nbytes % (1 << 16))
        )
        return prefixed(text) + body
    entries = []
    for name, size in zip(names, sizes, strict=True):
        entries += [(f"{name}.in_sum2", (1, size)), (f"{name}.counts", (1, rng.choice((1, 1, 2))))]
    data = b"GGUF" + struct.pack("<IQQ", 3, len(entries), 1)
    data += _gguf_string("general.type") + struct.pack("<I", 8) + _gguf_string("imatrix")
    offset = 0
    for name, shape in entries:
        data += _gguf_string(name) + struct.pack("<IQQ", 2, shape[1], shape[0])
        data += struct.pack("<IQ", 0, offset)
        offset += -(-4 * shape[0] * shape[1] // 32) * 32
    return data + bytes(-len(data) % 32) + rng.randbytes(offset)


def _shard(names: list[str]) -> bytes:
    """A sound file with tensors of zeros."""
    text, size = header_of({name: ["F32", [32, 64]] for name in names})
    return prefixed(text) + bytes(size)


def read_pattern(text: str) -> None:
    """A regular expression over names of every length."""
    try:
        pattern = Pattern(text)
        for name in ("lm_head", "model.layers.0.mlp.up_proj", "a" * 60 + "!", "ab." * 300):
            pattern.search(name)
    except RequantError as error:
        assert str(error)


# -- inputs ----------------------------------------------------------------------------
_PATTERN_PARTS = (
    r"a",
    r"b",
    r".",
    r"\d",
    r"\w",
    r"[a-z]",
    r"[^.]",
    r"(",
    r"(?:",
    r"(?=",
    r"(?!",
    r"(?<=",
    r"(?i)",
    r"(?P<x>",
    r")",
    r"|",
    r"*",
    r"+",
    r"?",
    r"*?",
    r"{2,5}",
    r"{1000}",
    r"{0,99999}",
    r"^",
    r"$",
    r"\b",
    r"\1",
    r"(?>",
    r"++",
    r"layers",
    r"é",
)


_ARCHITECTURES = (
    *("llama", "qwen2moe", "qwen3", "qwen3vl", "gemma2", "gemma3", "phi3", "gpt-oss"),
    *("mistral3", "smollm3", "granite", "seed_oss", "olmo2", "odd"),
)
_SETTINGS = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "expert_count",
    "expert_used_count",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_log_multiplier",
    "attention.temperature_scale",
    "attention.scale",
    "logit_scale",
)
_FLOATS = ("eps", "freq", "scale", "factor", "yarn")  # parts of the settings' names
_ROLES = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_qkv",
    "ffn_norm",
    "ffn_up",
    "ffn_gate_exps",
    "ffn_gate.3",
    "ffn_gate_inp_shexp",
    "attn_sinks",
)
_KINDS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 12: (256, 144), 14: (256, 210), 39: (32, 17)}
_KINDS |= {40: (64, 36), 24: (1, 1), 19: (256, 50)}


def _gguf_string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _gguf_value(rng: random.Random, like: str) -> bytes:
    """A value of the type that the key wants, mostly; else of any."""
    kind = like if rng.random() < 0.9 else rng.choice(["int", "float", "word", "words", "bool"])
    if kind == "int":
        return struct.pack("<II", 4, rng.choice([0, 1, 2, 4, 32, 64, 2**31, 2**32 - 1]))
    if kind == "float":
        return struct.pack("<If", 6, rng.choice([0.0, 1e-5, 1e4, float("inf"), float("nan")]))
    if kind == "bool":
        return struct.pack("<IB", 7, rng.randrange(2))
    if kind == "word":
        words = [
            "gpt2",
            "llama",
            "qwen2",
            "tekken",
            "default",
            "yarn",
            "longrope",
            "linear",
            "none",
            "",
            "a b",
        ]
        return struct.pack("<I", 8) + _gguf_string(rng.choice(words))
    if kind == "ints":
        numbers = [rng.randrange(8) for _ in range(rng.randint(0, 6))]
        if rng.random() < 0.1:
            numbers[:1] = [rng.choice([float("nan"), float("inf"), 1e300])]
            return struct.pack(f"<IIQ{len(numbers)}d", 9, 12, len(numbers), *numbers)
        return struct.pack(f"<IIQ{len(numbers)}i", 9, 5, len(numbers), *numbers)
    tokens = ["a", "b", "ab", "\u2581a", "<s>", "</s>", "<|end|>", "<|return|>", "a b", ""]
    words = [rng.choice(tokens) for _ in range(6)]
    return struct.pack("<IIQ", 9, 8, len(words)) + b"".join(map(_gguf_string, words))


def gguf_file(rng: random.Random) -> bytes:
    """A small model, plausible but for a place or two."""
    name = rng.choice(_ARCHITECTURES)
    keys = {"general.architecture": struct.pack("<I", 8) + _gguf_string(name)}
    for setting in _SETTINGS:
        if rng.random() < 0.9:
            like = "float" if any(part in setting for part in _FLOATS) else "int"
            like = "word" if setting.endswith("type") else like
            keys[f"{name}.{setting}"] = _gguf_value(rng, like)
    for key, like in (
        ("model", "word"),
        ("pre", "word"),
        ("tokens", "words"),
        ("merges", "words"),
        ("scores", "ints"),
        ("token_type", "ints"),
        ("bos_token_id", "int"),
        ("eos_token_id", "int"),
        ("add_bos_token", "bool"),
        ("chat_template", "word"),
    ):
        if rng.random() < 0.8:
            keys[f"tokenizer.ggml.{key}"] = _gguf_value(rng, like)
    names = ["token_embd.weight", "output_norm.weight", "rope_freqs.weight"]
    names += [f"blk.{rng.randrange(2)}.{rng.choice(_ROLES)}.weight" for _ in range(5)]
    names += [f"{rng.choice(names)[:-6]}{rng.choice(['bias', 'scale', 'weight'])}"]
    table, at = b"", 0
    for tensor in dict.fromkeys(names):
        kind = rng.choice(list(_KINDS))
        elements, nbytes = _KINDS[kind]
        shape = [256, *(rng.choice([1, 4, 64]) for _ in range(rng.randint(0, 2)))]
        table += _gguf_string(tensor) + struct.pack("<I", len(shape))
        table += struct.pack(f"<{len(shape)}QIQ", *shape, kind, at)
        at += -(-prod(shape) // elements * nbytes // 32) * 32
    counts = struct.pack("<IQQ", 3, len(dict.fromkeys(names)), len(keys))
    head = b"GGUF" + counts + b"".join(_gguf_string(k) + v for k, v in keys.items()) + table
    return head + bytes(-len(head) % 32 + at)


SHARDS = (["a.weight", "b.weight"], ["c.weight"], ["d.weight", "e.weight", "f.weight"])
_PATHS = (
    "../outside.safetensors",
    "0.safetensors/../1.safetensors",
    "./1.safetensors",
    "/etc/passwd",
    "1.safetensors\0",
    "a/" * 2000 + "1.safetensors",
    "\udc80.safetensors",
    "2.safetensors ",
    "config.json",
)


def index_text(rng: random.Random) -> bytes:
    """An index of the three shards, damaged as a value, as text, or both."""
    reported = {name: f"{at}.safetensors" for at, names in enumerate(SHARDS) for name in names}
    index: Any = {"metadata": {"total_size": 0}, "weight_map": reported}
    for _ in range(rng.randint(0, 2)):
        if rng.random() < 0.5:
            reported[rng.choice([*reported, "new", *_PATHS])] = rng.choice(
                [*reported.values(), *_PATHS]
            )
        else:
            index = damage_json(index, rng)
    text = json.dumps(index).encode()
    return damage_bytes(text, rng) if rng.random() < 0.5 else text


RECORD = json.loads((HERE / "record.json").read_text())


def record_value(rng: random.Random) -> Any:
    """What ``requant.json`` of a small output holds, damaged."""
    record: Any = copy.deepcopy(RECORD)
    for _ in range(rng.randint(1, 3)):
        if not isinstance(record, dict):
            return {}
        kind = rng.random()
        if kind < 0.2:
            key = rng.choice(["files", "headers", "tensors", "layers"])
            name = rng.choice([*_PATHS, "extra.json", "x.weight", "", "x" * 300, "\ud800"])
            if isinstance(record.get(key), dict):
                record[key][name] = rng.choice(list(_ODD))
        elif kind < 0.4 and isinstance(record.get("options"), dict):
            record["options"] = damage_json(record["options"], rng)
        else:
            record = damage_json(record, rng)
    return record if isinstance(record, dict) else {"record": record}


def make_input(kind: str, folders: list[Folder], rng: random.Random) -> Any:
    """One input of a kind, as ``readers`` has them."""
    if kind == "index":
        return index_text(rng)
    if kind == "record":
        return record_value(rng)
    if kind == "statistics":
        data = statistics_file(rng)
        return damage_bytes(data, rng) if rng.random() < 0.5 else data
    if kind == "gguf":
        data = gguf_file(rng)
        return damage_bytes(data, rng) if rng.random() < 0.3 else data
    if kind == "pattern":
        return "".join(rng.choice(_PATTERN_PARTS) for _ in range(rng.randint(1, 14)))
    folder = copy.deepcopy(rng.choice(folders))
    if kind == "header":
        text, _ = header_of(dict(list(folder["tensors"].items())[:4]))
        text = damage_bytes(text, rng)
        length = len(text) if rng.random() < 0.95 else rng.randrange(2**64)
        return struct.pack("<Q", length) + text
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:
            damage_tensors(folder["tensors"], rng)
        elif rng.random() < 0.3:
            damage_words(folder, rng)
        else:
            name = rng.choice(list(folder["files"]))
            content = folder["files"][name]
            if rng.random() < 0.05:
                raw = damage_bytes(json.dumps(content).encode(), rng)
                folder["files"][name] = raw.decode("utf-8", "replace")
            elif not isinstance(content, str):
                folder["files"][name] = damage_json(content, rng)
    if rng.random() < 0.1:
        names = list(folder["tensors"])
        weight_map: Any = dict.fromkeys(names, "model.safetensors")
        index = {"metadata": {}, "weight_map": damage_json(weight_map, rng)}
        folder["files"]["model.safetensors.index.json"] = index
    return folder


def readers(place: Path) -> dict[str, Callable[[Any], None]]:
    """Kind of input -> what reads it."""
    return {
        "header": read_header,
        "folder": FolderReader(place),
        "pattern": read_pattern,
        "gguf": GgufReader(place),
        "statistics": StatisticsReader(place.with_name("statistics")),
        "index": IndexReader(place.with_name("shards")),
        "record": RecordReader(place),
    }


def to_text(kind: str, value: Any) -> str:
    """An input as a seed file holds it."""
    content = value.hex() if isinstance(value, bytes) else value
    return json.dumps({"kind": kind, "input": content}, indent=1) + "\n"


def from_text(text: str) -> tuple[str, Any]:
    """The kind and the input of a seed file."""
    seed = json.loads(text)
    return seed["kind"], bytes.fromhex(seed["input"]) if seed["kind"] in (
        "header",
        "gguf",
        "index",
        "statistics",
    ) else seed["input"]
