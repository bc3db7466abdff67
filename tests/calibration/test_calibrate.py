"""``requant calibrate``: sums held against the model's own parts, called by hand."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear
from pytest import MonkeyPatch
from safetensors.numpy import load_file

import requant
from requant.calibration import block_run as run
from requant.calibration import blocks
from requant.calibration import text_windows as windows
from requant.calibration.block_run import calibrate
from requant.calibration.collector import Collector, Sums
from requant.calibration.run_folder import RunFolder
from requant.calibration.text_model import TextModel
from requant.errors import CheckpointError, OutputError, UsageError
from requant.importance.reader import read_statistics
from requant.importance.statistics_file import Importance
from requant.mlx_lm.evaluation import read_documents
from requant.nn.blas_products import blas_products
from requant.planning.planner import plan_with_source
from requant.quantization.options import ConvertOptions
from requant.sources.open import read_checkpoint
from tests.support.checkpoints import model
from tests.support.families import small_config
from tests.support.gguf_files import write_gguf
from tests.support.published_models import as_awq

pytestmark = pytest.mark.sweep(1)

LLAMA = Path(__file__).parents[2] / "examples" / "micro-llama"
TEXT = "A file holds bytes, and a tensor is a run of them with a shape. " * 30
WINDOW = 48


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def plain(folder: Path) -> Any:
    from mlx_lm.utils import load_model

    loaded, _ = load_model(folder)
    loaded.set_dtype(mx.float32)
    return loaded


def squares(x: mx.array) -> np.ndarray:
    rows = np.array(x).reshape(-1, x.shape[-1]).astype(np.float64)
    found: np.ndarray = (rows * rows).mean(0)
    return found


def entry(path: Path, layer: str, shape: tuple[int, ...]) -> Importance:
    found = read_statistics(path).find(layer, shape)
    assert isinstance(found, Importance), found
    return found


def calls_of(loaded: Any, ids: mx.array) -> tuple[Any, mx.array, Any]:
    """The first block, what it is given, and its mask."""
    from mlx_lm.models.base import create_attention_mask

    hidden = loaded.model.embed_tokens(ids)
    return loaded.model.layers[0], hidden, create_attention_mask(hidden, None)


def test_inputs_of_a_dense_model(text: Path, tmp_path: Path) -> None:
    """Of the first block's layers and of the head, in float32's rounding; Hessians too."""
    out = tmp_path / "s.safetensors"
    calibration = calibrate(LLAMA, out, text, hessian=True, tokens=4 * WINDOW, window=WINDOW)
    assert (
        calibration.tokens,
        calibration.windows,
        calibration.blockwise,
        calibration.not_observed,
    ) == (4 * WINDOW, 4, True, ())
    count = json.loads((LLAMA / "config.json").read_text())["num_hidden_layers"]
    assert calibration.layers == calibration.hessians == 4 * count + 1
    loaded, taken = plain(LLAMA), _taken(LLAMA, 4)
    block, hidden, mask = calls_of(loaded, taken)
    normed = block.input_layernorm(hidden)
    after = hidden + block.self_attn(normed, mask, None)
    inner = block.post_attention_layernorm(after)
    down = mx.sigmoid(block.mlp.gate_proj(inner)) * block.mlp.gate_proj(inner)
    down = down * block.mlp.up_proj(inner)
    last = loaded.model(taken)
    expected = {"self_attn.q_proj": normed, "mlp.up_proj": inner, "mlp.down_proj": down}
    for name, x in expected.items():
        importance = entry(out, f"model.layers.0.{name}", (1, x.shape[-1]))
        np.testing.assert_allclose(importance.weights(0), squares(x), rtol=1e-4)
        rows = np.array(x).reshape(-1, x.shape[-1]).astype(np.float64)
        hessian = np.triu(rows.T @ rows / len(rows))
        room = 1e-5 * np.abs(hessian).max()
        np.testing.assert_allclose(importance.hessian(0), hessian, rtol=1e-3, atol=room)
    tied = "model.embed_tokens" if "lm_head" not in loaded else "lm_head"
    head = entry(out, tied, (1, last.shape[-1]))
    np.testing.assert_allclose(head.weights(0), squares(last), rtol=1e-3)


def _taken(folder: Path, windows: int, seed: int = 0) -> mx.array:
    """The windows that a run takes: of all, those of a permutation, in their order."""
    from mlx_lm.utils import load_tokenizer

    tokens = load_tokenizer(folder).encode(TEXT)
    count = len(tokens) // WINDOW
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[:windows])
    return mx.array(np.array(tokens[: count * WINDOW]).reshape(count, WINDOW)[chosen])


def test_experts_by_their_own_tokens(text: Path, tmp_path: Path) -> None:
    folder, out = model("micro-moe"), tmp_path / "s.safetensors"
    calibration = calibrate(folder, out, text, tokens=2 * WINDOW, window=WINDOW)
    assert calibration.blockwise
    ids = _taken(folder, 2)
    block, hidden, mask = calls_of(plain(stacked(folder, tmp_path)), ids)
    after = hidden + block.self_attn(block.input_layernorm(hidden), mask, None)
    inner = block.post_attention_layernorm(after)
    gates = np.array(mx.softmax(block.mlp.gate(inner), axis=-1)).reshape(-1, 8)
    rows = np.array(inner).reshape(len(gates), -1).astype(np.float64)
    chosen = np.argsort(-gates, axis=1)[:, : block.mlp.top_k]
    importance = entry(out, "model.layers.0.mlp.switch_mlp.gate_proj", (8, 4, rows.shape[1]))
    down = entry(out, "model.layers.0.mlp.switch_mlp.down_proj", (8, 4, 128))
    glu = block.mlp.switch_mlp
    seen = 0
    for expert in range(8):
        mine = (chosen == expert).any(1)
        weights = importance.weights(expert)
        if not mine.any():
            assert weights is None
            assert expert in importance.matrices_without_tokens
            continue
        seen += 1
        np.testing.assert_allclose(weights, (rows[mine] ** 2).mean(0), rtol=1e-4)
        x = mx.array(rows[mine].astype(np.float32))
        up, gate = (x @ part.weight[expert].T for part in (glu.up_proj, glu.gate_proj))
        np.testing.assert_allclose(
            down.weights(expert), squares(up * gate * mx.sigmoid(gate)), rtol=1e-3
        )
    assert seen >= 4


def stacked(folder: Path, tmp_path: Path) -> Path:
    requant.convert(folder, tmp_path / "dense", dequantize=True, dtype="float32", layout="mlx-lm")
    return tmp_path / "dense"


def make_awq(source: Path) -> None:
    requant.convert(LLAMA, source, dequantize=True, dtype="float16", layout="keep")
    as_awq(source)
    (source / "model.safetensors.index.json").unlink()


def make_mlx(source: Path) -> None:
    requant.convert(LLAMA, source, bits=4)


def make_gguf(source: Path) -> None:
    weights = {
        name: np.array(array.astype(mx.float32))
        for name, array in dict(mx.load(str(LLAMA / "model.safetensors"))).items()
    }
    config = json.loads((LLAMA / "config.json").read_text())
    write_gguf(source, weights, config, "Q8_0", tokenizer=LLAMA)


@pytest.mark.parametrize("make", [make_awq, make_mlx, make_gguf])
def test_other_forms_of_the_model_give_the_same(make: Any, text: Path, tmp_path: Path) -> None:
    """A quantized source, and the dense values that it represents."""
    source = tmp_path / ("a.gguf" if make is make_gguf else "a")
    make(source)
    dense = tmp_path / "values"
    requant.convert(source, dense, dequantize=True, dtype="float32")
    reported: dict[str, Any] = {"tokens": 2 * WINDOW, "window": WINDOW}
    calibrate(source, tmp_path / "a.safetensors", text, **reported)
    calibrate(dense, tmp_path / "b.safetensors", text, **reported)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_whole_model_gives_the_same(text: Path, tmp_path: Path, monkeypatch: MonkeyPatch):
    reported: dict[str, Any] = {"tokens": 2 * WINDOW, "window": WINDOW, "hessian": True}
    calibrate(LLAMA, tmp_path / "a.safetensors", text, **reported)

    def rejects(*_: Any) -> None:
        raise blocks.NotBlockwiseError("of the test")

    monkeypatch.setattr(blocks.BlockwiseModel, "calls", rejects)
    calibration = calibrate(LLAMA, tmp_path / "b.safetensors", text, **reported)
    assert (calibration.blockwise, calibration.reason) == (False, "of the test")
    a, b = (mx.load(str(tmp_path / f"{x}.safetensors")) for x in "ab")
    assert a.keys() == b.keys()
    for name, array in a.items():
        np.testing.assert_allclose(np.array(array), np.array(b[name]), rtol=2e-3, atol=1e-4)


@pytest.mark.slow
def test_a_stopped_run_resumes(text: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Stopped at each block and at the head, the bytes are those of an undisturbed run."""
    reported: dict[str, Any] = {"tokens": 2 * WINDOW, "window": WINDOW, "hessian": True}
    calibrate(LLAMA, tmp_path / "whole.safetensors", text, **reported)
    output = tmp_path / "s.safetensors"
    kept, real = [], RunFolder.save_block

    def keep(self: Any, *args: Any) -> None:
        real(self, *args)
        kept.append(args[1])
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_block", keep)
    while True:
        try:
            calibrate(LLAMA, output, text, **reported)
            break
        except KeyboardInterrupt:
            assert not output.exists()
    assert kept == list(range(len(kept)))
    assert len(kept) > 4
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["text.txt", "whole.safetensors", "s.safetensors"]
    )


