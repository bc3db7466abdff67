"""ParoQuant folders and the layer that runs them, against the peer's own values."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import requant
from requant.nn import RotateQuantizedExperts, RotateQuantizedLinear
from tests.support.checkpoints import model
from tests.support.conversions import dequantized
from tests.support.fixture_checks import check_fixture
from tests.support.fixture_folders import fixture
from tests.support.gguf_models import tiny, values
from tests.support.layers.packers import gemm
from tests.support.logits import TOKENS, dense_folder, logits
from tests.support.safetensors_files import read_file, read_folder, write_file

pytest.importorskip("mlx_lm")
import requant.mlx_lm

pytestmark = pytest.mark.sweep(1)

DOWN = "model.layers.0.mlp.down_proj"


def rotated(x: np.ndarray, theta: np.ndarray, pairs: np.ndarray, scales: np.ndarray, group: int):
    """The forward formula of the format's document, pair by pair, in float64."""
    x = x.astype(np.float64) * scales.reshape(-1).astype(np.float64)
    for turn in range(theta.shape[0]):
        for t in range(x.shape[-1] // 2):
            base = 2 * t // group * group
            i, j = base + int(pairs[turn, 2 * t]), base + int(pairs[turn, 2 * t + 1])
            a = float(theta[turn, t])
            left, right = x[..., i].copy(), x[..., j].copy()
            x[..., i] = np.cos(a) * left + np.sin(a) * right
            x[..., j] = np.cos(a) * right - np.sin(a) * left
    return x


def test_values_of_the_fixture(tmp_path: Path) -> None:
    """The codes hold the rotated weight; dense values are those of the plain one."""

    def transposed(source: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> None:
        for name, array in read_file(fixture(name_) / "expected.safetensors").items():
            if name.endswith(".rotated_weight"):
                values[name.removesuffix(".rotated_weight")] = array

    name_ = "paroquant-g64-bias"
    found = check_fixture(
        name_, tmp_path, "rounded", bound=15 * 2**-11, values_rtol=1e-6, stored_as=transposed
    )
    for role in ("theta", "pairs", "channel_scales"):
        stored = read_folder(found.source)[f"{DOWN}.{role}"]
        assert found.weights[f"{DOWN}.{role}"].tobytes() == stored.tobytes()
    assert found.config["rotation"] == {"method": "paroquant", "group_size": 64, "krot": 8}


def test_codes_of_the_fixture_without_its_rotated_weight(tmp_path: Path) -> None:
    """What the codes hold follows from the plain weight: rotated, without the scales."""

    def transposed(source: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> None:
        for path, plain in list(values.items()):
            theta, pairs, scales = (
                source[f"{path}.{role}"] for role in ("theta", "pairs", "channel_scales")
            )
            values[path] = rotated(plain, theta, pairs, 1 / scales.astype(np.float64), 128)

    found = check_fixture(
        "paroquant-g128",
        tmp_path,
        "rounded",
        bound=15 * 2**-11,
        values_rtol=2e-6,
        stored_as=transposed,
    )
    stored = read_folder(found.source)
    for path in found.expected:
        for role in ("theta", "pairs", "channel_scales"):
            name = f"{path}.{role}"
            assert found.weights[name].tobytes() == stored[name].tobytes()


@pytest.mark.parametrize("name", ["paroquant-g128", "paroquant-g64-bias"])
def test_the_loaded_model_gives_the_plain_model_s_logits(name: str, tmp_path: Path) -> None:
    """From the source and from the folder that convert wrote; stock mlx-lm rejects the latter."""
    source = fixture(name) / "checkpoint"
    assert not requant.convert(source, tmp_path / "out", dtype="float32").plan.loads
    with pytest.raises(ValueError, match="not in model"):
        logits(tmp_path / "out")
    wanted = logits(dense_folder(name, tmp_path / "dense"))
    for folder in (source, tmp_path / "out"):
        weights, made = requant.mlx_lm.load_weights(folder, dtype="float32")
        model, _ = requant.mlx_lm.loading._build(made.plan.config, weights)
        assert isinstance(model.layers[0].mlp.down_proj, RotateQuantizedLinear)
        found = np.array(model(mx.array(TOKENS)).astype(mx.float32))
        assert np.abs(found - wanted).max() <= 5e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["paroquant-g128", "paroquant-g64-bias"])
@pytest.mark.parametrize("again", [False, True], ids=["source", "output"])
def test_folding_makes_plain_layers(name: str, again: bool, tmp_path: Path) -> None:
    """8 bits of the plain weight, from the source or from an output that kept the rotation."""
    source = fixture(name) / "checkpoint"
    if again:
        requant.convert(source, tmp_path / "rotated", dtype="float32")
        source = tmp_path / "rotated"
    report = requant.convert(source, tmp_path / "out", fold_rotation=True)
    assert report.plan.loads
    assert "rotation" not in report.plan.config
    assert not any("theta" in name for name in read_folder(tmp_path / "out"))
    assert all(error.relative_rms < 0.01 for error in report.errors.values())
    wanted = logits(dense_folder(name, tmp_path / "dense"))
    assert np.abs(logits(tmp_path / "out") - wanted).max() <= 0.06 * np.abs(wanted).max()


def test_tiny_vector() -> None:
    """Four inputs, two rounds, rotations by 90 degrees: by hand."""
    layer = _bare(4, 2)
    layer.channel_scales = mx.array([[1.0, 1.0, 2.0, 1.0]])
    layer.pairs = mx.array([[0, 2, 1, 3], [0, 1, 2, 3]], dtype=mx.int16)
    layer.theta = mx.array([[np.pi / 2, 0.0], [0.0, np.pi / 2]])
    transposed = np.array(layer.rotate(mx.array([1.0, 2.0, 3.0, 4.0])))
    np.testing.assert_allclose(transposed, [6.0, 2.0, 4.0, 1.0], atol=1e-6)


def _bare(count: int, rounds: int) -> Any:
    """The rotation of a layer with fewer inputs than MLX could quantize."""
    layer = RotateQuantizedLinear(32, 32, False, 32, 4, rounds, count)
    layer.theta = mx.zeros((rounds, count // 2))
    return layer


@settings(max_examples=25)
@given(st.integers(1, 3), st.sampled_from([64, 128]), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_any_rotation(blocks: int, group: int, rounds: int, seed: int) -> None:
    """The layer, and the folded weight, against the formula pair by pair."""
    rng = np.random.default_rng(seed)
    n_in, out = group * blocks, 32
    theta = rng.standard_normal((rounds, n_in // 2)).astype(np.float16)
    pairs = np.concatenate([[rng.permutation(group) for _ in range(blocks)] for _ in range(rounds)])
    pairs = pairs.reshape(rounds, n_in).astype(np.int16)
    scales = rng.uniform(0.5, 2, (1, n_in)).astype(np.float16)
    weights = {
        f"{DOWN}.qweight": rng.integers(-(2**31), 2**31, (n_in, out // 8)).astype(np.int32),
        f"{DOWN}.qzeros": rng.integers(-(2**31), 2**31, (blocks, out // 8)).astype(np.int32),
        f"{DOWN}.scales": rng.uniform(0.001, 0.01, (blocks, out)).astype(np.float16),
        f"{DOWN}.theta": theta,
        f"{DOWN}.pairs": pairs,
        f"{DOWN}.channel_scales": scales,
    }
    block = {"quant_method": "paroquant", "bits": 4, "group_size": group, "krot": rounds}
    made, quantization = requant.transform_weights(weights, block)
    assert quantization.quantization_for(DOWN) == requant.Quantization.affine(group, 4)
    layer = RotateQuantizedLinear(n_in, out, False, group, 4, rounds, group)
    layer.load_weights([(k.removeprefix(f"{DOWN}."), mx.array(v)) for k, v in made.items()])
    x = rng.standard_normal((3, n_in)).astype(np.float32)
    wanted = rotated(x, theta, pairs, scales, group)
    np.testing.assert_allclose(np.array(layer.rotate(mx.array(x))), wanted, atol=2e-5)
    codes = mx.dequantize(
        *(mx.array(made[f"{DOWN}.{role}"]).astype(kind) for role, kind in _TRIPLE),
        group_size=group,
        bits=4,
    )
    product = wanted @ np.array(codes).astype(np.float64).T
    got = np.array(layer(mx.array(x)))
    assert np.abs(got - product).max() <= 1e-4 * max(np.abs(product).max(), 1)


_TRIPLE = (("weight", mx.uint32), ("scales", mx.float32), ("biases", mx.float32))


# -- experts that share a rotation -----------------------------------------------------------
GROUP, KROT = 64, 3


def random_rotation(rng: np.random.Generator, n_in: int) -> dict[str, np.ndarray]:
    pairs = [[rng.permutation(GROUP) for _ in range(n_in // GROUP)] for _ in range(KROT)]
    return {
        "theta": rng.standard_normal((KROT, n_in // 2)).astype(np.float16),
        "pairs": np.array(pairs).reshape(KROT, n_in).astype(np.int16),
        "channel_scales": rng.uniform(0.5, 2, (1, n_in)).astype(np.float16),
    }


def plain_rows(transposed: np.ndarray, parts: dict[str, np.ndarray]) -> np.ndarray:
    """The plain weight, float64: its product with each input of the identity, rotated."""
    scales = parts["channel_scales"]
    identity = np.eye(transposed.shape[1])
    return transposed @ rotated(identity, parts["theta"], parts["pairs"], scales, GROUP).T


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """micro-moe with experts as ParoQuant stores them, and the plain weights of the same."""
    source = model("micro-moe")
    loaded = mx.load(str(source / "model.safetensors"))
    plain = {name: np.array(x.astype(mx.float32)) for name, x in loaded.items()}
    rng = np.random.default_rng(3)
    stored: dict[str, np.ndarray] = {}
    rotations: dict[str, dict[str, np.ndarray]] = {}
    for name, array in plain.items():
        path = name.removesuffix(".weight")
        if ".experts." not in name:
            stored[name] = array.astype(np.float16)
            plain[name] = stored[name].astype(np.float32)
            continue
        base = path.partition(".experts.")[0]
        before = "down" if "down_proj" in path else "gate_up"
        shared = f"{base}.experts.{before}_weight"
        parts = rotations.setdefault(shared, random_rotation(rng, array.shape[1]))
        packed, plain[name] = encoded(array, parts)
        stored |= {f"{path}.{role}": part for role, part in packed.items()}
    for shared, parts in rotations.items():
        stored |= {f"{shared}_{role}": part for role, part in parts.items()}
    config = json.loads((source / "config.json").read_text())
    return paroquant_folder(tmp_path_factory.mktemp("experts"), stored, config), plain


def paroquant_folder(place: Path, stored: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    write_file(place / "model.safetensors", stored)
    block = {"quant_method": "paroquant", "bits": 4, "group_size": GROUP, "krot": KROT}
    (place / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    return place


def encoded(
    weight: np.ndarray, parts: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors of a layer behind a rotation, and the plain weight that they represent."""
    # Angles forwards, scales as divisors: the weight of the rotated inputs.
    divisors = 1 / parts["channel_scales"].astype(np.float64)
    freed = rotated(weight, parts["theta"], parts["pairs"], divisors, GROUP)
    blocks = freed.reshape(len(weight), -1, GROUP)
    low, high = blocks.min(-1), blocks.max(-1)
    scales = np.maximum((high - low) / 15, 1e-4).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales), 0, 15).astype(np.uint8)
    wide = scales.astype(np.float64)[..., None]
    codes = np.clip(np.rint(blocks / wide + zeros[..., None]), 0, 15).astype(np.uint8)
    decoded = ((codes - zeros[..., None].astype(np.float64)) * wide).reshape(weight.shape)
    packed = gemm(codes.reshape(weight.shape), zeros, scales)
    return packed, plain_rows(decoded, parts).astype(np.float32)


@pytest.mark.parametrize(
    "name", ["qwen2", "qwen3", "gemma2", "phi3", "granite", "olmo2", "seed_oss", "ministral3"]
)
def test_any_architecture(name: str, tmp_path: Path) -> None:
    """Every linear layer of a model of any class, each behind a rotation of its own."""
    made, config = tiny(name)
    config.setdefault("tie_word_embeddings", False)
    rng = np.random.default_rng(11)
    stored, transposed = {}, []
    for key, array in values(made).items():
        stored[key] = array
        if key.endswith("_proj.weight"):
            parts = random_rotation(rng, array.shape[1])
            packed, plain = encoded(array, parts)
            path = key.removesuffix(".weight")
            stored |= {f"{path}.{role}": part for role, part in (packed | parts).items()}
            del stored[key]
            transposed.append((key, mx.array(plain)))
    source = paroquant_folder(tmp_path, stored, config)
    weights, report = requant.mlx_lm.load_weights(source, dtype="float32")
    loaded, _ = requant.mlx_lm.loading._build(report.plan.config, weights)
    layers = [x for _, x in loaded.named_modules() if isinstance(x, RotateQuantizedLinear)]
    assert len(layers) == len(transposed) >= 8
    made.load_weights(transposed, strict=False)
    wanted = np.array(made(TOKENS))
    assert np.abs(np.array(loaded(TOKENS)) - wanted).max() <= 2e-5 * np.abs(wanted).max()


def dense_logits(folder: Path, plain: dict[str, np.ndarray], place: Path) -> np.ndarray:
    place.mkdir()
    write_file(place / "model.safetensors", plain)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (place / "config.json").write_text(json.dumps(config))
    return logits(place)


@pytest.mark.slow
def test_experts_share_a_rotation(experts: Any, tmp_path: Path) -> None:
    """Kept: the loaded model gives the plain model's logits, from the source and the output."""
    folder, plain = experts
    wanted = dense_logits(folder, plain, tmp_path / "dense")
    report = requant.convert(folder, tmp_path / "out", dtype="float32")
    kept = {x.layer for x in report.plan.layers if x.treatment == "kept"}
    assert "model.layers.0.mlp.switch_mlp.down_proj" in kept
    out, stored = read_folder(tmp_path / "out"), read_folder(folder)
    for name, before in (("gate", "gate_up"), ("up", "gate_up"), ("down", "down")):
        for role in ("theta", "pairs", "channel_scales"):
            found = out[f"model.layers.1.mlp.switch_mlp.{name}_proj.{role}"]
            shared = stored[f"model.layers.1.mlp.experts.{before}_weight_{role}"]
            assert found.tobytes() == shared.tobytes()
    for source in (folder, tmp_path / "out"):
        weights, made = requant.mlx_lm.load_weights(source, dtype="float32")
        loaded, _ = requant.mlx_lm.loading._build(made.plan.config, weights)
        assert isinstance(loaded.layers[0].mlp.switch_mlp.up_proj, RotateQuantizedExperts)
        for length in (1, 8, 80):  # many tokens are sorted by expert
            tokens = mx.array([[(7 * n) % 250 for n in range(length)]])
            assert loaded(tokens).shape[1] == length
        found = np.array(loaded(TOKENS).astype(mx.float32))
        assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["source", "output"])
def test_experts_fold(experts: Any, again: bool, tmp_path: Path) -> None:
    """Plain 8-bit experts that stock mlx-lm runs; dense ones equal the formula."""
    folder, plain = experts
    source = folder
    if again:
        requant.convert(folder, tmp_path / "rotated", dtype="float32")
        source = tmp_path / "rotated"
    report = requant.convert(source, tmp_path / "out", fold_rotation=True)
    assert report.plan.loads
    assert not any(name.endswith(("theta", "pairs")) for name in read_folder(tmp_path / "out"))
    assert all(error.relative_rms < 0.01 for error in report.errors.values())
    # Eight bits can turn the choice of an expert; so the values are compared, and that they run.
    requant.convert(tmp_path / "out", tmp_path / "counterpart", dequantize=True, dtype="float32")
    counterpart = read_folder(tmp_path / "counterpart")
    for number, name in itertools.product(range(4), ("gate", "up", "down")):
        base, role = f"model.layers.{number}.mlp", f"{name}_proj.weight"
        values = np.stack([plain[f"{base}.experts.{n}.{role}"] for n in range(8)])
        error = counterpart[f"{base}.switch_mlp.{role}"] - values
        assert np.square(error).mean() <= 0.01**2 * np.square(values).mean()
    found, wanted = logits(tmp_path / "out"), logits(tmp_path / "counterpart")
    # Values of float16 layers are rounded to float16, as mx.dequantize does; products are not.
    assert np.abs(found - wanted).max() <= 2e-3 * np.abs(wanted).max()
    if again:
        return
    wide = dequantized(source, tmp_path / "wide")
    assert wide.keys() == plain.keys()
    for name, array in plain.items():
        room = 2e-6 * np.abs(array).max() if ".experts." in name else 0.0
        assert np.abs(wide[name] - array).max() <= room, name


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_of_experts_is_mlx_lm_s_behind_a_rotation(bias: bool) -> None:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    stock = QuantizedSwitchLinear(128, 64, 4, bias, 64, 4)
    ours = RotateQuantizedExperts(128, 64, 4, bias, 64, 4, KROT, GROUP)
    parts = random_rotation(np.random.default_rng(5), 128)
    weights = {name: stock[name] for name in ("weight", "scales", "biases")}
    if bias:
        stock.bias = weights["bias"] = mx.random.normal((4, 64))
    ours.load_weights([*weights.items(), *((k, mx.array(v)) for k, v in parts.items())])
    assert not ours.trainable_parameters()
    x = mx.random.normal((5, 1, 1, 128))
    indices = mx.array([[0, 3], [1, 2], [2, 2], [3, 0], [1, 0]])
    transposed = rotated(
        np.array(x), *(parts[k] for k in ("theta", "pairs", "channel_scales")), GROUP
    )
    wanted = stock(mx.array(transposed.astype(np.float32)), indices)
    assert ours(x, indices).shape == wanted.shape
    assert mx.allclose(ours(x, indices), wanted, atol=1e-4)


@pytest.mark.slow
def test_experts_keep_their_own_names(experts: Any, tmp_path: Path) -> None:
    """Under the source's layout each expert gets the rotation; and they fold from there."""
    folder, _ = experts
    requant.convert(folder, tmp_path / "kept", layout="keep", dtype="float32")
    out, stored = read_folder(tmp_path / "kept"), read_folder(folder)
    for expert in range(8):
        found = out[f"model.layers.2.mlp.experts.{expert}.up_proj.theta"]
        assert np.array_equal(found, stored["model.layers.2.mlp.experts.gate_up_weight_theta"])
    requant.convert(tmp_path / "kept", tmp_path / "a", fold_rotation=True)
    requant.convert(folder, tmp_path / "b", fold_rotation=True, dtype="float32")
    a, b = read_folder(tmp_path / "a"), read_folder(tmp_path / "b")
    assert a.keys() == b.keys()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda t: t.pop("model.layers.0.mlp.experts.down_weight_pairs"),
            ("down_proj.pairs", "is missing: a rotation is theta, pairs and channel_scales"),
        ),
        (
            lambda t: t["model.layers.0.mlp.experts.down_weight_pairs"].fill(0),
            ("model.layers.0.mlp.experts.down_weight_pairs", "round 0 does not pair off"),
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if ".0.mlp.experts." in n and "weight_" not in n],
            ("model.layers.0.mlp.experts.down_weight_theta", "experts share", "none to rotate"),
        ),
    ],
)
def test_broken_shared_rotations_are_named(
    edit: Any, words: tuple[str, ...], experts: Any, tmp_path: Path
) -> None:
    folder, _ = experts
    tensors = {name: array.copy() for name, array in read_folder(folder).items()}
    edit(tensors)
    (tmp_path / "bad").mkdir()
    write_file(tmp_path / "bad" / "model.safetensors", tensors)
    shutil.copy(folder / "config.json", tmp_path / "bad")
    with pytest.raises(requant.CheckpointError) as caught:
        requant.plan(tmp_path / "bad")
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert text.count("does not pair off") <= 1


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(f"{DOWN}.theta"), (f"{DOWN}.theta", "missing", "take all three from")),
        (lambda t: t.pop(f"{DOWN}.pairs"), (f"{DOWN}.pairs", "missing")),
        (lambda t: t.pop(f"{DOWN}.channel_scales"), (f"{DOWN}.channel_scales", "missing")),
        (
            lambda t: t.update({f"{DOWN}.theta": t[f"{DOWN}.theta"][:, :7].copy()}),
            (f"{DOWN}.theta", "F16 [8, 7]", "F16 [8, 96]"),
        ),
        (
            lambda t: t.update({f"{DOWN}.pairs": np.zeros_like(t[f"{DOWN}.pairs"])}),
            (f"{DOWN}.pairs", "round 0", "group 0", "0 to 63", "correct group_size"),
        ),
        (
            lambda t: t.update({f"{DOWN}.pairs": t[f"{DOWN}.pairs"] + np.int16(64)}),
            (f"{DOWN}.pairs", "does not pair off"),
        ),
        (
            lambda t: t.update({f"{DOWN}.theta": t[f"{DOWN}.theta"] * np.float16(np.nan)}),
            (f"{DOWN}.theta: holds NaN or infinity", "take the file from its publisher again"),
        ),
        (
            lambda t: t.update({"x.experts.gate_up_weight_theta": np.zeros((8, 4), np.float16)}),
            ("x.experts.gate_up_weight_theta", "experts share"),
        ),
    ],
)
def test_broken_rotations_are_named(edit: Any, words: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(fixture("paroquant-g64-bias") / "checkpoint", folder)
    tensors = read_file(folder / "model.safetensors")
    edit(tensors)
    write_file(folder / "model.safetensors", tensors)
    with pytest.raises(requant.CheckpointError) as caught:
        requant.convert(folder, tmp_path / "out")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(caught.value.problems) == 1  # the whole parts are not called wrong for it
    assert not (tmp_path / "out").exists()


def test_an_output_whose_config_forgot_the_rotation_is_rejected(tmp_path: Path) -> None:
    requant.convert(fixture("paroquant-g64-bias") / "checkpoint", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["rotation"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(requant.CheckpointError) as caught:
        requant.plan(tmp_path / "out")
    assert "config.json: rotation: gives no group_size for the rotation of " in str(caught.value)
    assert 'such as {"method": "paroquant", "group_size": 128, "krot": 8}' in str(caught.value)
