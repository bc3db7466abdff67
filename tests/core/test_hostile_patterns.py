"""Every place where a config or a user writes patterns: explosive ones end in seconds, in each."""

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import requant
from requant.core import regex
from requant.core.limits import MAX_PATTERN_S, MAX_PATTERNS_S
from requant.core.regex import PatternError
from requant.errors import RequantError
from requant.output.record import encode_json, record_hash
from requant.planning.planner import make_plan
from requant.quantization.options import ConvertOptions
from requant.sources.open import read_checkpoint
from requant.weights.transform import transform_weights
from tests.fuzz.harness import FolderReader, corpus

pytestmark = pytest.mark.sweep(1)

BOMB = r"(.?){30}\1{30}[!?]"  # neither re nor regex ends over a name of seven letters
SHORT_S = MAX_PATTERN_S / 10
WILD = "*.*_*" * 40 + "!"
# Config, its method, and where the bomb goes: keys of the block, then what is there.
CONFIGS: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "compressed-tensors ignore": (
        "compressed-tensors",
        lambda block: block.update(ignore=[f"re:{BOMB}", "lm_head"]),
    ),
    "compressed-tensors targets": (
        "compressed-tensors",
        lambda block: block["config_groups"]["group_0"]["targets"].insert(0, f"re:{BOMB}"),
    ),
    "gptq dynamic": ("gptq", lambda block: block.update(dynamic={f"-:{BOMB}": {}})),
    "gptq dynamic, positive": (
        "gptq",
        lambda block: block.update(dynamic={f"+:{BOMB}": {"bits": 8}}),
    ),
    "auto-round extra_config": (
        "auto-round",
        lambda block: block.update(extra_config={BOMB: {"bits": 8}}),
    ),
    "modelopt exclude_modules": (
        "modelopt",
        lambda block: block.update(exclude_modules=[WILD, "lm_head"]),
    ),
    "modelopt ignore": ("modelopt", lambda block: block.update(ignore=[WILD, "lm_head"])),
    "quark exclude": ("quark", lambda block: block.update(exclude=[WILD])),
    "quark layer_quant_config": (
        "quark",
        lambda block: block.update(layer_quant_config={WILD: {}}),
    ),
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the time, so that the many cases take seconds."""
    monkeypatch.setattr(regex, "MAX_PATTERN_S", SHORT_S)


def rejected(pattern: str) -> str:
    """What the error says of an explosive pattern, to be matched."""
    return re.escape(f"{pattern!r} took more than {SHORT_S:g} s")


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail, rather than hang, where what is inside takes longer."""

    def late(_: int, __: FrameType | None) -> None:
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def with_block(method: str, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A folder of the corpus, its quantization changed in every file that describes it."""
    for folder in corpus():
        block = folder["files"]["config.json"].get("quantization_config") or {}
        if method not in (block.get("quant_method"), block.get("provider")):
            continue
        for name, content in folder["files"].items():
            found = content.get("quantization_config") if name == "config.json" else content
            change(found.get("quantization", found) if isinstance(found, dict) else {})
        return folder
    raise AssertionError(f"the corpus has no {method}")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The patterns that were asked about a name."""
    seen: set[str] = set()
    for name in ("search", "match", "fullmatch"):
        real = getattr(regex.Pattern, name)

        def noting(self: regex.Pattern, path: str, real: Any = real) -> bool:
            seen.add(self.text)
            return real(self, path)

        monkeypatch.setattr(regex.Pattern, name, noting)
    return seen


def plan_dense(folder: Path) -> None:
    make_plan(read_checkpoint(folder), ConvertOptions(layout="keep", dequantize=True))


@pytest.mark.parametrize("place", CONFIGS)
def test_of_another_tools_config(place: str, tmp_path: Path, asked: set[str]) -> None:
    """A regular expression is rejected by name; a wildcard is never explosive."""
    FolderReader(tmp_path / "source").write(with_block(*CONFIGS[place]))
    pattern = WILD if place.startswith(("modelopt", "quark")) else BOMB
    for read in (requant.inspect, plan_dense):
        expected: AbstractContextManager[object] = nullcontext()
        if pattern == BOMB:
            expected = pytest.raises(PatternError, match=rejected(BOMB))
        with within(20), expected:
            read(tmp_path / "source")
    assert any(text.endswith(pattern) for text in asked)


@pytest.mark.parametrize("option", ["overrides", "only", "recipe", "layout"])
def test_of_a_user(option: str, dense: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 4, "layout": "keep"}
    if option == "recipe":
        (tmp_path / "r.toml").write_text(f"[[rules]]\nmatch = '{BOMB}'\nspec = 8\n")
        options["recipe"] = str(tmp_path / "r.toml")
    elif option == "only":
        options["only"] = [BOMB]
    else:
        options["overrides"] = [f"{BOMB}=8"]
    if option == "layout":
        pytest.importorskip("mlx_lm")
        options["layout"] = "auto"
    with within(20), pytest.raises(PatternError, match=rejected(BOMB)):
        requant.plan(dense, **options)


def test_of_arrays_in_memory() -> None:
    name = "model.layers.0.a_layer_with_a_long_name"
    weights = {
        f"{name}.qweight": np.zeros((16, 128), np.int32),
        f"{name}.qzeros": np.full((1, 16), 0x77777777, np.int32),
        f"{name}.scales": np.ones((1, 128), np.float16),
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    with within(20), pytest.raises(PatternError, match=rejected(BOMB)):
        transform_weights(weights, config | {"dynamic": {f"-:{BOMB}": {}}})


def test_of_another_tools_record(dense: Path, tmp_path: Path) -> None:
    """``verify`` repeats the options that an untrusted requant.json holds."""
    requant.convert(dense, tmp_path / "out", bits=4, overrides=["_proj=8"])
    record = json.loads((tmp_path / "out" / "requant.json").read_text())
    assert record["options"]["overrides"][0][0] == "_proj"
    record["options"]["overrides"][0][0] = BOMB
    record["sha256"] = record_hash(record)
    (tmp_path / "out" / "requant.json").write_bytes(encode_json(record))
    with within(20), pytest.raises(PatternError, match=rejected(BOMB)):
        requant.verify(dense, tmp_path / "out")


# -- many of them ------------------------------------------------------------------------
def test_a_quick_pattern_is_counted_too() -> None:
    """Two stars take re milliseconds over a long name, and a model has many of those."""
    pattern = regex.Pattern("a*a*b")
    began = time.process_time()
    with within(30), regex.regex_time_budget(), pytest.raises(PatternError, match="took more than"):
        for number in range(100_000):
            pattern.search("a" * 240 + f"{number}")
    assert time.process_time() - began < 3 * MAX_PATTERN_S


def test_each_model_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regex, "MAX_PATTERN_S", 0.05)
    for _ in range(5):
        with regex.regex_time_budget(), pytest.raises(PatternError):
            for number in range(100_000):
                regex.search("a*a*b", "a" * 240 + f"{number}")
        with regex.regex_time_budget():
            assert not regex.search("a*a*b", "a" * 240)


def test_many_patterns_share_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regex, "MAX_PATTERNS_S", 0.2)
    began = time.process_time()
    with regex.regex_time_budget():
        with pytest.raises(PatternError, match="one pattern too many"):
            for number in range(1_000_000):
                regex.Pattern(f"layers.{number}.*").search("model.layers.0.mlp")
        with pytest.raises(PatternError, match="one pattern too many"):
            regex.Pattern("a")
    assert time.process_time() - began < 3