def test_another_text_starts_over(text: Path, tmp_path: Path, monkeypatch: MonkeyPatch):
    reported: dict[str, Any] = {"tokens": 2 * WINDOW, "window": WINDOW}
    output, real = tmp_path / "s.safetensors", RunFolder.save_block

    def keep(self: Any, *args: Any) -> None:
        real(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_block", keep)
        with pytest.raises(KeyboardInterrupt):
            calibrate(LLAMA, output, text, **reported)
    calibrate(LLAMA, output, text, seed=3, **reported)
    calibrate(LLAMA, tmp_path / "t.safetensors", text, seed=3, **reported)
    assert output.read_bytes() == (tmp_path / "t.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output": "s.bin"}, "NAME.safetensors"),
        ({"text": "none.txt"}, "No such file"),
        ({"window": 4096, "tokens": 4096}, "do not fill one window of 4,096"),
        ({"tokens": 10}, "one window is the least"),
    ],
)
def test_what_cannot_be_is_reported(change: dict[str, Any], words: str, text: Path, tmp_path: Path):
    reported: dict[str, Any] = {"output": "s.safetensors", "text": text.name, "tokens": 96} | change
    reported["output"], reported["text"] = (
        tmp_path / reported["output"],
        tmp_path / reported["text"],
    )
    with pytest.raises(UsageError, match=words):
        calibrate(LLAMA, **{"window": WINDOW} | reported)
    assert [p.name for p in tmp_path.iterdir()] == [text.name]


