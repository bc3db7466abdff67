"""Sources from a hub on loopback and outputs to it, with the real huggingface_hub."""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.checkpoints import tree
from tests.support.hub_commands import Call, ok
from tests.support.hub_server import Hub, serving

pytestmark = pytest.mark.slow

pytest.importorskip("huggingface_hub")
MICRO = Path(__file__).parents[2] / "examples" / "micro-llama"
NAME = "someone/micro"


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = tree(MICRO)
    files["pytorch_model.bin"] = bytes(3 << 20)
    files["original/params.json"] = b"{}"
    files["README.md"] = (
        b"---\nlicense: apache-2.0\nlanguage: en\ntags: [x]\n---\n# Of the source\n"
    )
    with serving(Hub({NAME: files})) as running:
        yield running


@pytest.fixture
def call(hub: Hub, tmp_path: Path) -> Call:
    return Call(hub, tmp_path)


def test_a_plan_reads_headers_only(hub: Hub, call: Call) -> None:
    declared = ok(call("plan", NAME, "--bits", "4", "--layout", "keep"))
    size = len(hub.repositories[NAME]["model.safetensors"])
    assert f"{NAME} (dense, 853,120 parameters)" in declared
    wanted = {k: v for k, v in hub.repositories[NAME].items() if k not in UNWANTED}
    downloads = f"{len(wanted)} of {len(wanted)} files, {sum(map(len, wanted.values())):,} bytes"
    assert (
        f"{NAME} at {Hub.commit(NAME)[:12]} on the hub: convert downloads {downloads}" in declared
    )
    assert hub.sent < 150_000 < size
    assert {path.rpartition("/")[2] for method, path, _ in hub.log if "resolve" in path} == {
        "config.json",
        "model.safetensors",
    }
    asked = len(hub.log)
    ok(call("plan", NAME, "--bits", "4", "--layout", "keep"))
    assert len(hub.log) == asked + 1  # which commit it is; the headers are here


UNWANTED = ("pytorch_model.bin", "original/params.json")


def test_a_plan_is_that_of_the_folder(call: Call, tmp_path: Path, hub: Hub) -> None:
    local = tmp_path / "local"
    for name, content in hub.repositories[NAME].items():
        if name not in UNWANTED:
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            (local / name).write_bytes(content)
    hashes = [
        json.loads(ok(call("plan", source, "--bits", "4", "--json")))["hash"]
        for source in (NAME, local)
    ]
    assert hashes[0] == hashes[1]