LONG = [f"model.layers.{n}.mlp.up_proj.none" for n in range(40_000)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, key, names",
    [
        ("compressed-tensors", "ignore", LONG),
        ("compressed-tensors", "ignore", [f"re:{name}.*" for name in LONG]),
        ("modelopt", "exclude_modules", LONG),
        ("modelopt", "exclude_modules", [f"{name}*" for name in LONG]),
        ("quark", "exclude", LONG),
        ("quark", "exclude", [f"{name}?" for name in LONG]),
        ("fp8", "modules_to_not_convert", LONG),
        ("fp8", "ignored_layers", [f"{name}.*" for name in LONG]),
        ("gptq", "dynamic", [f"-:{name}" for name in LONG]),
        ("auto-round", "extra_config", LONG),
    ],
)
def test_lists_without_end(
    method: str, key: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list as long as a config may be, over thousands of layers."""
    monkeypatch.setattr(regex, "MAX_PATTERNS_S", MAX_PATTERNS_S / 10)
    value = {name: {} for name in names} if key in ("dynamic", "extra_config") else names
    folder = with_block(method, lambda block: block.update({key: value}))
    tensors = folder["tensors"]
    first = "model.layers.0."
    inner = {n.removeprefix(first): x for n, x in tensors.items() if n.startswith(first)}
    for number in range(1, 1500):
        tensors |= {f"model.layers.{number}.{name}": value for name, value in inner.items()}
    FolderReader(tmp_path / "source").write(folder)
    began = time.process_time()
    with within(60):
        try:
            make_plan(
                read_checkpoint(tmp_path / "source"), ConvertOptions(layout="keep", dequantize=True)
            )
        except RequantError as error:
            assert len(str(error)) < 1_000_000
    assert time.process_time() - began < 20


def test_wildcards_fit_as_fnmatch() -> None:
    import fnmatch

    texts = ("*", "a*", "*a", "?", "[ab]*", "[!a]b", "a.b", "[]a]", "[a", "a[b", "", "**", "a+b")
    names = ("", "a", "b", "ab", "a.b", "axb", "]", "[a", "a[b", "a+b", "aab", "ba\n")
    for text in texts:
        for name in names:
            expected = fnmatch.fnmatchcase(name, text)
            assert regex.wildcard(text).fullmatch(name) == expected, (text, name)
            assert bool(list(regex.Wildcards([text]).matching(name))) == expected, (text, name)