def test_an_output_is_not_replaced(text: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.safetensors"
    output.write_bytes(b"mine")
    with pytest.raises(OutputError, match="--force replaces it"):
        calibrate(LLAMA, output, text, tokens=96, window=WINDOW)
    assert output.read_bytes() == b"mine"


class _Block(nn.Module):
    def __call__(self, x: mx.array, mask: str | None = None) -> mx.array:
        return x + (1 if mask is None else 2)


class _Marked(_Block):
    pass


class _Model(nn.Module):
    """Blocks of two kinds that are distinguished by their class, as OLMo Hybrid's are."""

    def __init__(self, between: int = 0, backwards: bool = False) -> None:
        super().__init__()
        self.layers = [_Block(), _Marked(), _Block()]
        self.between, self.backwards = between, backwards

    def __call__(self, ids: mx.array) -> mx.array:
        h = mx.zeros((*ids.shape, 4))
        for layer in self.layers[:: -1 if self.backwards else 1]:
            h = layer(h, mask="causal") if isinstance(layer, _Marked) else layer(h)
            h = h + self.between if self.between else h
        return h


def layered(model: Any) -> blocks.BlockwiseModel:
    plan, source = plan_with_source(read_checkpoint(LLAMA), ConvertOptions(dequantize=True))
    empty = replace(plan, steps=(), shards=())
    return blocks.BlockwiseModel(TextModel(model), empty, source, None)


def test_blocks_stay_of_their_class() -> None:
    found, ids = layered(_Model()), np.arange(8)
    calls = found.calls(ids, ids)
    assert [call.kwargs for call in calls] == [{}, {"mask": "causal"}, {}]
    hidden = found.embed(ids)
    for block, call in zip(found.blocks, calls, strict=True):
        hidden = found.step(block, hidden, call)
    assert mx.array_equal(hidden, found.model(mx.array(ids[None])))
    assert [type(block) for block in found.blocks] == [_Block, _Marked, _Block]


@pytest.mark.parametrize(
    ("change", "why"),
    [({"between": 1}, "change between its blocks"), ({"backwards": True}, "once each, in order")],
)
def test_blocks_that_do_not_pass_their_arguments_on(change: dict[str, Any], why: str) -> None:
    with pytest.raises(blocks.NotBlockwiseError, match=why):
        layered(_Model(**change)).calls(np.arange(8), np.arange(8))


# -- layers ----------------------------------------------------------------------------------
def test_an_embedding_counts_as_the_head_without_a_word_in_the_config(text: Path, tmp_path: Path):
    """Gemma's class is always tied, and its config.json need not say so."""
    from mlx_lm.models.gemma import Model, ModelArgs

    config = json.loads((LLAMA / "config.json").read_text())
    del config["tie_word_embeddings"]
    config |= {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}
    folder = tmp_path / "gemma"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((LLAMA / name).read_bytes())
    made = Model(ModelArgs.from_dict(config))
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(made.parameters())), {"format": "mlx"}
    )
    output = tmp_path / "s.safetensors"
    calibration = calibrate(folder, output, text, tokens=WINDOW, window=WINDOW)
    assert not calibration.not_observed
    assert entry(output, "model.embed_tokens", (1, 128)).weights(0) is not None


