"""Config and tokenizer of GGUF files next to those that transformers' own reader makes of them."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

import requant
from requant.gguf.metadata import Metadata
from requant.gguf.pretokenizers import SPLITTINGS
from requant.gguf.tokenizer import tokenizer_files
from tests.support.checkpoints import model
from tests.support.gguf_files import write_gguf
from tests.support.gguf_models import OWN, tiny, trained, values

pytestmark = pytest.mark.sweep(1)

transformers = pytest.importorskip("transformers")
reader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")

# Text with what splitting rules look at: letters of several kinds, digits, marks, spaces.
TEXT = st.text(
    st.one_of(
        st.sampled_from(
            "aZs'tLLre 0129.,!/\n\r\t\u00a0\u4e2d\u3042\u01c5\u02b0\u0301\ud55c\U0001f600"
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=30,
)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Config of a file as transformers reads it; for this it asks for PyTorch without need."""
    monkeypatch.setattr(reader, "is_torch_available", lambda: True)
    return lambda path: reader.load_gguf_checkpoint(str(path), return_tensors=False)["config"]


UNKNOWN_TO_THEM = ("gemma", "ministral3", "smollm3", "granite", "seed_oss", "olmo2", "olmo3")
MORE: dict[str, dict[str, Any]] = {  # settings that llama.cpp's converter writes
    "llama": {"vocab_size": 256, "rope.dimension_count": 32},
    "gemma2": {"attention.sliding_window": 64},
    "gpt_oss": {},
}
# Where they are wrong; each with what the model that was written has.
WRONG = {
    # They know no Mixtral: llama.cpp calls it llama, with experts.
    ("mixtral", "model_type"): "mixtral"
}


@pytest.mark.parametrize("name", [name for name in OWN if name not in UNKNOWN_TO_THEM])
def test_config(name: str, theirs: Any, tmp_path: Path) -> None:
    """Everything that transformers reads from a file is in our config.json, with its value."""
    made, config = tiny(name)
    config.setdefault("tie_word_embeddings", False)
    weights = {k: v for k, v in values(made).items() if "rotary" not in k}
    path = tmp_path / "model.gguf"
    write_gguf(path, weights, config, more=MORE.get(name, {}))
    ours = requant.plan(path).config
    found = theirs(path)
    assert len(found) > 9
    for key, value in found.items():
        wanted = WRONG.get((name, key), value)
        if isinstance(wanted, float):  # they keep the digits that float32 adds
            wanted = float(str(np.float32(wanted)))
        assert ours[key] == wanted, key
    assert transformers.AutoConfig.for_model(**ours).model_type == config["model_type"]


@pytest.mark.parametrize("name", ["micro-llama", "qwen3-16m"])
@settings(max_examples=100)
@given(text=TEXT)
def test_tokenizer_of_a_trained_model(name: str, text: str) -> None:
    """The same numbers as the original tokenizer, and as transformers on the same file."""
    ours, original, theirs = tokenizers_of(name)
    wanted = original.encode(text, add_special_tokens=False)
    assert ours.encode(text, add_special_tokens=False) == wanted
    assert theirs.encode(text, add_special_tokens=False).ids == wanted
    assert ours.decode(wanted) == original.decode(wanted)


@cache
def tokenizers_of(name: str) -> tuple[Any, Any, Any]:
    """Ours, from a GGUF file; the original; what transformers makes of the same file."""
    folder = Path(mkdtemp())
    weights, config = trained(name)
    write_gguf(folder / "m.gguf", weights, config, "Q8_0", tokenizer=model(name))
    requant.convert(folder / "m.gguf", folder / "out", layout="keep")
    load = transformers.AutoTokenizer.from_pretrained
    # Their file reader wants PyTorch; what they make of the metadata does not.
    fields = gguf.GGUFReader(folder / "m.gguf").fields
    names = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"].items()
    found = {
        theirs: fields[f"tokenizer.{key}"].contents()
        for key, theirs in names
        if f"tokenizer.{key}" in fields
    }
    theirs, _ = mapping.convert_gguf_tokenizer("llama", found)
    return load(folder / "out"), load(model(name)), theirs


@pytest.mark.slow
def test_special_tokens_of_a_trained_model() -> None:
    ours, original, _ = tokenizers_of("qwen3-16m")
    for part in ("bos_token_id", "eos_token_id"):
        assert getattr(ours, part) == getattr(original, part)
    text = f"a{original.eos_token}b{original.bos_token}"
    assert ours.encode(text) == original.encode(text)


@pytest.mark.parametrize("pre", sorted(set(SPLITTINGS) & set(mapping.GGUF_PRE_TOKENIZER_SPLITS)))
@settings(max_examples=60)
@given(text=TEXT)
def test_splitting_of_words(pre: str, text: str) -> None:
    files, _ = tokenizer_files(
        Metadata(
            "m.gguf",
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
            | {"tokenizer.ggml.tokens": ("a",)},
        )
    )
    ours = Tokenizer.from_str(files["tokenizer.json"]().decode()).pre_tokenizer
    regex = Regex(mapping.GGUF_PRE_TOKENIZER_SPLITS[pre])
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs = pre_tokenizers.Sequence([pre_tokenizers.Split(regex, behavior="isolated"), level])
    assert ours is not None
    assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_their_names_are_known_here() -> None:
    assert set(mapping.GGUF_PRE_TOKENIZER_SPLITS) <= set(SPLITTINGS)


@pytest.mark.slow
def test_config_is_json(tmp_path: Path) -> None:
    """What convert writes is what transformers loads."""
    weights, config = trained("qwen3-16m")
    write_gguf(tmp_path / "m.gguf", weights, config, "Q8_0", tokenizer=model("qwen3-16m"))
    requant.convert(tmp_path / "m.gguf", tmp_path / "out")
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("hidden_size", "num_hidden_layers", "head_dim", "vocab_size"):
        assert getattr(loaded, key) == made[key] == config[key]


def test_accents_are_composed_for_qwen() -> None:
    """As Qwen's own tokenizer does; files do not mention it, and transformers leaves it out."""
    stored = {"tokens": ["e", "\u00c3", "\u00a9", "\u00cc", "\u0123"], "merges": []}
    values = {f"tokenizer.ggml.{key}": tuple(value) for key, value in stored.items()}
    values |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"}
    files, _ = tokenizer_files(Metadata("m.gguf", values))
    ours = Tokenizer.from_str(files["tokenizer.json"]().decode())
    kinds = {"tokenizer_type": "gpt2", "pre_tokenizer_type": "qwen2"}
    theirs, _ = mapping.convert_gguf_tokenizer("qwen2", stored | kinds)
    assert ours.encode("e\u0301").ids == ours.encode("\u00e9").ids == [1, 2]
    assert theirs.encode("\u00e9").ids == [1, 2]
    assert theirs.encode("e\u0301").ids[0] == 0
