"""The layout: quantized sources, recipes, rejections, memory, and the shared models."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from requant.api.convert import plan
from requant.core.dtypes import TensorInfo
from requant.errors import CheckpointError, UsageError
from requant.layouts.outputs import ByteCopy, ComputedByRule, Extent
from requant.libraries import LayoutError, UnknownModelError
from requant.quantization.config import Quantization
from tests.support.families import small_config
from tests.support.hub_forms import FORMS
from tests.support.mlx_lm_conversion import (
    MLX_LM,
    Source,
    carry_out,
    class_checkpoint,
    compare,
    convert_with_mlx_lm,
    load_config,
    mlx_lm_layout,
    random_like,
    write_mlx_checkpoint,
)
from tests.support.mlx_reference import differences

pytestmark = pytest.mark.sweep(2)

AFFINE = Quantization.affine(32, 4)
SHARED = Path(__file__).parents[2].parent / "shared" / "models"


def make(folder: Path, model_type: str, **changes: object) -> dict[str, mx.array]:
    """A random checkpoint of a small model, under the class's names; its tensors."""
    class_checkpoint(folder, small_config(model_type) | changes)
    weights: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    return weights


def quantized(folder: Path, model_type: str, form=lambda w: w, **changes: object) -> None:
    """A checkpoint in MLX's quantized format, its triples under the names that ``form`` gives."""
    make(folder, model_type, **changes)
    weights, config = convert_with_mlx_lm(folder, AFFINE)
    write_mlx_checkpoint(folder, config, form(weights))


# -- the shared models ---------------------------------------------------------------------
@pytest.mark.parametrize("name", ["micro-moe", "qwen3-16m", "micro-llama"])
@pytest.mark.parametrize("quantization", [Quantization.affine(64, 4), None])
def test_shared_models(name: str, quantization: Quantization | None, tmp_path: Path):
    if not (SHARED / name).exists():
        if os.environ.get("REQUANT_REQUIRE_SHARED") == "1":
            pytest.fail(f"{SHARED / name} is missing")
        pytest.skip(f"{SHARED / name} is missing")
    folder = tmp_path / name
    folder.mkdir()
    for file in (SHARED / name).iterdir():
        shutil.copyfile(file, folder / file.name)
    layout, different = compare(folder, quantization)
    assert different == []
    assert all(isinstance(tensor, ByteCopy) for tensor in layout.tensors.values())


# -- what comes to be of a tensor ----------------------------------------------------------
def test_experts_are_extents_of_whole_tensors(tmp_path: Path):
    weights = make(tmp_path / "m", "mixtral")
    form = FORMS["mixtral"]
    write_mlx_checkpoint(tmp_path / "m", small_config("mixtral"), form(weights))
    source = Source(tmp_path / "m")
    layout = mlx_lm_layout(source.checkpoint.config, source.infos, quantization=AFFINE)
    prefix = "model.layers.1.block_sparse_moe"
    stacked = layout.tensors[f"{prefix}.switch_mlp.down_proj.weight"]
    assert stacked == ByteCopy(
        TensorInfo("BF16", (4, 128, 128)),
        tuple(Extent(f"{prefix}.experts.{e}.w2.weight", 0, 2 * 128 * 128) for e in range(4)),
    )
    assert layout.targets[f"{prefix}.switch_mlp.down_proj"] == AFFINE


def test_the_comparison_sees_what_is_wrong(tmp_path: Path):
    """A control of the tests themselves: one extent moved by a row is a difference."""
    form = FORMS["mixtral"]
    write_mlx_checkpoint(
        tmp_path / "m", small_config("mixtral"), form(make(tmp_path / "m", "mixtral"))
    )
    source = Source(tmp_path / "m")
    layout = mlx_lm_layout(source.checkpoint.config, source.infos)
    name = "model.layers.0.block_sparse_moe.switch_mlp.up_proj.weight"
    stacked = layout.tensors[name]
    assert isinstance(stacked, ByteCopy)
    swapped = ByteCopy(stacked.info, (stacked.extents[1], stacked.extents[0], *stacked.extents[2:]))
    wrong = replace(layout, tensors={**layout.tensors, name: swapped})
    theirs, _ = convert_with_mlx_lm(tmp_path / "m", None)
    assert differences(carry_out(wrong, source), theirs) == [f"{name}: other bytes"]
    assert differences(carry_out(layout, source), theirs) == []


