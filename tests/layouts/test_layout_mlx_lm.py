"""``layout="mlx-lm"``: what mlx-lm's own converter writes, name for name and bit for bit."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from requant.api.convert import convert, plan
from requant.errors import CheckpointError, UnknownValueError
from requant.libraries import MLX_LM
from requant.quantization.config import PerLayerQuantization, Quantization
from tests.support.checkpoints import model, tree
from tests.support.families import small_config
from tests.support.hub_forms import FORMS
from tests.support.library_conversion import convert_both_ways
from tests.support.mlx_lm_conversion import (
    MLX,
    class_checkpoint,
    convert_with_mlx_lm,
    random_like,
    write_mlx_checkpoint,
)
from tests.support.mlx_reference import assert_same_output, by_mlx_lm, load, same
from tests.support.plan_texts import note_texts

pytestmark = pytest.mark.sweep(1)


@pytest.mark.parametrize(
    "options, theirs",
    [
        ({"bits": 4}, {"quantize": True, "q_bits": 4}),
        ({"bits": 3, "group_size": 32}, {"quantize": True, "q_bits": 3, "q_group_size": 32}),
        ({"mode": "mxfp4"}, {"quantize": True, "q_mode": "mxfp4"}),
        ({"mode": "nvfp4"}, {"quantize": True, "q_mode": "nvfp4"}),
        ({"mode": "mxfp8"}, {"quantize": True, "q_mode": "mxfp8"}),
        ({"dequantize": True}, {}),
        ({"bits": 4, "dtype": "float16"}, {"quantize": True, "q_bits": 4, "dtype": "float16"}),
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
@pytest.mark.parametrize("name", ["micro-llama", "micro-moe", "qwen3-16m"])
def test_output_is_mlx_lm_s(name: str, options: dict, theirs: dict, tmp_path: Path) -> None:
    if MLX < (0, 32, 4) and options.get("mode") in ("mxfp4", "mxfp8"):
        pytest.skip("earlier mlx rounds the scales of these modes differently")
    expected = by_mlx_lm(model(name), tmp_path / "theirs", **theirs)
    convert(model(name), tmp_path / "ours", layout="mlx-lm", **options)
    assert_same_output(tmp_path / "ours", tmp_path / "theirs", expected)


def test_a_moe_loads_in_mlx_lm_and_generates(tmp_path: Path) -> None:
    import mlx_lm

    convert(model("micro-moe"), tmp_path / "ours", layout="mlx-lm", bits=4)
    loaded, tokenizer = mlx_lm.load(str(tmp_path / "ours"))
    assert mlx_lm.generate(loaded, tokenizer, prompt="The file", max_tokens=4)


@pytest.mark.slow
def test_stacked_experts_are_read_from_the_files_and_threads_change_nothing(tmp_path: Path) -> None:
    made = plan(model("micro-moe"), layout="mlx-lm", bits=4)
    stacked = [step for step in made.steps if "switch_mlp" in step.layer]
    assert {type(step.inputs["weight"]).__name__ for step in stacked} == {"JoinedTensor"}
    options = {"layout": "mlx-lm", "bits": 4}
    convert(model("micro-moe"), tmp_path / "one", threads=1, **options)
    convert(model("micro-moe"), tmp_path / "two", threads=2, chunk_bytes=5000, **options)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_overrides_rule_over_mlx_lm_s_choice(tmp_path: Path) -> None:
    made = plan(
        model("micro-moe"), layout="mlx-lm", bits=4, overrides=["down_proj=8", "gate$=skip"]
    )
    targets = {layer.layer: layer.target for layer in made.layers}
    assert targets["model.layers.0.mlp.switch_mlp.down_proj"] == "affine 8-bit g64"
    assert targets["model.layers.0.mlp.gate"] == "BF16"
    block = made.config["quantization"]
    assert block["model.layers.0.mlp.switch_mlp.down_proj"]["bits"] == 8
    assert block["model.layers.0.mlp.gate"] is False


@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"bits": 3, "group_size": 32}, {"mode": "mxfp4"}, {"mode": "nvfp4"}]
)
def test_experts_quantized_one_by_one_are_stacked(options: dict, tmp_path: Path) -> None:
    """Codes, scales and biases alike, though mlx-lm's own rule stacks only ``.weight``."""
    convert(model("micro-moe"), tmp_path / "kept", layout="keep", **options)
    report = convert(tmp_path / "kept", tmp_path / "ours", layout="mlx-lm")
    convert(model("micro-moe"), tmp_path / "expected", layout="mlx-lm", **options)
    ours, expected = load(tmp_path / "ours"), load(tmp_path / "expected")
    kept = load(tmp_path / "kept")
    for name in ours:
        if ".switch_mlp." in name:
            assert same(ours[name], expected[name])
        elif name in kept:
            assert same(ours[name], kept[name])
    assert {x.exactness for x in report.plan.layers} == {"exact"}
    stacked = {name for name in expected if ".switch_mlp." in name}
    assert stacked and stacked <= ours.keys()
    assert not any(".experts." in name for name in ours)


