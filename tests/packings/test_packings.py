"""Every packing of AWQ, GPTQ and AutoRound: codes, zeros and groups against written facts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import requant
from tests.support.checkpoints import write_quantized
from tests.support.conversions import rejection
from tests.support.layers import packers
from tests.support.mlx_reference import codes_of
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import write_file

LAYER = "model.layers.0.mlp.up_proj"


def layer(out: int, n_in: int, groups: int, bits: int, seed: int, least_zero: int = 0) -> Any:
    """Random codes and zeros, and scales whose products with them are exact in float16."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (out, n_in))
    zeros = rng.integers(least_zero, 1 << bits, (out, groups))
    scales = (
        rng.integers(1, 8, (out, groups)) * 2.0 ** rng.integers(-9, -3, (out, groups))
    ).astype(np.float16)
    return codes, zeros, scales


def converted(
    tensors: Mapping[str, np.ndarray], block: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, requant.Quantization]:
    """Codes, scales and biases of the only layer, a value a code."""
    weights = {f"{LAYER}.{role}": array for role, array in tensors.items()}
    made, quantization = requant.transform_weights(weights, block)
    found = quantization.quantization_for(LAYER)
    assert found is not None
    scales, biases = (
        made[f"{LAYER}.{role}"].astype(np.float64).repeat(found.group_size, axis=1)
        for role in ("scales", "biases")
    )
    return codes_of(made[f"{LAYER}.weight"], found.bits), scales, biases, found


def check(
    tensors: Mapping[str, np.ndarray],
    block: Mapping[str, Any],
    codes: np.ndarray,
    zeros: np.ndarray | int,
    scales: np.ndarray,
    group: int,
) -> requant.Quantization:
    """The codes bit for bit, the scales as stored, the biases ``-zero * scale``."""
    got, got_scales, got_biases, quantization = converted(tensors, block)
    of = np.arange(codes.shape[1]) // group
    wanted = scales.astype(np.float64)
    assert np.array_equal(got, codes)
    assert np.array_equal(got_scales, wanted[:, of])
    assert np.array_equal(got_biases, (-wanted * zeros)[:, of])
    return quantization


shapes = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32 - 1))


@settings(max_examples=30)
@given(shapes, st.sampled_from([4, 5, 6, 7, 8]), st.sampled_from([32, 64, 128]))
def test_awq_gemm(shape: tuple[int, int, int], bits: int, group: int) -> None:
    out, groups = 32 * shape[0] if bits != 4 else 8 * shape[0], shape[1]
    codes, zeros, scales = layer(out, group * groups, groups, bits, shape[2])
    block = {"quant_method": "awq", "bits": bits, "group_size": group, "version": "GEMM"}
    quantization = check(
        packers.gemm(codes, zeros, scales, bits), block, codes, zeros, scales, group
    )
    assert quantization.bits == (8 if bits == 7 else bits)
    assert quantization.group_size == group


@pytest.mark.parametrize("stored", [True, False], ids=["zeros stored", "no zeros"])
def test_awq_gemm_without_zero_points(stored: bool, tmp_path: Path) -> None:
    """Every zero is 8, whether or not it is stored: exact; other zeros stop the run."""
    codes, _, scales = layer(16, 64, 2, 4, 11)
    eights = np.full(scales.shape, 8)
    block = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False}
    tensors = packers.gemm(codes, eights, scales)
    if not stored:
        del tensors["qzeros"]
    check(tensors, block, codes, 8, scales, 32)
    of_layer = {f"{LAYER}.{role}": part for role, part in tensors.items()}
    source = write_quantized(tmp_path / "source", of_layer, block, dtype="float16")
    report = requant.convert(source, tmp_path / "out", layout="keep")
    assert [str(found.exactness) for found in report.plan.layers] == ["exact"]
    of_layer[f"{LAYER}.qzeros"] = packers.gemm(codes, eights - 1, scales)["qzeros"]
    bad = write_quantized(tmp_path / "bad", of_layer, block, dtype="float16")
    assert "every zero is 8, but its zeros are 7" in rejection(bad, tmp_path / "none")


