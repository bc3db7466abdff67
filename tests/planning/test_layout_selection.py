"""Which layout a checkpoint gets, and what is said where that is not mlx-lm's."""

import sys
from pathlib import Path

import pytest

from requant.api.convert import plan
from requant.checkpoints.checkpoint import Checkpoint, StoredTensor
from requant.core.dtypes import TensorInfo
from requant.core.reasons import NoteCode, Reason, ReasonCode
from requant.errors import CheckpointError
from requant.formats import SourceLayout, read_layout
from requant.formats.base import dense_layer
from requant.layouts.left_dense import modalities_of
from requant.layouts.relayout import LibraryLayoutError, Relayout
from requant.libraries import LIBRARIES, Library
from requant.planning import layout_selection
from requant.planning.layout_selection import (
    LayoutResult,
    OtherLayout,
    candidates,
    choose_layout,
    other_layout,
    vision_part,
    with_target,
)
from requant.planning.planner import lay_out
from requant.quantization.config import Quantization
from requant.quantization.options import ConvertOptions
from requant.sources.open import read_checkpoint
from tests.support.checkpoints import model, write_folder
from tests.support.library_models import write_model

TENSORS = {"model.up.weight": ("BF16", [64, 128]), "model.norm.weight": ("BF16", [128])}
NO_CLASS = "mlx-lm has no class for model_type 'no_such_model'"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    config = {"model_type": "no_such_model"}
    return read_checkpoint(
        write_folder(tmp_path / "source", {"model.safetensors": TENSORS}, config=config)
    )


def choose(checkpoint: Checkpoint, layout: str) -> LayoutResult:
    return choose_layout(checkpoint, read_layout(checkpoint)[1], ConvertOptions(layout=layout))


def test_without_a_class_names_stay_and_the_reason_is_there(checkpoint: Checkpoint) -> None:
    chosen = choose(checkpoint, "auto")
    assert chosen.relayout is None
    assert [layer.path for layer in chosen.layout.layers] == ["model.up", "model.norm"]
    assert chosen.rejection == NO_CLASS
    assert other_layout(chosen, ConvertOptions()) == OtherLayout("", NO_CLASS)


def test_names_that_were_asked_for_need_no_reason(checkpoint: Checkpoint) -> None:
    chosen = choose(checkpoint, "keep")
    assert (chosen.relayout, chosen.rejection) == (None, "")
    assert other_layout(chosen, ConvertOptions()) == OtherLayout("", NO_CLASS)


def test_mlx_lm_s_layout_or_none(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="Without mlx-lm's class") as caught:
        choose(checkpoint, "mlx-lm")
    assert [problem.where for problem in caught.value.problems] == ["--layout mlx-lm"]


# -- which libraries are tried under ``auto`` ---------------------------------------------------
VISION = "model.visual.blocks.0.attn.qkv.weight"
SOUND = "audio_tower.layers.0.fc1.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CAUSAL = {"architectures": ["Qwen3ForCausalLM"]}


