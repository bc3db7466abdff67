"""How a plan is cut into parts."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.errors import UsageError
from requant.importance.reader import LayerStatistics, write_statistics
from requant.planning.parts import part_of, steps_of_part
from requant.planning.plan import Plan
from requant.planning.planner import make_plan
from requant.planning.step_cost import step_cost
from requant.quantization.options import ConvertOptions
from requant.quantization.part import Part
from requant.sources.open import read_checkpoint
from tests.support.checkpoints import MICRO_LLAMA, write_checkpoint
from tests.support.number_formats import bf16

OPTIONS = ConvertOptions.from_arguments(bits=4, layout="keep")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(read_checkpoint(MICRO_LLAMA), OPTIONS)


@settings(deadline=None)
@given(count=st.integers(1, 60))
def test_each_step_is_in_one_part(plan: Plan, count: int) -> None:
    parts = [steps_of_part(plan, Part(number, count)) for number in range(1, count + 1)]
    assert sorted(n for part in parts for n in part) == list(range(len(plan.steps)))
    # Contiguous: the parts follow each other in the order of the plan.
    assert [n for part in parts for n in part] == sorted(n for part in parts for n in part)


def test_parts_cost_about_the_same(plan: Plan) -> None:
    costs = [step_cost(step) for step in plan.steps]
    for count in (2, 3, 5):
        for number in range(1, count + 1):
            cost = sum(costs[n] for n in steps_of_part(plan, Part(number, count)))
            assert abs(cost - sum(costs) / count) <= max(costs)


def test_pieces_of_one_tensor_stay_together(tmp_path: Path) -> None:
    """Experts that become one stack, between layers that lie elsewhere in the file."""
    expert = "model.layers.0.block_sparse_moe.experts.{}.{}.weight"
    tensors = {
        expert.format(number, part): bf16(64, 128, seed=number)
        for number in range(4)
        for part in ("w1", "w2", "w3")
    }
    config = {"model_type": "mixtral", "num_local_experts": 4}
    plan = make_plan(read_checkpoint(write_checkpoint(tmp_path, tensors, config)), OPTIONS)
    of = {}
    for number in (1, 2, 3):
        for step in steps_of_part(plan, Part(number, 3)):
            for out in plan.steps[step].outputs.values():
                assert of.setdefault(out.name, number) == number
    assert set(of.values()) == {1, 2, 3}


def test_layers_that_share_a_hessian_stay_together(tmp_path: Path) -> None:
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    others = [f"model.layers.{n}.mlp.up_proj" for n in range(3)]
    source = write_checkpoint(
        tmp_path / "m", {f"{name}.weight": bf16(64, 128) for name in names + others}
    )
    file, ones = tmp_path / "s.safetensors", np.ones(128, np.float32)
    hessian = np.eye(128, dtype=np.float32)
    write_statistics(
        file,
        {name: LayerStatistics(ones, np.ones(1)) for name in (names[0], *others)},
        {name: lambda _: hessian for name in (names[0], *others)},
    )
    options = ConvertOptions.from_arguments(bits=4, layout="keep", gptq=True, statistics=str(file))
    plan = make_plan(read_checkpoint(source), options)
    assert all(step.gptq for step in plan.steps if step.layer in names)
    part = {
        plan.steps[step].layer: number
        for number in range(1, 7)
        for step in steps_of_part(plan, Part(number, 6))
    }
    assert len({part[name] for name in names}) == 1
    assert len(set(part.values())) == 4


def test_the_report_of_a_part_is_of_its_layers(plan: Plan) -> None:
    parts = [part_of(plan, steps_of_part(plan, Part(number, 3))) for number in (1, 2, 3)]
    assert sum(part.bytes_out for part in parts) == plan.bytes_out
    assert sum(part.parameters for part in parts) == plan.parameters
    assert [x.layer for part in parts for x in part.layers] == [x.layer for x in plan.layers]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1/0", "1", "a/b", "1/2/3", "-1/2", "1/99999", 3])
def test_no_such_part(text: object) -> None:
    with pytest.raises(UsageError, match="--part"):
        Part.parse(text)