def test_reasons_of_dense_layers(tmp_path: Path):
    make(tmp_path / "m", "qwen2", intermediate_size=144)
    source = Source(tmp_path / "m")
    layout = mlx_lm_layout(source.checkpoint.config, source.infos, quantization=AFFINE)
    down = "model.layers.0.mlp.down_proj"
    assert layout.dense_reasons[down].text == "last axis 144 is not a multiple of group 32"
    assert down not in layout.targets
    if MLX_LM < (0, 32):  # has no such family
        return
    make(tmp_path / "s", "spark2_5")
    source = Source(tmp_path / "s")
    layout = mlx_lm_layout(source.checkpoint.config, source.infos, quantization=AFFINE)
    assert layout.dense_reasons["model.layers.0.self_attn.g_proj"].text == (
        "mlx-lm leaves it dense in this model"
    )


def test_tied_head_and_towers_are_listed_as_dropped(tmp_path: Path):
    weights = make(tmp_path / "m", "qwen3", tie_word_embeddings=True)
    extra = {"lm_head.weight": random_like("h", (256, 128))}
    write_mlx_checkpoint(
        tmp_path / "m", small_config("qwen3") | {"tie_word_embeddings": True}, extra | weights
    )
    layout, different = compare(tmp_path / "m", AFFINE)
    assert different == []
    assert layout.dropped == ("lm_head.weight",)


def test_config_is_written_as_mlx_lm_does(tmp_path: Path):
    extra = {"_name_or_path": "x", "vision_config": {"depth": 2}, "a_float": {"__float__": "NaN"}}
    make(tmp_path / "m", "qwen3", **extra, torch_dtype="float32")
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    layout, different = compare(tmp_path / "m", Quantization(32, 4, "mxfp4"))
    assert different == []
    assert layout.config["eos_token_id"] == [7, 8]
    assert layout.config["a_float"] == {"__float__": "NaN"}
    assert layout.config["quantization_config"] == layout.config["quantization"]
    assert "vision_config" not in layout.config
    assert list(layout.config) == sorted(layout.config)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype(dtype: str, tmp_path: Path):
    class_checkpoint(tmp_path / "m", small_config("deepseek_v3"), mx.float32)
    layout, different = compare(tmp_path / "m", AFFINE, dtype=dtype)
    assert different == []
    kept = {name for name, found in layout.dtypes.items() if found == "F32"}
    biases = {"model.layers.1.mlp.gate.e_score_correction_bias"}
    assert kept == (layout.dtypes.keys() if dtype == "float32" else biases)


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_recipes(recipe: str, model_type: str, tmp_path: Path):
    make(tmp_path / "m", model_type, num_hidden_layers=9)
    layout, different = compare(tmp_path / "m", AFFINE, recipe=recipe)
    assert different == []
    assert len({target.bits for target in layout.targets.values()}) == 2


def test_recipes_that_cannot_be(tmp_path: Path):
    make(tmp_path / "m", "gpt2")
    source = Source(tmp_path / "m")
    config = source.checkpoint.config
    with pytest.raises(UsageError, match="affine"):
        mlx_lm_layout(
            config, source.infos, quantization=Quantization(32, 4, "mxfp4"), recipe="mixed_2_6"
        )
    with pytest.raises(LayoutError, match="expected keys"):
        mlx_lm_layout(config, source.infos, quantization=AFFINE, recipe="mixed_2_6")


# -- quantized sources ---------------------------------------------------------------------
def test_triples_keep_their_codes(tmp_path: Path):
    quantized(tmp_path / "m", "llama")
    layout, different = compare(tmp_path / "m")
    assert different == []
    assert all(isinstance(tensor, ByteCopy) for tensor in layout.tensors.values())


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v2", "glm4_moe", "mixtral"])
def test_triples_of_experts_are_stacked_alike(model_type: str, tmp_path: Path):
    form = FORMS[model_type]
    quantized(tmp_path / "m", model_type, form)
    layout, different = compare(tmp_path / "m")
    assert different == []
    stacked = [name for name in layout.tensors if "switch_mlp.up_proj." in name]
    assert {name.rpartition(".")[2] for name in stacked} == {"weight", "scales", "biases"}
    for name in stacked:
        tensor = layout.tensors[name]
        assert isinstance(tensor, ByteCopy)
        assert len(tensor.extents) == 4


