"""Statistics files, ours and llama.cpp's: their layers, and conversions weighted by them."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import requant
from requant.errors import CheckpointError, RequantError
from requant.gguf.families import _FAMILIES as FAMILIES
from requant.importance.layer_names import LayerKey, layer_key
from requant.importance.reader import LayerStatistics, read_statistics, write_statistics
from requant.kernels import quantize as native
from requant.kernels.input_power import estimated_power
from requant.quantization.config import Quantization
from tests.support.plan_texts import note_texts, reason_text
from tests.support.safetensors_files import read_folder, write_file

BF16 = np.dtype(ml_dtypes.bfloat16)
Vectors = Mapping[str, np.ndarray]


def squares(*shape: int, seed: int = 0) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(0, 2, shape)).astype(np.float32)


def older(path: Path, entries: Vectors, calls: int = 3) -> Path:
    """The form before GGUF, by hand."""
    data = struct.pack("<i", len(entries))
    for name, values in entries.items():
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", calls, values.size) + (values * calls).astype("<f4").tobytes()
    path.write_bytes(data + struct.pack("<i", 7) + struct.pack("<i", 4) + b"text")
    return path


def newer(path: Path, entries: Vectors, counts: Mapping[str, Any]) -> Path:
    """The GGUF form, by the gguf package, as llama.cpp's tool lays it out."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in entries.items():
        rows = values.reshape(-1, values.shape[-1])
        count = np.broadcast_to(np.asarray(counts[name], np.float32), len(rows)).reshape(-1, 1)
        writer.add_tensor(f"{name}.in_sum2", rows * count)
        writer.add_tensor(f"{name}.counts", count.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ours(path: Path, layers: Vectors, counts: Mapping[str, Any] | None = None) -> Path:
    made = {}
    for name, values in layers.items():
        count = (counts or {}).get(name, [100] * (1 if values.ndim == 1 else len(values)))
        made[name] = LayerStatistics(values, np.asarray(count, np.float64))
    write_statistics(path, made, metadata={"model": "a test"})
    return path


# -- names ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("model.layers.3.self_attn.q_proj", LayerKey(3, "attn_q")),
        ("language_model.model.layers.3.self_attn.o_proj", LayerKey(3, "attn_output")),
        ("model.layers.0.mlp.experts.7.down_proj", LayerKey(0, "ffn_down_exps", 7)),
        ("model.layers.0.block_sparse_moe.experts.7.w3", LayerKey(0, "ffn_up_exps", 7)),
        ("model.layers.0.mlp.switch_mlp.gate_proj", LayerKey(0, "ffn_gate_exps")),
        ("model.layers.0.mlp.experts.gate_up_proj", LayerKey(0, "ffn_gate_up_exps")),
        ("model.layers.0.mlp.shared_expert.up_proj", LayerKey(0, "ffn_up_shexp")),
        ("model.layers.0.mlp.shared_experts.up_proj", LayerKey(0, "ffn_up_shexp")),
        ("transformer.h.1.mlp.c_proj", LayerKey(1, "ffn_down")),
        ("transformer.h.1.attn.c_proj", LayerKey(1, "attn_output")),
        ("blk.2.ffn_down.5", LayerKey(2, "ffn_down_exps", 5)),
        ("lm_head", LayerKey(-1, "output")),
        ("model.embed_tokens", LayerKey(-1, "token_embd")),
        ("model.layers.0.mlp.gate", LayerKey(0, "mlp.gate")),
        ("model.layers.0.linear_attn.in_proj_qkvz", LayerKey(0, "linear_attn.in_proj_qkvz")),
        ("vision_tower.blocks.0.norm1", None),
        # Blocks of something else that are numbered from 0 too.
        ("vision_tower.encoder.layers.0.self_attn.q_proj", None),
        ("model.visual.blocks.0.attn.qkv_proj", None),
        ("audio_tower.layers.0.fc1", None),
        ("model.encoder.layers.0.self_attn.q_proj", None),
        ("mtp.layers.0.mlp.down_proj", None),
        ("multi_modal_projector.output", None),
        ("model.layers.0.self_attn.indexer.wk", LayerKey(0, "self_attn.indexer.wk")),
        ("model.layers.layers.3.mlp.down_proj", LayerKey(3, "ffn_down")),
        ("transformer.encoder.layers.2.self_attention.query_key_value", LayerKey(2, "attn_qkv")),
        ("language_model.model.layers.2.self_attn.o_proj", LayerKey(2, "attn_output")),
    ],
)
def test_names(path: str, key: LayerKey | None) -> None:
    assert layer_key(path) == key