def test_layers_of_a_class_that_is_not_watched_are_named(text: Path, tmp_path: Path) -> None:
    """``MultiLinear`` is a matrix a head, multiplied from either side."""
    from mlx_lm.models.deepseek_v3 import Model, ModelArgs

    config = small_config("deepseek_v3")
    config["vocab_size"] = json.loads((LLAMA / "config.json").read_text())["vocab_size"]
    folder = tmp_path / "mla"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((LLAMA / name).read_bytes())
    made = Model(ModelArgs.from_dict(config))
    weights = dict(tree_flatten(made.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    calibration = calibrate(folder, tmp_path / "s.safetensors", text, tokens=WINDOW, window=WINDOW)
    heads = [n for n, m in made.named_modules() if type(m).__name__ == "MultiLinear"]
    assert heads and set(heads) <= set(calibration.not_observed)
    assert not any(name.endswith("o_proj") for name in calibration.not_observed)


@pytest.mark.parametrize(
    ("batch", "asked"), [((3, 1), (3, 2)), ((3, 2), (1, 2)), ((1, 2), (3, 1)), ((4,), (4,))]
)
def test_inputs_and_experts_spread_over_each_other(batch: tuple[int, ...], asked: tuple[int, ...]):
    """Two rows a place; the sums are those of a loop over places."""
    rng = np.random.default_rng(len(asked))
    stack = SwitchLinear(8, 5, 4, bias=False)
    x = mx.array(rng.normal(size=(*batch, 2, 8)), mx.float32)
    chosen = mx.array(rng.integers(0, 4, asked), mx.uint32)
    collector = Collector({id(stack): "stack"}, False, 0)
    with blas_products(), collector.observing():
        made = stack(x, chosen)
        collector.flush()
    plain = stack(x, chosen)
    assert made.shape == plain.shape
    np.testing.assert_allclose(np.array(made), np.array(plain), rtol=1e-4, atol=1e-5)
    shape = np.broadcast_shapes(batch, asked)
    count, squares = np.zeros(4), np.zeros((4, 8))
    rows = np.broadcast_to(np.array(x), (*shape, 2, 8))
    experts = np.broadcast_to(np.array(chosen), shape)
    for place in np.ndindex(shape):
        count[experts[place]] += 2
        squares[experts[place]] += (rows[place] ** 2).sum(0)
    assert (collector.sums["stack"].count == count).all()
    np.testing.assert_allclose(collector.sums["stack"].squares, squares, rtol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_sums_on_a_device_are_those_of_numpy(dtype: mx.Dtype, monkeypatch: MonkeyPatch) -> None:
    """What a GPU computes, here on the CPU: a layer, and experts one of which is never asked."""
    rng = np.random.default_rng(7)
    glu, linear = SwitchGLU(16, 24, 4), nn.Linear(16, 8)
    paths = {id(m): n for n, m in glu.named_modules()} | {id(linear): "linear"}
    x = mx.array(rng.normal(size=(1, 9, 16))).astype(dtype)
    chosen = mx.array([[rng.permutation(3)[:2].tolist() for _ in range(9)]], mx.uint32)
    monkeypatch.setattr("requant.calibration.collector._PENDING", 3)
    sums = []
    for is_cpu in (True, False):
        monkeypatch.setattr("requant.calibration.collector.on_cpu", lambda is_cpu=is_cpu: is_cpu)
        collector = Collector(paths, True, 1 << 30)
        for _ in range(5):
            with collector.observing():
                glu(x, chosen), linear(x)
                collector.flush()
        sums.append(collector.sums)
    for name, ours in sums[0].items():
        theirs = sums[1][name]
        assert (ours.count == theirs.count).all()
        for a, b in zip(ours.statistics().__slots__, theirs.statistics().__slots__, strict=True):
            mine, other = getattr(ours.statistics(), a), getattr(theirs.statistics(), b)
            np.testing.assert_allclose(mine, other, rtol=1e-5)
        for expert in range(len(ours.count)):
            pair = [np.triu(s.hessian(expert)) for s in (ours, theirs)]
            np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-5)


def test_windows_that_a_gpu_works_on_ahead(
    text: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """More of them than are begun at a time, here on the CPU: the same statistics."""
    files = [tmp_path / "cpu.safetensors", tmp_path / "gpu.safetensors"]
    for file, is_cpu in zip(files, (True, False), strict=True):
        for module in ("collector", "block_run"):
            name = f"requant.calibration.{module}.on_cpu"
            monkeypatch.setattr(name, lambda is_cpu=is_cpu: is_cpu)
        calibrate(LLAMA, file, text, tokens=320, window=16, hessian=True)
    ours, theirs = map(load_file, files)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_hessian_of_more_columns_than_are_summed_at_a_time() -> None:
    """Its upper triangle, of tokens added in two parts."""
    x = np.random.default_rng(8).normal(size=(40, 450)).astype(np.float32)
    sums = Sums(1, 450, True, False)
    sums.add(x[:13])
    sums.add(x[13:])
    expected = np.triu(x.astype(np.float64).T @ x / 40)
    np.testing.assert_allclose(np.triu(sums.hessian(0)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks(text: Path, tmp_path: Path) -> None:
    """Arrays of MLX at their peak: a model of 12 blocks against one of 2."""
    from mlx_lm.models.llama import Model, ModelArgs

    def peak(blocks: int) -> int:
        config = json.loads((LLAMA / "config.json").read_text())
        config |= {"num_hidden_layers": blocks, "intermediate_size": 4096}
        folder = tmp_path / str(blocks)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((LLAMA / name).read_bytes())
        weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        del weights
        mx.clear_cache()
        mx.reset_peak_memory()
        calibrate(folder, tmp_path / f"{blocks}.safetensors", text, tokens=96, window=WINDOW)
        return int(mx.get_peak_memory())

    few, many = peak(2), peak(12)
    assert many < 1.4 * few < 12 * 4096 * 128 * 3 * 4 / 2


# -- texts, and what goes wrong --------------------------------------------------------------
class _Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def test_each_file_and_all_of_a_long_one_have_their_share(tmp_path: Path, monkeypatch: MonkeyPatch):
    long, other = tmp_path / "long.txt", tmp_path / "other.jsonl"
    long.write_text("".join(chr(65 + n // 400) * 10 for n in range(8000)))
    other.write_text("".join(json.dumps(chr(97 + n % 26) * 50) + "\n" for n in range(999)))
    monkeypatch.setattr(windows, "_PIECE_CHARS", 1000)
    letters = windows.windows_of(_Letters(), [long, other], 800, 10, 0).ravel()
    assert len(letters) == 800 and 0.3 < (letters >= 97).mean() < 0.7
    assert len({*letters[letters < 97].tolist()}) > 3
    again = windows.windows_of(_Letters(), [long, other], 800, 10, 0).ravel()
    assert (letters == again).all()


def test_the_texts_that_come_with_requant() -> None:
    """Are read whole, are small, and hold other scripts than Latin."""
    texts = ["".join(read_documents(path)) for path in windows.texts_of(None)]
    assert len(texts) == 2 and sum(len(text.encode()) for text in texts) < 300_000
    assert all(letter in texts[1] for letter in "öéñçłğм月の김عह")


def test_inputs_that_are_not_numbers_are_named(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    folder.mkdir()
    for path in LLAMA.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = dict(mx.load(str(folder / "model.safetensors")))
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = mx.where(mx.arange(128) == 3, mx.nan, weights[name])
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(CheckpointError) as rejected:
        calibrate(folder, tmp_path / "s.safetensors", text, tokens=96, window=WINDOW)
    assert "nan cannot be calibrated" in str(rejected.value)
    assert [p.where for p in rejected.value.problems] == ["model.layers.1.mlp.down_proj"]


def test_layers_too_wide_for_a_hessian_are_named_beforehand(
    text: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "MOST_HESSIAN_BYTES", 4 * 128 * 128)
    reported: list[str] = []
    calibration = calibrate(
        LLAMA,
        tmp_path / "s.safetensors",
        text,
        hessian=True,
        tokens=96,
        window=WINDOW,
        progress=lambda what, *_: reported.append(what),
        on_note=reported.append,
    )
    wide = tuple(f"model.layers.{number}.mlp.down_proj" for number in range(4))
    assert tuple(line.split(":")[0] for line in reported[:4]) == wide == calibration.too_wide
    assert reported[4].startswith("block 1")


def test_two_runs_do_not_share_a_folder(text: Path, tmp_path: Path, monkeypatch: MonkeyPatch):
    output, reported = tmp_path / "s.safetensors", {"tokens": 96, "window": WINDOW}
    real, rejected = RunFolder.save_block, []

    def keep(self: Any, *args: Any) -> None:
        monkeypatch.setattr(RunFolder, "save_block", real)
        with pytest.raises(OutputError, match="being written by another process"):
            calibrate(LLAMA, output, text, **reported)
        rejected.append(args)
        real(self, *args)

    monkeypatch.setattr(RunFolder, "save_block", keep)
    calibrate(LLAMA, output, text, **reported)
    assert len(rejected) == 1 and output.exists()


def test_hidden_states_that_were_cut_are_noticed(
    text: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    output, reported = tmp_path / "s.safetensors", {"tokens": 96, "window": WINDOW}
    real = RunFolder.save_block

    def keep(self: Any, *args: Any) -> None:
        real(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopped:
        patch.setattr(RunFolder, "save_block", keep)
        calibrate(LLAMA, output, text, **reported)
    assert "the same command resumes" in stopped.value.__notes__[0]
    hidden = tmp_path / ".s.safetensors.requant-calibrating" / "hidden-0"
    hidden.write_bytes(hidden.read_bytes()[:-1])
    with pytest.raises(OutputError, match="--no-resume starts over") as cut:
        calibrate(LLAMA, output, text, **reported)
    assert not getattr(cut.value, "__notes__", [])
    calibrate(LLAMA, output, text, **reported, resume=False)
    assert output.exists()


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_not_a_signal(text: Path, tmp_path: Path) -> None:
    """A limit on the size of files represents the disk."""
    code = (
        "import resource, signal, sys, requant\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "def full(*_):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))\n"
        "try:\n"
        "    requant.calibrate(*sys.argv[1:], tokens=96, window=48, progress=full)\n"
        "except requant.OutputError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", code, LLAMA, tmp_path / "s.safetensors", text]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "hidden-1: File too large" in done.stdout, done.stderr
    assert calibrate(LLAMA, tmp_path / "s.safetensors", text, tokens=96, window=WINDOW).blockwise
