"""``verify --load``: each library's class, every parameter, and the values of a forward pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import requant
from requant.errors import CheckpointError, Problem
from requant.libraries import MLX_VLM, Library, loading
from requant.libraries.forward_pass import forward
from requant.libraries.load_check import check_load
from tests.support.class_models import class_checkpoint
from tests.support.library_models import MODELS, write_model
from tests.support.mlx_reference import as_bytes

LIBRARIES = list(MODELS)


def rewrite(folder: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    """Change the tensors of a folder."""
    weights = dict(mx.load(str(folder / "model.safetensors")))
    change(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_parameter_is_the_file_s(library: str, tmp_path: Path) -> None:
    weights = write_model(library, tmp_path)
    model, _ = loading.load(tmp_path, library)
    loaded = dict(tree_flatten(model.parameters()))
    if library == "mlx-audio":
        weights = {n: x.transpose(0, 2, 1) if x.ndim == 3 else x for n, x in weights.items()}
    assert loaded.keys() == weights.keys()
    assert all(as_bytes(loaded[name]) == as_bytes(x) for name, x in weights.items())


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_problem_is_named(library: str, tmp_path: Path) -> None:
    """mlx-audio's own loader takes this file, and leaves random values."""
    write_model(library, tmp_path)
    weights = mx.load(str(tmp_path / "model.safetensors"))
    missing, other = sorted(n for n, x in weights.items() if x.ndim == 2 and ".0." in n)[:2]
    shape = list(weights[other].shape)

    def change(weights: dict[str, mx.array]) -> None:
        weights["added.weight"] = weights.pop(missing)
        weights[other] = mx.zeros((7, 128), mx.bfloat16)

    rewrite(tmp_path, change)
    check = check_load(tmp_path, library)
    by_place = {problem.where: problem.message for problem in check.problems}
    assert by_place.keys() == {missing, other, "added.weight"}
    assert "no tensor" in by_place[missing]
    assert "does not use it" in by_place["added.weight"]
    assert by_place[other] == f"shape [7, 128], {library} expects {shape}"


def test_mlx_audio_itself_does_not_notice(tmp_path: Path) -> None:
    """Why names are compared: without, a layer that is missing has random values."""
    write_model("mlx-audio", tmp_path)
    rewrite(tmp_path, lambda weights: weights.pop("language_model.model.norm.weight"))
    from mlx_audio.stt import utils
    from mlx_audio.stt.models import qwen2_audio

    hook = vars(qwen2_audio.Model)["post_load_hook"]
    qwen2_audio.Model.post_load_hook = staticmethod(lambda model, path: model)
    try:
        assert utils.load_model(tmp_path) is not None
    finally:
        qwen2_audio.Model.post_load_hook = hook
    (problem,) = check_load(tmp_path, "mlx-audio").problems
    assert problem.where == "language_model.model.norm.weight"


@pytest.mark.parametrize(
    ("library", "ran"),
    [
        ("mlx-lm", ["text, 8 tokens"]),
        ("mlx-vlm", ["text, 8 tokens", "image 168 x 168 and text, 44 tokens"]),
        ("mlx-audio", ["text, 8 tokens", "sound of 100 frames (audio_tower alone)"]),
        ("mlx-embeddings", ["text, 8 tokens"]),
    ],
)
def test_the_pass_runs_each_input(library: str, ran: list[str], tmp_path: Path) -> None:
    write_model(library, tmp_path)
    assert loading.find_library(tmp_path) == library
    model, config = loading.load(tmp_path, library)
    given = forward(model, config)
    assert (given.ran, given.not_run, given.nonfinite) == (ran, [], [])
    if library == "mlx-vlm":  # text, then 4 + 36 + 4 tokens
        assert given.logits == (8 + 44) * 384