@settings(max_examples=30)
@given(shapes, st.sampled_from([32, 64, 128]))
def test_awq_gemv(shape: tuple[int, int, int], group: int) -> None:
    out, groups = shape[0], shape[1]
    codes, zeros, scales = layer(out, group * groups, groups, 4, shape[2])
    block = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemv"}
    check(packers.gemv(codes, zeros, scales), block, codes, zeros, scales, group)


@settings(max_examples=20)
@given(shapes, st.sampled_from([64, 128]), st.sampled_from(["qzeros", "scaled_zeros"]))
def test_awq_gemv_fast(shape: tuple[int, int, int], group: int, role: str) -> None:
    out, groups = 4 * shape[0], shape[1]
    codes, zeros, scales = layer(out, group * groups, groups, 4, shape[2])
    block = {"quant_method": "awq", "w_bit": 4, "q_group_size": group, "version": "gemv_fast"}
    if role == "scaled_zeros":
        block |= {"backend": "llm-awq", "version": "gemm"}
    check(packers.fast(codes, zeros, scales, role), block, codes, zeros, scales, group)


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1), st.booleans())
def test_marlin(blocks: int, groups: int, seed: int, by_gptq: bool) -> None:
    out, group = 64 * blocks, 128
    codes, _, scales = layer(out, group * groups, groups, 4, seed)
    names = ("B", "s") if by_gptq else ("qweight", "scales")
    block: dict[str, Any] = {"bits": 4, "group_size": group, "quant_method": "awq"}
    block |= {"version": "marlin", "zero_point": False}
    if by_gptq:
        block = {"bits": 4, "group_size": group, "quant_method": "gptq", "sym": True}
        block |= {"checkpoint_format": "marlin"}
    check(packers.marlin(codes, scales, names), block, codes, 8, scales, group)


@settings(max_examples=60)
@given(
    shapes,
    st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    st.sampled_from([32, 64, 128, 256]),
    st.sampled_from(["gptq", "gptq_v2", "gptq_p"]),
    st.booleans(),
)
def test_gptq(shape: tuple[int, int, int], bits: int, group: int, written: str, by_gptqmodel: bool):
    out, groups = 32 * shape[0], shape[1]
    planar = written == "gptq_p" or bits in (5, 6, 7)  # whatever the label says
    minus = 1 if written == "gptq" and not planar else 0
    # A stored field of all ones is read in two ways: v1 zeros start at 1.
    codes, zeros, scales = layer(out, group * groups, groups, bits, shape[2], least_zero=minus)
    tensors = packers.gptq(codes, zeros, scales, bits, planar=planar, stored_minus=minus)
    block: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": group}
    block |= {"checkpoint_format": written, "sym": False}
    if by_gptqmodel:
        block["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    quantization = check(tensors, block, codes, zeros, scales, group)
    assert quantization.group_size == min(group, 128)


@settings(max_examples=40)
@given(
    shapes,
    st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    st.sampled_from(["auto_round", "auto_round:auto_gptq", "auto_round:gptqmodel"]),
)
def test_auto_round_is_a_stream_at_every_width(
    shape: tuple[int, int, int], bits: int, written: str
) -> None:
    out, groups, group = 32 * shape[0], shape[1], 32
    minus = 1 if written == "auto_round:auto_gptq" else 0
    codes, zeros, scales = layer(out, group * groups, groups, bits, shape[2], least_zero=minus)
    tensors = packers.gptq(codes, zeros, scales, bits, stored_minus=minus)
    block = {"quant_method": "auto-round", "bits": bits, "group_size": group, "sym": False}
    check(tensors, block | {"packing_format": written}, codes, zeros, scales, group)


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_outputs_that_fill_no_word(out: int, seed: int) -> None:
    """A tool pads qzeros to whole words where the outputs end within one."""
    codes, zeros, scales = layer(out, 96, 3, 4, seed)
    tensors = packers.gptq(codes, zeros, scales, 4)
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    check(tensors, block | {"checkpoint_format": "gptq_v2"}, codes, zeros, scales, 32)


@pytest.mark.parametrize(("n_in", "group", "groups"), [(352, 128, 3), (96, 64, 2), (160, 128, 2)])
def test_a_ragged_last_group_becomes_smaller_groups(n_in: int, group: int, groups: int) -> None:
    codes, zeros, scales = layer(32, n_in, groups, 4, 7)
    tensors = packers.gptq(codes, zeros, scales, 4)
    block = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": False}
    quantization = check(
        tensors, block | {"checkpoint_format": "gptq_v2"}, codes, zeros, scales, group
    )
    assert quantization.group_size == 32


@pytest.mark.parametrize("pack_dtype", [np.int8, np.int16, np.int64])
def test_words_of_another_width(pack_dtype: type) -> None:
    """GPTQModel's pack_dtype: the same stream in other integers."""
    codes, zeros, scales = layer(64, 128, 2, 4, 3)
    tensors = packers.gptq(codes, zeros, scales, 4)
    tensors["qweight"] = np.ascontiguousarray(
        np.ascontiguousarray(tensors["qweight"].T).view(pack_dtype).T
    )
    tensors["qzeros"] = tensors["qzeros"].view(pack_dtype)
    block = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False}
    check(tensors, block | {"checkpoint_format": "gptq_v2"}, codes, zeros, scales, 64)


