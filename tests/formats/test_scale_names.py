"""One list of scale names: what is next to codes is found whatever joins the two."""

import pytest

from requant.formats.scale_names import Role, ScaleNames, parse_scale_name

SCALES = (
    # codes, what tools write next to them, what it is
    ("mlp.up.weight", "mlp.up.weight_scale", Role.SCALE),
    ("mlp.up.weight", "mlp.up.weight_scale_inv", Role.SCALE),
    ("mlp.up.weight", "mlp.up.scale", Role.SCALE),
    ("mlp.up.weight", "mlp.up.scales", Role.SCALE),
    ("mlp.up.weight", "mlp.up.qscale_weight", Role.SCALE),
    ("mlp.up.weight", "mlp.up.SCB", Role.SCALE),
    ("mlp.up.weight", "mlp.up.weight.absmax", Role.SCALE),
    ("mlp.up.weight", "mlp.up.weight.nested_absmax", Role.TENSOR_SCALE),
    ("mlp.up.weight", "mlp.up.weight.quant_state.bitsandbytes__nf4", Role.OTHER),
    ("mlp.up.weight", "mlp.up.weight_quantizer._scale", Role.SCALE),
    ("mlp.up.weight", "mlp.up.weight_quantizer._double_scale", Role.TENSOR_SCALE),
    ("mlp.up.weight", "mlp.up.weight_scale_2", Role.TENSOR_SCALE),
    ("mlp.up.weight", "mlp.up.weight_zero_point", Role.ZERO),
    ("mlp.up.weight", "mlp.up.pre_quant_scale", Role.INPUT_SCALE),
    ("mlp.up.weight_packed", "mlp.up.weight_scale", Role.SCALE),
    ("mlp.up.weight_packed", "mlp.up.weight_global_scale", Role.TENSOR_SCALE),
    ("mlp.up.weight_packed", "mlp.up.weight_shape", Role.OTHER),
    ("mlp.up.weight_packed", "mlp.up.weight_g_idx", Role.INDEX),
    ("mlp.up.qweight", "mlp.up.qzeros", Role.ZERO),
    ("mlp.up.qweight", "mlp.up.g_idx", Role.INDEX),
    ("mlp.up.W_q", "mlp.up.zero", Role.ZERO),
    ("mlp.up.weight", "mlp.up.biases", Role.OFFSET),
    ("mlp.up.weight", "mlp.up.qbiases", Role.OFFSET),
    ("mlp.up._weight_qdata", "mlp.up._weight_scale", Role.SCALE),
    ("mlp.up.weight._data", "mlp.up.weight._scale", Role.SCALE),
    ("mlp.up.weight._data", "mlp.up.weight._shift", Role.ZERO),
    ("experts.gate_up_proj", "experts.gate_up_proj_scale", Role.SCALE),
    ("experts.gate_up_proj", "experts.gate_up_proj_scale_inv", Role.SCALE),
    ("experts.gate_up_proj", "experts.gate_up_proj_weight_scale", Role.SCALE),
    ("experts.gate_up_proj", "experts.gate_up_proj.weight_scale", Role.SCALE),
    ("experts.gate_up_proj", "experts.gate_up_proj_weight_scale_2", Role.TENSOR_SCALE),
    ("experts.gate_up_proj", "experts.gate_up_proj_absmax", Role.SCALE),
    ("experts.gate_up_proj", "experts.gate_up_proj_zero_point", Role.ZERO),
    ("experts.gate_up_proj", "experts.gate_up_proj_qzeros", Role.ZERO),
    ("experts.gate_up_proj_packed", "experts.gate_up_proj_scale", Role.SCALE),
    ("experts.gate_up_proj_packed", "experts.gate_up_proj_global_scale", Role.TENSOR_SCALE),
    ("experts.gate_up_proj_blocks", "experts.gate_up_proj_scales", Role.SCALE),
    ("experts.w13_weight", "experts.w13_weight_scale", Role.SCALE),
    ("experts.w13_weight", "experts.w13_weight_scale_inv", Role.SCALE),
    ("experts.w13_weight", "experts.w13_weight_scale_2", Role.TENSOR_SCALE),
    ("experts.w2_weight", "experts.w2_scale", Role.SCALE),
    ("experts.w13_weight_packed", "experts.w13_weight_scale", Role.SCALE),
    ("experts.w13_qweight", "experts.w13_qzeros", Role.ZERO),
)


@pytest.mark.parametrize(("codes", "scale", "role"), SCALES)
def test_a_scale_is_found_by_its_codes_and_the_codes_by_their_scale(
    codes: str, scale: str, role: Role
) -> None:
    names = ScaleNames(["mlp.down.weight", codes, scale, "norm.weight"])
    (found,) = names.siblings(codes)
    assert (found.name, found.role) == (scale, role)
    assert names.codes_of(found) == codes
    assert names.siblings(codes, role) == (found,)
    assert names.siblings("mlp.down.weight") == names.siblings("norm.weight") == ()


@pytest.mark.parametrize(
    "name",
    ["norm.weight", "scale", "up.input_max", "h.0.attn.bias", "upscale", "up.e_score_correction"],
)
def test_other_names_are_not_scales(name: str) -> None:
    assert parse_scale_name(name) is None


@pytest.mark.parametrize("name", ["norm.scale", "logit_scale", "router.per_expert_scale"])
def test_names_that_dense_models_use_too_are_not_certain(name: str) -> None:
    found = parse_scale_name(name)
    assert found is not None
    assert not found.is_certain


def test_a_scale_of_activations_is_next_to_no_codes() -> None:
    names = ScaleNames(["up.weight", "up.input_scale", "up.output_scale"])
    assert names.siblings("up.weight") == ()