def test_the_rest_of_a_partly_quantized_source(tmp_path: Path):
    make(tmp_path / "m", "llama")
    dense = mx.load(str(tmp_path / "m" / "model.safetensors"))
    weights, config = convert_with_mlx_lm(tmp_path / "m", AFFINE)
    up = "model.layers.0.mlp.up_proj"
    some = {k: v for k, v in weights.items() if not k.startswith(up)}
    write_mlx_checkpoint(tmp_path / "m", config, some | {f"{up}.weight": dense[f"{up}.weight"]})
    layout, different = compare(tmp_path / "m", Quantization.affine(64, 8))
    assert different == []
    assert dict(layout.targets) == {up: Quantization.affine(64, 8)}


@pytest.mark.skipif(MLX_LM < (0, 32), reason="mlx-lm has no global scales before 0.32")
def test_which_layers_take_a_global_scale(tmp_path: Path):
    make(tmp_path / "m", "mixtral")
    source = Source(tmp_path / "m")
    layout = mlx_lm_layout(source.checkpoint.config, source.infos)
    experts = "model.layers.0.block_sparse_moe.switch_mlp.up_proj"
    assert experts in layout.with_global_scale
    assert "model.layers.0.self_attn.q_proj" not in layout.with_global_scale


@pytest.mark.slow
def test_published_mxfp4(tmp_path: Path):
    """gpt-oss as it is published: blocks of 16 bytes, gate and up rows in turn."""
    config = small_config("gpt_oss") | {"quantization_config": {"quant_method": "mxfp4"}}
    weights = make(tmp_path / "m", "gpt_oss")
    weights = {
        k: v for k, v in weights.items() if "experts.gate" not in k and "experts.up" not in k
    }
    weights = {k: v for k, v in weights.items() if "experts.down" not in k}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        for proj, rows in (("gate_up_proj", 256), ("down_proj", 128)):
            codes = mx.random.randint(0, 256, (4, rows, 4, 16)).astype(mx.uint8)
            weights[f"{prefix}.{proj}_blocks"] = codes
            scales = mx.random.randint(110, 130, (4, rows, 4)).astype(mx.uint8)
            weights[f"{prefix}.{proj}_scales"] = scales
            weights[f"{prefix}.{proj}_bias"] = random_like(f"{layer}{proj}", (4, rows))
    write_mlx_checkpoint(tmp_path / "m", config, weights)
    layout, different = compare(tmp_path / "m", dtype="bfloat16")
    assert different == []
    assert all(isinstance(tensor, ByteCopy) for tensor in layout.tensors.values())


# -- rejections ------------------------------------------------------------------------------
def infos_of(model_type: str, config: dict) -> dict[str, TensorInfo]:
    """The tensors that mlx-lm's class has, without data."""
    import importlib

    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    model = module.Model(module.ModelArgs.from_dict(config))
    return {
        name: TensorInfo("BF16", tuple(array.shape))
        for name, array in tree_flatten(model.parameters())
    }


@pytest.mark.parametrize("config", [{"model_type": "no-such"}, {}, {"model_type": 3}])
def test_unknown_models(config: dict):
    with pytest.raises(UnknownModelError, match="--layout keep"):
        mlx_lm_layout(config, {})


def test_without_mlx_lm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(UnknownModelError, match="mlx-lm is not installed"):
        mlx_lm_layout({"model_type": "llama"}, {})