def test_an_mlx_source_keeps_its_codes(tmp_path: Path) -> None:
    convert(model("qwen3-16m"), tmp_path / "first", bits=4)
    convert(tmp_path / "first", tmp_path / "second", layout="mlx-lm")
    first, second = load(tmp_path / "first"), load(tmp_path / "second")
    assert first.keys() == second.keys()
    assert [name for name in first if not same(first[name], second[name])] == []


def test_a_model_that_mlx_lm_does_not_know(dense: Path) -> None:
    set_config(dense, model_type="no_such_model")
    with pytest.raises(CheckpointError, match=r"no_such_model.* --layout keep needs no class"):
        plan(dense, layout="mlx-lm", bits=4)


# -- auto: mlx-lm's layout where it can be had, and a note where it cannot -------------------
@pytest.mark.parametrize("name", ["micro-llama", "micro-moe", "qwen3-16m"])
def test_auto_is_mlx_lm_s_layout_where_mlx_lm_takes_the_model(name: str) -> None:
    made = plan(model(name), bits=4)
    assert made.layout == "mlx-lm"
    assert made.hash == plan(model(name), bits=4, layout="mlx-lm").hash
    assert not any("--layout" in note for note in note_texts(made.notes))


def kept_because(folder: Path, **options: object) -> str:
    """The note with which a plan keeps the source's names."""
    made, kept = plan(folder, **options), plan(folder, layout="keep", **options)
    assert (made.layout, made.hash) == ("keep", kept.hash)
    (note,) = set(note_texts(made.notes)) - set(note_texts(kept.notes))
    return note.removeprefix("Tensors keep the source's names (--layout keep): ")


def test_auto_keeps_names_where_mlx_lm_has_no_class(dense: Path) -> None:
    set_config(dense, model_type="no_such_model")
    assert kept_because(dense) == "mlx-lm has no class for model_type 'no_such_model'"
    set_config(dense, model_type=None)
    assert kept_because(dense) == "config.json has no model_type"


