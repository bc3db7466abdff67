"""Models of mlx-vlm, mlx-audio and mlx-embeddings: requant's output is the library's own, by bytes.

``scripts/layouts`` does the same for every model of the four libraries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import requant
from requant.errors import CheckpointError
from requant.libraries import LIBRARIES
from requant.quantization.config import Quantization
from tests.support.class_models import FOLDERS, class_checkpoint
from tests.support.library_conversion import convert_both_ways, loaded
from tests.support.mlx_reference import differences, load
from tests.support.safetensors_files import read_folder, write_file

pytestmark = [
    pytest.mark.sweep(2),
    pytest.mark.filterwarnings("ignore"),  # of the libraries, while they are imported
]

AFFINE = Quantization.affine(64, 4)
MODES: dict[str, tuple[Quantization | None, str | None]] = {
    "4 bits": (AFFINE, None),
    "mxfp4": (Quantization(32, 4, "mxfp4"), None),
    "nvfp4": (Quantization(16, 4, "nvfp4"), None),
    "mixed_4_6": (AFFINE, "mixed_4_6"),
    "dense": (None, None),
}
VLM = ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "idefics3", "glm4v", "paligemma", "mllama"]
VLM += ["qwen3_5_moe", "mistral3", "aya_vision", "gemma4", "deepseek_vl_v2", "lfm2_vl"]
AUDIO = ["whisper", "voxtral", "qwen2_audio", "qwen3_asr", "wav2vec", "moonshine", "parakeet"]
EMBEDDINGS = ["bert", "xlm_roberta", "modernbert", "qwen3", "gemma3_text", "siglip", "qwen3_vl"]
CASES = [
    *(("mlx-vlm", f"mlx_vlm.models.{family}") for family in VLM),
    *(("mlx-audio", f"mlx_audio.stt.models.{family}") for family in AUDIO),
    ("mlx-audio", "mlx_audio.tts.models.moss_tts_nano"),
    ("mlx-audio", "mlx_audio.tts.models.qwen3_tts"),
    *(("mlx-embeddings", f"mlx_embeddings.models.{family}") for family in EMBEDDINGS),
]
# What the libraries themselves do not load again: mlx-audio 0.6.2 transposes convolutions once
# more, and mlx-embeddings 0.1.0 writes a setting that its own class does not take.
NOT_LOADED = {"moonshine", "wav2vec", FOLDERS["siglip"]}


def source_of(library: str, package: str, folder: Path, **own: Any) -> Path:
    """A small checkpoint of a model; skips where the library is not installed."""
    if LIBRARIES[library].folder is None:
        pytest.skip(
            f"{library} is not installed (pip install 'requant[{LIBRARIES[library].extra}]')"
        )
    family = package.rpartition(".")[2]
    source = folder / FOLDERS.get(family, family)
    class_checkpoint(LIBRARIES[library], package, source, own)
    return source


@pytest.mark.parametrize(
    ("number", "library", "package"), [(i, *x) for i, x in enumerate(CASES)], ids=lambda x: str(x)
)
def test_every_byte_is_the_library_s(
    number: int, library: str, package: str, tmp_path: Path
) -> None:
    """In 4 bits and one other mode, one after another; the text of the config included."""
    source = source_of(library, package, tmp_path)
    modes = [x for x in MODES if not x.startswith("mixed") or x in LIBRARIES[library].recipes]
    for mode in {"4 bits", modes[1 + number % (len(modes) - 1)]}:
        quantization, recipe = MODES[mode]
        result = convert_both_ways(
            LIBRARIES[library], source, tmp_path / mode, quantization, recipe
        )
        if result.library_error:  # Whisper's layers are not those of a recipe
            assert result.requant_error, mode
            continue
        assert (result.requant_error, result.different) == ("", []), mode
        assert bool(result.load_error) == (source.name in NOT_LOADED), result.load_error
        assert bool(result.load_error) == bool(result.own_load_error)


def test_a_head_of_another_name_leaves_the_flag(tmp_path: Path) -> None:
    """Speech models have no ``lm_head``: nothing says that theirs is tied to an embedding."""
    package = "mlx_audio.tts.models.moss_tts_nano"
    source = source_of("mlx-audio", package, tmp_path, gpt2_config={"tie_word_embeddings": False})
    result = convert_both_ways(LIBRARIES["mlx-audio"], source, tmp_path / "work", AFFINE)
    assert (result.requant_error, result.different) == ("", [])


def test_a_parameter_without_a_tensor_is_named(tmp_path: Path) -> None:
    """mlx-audio would write random values for it."""
    source = source_of("mlx-audio", "mlx_audio.stt.models.qwen3_asr", tmp_path)
    tensors = read_folder(source)
    missing = next(name for name in tensors if name.startswith("audio_tower.") and "conv" in name)
    del tensors[missing]
    write_file(source / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=missing):
        requant.convert(source, tmp_path / "out", layout="mlx-audio", quantization=AFFINE)


def test_the_comparison_sees_one_bit(tmp_path: Path) -> None:
    source = source_of("mlx-embeddings", "mlx_embeddings.models.bert", tmp_path)
    requant.convert(source, tmp_path / "out", layout="mlx-embeddings", quantization=AFFINE)
    tensors = read_folder(tmp_path / "out")
    name = next(name for name in tensors if name.endswith(".scales"))
    before = load(tmp_path / "out")
    changed = tensors[name].copy()
    changed.view("uint8").reshape(-1)[0] ^= 1
    write_file(tmp_path / "changed.safetensors", tensors | {name: changed})
    assert differences(load(tmp_path), before)[-1:] == [f"{name}: other bytes"]
    assert loaded(LIBRARIES["mlx-embeddings"], tmp_path / "out", only_weights=True) is not None