def test_a_group_of_16_is_requantized() -> None:
    codes, zeros, scales = layer(32, 64, 4, 4, 1)
    tensors = packers.gptq(codes, zeros, scales, 4)
    block = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False}
    _, _, _, quantization = converted(tensors, block | {"checkpoint_format": "gptq_v2"})
    assert quantization == requant.Quantization.affine(64, 8)


def test_inputs_that_fill_no_group_of_mlx_stay_dense() -> None:
    codes, zeros, scales = layer(32, 40, 1, 4, 1)
    tensors = packers.gptq(codes, zeros, scales, 4)
    block = {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": False}
    weights = {f"{LAYER}.{role}": array for role, array in tensors.items()}
    made, quantization = requant.transform_weights(
        weights, block | {"checkpoint_format": "gptq_v2"}
    )
    values = (codes - zeros) * scales.astype(np.float64)
    assert np.array_equal(made[f"{LAYER}.weight"], values.astype(np.float16))
    assert quantization.quantization_for(LAYER) is None


# -- words by hand, from the formats' documents ------------------------------------------------
@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (4, list(range(1, 9)), ["0x87654321"]),
        (2, [i % 4 for i in range(16)], ["0xe4e4e4e4"]),
        (8, [0, 1, 2, 3], ["0x3020100"]),
        (3, [i % 8 for i in range(32)], ["0x88fac688", "0xc688fac6", "0xfac688fa"]),
        (
            5,
            list(range(32)),
            ["0x8a418820", "0xc5a92839", "0xca307b9a", "0x38bdab49", "0xffbbcdeb"],
        ),
        (
            6,
            list(range(32)),
            ["0x440c2040", "0xa2481c61", "0x3ce34c2c", "0x544d2450", "0xa6585d65", "0x7de75c6d"],
        ),
    ],
)
def test_the_packer_s_stream(bits: int, codes: list[int], words: list[str]) -> None:
    assert [hex(word) for word in packers.stream(codes, bits)] == words


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (3, [i % 8 for i in range(32)], ["0xe4e4e4e4", "0xe4e4e4e4", "0xf0f0f0f0"]),
        (
            5,
            list(range(32)),
            ["0x76543210", "0xfedcba98", "0x76543210", "0xfedcba98", "0xffff0000"],
        ),
        (
            6,
            list(range(32)),
            ["0x76543210", "0xfedcba98", "0x76543210", "0xfedcba98", "0x0", "0x55555555"],
        ),
    ],
)
def test_the_packer_s_planes(bits: int, codes: list[int], words: list[str]) -> None:
    assert [hex(word) for word in packers.planes(codes, bits)] == words