@pytest.mark.parametrize(
    ("names", "config", "expected"),
    [
        ([EMBEDDING, HEAD], CAUSAL, ["mlx-lm", "mlx-audio"]),
        ([EMBEDDING], CAUSAL, ["mlx-lm", "mlx-audio"]),
        (["embed_tokens.weight"], CAUSAL, ["mlx-lm", "mlx-audio", "mlx-embeddings"]),
        ([EMBEDDING], {}, ["mlx-lm", "mlx-audio", "mlx-embeddings"]),
        ([EMBEDDING, HEAD, VISION], {}, ["mlx-vlm", "mlx-audio", "mlx-lm"]),
        ([EMBEDDING, HEAD, SOUND], {}, ["mlx-audio", "mlx-vlm", "mlx-lm"]),
        ([EMBEDDING, VISION], {}, ["mlx-vlm", "mlx-audio", "mlx-lm", "mlx-embeddings"]),
    ],
)
def test_candidates(
    names: list[str],
    config: dict[str, object],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With every library installed and with a class for the model."""
    monkeypatch.setattr(Library, "missing_class_reason", lambda *_: "")
    tensors = {name: ("BF16", [128, 64]) for name in names}
    source = write_folder(tmp_path / "source", {"model.safetensors": tensors}, config=config)
    layout = read_layout(read_checkpoint(source))[1]
    found = candidates(config, layout, *modalities_of(layout.layers, config))
    assert [library.name for library in found] == expected


def rejecting(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """Let one library have a class and reject every model, and the others have none."""
    reasons = {x: "" if x == library else f"{x} has no class" for x in LIBRARIES}
    monkeypatch.setattr(Library, "missing_class_reason", lambda x, _: reasons[x.name])

    def relayout(checkpoint: Checkpoint, _: object, library: Library, __: object) -> None:
        raise LibraryLayoutError(checkpoint, library, f"{library.name} says no")

    monkeypatch.setattr(layout_selection, "_relayout", relayout)


@pytest.mark.parametrize("library", ["mlx-vlm", "mlx-lm"])
def test_the_layout_that_could_be_taken_instead(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that were asked for: of the libraries that ``auto`` tries, the first that works."""
    monkeypatch.setattr(Library, "missing_class_reason", lambda *_: "")

    def relayout(checkpoint: Checkpoint, _: object, tried: Library, __: object) -> None:
        if tried.name != library:
            raise LibraryLayoutError(checkpoint, tried, "no")

    monkeypatch.setattr(layout_selection, "_relayout", relayout)
    tensors = {name: ("BF16", [128, 64]) for name in (EMBEDDING, HEAD, VISION)}
    source = write_folder(tmp_path / "source", {"model.safetensors": tensors}, config={})
    chosen = choose(read_checkpoint(source), "keep")
    assert other_layout(chosen, ConvertOptions()) == OtherLayout(library)


@pytest.mark.parametrize(
    ("layout", "mmproj", "installed", "expected"),
    [
        ("auto", None, True, None),
        ("auto", None, False, "none"),
        ("auto", "a.gguf", False, "a.gguf"),
        ("mlx-lm", None, True, "none"),
        ("mlx-vlm", None, False, None),
        ("keep", None, False, None),
    ],
)
def test_the_vision_part_is_read_where_it_can_be_written(
    layout: str,
    mmproj: str | None,
    installed: bool,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Library, "folder", Path() if installed else None)
    assert vision_part(ConvertOptions(layout=layout, mmproj=mmproj)) == expected


@pytest.mark.parametrize("library", ["mlx-vlm", "mlx-audio"])
def test_a_library_that_rejects_says_why(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names stay, and both reasons are given."""
    rejecting(monkeypatch, library)
    tensors = {name: ("BF16", [128, 64]) for name in (VISION, SOUND)}
    source = write_folder(tmp_path / "source", {"model.safetensors": tensors}, config={})
    chosen = choose(read_checkpoint(source), "auto")
    assert chosen.relayout is None
    assert chosen.rejection == "mlx-lm says no"
    texts = [x.text for x in chosen.notes if x.code is NoteCode.LIBRARY_REJECTED]
    assert texts == [f"{library} does not take this model: {library} says no."]


def test_a_missing_library_that_keeps_towers_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Library, "folder", None)
    tensors = {VISION: ("BF16", [128, 64])}
    source = write_folder(tmp_path / "source", {"model.safetensors": tensors}, config={})
    chosen = choose(read_checkpoint(source), "auto")
    assert [x.text for x in chosen.notes][:1] == [
        "mlx-vlm is not installed (pip install 'requant[vlm]')."
    ]


def test_text_only_is_the_first_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the plan: mlx-lm drops the tower, and the extra that keeps it is named."""
    pytest.importorskip("mlx_lm")
    write_model("mlx-vlm", tmp_path)
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    made = plan(tmp_path, bits=4)
    assert made.layout == "mlx-lm"
    assert made.notes[0].code is NoteCode.TEXT_ONLY
    assert made.notes[0].text == (
        "Text only: mlx-lm's class drops the towers for images; "
        "mlx-vlm keeps them (pip install 'requant[vlm]')."
    )


# -- another target ----------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", ["micro-llama", "micro-moe", "qwen3-16m"])
def test_another_target_gives_the_same_layout_as_a_new_one(name: str) -> None:
    pytest.importorskip("mlx_lm")
    before = Quantization.affine(64, 4)
    made = laid_out_for(model(name), before)
    for target in (Quantization.affine(g, b) for g in (32, 64, 128) for b in (2, 8)):
        again, found = laid_out_for(model(name), target), with_target(made, before, target)
        assert found is not None and found.relayout is not None and again.relayout is not None
        assert found.relayout.layout.targets == again.relayout.layout.targets
        assert found.relayout.layout.dense_reasons == again.relayout.layout.dense_reasons
        assert found.layout is made.layout


def laid_out_for(source: Path, target: Quantization) -> LayoutResult:
    options = ConvertOptions.from_arguments(target, layout="mlx-lm")
    return lay_out(read_checkpoint(source), options).chosen


def test_the_group_size_of_another_target_decides() -> None:
    """A layer with the target, one with the library's own choice, one that is too narrow."""
    conversion_trace = pytest.importorskip("requant.layouts.conversion_trace")
    before, own = Quantization.affine(64, 4), Quantization.affine(32, 8)
    narrow = Reason(ReasonCode.NO_GROUP_SIZE, "last axis 96 is not a multiple of group 64")
    widths = {"up": 192, "router": 128, "narrow": 96}
    layers = tuple(
        dense_layer(StoredTensor(f"{path}.weight", TensorInfo("BF16", (8, n)), "a", 0))
        for path, n in widths.items()
    )
    decisions = conversion_trace.Decisions(
        targets={"up": before, "router": own}, dense_reasons={"narrow": narrow}
    )
    layout = SourceLayout(layers)
    made = LayoutResult(None, layout, Relayout(decisions, {}, layout))
    wide = with_target(made, before, Quantization.affine(128, 4))
    assert wide.relayout.layout.targets == {"router": own}
    assert wide.relayout.layout.dense_reasons == {
        "narrow": narrow,
        "up": Reason(ReasonCode.NO_GROUP_SIZE, "last axis 192 is not a multiple of group 128"),
    }
    same = with_target(made, before, Quantization.affine(64, 2))
    assert same.relayout.layout.targets == {"router": own, "up": Quantization.affine(64, 2)}
    assert made.relayout.layout.targets == {"up": before, "router": own}
    assert with_target(made, before, Quantization.affine(32, 4)) is None