def test_missing_and_unknown_tensors_are_named():
    config = small_config("llama")
    infos = infos_of("llama", config)
    without = {k: v for k, v in infos.items() if not k.endswith("up_proj.weight")}
    with pytest.raises(LayoutError) as caught:
        mlx_lm_layout(config, without)
    for layer in range(2):
        assert f"model.layers.{layer}.mlp.up_proj.weight" in str(caught.value)
    with pytest.raises(LayoutError, match=r"model\.layers\.9\.odd"):
        mlx_lm_layout(config, infos | {"model.layers.9.odd": TensorInfo("F32", (2,))})
    with pytest.raises(LayoutError, match=r"norm\.weight"):
        mlx_lm_layout(config, infos | {"model.norm.weight": TensorInfo("BF16", (64,))})


def test_a_tensor_that_the_rule_wants():
    config = small_config("falcon_h1")
    with pytest.raises(LayoutError, match=r"conv1d\.weight' is missing"):
        mlx_lm_layout(config, {"a": TensorInfo("F32", (2,))})


def test_settings_that_the_class_wants():
    with pytest.raises(LayoutError, match="hidden_size"):
        mlx_lm_layout({"model_type": "llama"}, {"a": TensorInfo("F32", (2,))})


def test_code_of_the_checkpoint_is_not_run(tmp_path: Path):
    """Older mlx-lm runs what ``model_file`` names, with an absolute path from anywhere."""
    make(tmp_path / "m", "llama")
    code = tmp_path / "m" / "x.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name in ("x.py", str(code)):
        config = small_config("llama") | {"model_file": name}
        with pytest.raises(UnknownModelError, match=r"model_file.* not run"):
            mlx_lm_layout(config, Source(tmp_path / "m").infos)
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        assert plan(tmp_path / "m", bits=4).layout == "keep"
        with pytest.raises(CheckpointError, match=r"model_file.* not run"):
            plan(tmp_path / "m", bits=4, layout="mlx-lm")
    assert not (tmp_path / "ran").exists()


def test_dtypes_that_mlx_cannot_load():
    with pytest.raises(LayoutError, match=r"load 1 tensor, so.*odd \(F64\)"):
        mlx_lm_layout(small_config("llama"), {"odd": TensorInfo("F64", (2,))})


def test_a_rule_that_looks_at_values(monkeypatch: pytest.MonkeyPatch):
    from mlx_lm.models import llama

    def sanitize(self, weights):
        return {k: v for k, v in weights.items() if v.sum().item() == 0}

    monkeypatch.setattr(llama.Model, "sanitize", sanitize)
    config = small_config("llama")
    with pytest.raises(LayoutError, match="looks at values"):
        mlx_lm_layout(config, infos_of("llama", config))


def test_weights_changed_after_the_rule(monkeypatch: pytest.MonkeyPatch):
    from mlx_lm.models import llama

    def load_weights(self, weights, strict=True):
        super(llama.Model, self).load_weights(weights, strict)
        self.model.norm.weight = mx.zeros(7)

    monkeypatch.setattr(llama.Model, "load_weights", load_weights, raising=False)
    config = small_config("llama")
    infos = infos_of("llama", config)
    with pytest.raises(LayoutError, match=r"after it has loaded them \(model\.norm\.weight\)"):
        mlx_lm_layout(config, infos)