@pytest.mark.parametrize(
    ("library", "name", "found"),
    [
        ("mlx-lm", "model.layers.1.mlp.down_proj.weight", "text"),
        ("mlx-vlm", "vision_tower.blocks.1.mlp.fc2.weight", "image"),
        ("mlx-audio", "audio_tower.layers.1.fc2.weight", "sound"),
        ("mlx-embeddings", "encoder.layer.1.output.dense.weight", "text"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(
    library: str, name: str, found: str, value: float, tmp_path: Path
) -> None:
    """One weight of a layer or of a tower."""
    write_model(library, tmp_path)

    def change(weights: dict[str, mx.array]) -> None:
        values = np.array(weights[name].astype(mx.float32))
        values[3, 5] = value
        weights[name] = mx.array(values).astype(mx.bfloat16)

    rewrite(tmp_path, change)
    problems = check_load(tmp_path, library).problems
    assert problems and all(found in problem.message for problem in problems)
    assert all("NaN or infinite" in problem.message for problem in problems)


def test_code_of_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    write_model("mlx-vlm", tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w')")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_file": "own.py"}))
    for layout in (*LIBRARIES, ""):
        (problem,) = check_load(tmp_path, layout).problems
        assert problem == Problem(
            "config.json", "names code of its own (model_file), which is not run"
        )
    assert not marker.exists()


def test_hooks_of_mlx_audio_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They load tokenizers with ``trust_remote_code=True``."""
    write_model("mlx-audio", tmp_path)
    from mlx_audio.stt.models import qwen2_audio

    def hook(model: object, path: Path) -> None:
        raise AssertionError("the hook was run")

    monkeypatch.setattr(qwen2_audio.Model, "post_load_hook", staticmethod(hook))
    assert check_load(tmp_path, "mlx-audio").ok
    assert vars(qwen2_audio.Model)["post_load_hook"].__func__ is hook


def test_a_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model("mlx-lm", tmp_path)
    monkeypatch.setattr(Library, "folder", None)
    (problem,) = check_load(tmp_path, "mlx-vlm").problems
    assert str(problem) == "mlx-vlm: is not installed (pip install 'requant[vlm]')"
    (problem,) = check_load(tmp_path).problems
    assert "mlx-embeddings (requant[embeddings])" in problem.message


def test_a_class_that_is_missing(tmp_path: Path) -> None:
    write_model("mlx-lm", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "none-such"}')
    for library in LIBRARIES:
        if loading.library_version(library):
            (problem,) = check_load(tmp_path, library).problems
            assert problem.where == library
            assert "no class for model_type 'none-such'" in problem.message


def test_what_is_replaced_is_put_back(tmp_path: Path) -> None:
    import mlx.nn as nn

    def state() -> tuple[object, ...]:
        return mx.load, mx.gather_mm, nn.Module.load_weights, mx.default_device()

    before = state()
    write_model("mlx-lm", tmp_path)
    assert check_load(tmp_path, "mlx-lm").ok
    (tmp_path / "model.safetensors").write_bytes(b"short")
    assert not check_load(tmp_path, "mlx-lm").ok
    assert state() == before


def test_experts_in_bfloat16(tmp_path: Path) -> None:
    """MLX's ``gather_mm`` takes float32 alone on the CPU."""
    from tests.support.checkpoints import model

    check = check_load(model("micro-moe"), "mlx-lm")
    assert check.ok and check.ran == ("text, 8 tokens",)


@pytest.mark.slow
def test_verify_and_convert(tmp_path: Path) -> None:
    write_model("mlx-vlm", tmp_path / "source")
    out = tmp_path / "out"
    report = requant.convert(tmp_path / "source", out, bits=4, layout="keep", verify_load=True)
    assert report.load is not None and report.load.library == "mlx-vlm"
    verification = requant.verify(out, load=True)
    assert verification.ok and verification.load == report.load
    assert requant.verify(out).load is None
    (out / "requant.json").unlink()
    assert requant.verify(out, load=True).load == report.load


def test_an_output_that_does_not_load_stays(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_model("mlx-vlm", source)
    rewrite(source, lambda weights: weights.pop("language_model.model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"norm\.weight: mlx-vlm finds no tensor") as caught:
        requant.convert(source, out, bits=4, layout="keep", verify_load=True)
    assert caught.value.action == "loaded"
    assert "complete and stays" in caught.value.__notes__[0]
    assert requant.verify(source, out).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_class_that_runs_in_generation_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text then runs as mlx-vlm's generation runs it, with the same logits."""
    write_model("mlx-vlm", tmp_path)
    model, _ = loading.load(tmp_path, "mlx-vlm", on_cpu=True)

    def call(self: object, input_ids: mx.array, pixel_values=None, mask=None) -> None:
        raise ValueError("not without a cache")

    monkeypatch.setattr(type(model), "__call__", call)
    check = check_load(tmp_path, "mlx-vlm")
    assert check.ok and check.ran[0] == "text, 8 tokens" and check.logits >= 8 * 384


def test_a_class_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model("mlx-lm", tmp_path)
    from mlx_lm.models import llama

    def call(self: object, inputs: mx.array, cache: object = None) -> None:
        raise KeyError("rope")

    monkeypatch.setattr(llama.Model, "__call__", call)
    (problem,) = check_load(tmp_path, "mlx-lm").problems
    expected = "its class for model_type 'llama' fails: text (KeyError: 'rope')"
    assert problem.message == expected


def test_a_class_that_fails_is_named_with_its_line(tmp_path: Path) -> None:
    """Command R's class takes the mask of a layer that a model of two layers does not have."""
    class_checkpoint(MLX_VLM, "mlx_vlm.models.cohere2", tmp_path / "cohere2")
    config = json.loads((tmp_path / "cohere2" / "config.json").read_text())
    config |= {"sliding_window_pattern": 4}
    (tmp_path / "cohere2" / "config.json").write_text(json.dumps(config))
    (problem,) = check_load(tmp_path / "cohere2", "mlx-vlm").problems
    assert "class for model_type 'cohere2' fails: text (IndexError: list index" in problem.message
    assert ", in mlx_vlm/models/cohere2/language.py, line " in problem.message


def test_a_kernel_for_metal_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of the model; what fails in another way does."""
    write_model("mlx-lm", tmp_path)
    from mlx_lm.models import llama

    def call(self: object, inputs: mx.array, cache: object = None) -> None:
        raise RuntimeError("[metal_kernel] No Metal back-end.")

    monkeypatch.setattr(llama.Model, "__call__", call)
    check = check_load(tmp_path, "mlx-lm")
    assert check.ok and check.ran == ()
    assert check.not_run == ("text (needs Metal, which this machine does not have)",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("aya_vision", {}),
        ("aya_vision", {"model_type": "cohere2_vision"}),
        ("cohere2", {}),
        ("glm4v_moe", {}),
        ("hunyuan_vl", {}),
        ("minimax_m3_vl", {}),
    ],
)
def test_families_whose_small_models_run(family: str, own: dict[str, str], tmp_path: Path) -> None:
    """With sections of rotary positions and patterns of windows that fit the small sizes."""
    class_checkpoint(MLX_VLM, f"mlx_vlm.models.{family}", tmp_path / family, own)
    check = check_load(tmp_path / family, "mlx-vlm")
    assert check.ok and check.ran[0] == "text, 8 tokens", check