def test_auto_keeps_names_where_the_class_does_not_take_the_tensors(
    dense: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    assert kept_because(dense).startswith("mlx-lm, loading llama: ")
    shutil.copytree(model("micro-llama"), tmp_path / "more")
    weights = mx.load(str(tmp_path / "more" / "model.safetensors"))
    mx.eval(weights)  # the file is written over
    weights["model.surplus.weight"] = mx.ones((4, 64))
    mx.save_safetensors(str(tmp_path / "more" / "model.safetensors"), weights)
    assert "model.surplus.weight" in kept_because(tmp_path / "more", bits=4)


@pytest.mark.parametrize("package", ["mlx", "mlx_lm"])
def test_auto_keeps_names_without_mlx_lm(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert "mlx-lm is not installed" in kept_because(model("micro-llama"), bits=4)
    with pytest.raises(CheckpointError, match=r"not installed.* --layout keep needs no class"):
        plan(model("micro-llama"), layout="mlx-lm")


def test_auto_survives_an_mlx_lm_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets a limit of the process while it is imported, which may be forbidden."""

    class Broken:
        def __getattr__(self, name: str) -> object:
            raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setitem(sys.modules, "mlx_lm.utils", Broken())
    assert "cannot be imported (not allowed to raise" in kept_because(model("micro-llama"))


def test_layers_that_the_model_wants_finer_stay_so(tmp_path: Path) -> None:
    """Its rule for routers holds for a quantized source too: 8 bits, whatever the others take."""
    convert(model("micro-moe"), tmp_path / "first", bits=4)
    made = plan(tmp_path / "first", mode="mxfp4", layout="mlx-lm")
    gates = [x for x in made.layers if x.layer.endswith("mlp.gate")]
    assert {(x.treatment, x.target) for x in gates} == {("kept", "affine 8-bit g64")}
    assert made.config["quantization"]["model.layers.0.mlp.gate"]["bits"] == 8


@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"dequantize": True}])
def test_a_folder_in_mlx_lm_s_names_stays_so(options: dict, tmp_path: Path) -> None:
    """Quantized sources too, with the block that then holds."""
    convert(model("micro-moe"), tmp_path / "first", bits=4)
    first = plan(tmp_path / "first", **options)
    kept = plan(tmp_path / "first", layout="keep", **options)
    assert first.layout == "mlx-lm"
    assert {t.name: t.info for s in first.shards for t in s.tensors} == {
        t.name: t.info for s in kept.shards for t in s.tensors
    }
    for key in ("quantization", "quantization_config"):
        blocks = [x.config.get(key) for x in (first, kept)]
        assert (blocks[0] is None) == (blocks[1] is None)
        if blocks[0] is not None:  # the library also names layers that equal its default
            read = [PerLayerQuantization.from_dict(x) for x in blocks]
            for path in {path for x in read for path in x.per_layer} | {"model.layers.0.mlp.other"}:
                assert read[0].quantization_for(path) == read[1].quantization_for(path)
    assert ("quantization" in first.config) == (options != {"dequantize": True})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "heavy"),
    [
        ({"model_type": None}, []),
        ({"model_type": "no_such_model"}, []),
        ({"model_type": "mistral"}, ["mlx"]),
        ({"model_type": "llama"}, ["mlx"]),
    ],
    ids=str,
)
def test_mlx_lm_is_imported_only_where_it_may_have_a_class(
    dense: Path, config: dict, heavy: list[str]
) -> None:
    set_config(dense, **config)
    code = (
        f"import sys, requant; requant.plan({str(dense)!r})\nprint([m for m in ('mlx', 'mlx_lm') "
        "if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(heavy)


def set_config(folder: Path, **changes: object) -> None:
    """Change keys of config.json; None takes one away."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def test_an_unknown_layout() -> None:
    with pytest.raises(UnknownValueError):
        plan("nowhere", layout="gguf")


# -- what mlx-lm's class has no use for --------------------------------------------------------
EXTRA = {
    "visual.blocks.0.weight": (64, 128),
    "visual.blocks.0.bias": (64,),
    "visual.patch_embed.proj.weight": (8, 3, 2, 2, 2),
}
PROCESSOR = '{"image_processor_type": "Qwen2VLImageProcessor"}'


def vlm(folder: Path, family: str = "qwen2_vl", extra: dict = EXTRA, **config: object) -> Path:
    """A small text model in its published form, with a tower next to it."""
    class_checkpoint(folder, small_config(family))
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    weights = FORMS[family](weights) | {x: random_like(x, s) for x, s in extra.items()}
    config = small_config(family) | {"vision_config": {"depth": 1}, **config}
    write_mlx_checkpoint(folder, config, weights)
    (folder / "preprocessor_config.json").write_text(PROCESSOR)
    return folder


def test_what_is_dropped_is_listed_by_name(tmp_path: Path) -> None:
    report = convert(vlm(tmp_path / "vlm"), tmp_path / "out", bits=4, group_size=32)
    plan = report.plan
    expected = {*EXTRA, "visual.patch.weight"}
    assert (plan.layout, plan.loads) == ("mlx-lm", True)
    assert {name for name, _ in plan.dropped} == expected
    for document in (plan.to_dict(), report.to_dict()):
        assert {name for name, _ in document["dropped"]} == expected
    assert not expected & load(tmp_path / "out").keys()


@pytest.mark.parametrize("keep_extra", [False, True])
def test_vision_config_stays_next_to_its_tower(tmp_path: Path, keep_extra: bool) -> None:
    """mlx-lm takes the key out of the config, and loaders choose by it what they expect."""
    source = vlm(tmp_path / "vlm", audio_config={"layers": 1})
    convert(source, tmp_path / "out", bits=4, group_size=32, keep_extra=keep_extra)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("vision_config") == ({"depth": 1} if keep_extra else None)
    assert list(config) == sorted(config)
    _, wanted = convert_with_mlx_lm(source, Quantization.affine(32, 4))
    config.pop("vision_config", None)
    assert config == wanted
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == PROCESSOR


def test_vision_config_goes_where_no_tensor_of_a_tower_is_kept(tmp_path: Path) -> None:
    """What --keep-extra keeps need not be a tower."""
    source = vlm(tmp_path / "next", "qwen3_next", {"mtp.fc.weight": (128, 256)})
    convert(source, tmp_path / "out", bits=4, group_size=32, keep_extra=True)
    assert "vision_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_extra_tensors_are_kept_dense_under_their_names(tmp_path: Path, dtype: str | None) -> None:
    source = vlm(tmp_path / "vlm", torch_dtype="float32")
    options = {"bits": 4, "group_size": 32, "dtype": dtype}
    plan = convert(source, tmp_path / "kept", **options, keep_extra=True).plan
    convert(source, tmp_path / "dropped", **options)
    stored, kept, dropped = (load(tmp_path / x) for x in ("vlm", "kept", "dropped"))
    assert kept.keys() == dropped.keys() | EXTRA.keys() | {"visual.patch.weight"}
    assert all(same(kept[name], dropped[name]) for name in dropped)
    for name in EXTRA:
        expected = stored[name] if dtype is None else stored[name].astype(mx.float16)
        assert same(kept[name], expected)
    assert plan.dropped == ()
    (note,) = [note for note in note_texts(plan.notes) if "has no use for" in note]
    assert note.startswith("mlx-lm has no use for 4 tensors ")
    assert note.endswith("ignores such tensors when it loads the result.")


@pytest.mark.parametrize("keep_extra", [False, True])
def test_mlx_lm_loads_the_same_model_with_and_without_them(tmp_path: Path, keep_extra: bool):
    from mlx_lm.utils import load_model

    convert(vlm(tmp_path / "vlm"), tmp_path / "out", bits=4, group_size=32, keep_extra=keep_extra)
    model, _ = load_model(tmp_path / "out")
    packed = dict(tree_flatten(model.parameters()))
    written = load(tmp_path / "out")
    assert all(same(array, written[name]) for name, array in packed.items())


def test_where_mlx_lm_rejects_them_a_note_says_so(tmp_path: Path) -> None:
    """Its rule for this model drops MTP heads only while experts are still apart."""
    from mlx_lm.utils import load_model

    source = vlm(tmp_path / "next", "qwen3_next", {"mtp.fc.weight": (128, 256)})
    dropped = plan(source, bits=4, group_size=32)
    assert dropped.loads and [name for name, _ in dropped.dropped] == ["mtp.fc.weight"]
    made = convert(source, tmp_path / "out", bits=4, group_size=32, keep_extra=True).plan
    assert not made.loads
    (note,) = [note for note in note_texts(made.notes) if "has no use for" in note]
    assert "does not load the result as it is: mlx-lm, loading qwen3_next: its class" in note
    with pytest.raises(ValueError, match=r"mtp\.fc\.weight"):
        load_model(tmp_path / "out")
    load_model(tmp_path / "out", strict=False)


@pytest.mark.slow
def test_a_kept_tower_of_codes_stays_codes(tmp_path: Path) -> None:
    first = vlm(tmp_path / "vlm")
    options = {"bits": 4, "group_size": 32, "keep_extra": True}
    convert(first, tmp_path / "first", **options, overrides=[r"visual\.blocks=8:64"])
    convert(tmp_path / "first", tmp_path / "second", keep_extra=True)
    before, after = load(tmp_path / "first"), load(tmp_path / "second")
    assert before.keys() == after.keys() >= {"visual.blocks.0.scales"}
    assert all(same(before[name], after[name]) for name in before)
    listed = plan(tmp_path / "first").dropped
    assert "visual.blocks.0.scales" in {name for name, _ in listed}
    dense = plan(tmp_path / "first", dequantize=True, keep_extra=True)
    assert {x.treatment for x in dense.layers if x.layer == "visual.blocks.0"} == {"dequantized"}


def test_the_library_s_own_block_of_a_quantized_source(tmp_path: Path) -> None:
    """Where it describes what was decided: with a mixed recipe it names layers of the default."""
    class_checkpoint(tmp_path / "class", small_config("minimax"))
    weights = mx.load(str(tmp_path / "class" / "model.safetensors"))
    mx.eval(weights)
    source = tmp_path / "minimax"
    write_mlx_checkpoint(source, small_config("minimax"), FORMS["minimax"](weights))
    affine = Quantization.affine(32, 4)
    result = convert_both_ways(MLX_LM, source, tmp_path / "work", affine, "mixed_4_6")
    assert (result.requant_error, result.different) == ("", [])
    options = {"recipe": "mixed_4_6", "group_size": 32, "overrides": ["embed_tokens=8"]}
    convert(source, tmp_path / "other", layout="mlx-lm", **options)
    block = json.loads((tmp_path / "other" / "config.json").read_text())["quantization"]
    assert block["model.embed_tokens"]["bits"] == 8
