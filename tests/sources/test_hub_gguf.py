"""GGUF files of a hub on loopback, and models loaded from it into memory."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import requant
from requant.gguf.file_selection import gguf_models, select_model
from tests.support.checkpoints import MICRO_LLAMA, tree
from tests.support.hub_commands import Call, call, ok  # noqa: F401  (a fixture)
from tests.support.hub_server import Hub, serving

pytestmark = pytest.mark.sweep(1, tests=("test_models_are_detected_by_the_end_of_their_names",))

pytest.importorskip("huggingface_hub")
NAME = "someone/micro-GGUF"
CARD = b"---\nlicense: mit\n---\n# micro\n"


def test_models_are_detected_by_the_end_of_their_names() -> None:
    names = [
        "a-Q4_K_M.gguf",
        "a.IQ2_XXS.gguf",
        "a-UD-Q3_K_XL.gguf",
        "BF16/a-BF16-00001-of-00002.gguf",
        "BF16/a-BF16-00002-of-00002.gguf",
        "mmproj-a-f16.gguf",
        "a.imatrix.gguf",
        "small-Q8_0.gguf",
        "large-q8_0.gguf",
        "odd.gguf",
        "README.md",
    ]
    models = gguf_models(names)
    assert {key: len(files) for key, files in models.items()} == {
        **{"BF16": 2, "UD-Q3_K_XL": 1, "Q4_K_M": 1, "IQ2_XXS": 1, "large-q8_0": 1},
        **{"small-Q8_0": 1, "odd": 1},
    }
    assert select_model(models, "q4_k_m") == "Q4_K_M"
    assert select_model(models, "a-BF16-00001-of-00002.gguf") == "BF16"
    assert select_model(models, "large-q8_0.gguf") == "large-q8_0"
    assert select_model(models, "Q8_0") is None
    assert select_model(models, "Q4_K") is None


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """micro-llama as GGUF: Q8_0, Q4_0 in parts below a folder, and a picture tower's name."""
    pytest.importorskip("gguf")
    from safetensors.numpy import load_file

    from tests.support.gguf_files import write_gguf

    folder = tmp_path_factory.mktemp("gguf")
    stored = load_file(MICRO_LLAMA / "model.safetensors")
    weights = {name: x.astype(np.float32) for name, x in stored.items()}
    config = json.loads((MICRO_LLAMA / "config.json").read_text())
    (folder / "Q4_0").mkdir()
    dim = config["hidden_size"] // config["num_attention_heads"]
    extra = {"rope_freqs.weight": np.ones(dim // 2, np.float32)}  # a setting behind the header
    write_gguf(
        folder / "micro-Q8_0.gguf", weights, config, "Q8_0", tokenizer=MICRO_LLAMA, extra=extra
    )
    write_gguf(folder / "Q4_0" / "m-Q4_0.gguf", weights, config, "Q4_0", split_tensors=7)
    found = tree(folder)
    assert len(found) > 3
    return found | {"mmproj-micro-f16.gguf": b"GGUF", "README.md": CARD}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    known = {NAME: dict(files), "someone/one": {"m.gguf": files["micro-Q8_0.gguf"]}}
    with serving(Hub(known | {"someone/micro": tree(MICRO_LLAMA)})) as running:
        yield running


def written(tmp_path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(content)
    return tmp_path / "local"


@pytest.mark.parametrize(
    ("kind", "option"), [("Q8_0", ()), ("q4_0", ("--consume-source",)), ("micro-Q8_0.gguf", ())]
)
def test_a_file_of_a_repository(
    hub: Hub,
    call: Call,  # noqa: F811
    tmp_path: Path,
    files: dict[str, bytes],
    kind: str,
    option: tuple[str, ...],
) -> None:
    local = written(tmp_path, files) / ("micro-Q8_0.gguf" if "8" in kind else "Q4_0")
    size = sum(len(x) for name, x in files.items() if ("Q8_0" in name) == ("8" in kind))
    alone = ("--mmproj", "none")
    declared = ok(call("plan", f"{NAME}:{kind}", *alone))
    assert hub.sent < size
    assert f"{NAME}:{'Q8_0' if '8' in kind else 'Q4_0'} at " in declared
    ok(call("convert", f"{NAME}:{kind}", "out", *option, *alone, "--quiet"))
    requant.convert(local, tmp_path / "expected", mmproj="none")
    ours, theirs = tree(tmp_path / "out"), tree(tmp_path / "expected")
    record = json.loads(ours.pop("requant.json"))
    theirs.pop("requant.json")
    assert ours == theirs
    assert record["source"]["repository"] == [
        f"{NAME}:{'Q8_0' if '8' in kind else 'Q4_0'}",
        Hub.commit(NAME),
    ]
    ok(call("verify", NAME, "out"))
    assert not [path for _, path, _ in hub.log if "mmproj" in path]


def test_a_vision_part(
    hub: Hub,
    call: Call,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mmproj file next to the model is read with it; of two the error names both."""
    from tests.support.mmproj_pairs import write_pair

    folder = tmp_path / "pair"
    write_pair(folder, "gemma3", monkeypatch)
    pair = hub.repositories["someone/pair"] = tree(folder)
    two = pair | {"mmproj-model-Q8_0.gguf": pair["mmproj-model.gguf"]}
    hub.repositories["someone/two"] = two
    ok(call("convert", "someone/pair:model", "out", "--layout", "keep", "--quiet"))
    requant.convert(folder, tmp_path / "expected", layout="keep")
    ours, theirs = tree(tmp_path / "out"), tree(tmp_path / "expected")
    assert b"vision_tower" in ours["model.safetensors"]
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert ours[name] == theirs[name]
    ok(call("verify", "someone/pair", "out"))
    done = call("plan", "someone/two:model", "--layout", "keep")
    assert done.returncode == 1
    assert "(mmproj-model-Q8_0.gguf, mmproj-model.gguf): choose with --mmproj" in done.stderr
    chosen = ("--layout", "keep", "--mmproj", "mmproj-model-Q8_0.gguf")
    ok(call("plan", "someone/two:model", *chosen))


def test_which_one_is_meant(hub: Hub, call: Call) -> None:  # noqa: F811
    for wanted, declared in (
        ("", f"{NAME} holds 2 GGUF models; write {NAME}:Q4_0, or one of: Q4_0, Q8_0"),
        (":Q4_K_M", f"{NAME} holds no GGUF file 'Q4_K_M'; write {NAME}:Q4_0, or one of"),
    ):
        done = call("inspect", NAME + wanted)
        assert done.returncode == 1 and declared in done.stderr and "Traceback" not in done.stderr
    done = call("inspect", "someone/micro:Q4_K_M")
    assert "someone/micro holds no GGUF files, so there is no 'Q4_K_M'" in done.stderr
    assert "someone/one: gguf" in ok(call("inspect", "someone/one"))
    assert "dense" in ok(call("inspect", "someone/micro"))


def test_config_from_a_folder(hub: Hub, call: Call, tmp_path: Path) -> None:  # noqa: F811
    source = (f"{NAME}:Q8_0", "out", "--mmproj", "none")
    ok(call("convert", *source, "--config-from", MICRO_LLAMA, "--quiet"))
    made = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert made == (MICRO_LLAMA / "tokenizer.json").read_bytes()
    done = call("plan", "someone/micro", "--config-from", MICRO_LLAMA)
    assert done.returncode == 2 and "--config-from is for GGUF files" in done.stderr


def test_the_card_of_a_gguf_model(hub: Hub, call: Call) -> None:  # noqa: F811
    ok(call("convert", f"{NAME}:Q8_0", "out", "--mmproj", "none", "--quiet"))
    declared = ok(call("upload", "out", "me/m", "--dry-run"))
    assert f"base_model: {NAME}\n" in declared and "license: mit\n" in declared
    assert f"requant convert {NAME}:Q8_0 OUTPUT" in declared
    assert f"requant verify {NAME}:Q8_0 m\n" in declared


def test_generate_takes_a_repository(hub: Hub, call: Call) -> None:  # noqa: F811
    options = ("--prompt", "The file", "--bits", "4", "--max-tokens", "6", "--json")
    declared = json.loads(ok(call("generate", "someone/micro", "--revision", "v1", *options)))
    local = json.loads(ok(call("generate", MICRO_LLAMA, *options)))
    assert declared["text"] == local["text"]
    sent = hub.sent
    ok(call("generate", f"{NAME}:Q8_0", "--prompt", "The", "--max-tokens", "2", "--quiet"))
    assert hub.sent > sent
    done = call("generate", "no/such", "--prompt", "x")
    assert done.returncode == 1 and "no such model on the hub" in done.stderr