def test_names_of_another_library(tmp_path: Path) -> None:
    """mlx-vlm has ``language_model`` before a text model's names, and copies a tied head."""
    found = {"layers.2.linear_attn.in_proj_qkvz": 64, "embed_tokens": 96}
    mine = {f"model.{name}": squares(size) for name, size in found.items()}
    statistics = read_statistics(ours(tmp_path / "s.safetensors", mine))

    def entry(path: str, size: int) -> str | None:
        importance = statistics.find(path, (1, size))
        return None if importance is None else importance.entries[0].name

    for name, size in found.items():
        assert entry(f"language_model.model.{name}", size) == f"model.{name}"
    assert entry("language_model.lm_head", 96) == "model.embed_tokens"
    for other in ("3.linear_attn.in_proj_qkvz", "2.linear_attn.in_proj_ba"):
        assert entry(f"language_model.model.layers.{other}", 64) is None
    assert entry("vision_tower.layers.2.linear_attn.in_proj_qkvz", 64) is None


def test_an_embedding_has_not_its_heads_statistics(tmp_path: Path) -> None:
    mine = {"lm_head": squares(96)}
    statistics = read_statistics(ours(tmp_path / "s.safetensors", mine))
    assert statistics.find("language_model.lm_head", (1, 96)) is not None
    assert statistics.find("language_model.model.embed_tokens", (1, 96)) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_gguf_family_has_one_key(family: str) -> None:
    """llama.cpp's name and Hugging Face's are one layer, by the table that GGUF sources use."""
    blocks = FAMILIES[family].blocks
    matrices = {
        role: path
        for role, path in blocks.items()
        if role.startswith(("attn", "ffn"))
        and not role.endswith(("norm", "sinks", "_inp", "rel_b"))
    }
    for role, path in matrices.items():
        if "inp" in role:
            continue
        theirs, names = layer_key(f"model.layers.4.{path}"), layer_key(f"blk.4.{role}")
        if path.endswith("gate_up_proj"):  # llama.cpp calls Phi's fused matrix ffn_up
            assert theirs == LayerKey(4, "ffn_gate_up")
        else:
            assert theirs == names, path


# -- files ---------------------------------------------------------------------------------


LAYERS = {
    "model.layers.0.self_attn.q_proj": squares(64, seed=1),
    "model.layers.0.mlp.switch_mlp.up_proj": squares(4, 96, seed=2),
}
TENSORS = {
    "blk.0.attn_q.weight": LAYERS["model.layers.0.self_attn.q_proj"],
    "blk.0.ffn_up_exps.weight": LAYERS["model.layers.0.mlp.switch_mlp.up_proj"],
}
COUNTS = {"blk.0.attn_q.weight": 40, "blk.0.ffn_up_exps.weight": [5, 0, 7, 9]}


def three_forms(folder: Path) -> list[Path]:
    reported = {"model.layers.0.mlp.switch_mlp.up_proj": [5, 0, 7, 9]}
    return [
        ours(folder / "stats.safetensors", LAYERS, reported),
        newer(folder / "imatrix.gguf", TENSORS, COUNTS),
        older(folder / "imatrix.dat", TENSORS),
    ]