# -- computing -----------------------------------------------------------------------------
def test_compute_asks_for_its_inputs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With batches of one, each tensor loads what ``inputs`` says; asked twice, it is the same."""
    monkeypatch.setattr("requant.layouts.layout.BATCH_BYTES", 0)
    form = FORMS["qwen3_next"]
    write_mlx_checkpoint(
        tmp_path / "m", small_config("qwen3_next"), form(make(tmp_path / "m", "qwen3_next"))
    )
    source = Source(tmp_path / "m")
    layout = mlx_lm_layout(source.checkpoint.config, source.infos)
    expected, _ = convert_with_mlx_lm(tmp_path / "m", None)
    computed = {k: v for k, v in layout.tensors.items() if isinstance(v, ComputedByRule)}
    assert computed
    for name, tensor in reversed(computed.items()):
        asked: list[str] = []

        def load(source_name: str, asked: list[str] = asked) -> mx.array:
            asked.append(source_name)
            return source.load(source_name)

        first = layout.compute(name, load)
        assert sorted(asked) == sorted(tensor.inputs)
        again = layout.compute(name, source.load)
        assert (
            differences({"x": first, "y": again}, {"x": expected[name], "y": expected[name]}) == []
        )


def test_threads_get_what_they_ask_for(tmp_path: Path):
    form = FORMS["falcon_h1"]
    write_mlx_checkpoint(
        tmp_path / "m", small_config("falcon_h1"), form(make(tmp_path / "m", "falcon_h1"))
    )
    source = Source(tmp_path / "m")
    layout = mlx_lm_layout(source.checkpoint.config, source.infos)
    expected, _ = convert_with_mlx_lm(tmp_path / "m", None)
    names = [name for name, x in layout.tensors.items() if isinstance(x, ComputedByRule)]
    assert len(names) > 8
    results: dict[str, mx.array] = {}

    def work(part: int) -> None:
        for name in names[part::4]:
            results[name] = layout.compute(name, source.load)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert differences(results, {name: expected[name] for name in names}) == []


# -- cost ----------------------------------------------------------------------------------
BIG_LLAMA = {
    **{"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80},
    **{"intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
    **{"rms_norm_eps": 1e-5, "vocab_size": 128256, "tie_word_embeddings": False},
    "torch_dtype": "bfloat16",
}
BIG_MOE = {
    **{"model_type": "qwen3_moe", "hidden_size": 4096, "num_hidden_layers": 60},
    **{"intermediate_size": 12288, "num_attention_heads": 64, "num_key_value_heads": 4},
    **{"rms_norm_eps": 1e-6, "vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": False},
    **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536},
    **{"decoder_sparse_step": 1, "mlp_only_layers": [], "rope_theta": 1e6},
    "max_position_embeddings": 40960,
    "norm_topk_prob": True,
}

MEMORY = """
import json, resource, sys
import mlx.core as mx
from mlx_lm import utils
from requant.core.dtypes import TensorInfo
from requant.layouts.layout import Request, Shown, library_layout
from requant.libraries import MLX_LM
from requant.quantization.config import Quantization
config, tensors = json.load(open(sys.argv[1]))
tensors = {name: TensorInfo("BF16", tuple(shape)) for name, shape in tensors.items()}
utils._get_classes(config)
unit = 20 if sys.platform == "darwin" else 10
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> unit
before = peak()
request = Request(Quantization.affine(64, 4))
layout = library_layout(MLX_LM, Shown(config, tensors), request)
print(json.dumps([peak() - before, mx.get_peak_memory(), len(layout.targets)]))
"""


@pytest.mark.slow
def test_a_70b_model_takes_no_memory(tmp_path: Path):
    shapes = {name: info.shape for name, info in infos_of("llama", BIG_LLAMA).items()}
    (tmp_path / "in.json").write_text(json.dumps([BIG_LLAMA, shapes]))
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, str(tmp_path / "in.json")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resident_mib, mlx_bytes, layers = json.loads(out.splitlines()[-1])
    assert layers == 7 * 80 + 2
    assert resident_mib < 64
    assert mlx_bytes < 1 << 20


@pytest.mark.slow
def test_a_big_mixture_is_planned_without_memory():
    infos = {}
    for name, info in infos_of("qwen3_moe", BIG_MOE).items():
        for e in range(128 if "switch_mlp" in name else 1):
            single = re.sub("switch_mlp", f"experts.{e}", name)
            shape = info.shape[1:] if single != name else info.shape
            infos[single] = TensorInfo("BF16", shape)
    assert len(infos) > 23_000
    mx.reset_peak_memory()
    before = mx.get_peak_memory()
    layout = mlx_lm_layout(BIG_MOE, infos, quantization=Quantization.affine(64, 4))
    assert mx.get_peak_memory() - before < 1 << 20
    assert len(layout.tensors) == 723
    assert layout.targets["model.layers.0.mlp.gate"] == Quantization.affine(64, 8)


def test_the_config_given_is_not_changed(tmp_path: Path):
    quantized(tmp_path / "m", "llama")
    source = Source(tmp_path / "m")
    config = load_config(tmp_path / "m")
    before = json.dumps(config)
    mlx_lm_layout(config, source.infos)
    assert json.dumps(config) == before