def test_the_packer_s_gemm_word() -> None:
    codes = np.arange(1, 9).reshape(8, 1)
    made = packers.gemm(codes, np.full((8, 1), 8), np.ones((8, 1), np.float16))
    assert hex(int(made["qweight"].view(np.uint32)[0, 0])) == "0x86427531"
    assert hex(int(made["qzeros"].view(np.uint32)[0, 0])) == "0x88888888"


def test_the_packer_s_fast_words() -> None:
    codes = np.fromfunction(lambda r, k: (5 * r + 3 * k) % 16, (4, 64)).astype(int)
    ones = np.ones((4, 1), np.float16)
    words = packers.fast(codes, np.zeros((4, 1)), ones, "qzeros")["qweight"].view(np.uint16)[0]
    assert [hex(word) for word in words[:4]] == ["0x8080", "0xb3b3", "0xe6e6", "0x1919"]
    assert [hex(word) for word in words[[16, 17, 63]]] == ["0xd5d5", "0x808", "0xc4c4"]


def test_the_packer_s_marlin_words() -> None:
    codes = np.fromfunction(lambda n, k: (3 * k + 7 * n) % 16, (64, 16)).astype(int)
    words = packers.marlin(codes, np.ones((64, 1), np.float16), ("B", "s"))["B"].view(np.uint32)[0]
    assert [hex(word) for word in words[:4]] == ["0x3bb30880"] * 4
    assert hex(words[127]) == "0x6ee63bb3"


@pytest.mark.parametrize(
    ("word", "zeros"),
    [("0xf7777777", [8, 8, 8, 8, 8, 8, 8, 0]), ("0x77777f77", [8, 8, 0, 9, 8, 8, 8, 8])],
)
def test_zeros_of_version_1_by_gptqmodel_add_one_to_the_word(word: str, zeros: list[int]) -> None:
    """A carry runs into the next field, as the writer's borrow did."""
    tensors = packers.gptq(np.zeros((8, 32), int), np.zeros((8, 1), int), np.ones((8, 1), "f2"), 4)
    tensors["qzeros"] = np.array([[int(word, 16)]], np.uint32).view(np.int32)
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    block["meta"] = {"quantizer": ["gptqmodel:4.0.0"]}
    _, _, biases, _ = converted(tensors, block)
    assert (-biases[:, 0]).tolist() == zeros


def test_zeros_of_version_1_by_others_wrap_in_their_field() -> None:
    tensors = packers.gptq(np.zeros((8, 32), int), np.zeros((8, 1), int), np.ones((8, 1), "f2"), 4)
    tensors["qzeros"] = np.array([[0x77777F77]], np.uint32).view(np.int32)
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    _, _, biases, _ = converted(tensors, block)
    assert (-biases[:, 0]).tolist() == [8, 8, 0, 8, 8, 8, 8, 8]


def test_groups_counted_from_the_end() -> None:
    """GPTQModel reads a negative group as one from the end: -1 is the last."""
    codes, zeros, scales = layer(32, 64, 2, 4, 5)
    tensors = packers.gptq(codes, zeros, scales, 4)
    tensors["g_idx"] = np.repeat(np.array([0, -1], np.int32), 32)
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    check(tensors, block | {"checkpoint_format": "gptq_v2"}, codes, zeros, scales, 32)


@pytest.mark.parametrize(("field", "noted"), [(0x77777F77, True), (0x77777777, False)])
def test_a_zero_that_readers_dispute_is_noted(field: int, noted: bool, tmp_path: Path) -> None:
    tensors = packers.gptq(np.zeros((8, 32), int), np.zeros((8, 1), int), np.ones((8, 1), "f2"), 4)
    tensors["qzeros"] = np.array([[field]], np.uint32).view(np.int32)
    write_file(
        tmp_path / "model.safetensors", {f"{LAYER}.{role}": part for role, part in tensors.items()}
    )
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    config = {"model_type": "llama", "quantization_config": block}
    (tmp_path / "config.json").write_text(json.dumps(config))
    notes = note_texts(requant.plan(tmp_path, layout="keep").notes)
    assert any("taken for 0" in note for note in notes) is noted