def test_three_forms_say_the_same(tmp_path: Path) -> None:
    for path in three_forms(tmp_path):
        statistics = read_statistics(path)
        dense = statistics.find("model.layers.0.self_attn.q_proj", (32, 64))
        # The inputs of k, v and a fused qkv are those of q.
        for name in ("k_proj", "qkv_proj"):
            other = statistics.find(f"model.layers.0.self_attn.{name}", (32, 64))
            assert not isinstance(other, str | None)
            assert not isinstance(dense, str | None)
            assert other.entries == dense.entries
        stack = statistics.find("model.layers.0.mlp.switch_mlp.gate_proj", (4, 32, 96))
        one = statistics.find("model.layers.0.mlp.experts.2.up_proj", (32, 96))
        assert not isinstance(stack, str | None)
        assert not isinstance(one, str | None)
        q = dense.weights(0)
        assert q is not None
        np.testing.assert_allclose(q, squares(64, seed=1), rtol=1e-6)
        experts = squares(4, 96, seed=2)
        for number in (0, 2, 3):
            weights = stack.weights(number)
            assert weights is not None
            np.testing.assert_allclose(weights, experts[number], rtol=1e-6)
        assert np.array_equal(one.weights(0), stack.weights(2))  # type: ignore[arg-type]
        if path.suffix != ".dat":  # the older form does not say
            assert stack.matrices_without_tokens == [1]
            assert stack.weights(1) is None
        assert statistics.find("model.layers.1.self_attn.q_proj", (32, 64)) is None
        wrong = statistics.find("model.layers.0.self_attn.q_proj", (32, 128))
        assert isinstance(wrong, str)
        assert "blk.0.attn_q has 64 inputs" in wrong or "q_proj has 64 inputs" in wrong
        assert "the layer has 128 inputs" in wrong


def test_experts_with_a_name_each_make_a_stack(tmp_path: Path) -> None:
    entries = {f"blk.0.ffn_up.{n}.weight": squares(96, seed=n) for n in range(3)}
    statistics = read_statistics(older(tmp_path / "m.dat", entries))
    stack = statistics.find("model.layers.0.mlp.switch_mlp.up_proj", (3, 8, 96))
    assert not isinstance(stack, str | None)
    for number in range(3):
        weights = stack.weights(number)
        assert weights is not None
        np.testing.assert_allclose(weights, squares(96, seed=number), rtol=1e-6)