def test_small_tensors_that_decide_come_by_range(hub: Hub, call: Call) -> None:
    """A g_idx out of order tells whether GPTQ's codes are kept: sparse files hold zeros."""
    order = np.random.default_rng(0).permutation(128) // 32
    for name, g_idx in (("a/sorted", np.arange(128) // 32), ("a/shuffled", order)):
        hub.repositories[name] = gptq_files(g_idx.astype(np.int32))
    kept = ok(call("plan", "a/sorted", "--layout", "keep"))
    requantized = ok(call("plan", "a/shuffled", "--layout", "keep"))
    assert "kept" in kept and "requantized" not in kept
    assert "requantized" in requantized


def gptq_files(g_idx: np.ndarray) -> dict[str, bytes]:
    random = np.random.default_rng(1)

    def words(*shape: int) -> np.ndarray:
        return random.integers(-(1 << 31), 1 << 31, shape, np.int64).astype(np.int32)

    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"gptq-{os.getpid()}.safetensors"
    tensors = {
        "model.layers.0.self_attn.q_proj.qweight": words(16, 64),
        "model.layers.0.self_attn.q_proj.qzeros": words(4, 8),
        "model.layers.0.self_attn.q_proj.scales": np.ones((4, 64), np.float16),
        "model.layers.0.self_attn.q_proj.g_idx": g_idx,
        "model.embed_tokens.weight": np.zeros((3000, 64), np.float16),  # header, then far away
    }
    save_file(tensors, path)
    content = path.read_bytes()
    path.unlink()
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True}
    config = {"model_type": "llama", "quantization_config": block}
    return {"model.safetensors": content, "config.json": json.dumps(config).encode()}


def test_convert_downloads_and_records_the_commit(hub: Hub, call: Call, tmp_path: Path) -> None:
    options = ("--bits", "4", "--layout", "keep", "--quiet")
    ok(call("convert", NAME, "out", "--revision", "v1", *options))
    ok(call("convert", MICRO, "local", *options))
    assert not [path for _, path, _ in hub.log if path.endswith(UNWANTED)]
    out, local = ((tmp_path / x / "model.safetensors").read_bytes() for x in ("out", "local"))
    assert out == local
    record = json.loads((tmp_path / "out" / "requant.json").read_text())
    assert record["source"]["repository"] == [NAME, Hub.commit(NAME)]
    declared = ok(call("report", "out"))
    assert f"requant convert {NAME} out --bits 4" in declared
    assert f"--revision {Hub.commit(NAME)}" in declared
    ok(call("verify", "out"))
    snapshot = next((tmp_path / "hf" / "hub").glob("models--*/snapshots/*"))
    (snapshot / "pytorch_model.bin").write_bytes(bytes(3 << 20))  # another program's
    (snapshot / "notes.txt").write_text("not of the repository")
    assert f"equal to a conversion of {NAME}" in ok(call("verify", NAME, "out"))
    assert "all of its files are downloaded" in ok(call("plan", NAME, *options[:4]))


def test_a_download_that_was_cut_resumes(hub: Hub, call: Call, tmp_path: Path) -> None:
    """The client writes what came in pieces of 10 MB; a second process asks for the rest."""
    save_file({"x.weight": np.zeros((16384, 1024), np.float16)}, tmp_path / "large")
    content = (tmp_path / "large").read_bytes()
    hub.repositories["a/large"] = {"config.json": b"{}", "model.safetensors": content}
    ok(call("plan", "a/large", "--layout", "keep"))
    before, hub.cut_after = hub.sent, 25_000_000
    options = ("--bits", "4", "--layout", "keep", "--quiet")
    first = call("convert", "a/large", "out", *options)
    if first.returncode:  # else the client went on by itself
        assert "try again" in first.stderr and "Traceback" not in first.stderr
        assert not (tmp_path / "out").exists()
        ok(call("convert", "a/large", "out", *options))
    starts = [int(r[6:].split("-")[0]) for _, path, r in hub.log if r and "resolve" in path]
    assert max(starts) >= 10_000_000
    assert hub.sent - before < 1.5 * len(content)
    ok(call("verify", "out"))


def test_problems_come_before_the_download(hub: Hub, call: Call) -> None:
    hub.repositories[NAME]["config.json"] = b'{"quantization_config": {"quant_method": "strange"}}'
    sent = hub.sent
    done = call("convert", NAME, "out", "--layout", "keep")
    assert done.returncode == 1 and f"{NAME} cannot be converted" in done.stderr
    assert "strange" in done.stderr and hub.sent - sent < 200_000


def test_an_output_in_the_way_is_reported_before_the_download(hub: Hub, call: Call, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    done = call("convert", NAME, "out", "--layout", "keep")
    assert done.returncode == 1 and "out exists and holds no config.json" in done.stderr
    assert hub.sent < 200_000


@pytest.mark.parametrize(
    "arguments, env, declared",
    [
        (["no/such"], {}, "there is no folder no/such, and no such model on the hub"),
        ([NAME, "--revision", "v9"], {}, f"{NAME} has no revision 'v9'"),
        (["a/gated"], {}, "a/gated: config.json is gated: accept its terms"),
        ([NAME], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
        ([NAME], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids"),
        (["a/empty"], {}, "config.json: is not in the repository"),
        (["a/pickle"], {}, "only pickle files (pytorch_model.bin). Loading those can run code"),
        (["a/evil"], {}, "the hub lists '../../x' with 1 bytes, which is not a file"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_cannot_be_had(
    hub: Hub, call: Call, arguments: list[str], env: dict[str, str], declared: str, tmp_path: Path
) -> None:
    hub.repositories |= {"a/gated": tree(MICRO), "a/empty": {"x.txt": b""}}
    hub.repositories["a/pickle"] = {"pytorch_model.bin": b"x" * 99, "config.json": b"{}"}
    hub.repositories["a/evil"] = {"../../x": b"x", "config.json": b"{}"}
    hub.gated.add("a/gated")
    for command in ("plan", "inspect"):
        done = call(command, *arguments, **env)
        assert done.returncode == 1, done.stdout
        assert declared in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "hf" / "x").exists()


@pytest.mark.parametrize("code", [429, 503])
def test_a_hub_that_has_no_time(hub: Hub, call: Call, code: int, tmp_path: Path) -> None:
    hub.busy = code
    for command in (("plan", NAME), ("convert", NAME, "out")):
        done = call(*command)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"{NAME}: the hub answers {code}: Not now. What came is kept" in done.stderr
        assert "try again in a while" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_revision_is_for_the_hub(call: Call) -> None:
    done = call("plan", MICRO, "--revision", "main")
    assert done.returncode == 2 and "is for repositories on the hub" in done.stderr


# -- out to the hub ------------------------------------------------------------------------
@pytest.fixture
def output(call: Call, tmp_path: Path) -> Path:
    ok(call("convert", NAME, "out", "--bits", "4", "--shard-size", "200kB", "--quiet"))
    return tmp_path / "out"


def test_preview_asks_nobody(hub: Hub, call: Call, output: Path) -> None:
    asked = len(hub.log)
    declared = ok(call("upload", output, "me/micro-4bit", "--dry-run"))
    assert ok(call("upload", output, "me/micro-4bit", "--preview")) == declared
    assert len(hub.log) == asked
    assert "pipeline_tag: text-generation\n" in declared and "language: en\n" in declared
    assert f"base_model: {NAME}\n" in declared and "license: apache-2.0\n" in declared
    assert "library_name: mlx\n" in declared and "base_model_relation: quantized" in declared
    assert f"requant convert {NAME} OUTPUT --bits 4" in declared
    assert f"--revision {Hub.commit(NAME)}\n" in declared
    assert f"requant verify {NAME} micro-4bit" in declared
    assert "mlx_lm.generate --model me/micro-4bit" in declared
    assert "# Of the source" not in declared and "# me/micro-4bit\n" in declared
    assert "model-00001-of-0000" in declared


def test_upload(hub: Hub, call: Call, output: Path) -> None:
    done = call("upload", output, "me/micro-4bit", HF_TOKEN="hf_x")
    assert done.returncode == 0, done.stderr
    assert f"uploaded: {hub.url}/me/micro-4bit/commit/" in done.stderr
    came = committed(hub, "me/micro-4bit")
    expected = tree(output)
    card = came.pop("README.md")
    assert expected.pop("README.md").endswith(b"# Of the source\n")
    assert came == expected
    assert b"# me/micro-4bit\n" in card and b"| quantized | BF16 | affine 4-bit g64 |" in card


def test_shards_of_an_earlier_upload_go(hub: Hub, call: Call, output: Path) -> None:
    """mlx-lm reads every model*.safetensors of a folder; one of another size must not stay."""
    old = (
        "model-00001-of-00009.safetensors",
        "model.safetensors",
        "own/adapter.safetensors",
        "a.md",
    )
    hub.repositories["me/m"] = dict.fromkeys(old, b"old")
    done = call("upload", output, "me/m", "--json", HF_TOKEN="hf_x")
    deleted = [x["value"]["path"] for x in hub.commits["me/m"] if x["key"] == "deletedFile"]
    assert deleted == list(old[:2]) == json.loads(ok(done))["removed"]
    assert set(committed(hub, "me/m")) == set(tree(output))
    declared = call("upload", output, "me/m", HF_TOKEN="hf_x").stderr
    assert f"removed there, of an earlier upload: {old[0]}, {old[1]}\n" in declared


def test_only_what_the_record_says_is_uploaded(hub: Hub, call: Call, output: Path) -> None:
    """Not a file that was cut or altered since; nothing is sent to the hub then."""
    (output / ".cache").mkdir()
    (output / ".cache" / "notes.txt").write_text("own")
    (output / "own").mkdir()
    (output / "own" / ".DS_Store").write_text("own")
    ok(call("upload", output, "me/m", HF_TOKEN="hf_x"))
    assert not [name for name in committed(hub, "me/m") if "/" in name]
    shard = min(output.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    asked = len(hub.log)
    done = call("upload", output, "me/n", HF_TOKEN="hf_x")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "out cannot be uploaded, for it is not what its requant.json says; convert it again"
        in done.stderr
    )
    assert {method for method, *_ in hub.log[asked:]} == {"GET"} and "me/n" not in hub.commits


def test_a_public_repository_does_not_become_private(hub: Hub, call: Call, output: Path) -> None:
    """The hub leaves it as it is; whoever asked for a private one must hear of it before."""
    hub.repositories["me/m"] = {}
    hub.public.add("me/m")
    done = call("upload", output, "me/m", "--private", HF_TOKEN="hf_x")
    assert done.returncode == 1 and "me/m" not in hub.commits and not hub.objects
    assert "me/m: is public already, and --private is for a new repository" in done.stderr
    ok(call("upload", output, "me/new", "--private", HF_TOKEN="hf_x"))
    ok(call("upload", output, "me/m", HF_TOKEN="hf_x"))
    assert {"me/new", "me/m"} <= set(hub.commits)


def committed(hub: Hub, name: str) -> dict[str, bytes]:
    """The files of a commit."""
    found = {}
    for line in hub.commits[name]:
        if line["key"] == "file":
            found[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        elif line["key"] == "lfsFile":
            found[line["value"]["path"]] = hub.objects[line["value"]["oid"]]
    return found


def test_an_upload_that_was_stopped_resumes(hub: Hub, call: Call, output: Path) -> None:
    hub.reject_objects = 1
    first = call("upload", output, "me/m", HF_TOKEN="hf_x")
    assert first.returncode == 1 and "Traceback" not in first.stderr
    assert len(hub.objects) == 1 and "me/m" not in hub.commits
    hub.reject_objects = -1
    there = len([1 for method, *_ in hub.log if method == "PUT"])
    ok(call("upload", output, "me/m", HF_TOKEN="hf_x"))
    again = len([1 for method, *_ in hub.log if method == "PUT"]) - there
    assert again == len(hub.objects) - 1 == len(list(output.glob("*.safetensors"))) - 1


def test_convert_and_upload(hub: Hub, call: Call) -> None:
    done = call("convert", NAME, "o", "--layout", "keep", "--upload", "me/o", HF_TOKEN="hf_x")
    ok(done)
    assert "Tensors have the source's names" in committed(hub, "me/o")["README.md"].decode()


def test_what_the_source_says_of_itself_is_kept(hub: Hub, call: Call) -> None:
    data = "license: other\nlicense_name: own\nlanguage: [de, fr]\npipeline_tag: feature-extraction"
    hub.repositories[NAME]["README.md"] = f"---\n{data}\n---\n".encode()
    ok(call("convert", NAME, "out", "--bits", "4", "--quiet"))
    declared = json.loads(ok(call("upload", "out", "me/m", "--dry-run", "--json")))["card"]
    for line in ("license_name: own", "language: [de, fr]", "pipeline_tag: feature-extraction"):
        assert f"{line}\n" in declared
    declared = ok(call("upload", "out", "me/m", "--dry-run", "--base-model", "the/original"))
    assert "base_model: the/original\n" in declared and f"requant convert {NAME} OUTPUT" in declared


def test_an_upload_that_cannot_be(hub: Hub, call: Call, output: Path) -> None:
    hub.readonly = True
    done = call("upload", output, "them/m", HF_TOKEN="hf_x")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "them/m: the hub answers 403: " in done.stderr and "no right to write" in done.stderr
    hub.readonly, hub.down = False, True
    done = call("upload", output, "me/m", HF_TOKEN="hf_x")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "me/m: the hub cannot be reached" in done.stderr
    assert "Files that arrived are not sent again: try again" in done.stderr


def test_a_token_is_missed_before_the_conversion(hub: Hub, call: Call, tmp_path: Path) -> None:
    done = call("convert", NAME, "o", "--upload", "me/o")
    assert done.returncode == 1 and "me/o: uploading needs a token: log in" in done.stderr
    assert call("convert", NAME, "o", "--upload", "o").returncode == 2
    assert not hub.log and not (tmp_path / "o").exists()


def test_upload_needs_a_token_and_a_record(call: Call, output: Path) -> None:
    done = call("upload", output, "me/m")
    assert done.returncode == 1 and "log in with `hf auth login`" in done.stderr
    done = call("upload", MICRO, "me/m", "--preview")
    assert done.returncode == 1 and "requant.json: is missing" in done.stderr
    assert call("upload", output, "nobody", "--preview").returncode == 2
