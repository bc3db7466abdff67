"""Whether a library has a class for a model, found by its files and tables without an import."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from requant.libraries import LIBRARIES, LayoutError, Library, Request

# A package of each library: file -> its text.
PACKAGES: dict[str, dict[str, str]] = {
    "mlx-lm": {
        "models/llama.py": "raise RuntimeError('imported')",
        "utils.py": "import numpy\nMODEL_REMAPPING = {'mistral': 'llama'}\n"
        "MODEL_ARCHITECTURE_REMAPPING = {('odd', 'OddForCausalLM'): 'llama'}",
    },
    "mlx-vlm": {
        "models/qwen2_vl/__init__.py": "raise RuntimeError('imported')",
        "utils.py": "MODEL_REMAPPING = {'qwen2-vl-chat': 'qwen2_vl', 'gone': 'no_such'}",
    },
    "mlx-audio": {
        "stt/models/whisper/__init__.py": "raise RuntimeError('imported')",
        "stt/models/parakeet/__init__.py": "DETECTION_HINTS = "
        "{'model_type_aliases': {'parakeet_tdt'}}",
        "stt/models/wav2vec/__init__.py": "from .wav2vec import Model",
        "stt/models/wav2vec/config.py": "@dataclass\nclass ModelConfig(Base):\n"
        '    model_type: str = "wav2vec2"\n',
        "lid/models/wav2vec2/__init__.py": "DETECTION_HINTS = "
        "{'architectures': {'Wav2Vec2ForSequenceClassification'}}",
        "tts/models/llama/__init__.py": "",
    },
    "mlx-embeddings": {"models/xlm_roberta.py": "", "models/base.py": ""},
}
CASES: list[tuple[str, Mapping[str, Any], bool]] = [
    ("mlx-lm", {"model_type": "llama"}, True),
    ("mlx-lm", {"model_type": "mistral"}, True),
    ("mlx-lm", {"model_type": "odd"}, True),
    ("mlx-lm", {"model_type": "../llama"}, False),
    ("mlx-lm", {"model_type": "bert"}, False),
    ("mlx-lm", {"model_type": 3}, False),
    ("mlx-lm", {}, False),
    ("mlx-vlm", {"model_type": "qwen2_vl"}, True),
    ("mlx-vlm", {"model_type": "Qwen2-VL-Chat"}, True),
    ("mlx-vlm", {"model_type": "gone"}, False),
    ("mlx-vlm", {"model_type": "llama"}, False),
    ("mlx-audio", {"model_type": "whisper"}, True),
    ("mlx-audio", {"name": "Whisper"}, True),
    ("mlx-audio", {"model_type": "parakeet_tdt"}, True),
    ("mlx-audio", {"model_type": "llama"}, False),
    ("mlx-audio", {"architectures": ["WhisperForConditionalGeneration"]}, False),
    ("mlx-embeddings", {"model_type": "xlm-roberta"}, True),
    ("mlx-embeddings", {"model_type": "base"}, False),
]


def package_of(library: Library, folder: Path) -> Path:
    """A package with the library's files, none of which may be imported."""
    for name, text in PACKAGES[library.name].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(("name", "config", "expected"), CASES, ids=str)
def test_a_class_is_found_by_files_and_tables(
    name: str, config: Mapping[str, Any], expected: bool, tmp_path: Path
) -> None:
    library = LIBRARIES[name]
    assert library.find_class(package_of(library, tmp_path), config) is expected


@pytest.mark.parametrize(
    ("heads", "domain"),
    [(["Wav2Vec2ForSequenceClassification"], "lid"), (["Wav2Vec2ForCTC"], "stt")],
)
def test_the_head_decides_between_the_domains_of_a_type(
    heads: list[str], domain: str, tmp_path: Path
) -> None:
    library = LIBRARIES["mlx-audio"]
    folder = package_of(library, tmp_path)
    config = {"model_type": "wav2vec2", "architectures": heads}
    assert library.arguments(folder, config) == {"model_domain": domain}


@pytest.mark.parametrize("name", ["mlx-lm", "mlx-vlm"])
def test_tables_that_cannot_be_read_leave_it_to_the_library(name: str, tmp_path: Path) -> None:
    for text in ("MODEL_REMAPPING = dict(a=1)", "def broken(", "NAMES = {}"):
        (tmp_path / "utils.py").write_text(text)
        assert LIBRARIES[name].find_class(tmp_path, {"model_type": "anything"})


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_is_missing_names_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = LIBRARIES[name]
    monkeypatch.setitem(sys.modules, library.package, None)
    why = library.missing_class_reason({"model_type": "llama"})
    assert why == f"{name} is not installed (pip install 'requant[{library.extra}]')"


def test_a_library_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.setitem(sys.modules, "mlx_lm.convert", None)
    with pytest.raises(LayoutError, match="mlx-lm cannot be imported"):
        LIBRARIES["mlx-lm"].convert(tmp_path, tmp_path / "out", Request())