@settings(max_examples=40)
@given(
    shapes=st.dictionaries(
        st.text("abcd.", min_size=1, max_size=9).map(lambda s: f"x{s}x"),
        st.tuples(st.integers(1, 4), st.integers(1, 40), st.booleans()),
        min_size=1,
        max_size=5,
    )
)
def test_what_is_written_is_read(
    shapes: dict[str, tuple[int, int, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("s") / "s.safetensors"
    layers, hessians = {}, {}
    for n, (name, (experts, n_in, with_hessian)) in enumerate(shapes.items()):
        values = squares(experts, n_in, seed=n)
        layers[name] = LayerStatistics(values, np.ones(experts), values * 2)
        if with_hessian:
            full = squares(experts, n_in, n_in, seed=n)
            hessians[name] = full.__getitem__
    write_statistics(path, layers, hessians)
    statistics = read_statistics(path)
    assert set(statistics.seen) == set(shapes)
    for n, (name, (experts, n_in, with_hessian)) in enumerate(shapes.items()):
        answer = statistics.find(name, (experts, 2, n_in))
        assert not isinstance(answer, str | None)
        assert answer.has_hessians == with_hessian
        for expert in range(experts):
            weights = answer.weights(expert)
            assert weights is not None
            assert np.array_equal(weights, squares(experts, n_in, seed=n)[expert])
            if with_hessian:
                full = squares(experts, n_in, n_in, seed=n)[expert]
                assert np.array_equal(answer.hessian(expert), np.triu(full))


def test_hessians_of_older_files_are_read(tmp_path: Path) -> None:
    """They are whole matrices."""
    full = squares(2, 5, 5, seed=3)
    tensors = {"a.mean_square": squares(2, 5), "a.count": np.ones(2, "<f4"), "a.hessian": full}
    path = tmp_path / "s.safetensors"
    save_file(tensors, path, {"format": "requant-statistics", "version": "1"})
    answer = read_statistics(path).find("a", (2, 3, 5))
    assert not isinstance(answer, str | None)
    for expert in range(2):
        assert np.array_equal(answer.hessian(expert), full[expert])


def test_hessians_take_a_triangle(tmp_path: Path) -> None:
    """Row by row from the diagonal, as safetensors reads it."""
    full = squares(3, 70, 70, seed=4)
    layers = {"a": LayerStatistics(squares(3, 70), np.ones(3))}
    write_statistics(tmp_path / "s.safetensors", layers, {"a": full.__getitem__})
    stored = load_file(tmp_path / "s.safetensors")["a.hessian_triangle"]
    rows, columns = np.triu_indices(70)
    assert np.array_equal(stored, full[:, rows, columns])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    """The last number of the data becomes a NaN."""
    data = bytearray(path.read_bytes())
    at = data.rindex(squares(4, 96, seed=2)[3].tobytes()[-4:])
    data[at : at + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: d / "none", "cannot be read: No such file"),
        (lambda d: d, "is not a regular file|Is a directory"),
        (lambda d: written(d, b"123"), "has 3 bytes, too few"),
        (lambda d: written(d, ours(d / "s", LAYERS).read_bytes()[:200]), "header: .*bytes"),
        (lambda d: written(d, b"\x00" * 64), "neither a safetensors nor a GGUF file"),
        (lambda d: written(d, struct.pack("<iii", 1, 3, 9)), "the download complete"),
        (lambda d: written(d, struct.pack("<ii3sii", 1, 3, b"abc", 1, -5) + bytes(8)), "is -5"),
        (lambda d: changed(d, ours(d / "s", LAYERS), cut), "ends at|beyond|past"),
        (lambda d: changed(d, ours(d / "s", LAYERS), flipped), "negative or no numbers"),
        (lambda d: other_tensors(d), "not a statistics file, but other tensors"),
        (lambda d: newer_of(d, "general.type"), "expected 'imatrix': the file is a model"),
        (lambda d: newer_of(d, "counts"), "has in_sum2, but no counts"),
        (lambda d: newer_of(d, "rows"), "a count for each row of sums"),
        (lambda d: ours(d / "s", {"a": -squares(4)}), "negative or no numbers"),
        (lambda d: ours(d / "s", {"a": squares(2, 4)}, {"a": [1]}), "count is F32"),
        (lambda d: ours(d / "s", {"a": squares(4)}, {"a": [np.nan]}), "negative or no numbers"),
    ],
)
def test_damaged_files_are_rejected(make: Callable[[Path], Path], words: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=words) as caught:
        read_statistics(make(tmp_path))
    assert str(tmp_path) in str(caught.value)


def written(folder: Path, data: bytes) -> Path:
    (folder / "file").write_bytes(data)
    return folder / "file"


def changed(folder: Path, path: Path, change: Callable[[Path], None]) -> Path:
    change(path)
    return path


def other_tensors(folder: Path) -> Path:
    write_file(folder / "s.safetensors", {"a.weight": np.ones((2, 2), np.float32)})
    return folder / "s.safetensors"


def newer_of(folder: Path, damage: str) -> Path:
    path = folder / "m.gguf"
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("model" if damage == "general.type" else "imatrix")
    writer.add_tensor("a.weight.in_sum2", squares(2, 4))
    if damage != "counts":
        writer.add_tensor("a.weight.counts", np.ones((2 + (damage == "rows"), 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# -- conversions ---------------------------------------------------------------------------
@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A stack of experts under mixtral's names, and two dense layers."""
    folder = tmp_path / "source"
    folder.mkdir()
    random = np.random.default_rng(9)
    names = {
        "model.layers.0.self_attn.q_proj": (32, 64),
        "model.layers.0.self_attn.o_proj": (32, 64),
        "model.layers.0.mlp.switch_mlp.up_proj": (4, 32, 96),
    }
    tensors = {f"{n}.weight": random.normal(0, 1, s).astype(BF16) for n, s in names.items()}
    write_file(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "of a test"}))
    return folder


OPTIONS: dict[str, Any] = {"bits": 3, "group_size": 32, "layout": "keep"}


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
def test_each_matrix_is_weighted_by_its_own(mode: str, source: Path, tmp_path: Path) -> None:
    """The same as the kernels alone, matrix by matrix; whatever the chunks and the form."""
    options: dict[str, Any] = {"mode": mode, "layout": "keep"}
    if mode == "affine":
        options |= OPTIONS
    weights = read_folder(source)
    group, bits = {"affine": (32, 3), "mxfp4": (32, 4), "nvfp4": (16, 4)}[mode]
    for number, path in enumerate(three_forms(tmp_path)):
        out = tmp_path / f"out{number}"
        report = requant.convert(
            source, out, statistics=path, chunk_bytes=(1, 3000, None)[number], **options
        )
        made = read_folder(out)

        def check(layer: str, expert: int | None, importance: np.ndarray | None) -> None:
            w = weights[f"{layer}.weight"]
            stored = made[f"{layer}.weight"], made[f"{layer}.scales"]  # noqa: B023
            if expert is not None:
                w, stored = w[expert], tuple(array[expert] for array in stored)
            estimated = estimated_power(w) if importance is None else None
            words, scales, _ = native.quantize(
                w,
                Quantization(group, bits, mode),
                search="best",
                weights=importance if estimated is None else estimated,
                by_magnitude=importance is None,
            )
            assert np.array_equal(stored[0], words), (layer, expert)
            assert stored[1].tobytes() == scales.tobytes(), (layer, expert)

        check("model.layers.0.self_attn.q_proj", None, squares(64, seed=1))
        check("model.layers.0.self_attn.o_proj", None, None)
        for expert in range(4):
            unseen = expert == 1 and path.suffix != ".dat"
            mine = None if unseen else squares(4, 96, seed=2)[expert]
            check("model.layers.0.mlp.switch_mlp.up_proj", expert, mine)
        notes = " ".join(note_texts(report.plan.notes))
        assert "weighted by" in notes
        assert "model.layers.0.self_attn.o_proj found no statistics" in notes
        assert ("1 expert of" in notes) == (path.suffix != ".dat")
        reasons = {x.layer: reason_text(x) for x in report.plan.layers}
        assert "no statistics" in reasons["model.layers.0.self_attn.o_proj"]
        assert not reasons["model.layers.0.self_attn.q_proj"]


def test_other_shapes_are_reported_all_at_once(source: Path, tmp_path: Path) -> None:
    layers = {
        "model.layers.0.self_attn.q_proj": squares(96),
        "model.layers.0.mlp.switch_mlp.up_proj": squares(5, 96),
    }
    path = ours(tmp_path / "s.safetensors", layers)
    with pytest.raises(CheckpointError) as caught:
        requant.convert(source, tmp_path / "out", statistics=path, **OPTIONS)
    words = str(caught.value)
    assert "q_proj has 96 inputs, the layer has 64 inputs" in words
    assert "has 5 experts of 96 inputs, the layer has 4 experts of 96 inputs" in words
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_model_are_rejected(source: Path, tmp_path: Path) -> None:
    path = ours(tmp_path / "s.safetensors", {"encoder.up": squares(64)})
    with pytest.raises(CheckpointError, match=r"encoder\.up: is it of another model"):
        requant.plan(source, statistics=path, **OPTIONS)


def test_verify_takes_the_file_again(source: Path, tmp_path: Path) -> None:
    path, out = ours(tmp_path / "s.safetensors", LAYERS), tmp_path / "out"
    requant.convert(source, out, statistics=path, **OPTIONS)
    record = json.loads((out / "requant.json").read_text())
    assert record["options"]["statistics"] == "s.safetensors"
    assert record["options"]["search"] == "best"
    assert str(tmp_path) not in (out / "requant.json").read_text()
    assert requant.verify(out).ok
    assert requant.verify(source, out, statistics=path).ok
    with pytest.raises(RequantError, match=r"made with statistics, s\.safetensors"):
        requant.verify(source, out)
    other = ours(tmp_path / "other.safetensors", {k: v * v for k, v in LAYERS.items()})
    verification = requant.verify(source, out, statistics=other)
    assert any("another plan" in problem.message for problem in verification.problems)
    plain = tmp_path / "plain"
    requant.convert(source, plain, **OPTIONS)
    with pytest.raises(RequantError, match="made without statistics"):
        requant.verify(source, plain, statistics=path)


def test_a_file_that_changes_meanwhile_is_rejected(source: Path, tmp_path: Path) -> None:
    path = ours(tmp_path / "s.safetensors", LAYERS)
    statistics = read_statistics(path)
    answer = statistics.find("model.layers.0.self_attn.q_proj", (32, 64))
    assert not isinstance(answer, str | None)
    ours(path, {k: v * 2 for k, v in LAYERS.items()})
    with pytest.raises(CheckpointError, match="another file now"):
        answer.weights(0)
