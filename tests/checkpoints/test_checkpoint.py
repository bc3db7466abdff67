"""Source folders: what is read, what is copied, and every way to be rejected."""

import hashlib
import json
import os
import socket
import struct
import time
from pathlib import Path

import pytest
import safetensors

from requant.checkpoints import safetensors_folder
from requant.checkpoints.checkpoint import Checkpoint, SourceFile, StoredTensor
from requant.core.dtypes import TensorInfo
from requant.core.files import open_regular
from requant.errors import MAX_PROBLEMS, MAX_PROBLEMS_SHOWN, CheckpointError
from requant.sources.open import read_checkpoint
from tests.support.checkpoints import INDEX, SHARED, write_folder
from tests.support.fixture_folders import NAMES, fixture
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import entry, header, weights

ONE = {"a.weight": ("BF16", [2, 3])}
TWO = {"b.weight": ("F32", [4])}


def problems_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """Location to message; no location may have two."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    found = {problem.where: problem.message for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems)
    return found


def only_problem(path: str | os.PathLike[str]) -> str:
    """The one problem of a folder, as it is printed."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    (problem,) = caught.value.problems
    return str(problem)


# What is read
def test_single_file(tmp_path: Path) -> None:
    raw = weights({"a.weight": ("BF16", [2, 3]), "a.scales": ("F32", [2]), "none": ("U8", [0])})
    config = '{"model_type": "llama",\n "rope": [1e5, NaN]}'
    folder = write_folder(tmp_path, {"model.safetensors": raw}, config=config.encode())
    (length,) = struct.unpack("<Q", raw[:8])
    checkpoint = read_checkpoint(folder)
    assert checkpoint.path == folder
    assert checkpoint.files == (
        SourceFile("model.safetensors", len(raw), hashlib.sha256(raw[: 8 + length]).hexdigest()),
    )
    assert list(checkpoint.tensors.values()) == [
        StoredTensor("a.weight", TensorInfo("BF16", (2, 3)), "model.safetensors", 8 + length),
        StoredTensor("a.scales", TensorInfo("F32", (2,)), "model.safetensors", 8 + length + 12),
        StoredTensor("none", TensorInfo("U8", (0,)), "model.safetensors", 8 + length + 20),
    ]
    assert list(checkpoint.tensors) == ["a.weight", "a.scales", "none"]
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.config_text == config
    assert checkpoint.side_files == checkpoint.left_out == ()


def test_tensors_are_read_only(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_folder(tmp_path, {"model.safetensors": ONE}))
    with pytest.raises(TypeError):
        checkpoint.tensors["x"] = checkpoint.tensors["a.weight"]  # type: ignore[index]


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    """The header may name them in any order."""
    head = header({"z": entry("U8", [2], 2, 4), "b": entry("U8", [2], 0, 2)})
    folder = write_folder(tmp_path, {"model.safetensors": head + bytes(4)})
    assert list(read_checkpoint(folder).tensors) == ["b", "z"]


def test_shards_by_index_in_natural_order(tmp_path: Path) -> None:
    files = {f"model-{i}.safetensors": {f"t{i}": ("U8", [i])} for i in (10, 9, 2)}
    weight_map = {f"t{i}": f"model-{i}.safetensors" for i in (10, 9, 2)}
    checkpoint = read_checkpoint(write_folder(tmp_path, files, weight_map=weight_map))
    assert [file.name for file in checkpoint.files] == [
        f"model-{i}.safetensors" for i in (2, 9, 10)
    ]
    assert list(checkpoint.tensors) == ["t2", "t9", "t10"]
    assert checkpoint.side_files == ()


def test_shards_without_an_index(tmp_path: Path) -> None:
    files = {"weights.00.safetensors": ONE, "weights.01.safetensors": TWO}
    checkpoint = read_checkpoint(write_folder(tmp_path, files))
    assert {t.name: t.file for t in checkpoint.tensors.values()} == {
        "a.weight": "weights.00.safetensors",
        "b.weight": "weights.01.safetensors",
    }


def test_single_file_with_an_index(tmp_path: Path) -> None:
    """As mlx-lm writes it."""
    weight_map = {"a.weight": "model.safetensors"}
    folder = write_folder(tmp_path, {"model.safetensors": ONE}, weight_map=weight_map)
    assert list(read_checkpoint(folder).tensors) == ["a.weight"]


def test_shard_in_a_subfolder_named_by_the_index(tmp_path: Path) -> None:
    files = {"parts/one.safetensors": ONE, "parts/note.txt": b"x"}
    weight_map = {"a.weight": "parts/one.safetensors"}
    checkpoint = read_checkpoint(write_folder(tmp_path, files, weight_map=weight_map))
    assert checkpoint.tensors["a.weight"].file == "parts/one.safetensors"
    assert checkpoint.side_files == ("parts/note.txt",)
    assert checkpoint.left_out == ()


def test_a_cache_made_of_links(tmp_path: Path) -> None:
    """As the hub's cache: each file is a link to a blob outside the folder."""
    blobs = write_folder(tmp_path / "blobs", {"0": weights(ONE), "1": b"{}", "2": b"merges"})
    folder = tmp_path / "snapshots" / "main"
    folder.mkdir(parents=True)
    for name, blob in {"model.safetensors": "0", "config.json": "1", "merges.txt": "2"}.items():
        (folder / name).symlink_to(blobs / blob)
    checkpoint = read_checkpoint(folder)
    assert list(checkpoint.tensors) == ["a.weight"]
    assert checkpoint.config == {}
    assert checkpoint.side_files == ("merges.txt",)


def test_only_headers_are_read(tmp_path: Path) -> None:
    """A sparse file of 1 TiB: whoever read its data would not come back."""
    size = 1 << 40
    head = header({"a": entry("U8", [size], 0, size)})
    folder = write_folder(tmp_path, {"model.safetensors": head})
    try:
        os.truncate(folder / "model.safetensors", len(head) + size)
    except OSError:
        pytest.skip("no sparse files of this size here")
    assert read_checkpoint(folder).tensors["a"].info.nbytes == size


def test_the_source_stays_as_it_was(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"model.safetensors": ONE, "sub/x.txt": b"x"})
    before = {p: p.stat() for p in folder.rglob("*")}
    read_checkpoint(folder)
    after = {p: p.stat() for p in folder.rglob("*")}
    assert before.keys() == after.keys()
    assert all(before[p].st_mtime_ns == after[p].st_mtime_ns for p in before)


# The folder itself
def test_no_such_folder(tmp_path: Path) -> None:
    assert "there is no such folder" in only_problem(tmp_path / "gone")


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert only_problem("Org/Model-7B.v2").endswith(
        "download it first: hf download Org/Model-7B.v2 --local-dir Model-7B.v2"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.safetensors", "give the folder that holds it"),
        ("m.gguf", "is not a GGUF file: it starts with"),
        ("m.txt", "is a file, expected a folder"),
        ("pytorch_model.bin", "save it as safetensors with save_pretrained"),
        ("m.pt", "Loading those can run code, so they are not read"),
    ],
)
def test_file_instead_of_a_folder(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    problem = only_problem(tmp_path / name)
    assert name in problem
    assert message in problem


def test_name_with_a_nul() -> None:
    with pytest.raises(CheckpointError):
        read_checkpoint("a\0b")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["pytorch_model-1.bin", "x.ckpt"], ["pytorch_model-1.bin", "x.ckpt", "save_pretrained"]),
        (["a.pt"], ["a.pt", "can run code"]),
        (["a.pth", "b.pth", "c.pth", "d.pth"], ["a.pth", "and 1 more"]),
        (["m.gguf"], ["m.gguf", "is not a GGUF file"]),
        (["vae/m.safetensors"], ["vae/m.safetensors", "give the folder of the model itself"]),
        (["README.md"], ["holds no weights", "model.safetensors"]),
        ([], ["holds no weights"]),
    ],
)
def test_folder_without_weights(tmp_path: Path, files: list[str], words: list[str]) -> None:
    problem = only_problem(write_folder(tmp_path, dict.fromkeys(files, b"x")))
    assert all(word in problem for word in words), problem


def test_weight_files_without_tensors(tmp_path: Path) -> None:
    assert "hold no tensors" in only_problem(write_folder(tmp_path, {"model.safetensors": {}}))


# config.json
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "does not exist"),
        (b"", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"\xff\xfe{", "not UTF-8: byte 0 is 0xff"),
        (b"[1, 2]", "is [1, 2], expected an object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": "\\udc00"}', "surrogate"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs more than once"),
    ],
)
def test_bad_config(tmp_path: Path, config: bytes | None, message: str) -> None:
    folder = write_folder(tmp_path, {"model.safetensors": ONE}, config=config)
    assert only_problem(folder).startswith("config.json: ")
    assert message in only_problem(folder)


def test_config_may_say_the_same_twice(tmp_path: Path) -> None:
    """Hand-edited configs do; every reader agrees on what it means."""
    folder = write_folder(tmp_path, {"model.safetensors": ONE}, config=b'{"a": 1, "a": 1}')
    assert read_checkpoint(folder).config == {"a": 1}


@pytest.mark.parametrize(
    "name, most",
    [("config.json", "16,777,216"), ("quantize_config.json", "16,777,216"), (INDEX, "67,108,864")],
)
def test_a_gigabyte_of_json(tmp_path: Path, name: str, most: str) -> None:
    folder = write_folder(tmp_path, {"model.safetensors": ONE})
    (folder / name).touch()
    os.truncate(folder / name, 1 << 30)
    found = f"{name}: takes 1,073,741,824 bytes, at most {most} are read"
    assert only_problem(folder).partition(";")[0] == found


@pytest.mark.parametrize("kind", ["fifo", "device", "link", "cut"])
@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00002.gguf"])
def test_a_gguf_that_is_not_a_file(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "source" / name
    path.parent.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "cut":
        path.write_bytes(b"GGUF\x03\0\0\0")
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/etc/passwd")
    words = {"link": "is a link out of its folder", "cut": "ends"}
    for source in (path, path.parent):
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(source)
        assert words.get(kind, "is a device, pipe or socket") in str(caught.value.problems[0])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "dangling", "loop", "folder"])
def test_no_regular_file(tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    """A pipe must not make us wait; nothing is read through it."""
    folder = write_folder(
        tmp_path, {"model.safetensors": ONE}, weight_map={"a.weight": "model.safetensors"}
    )
    path = folder / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
        message = "is a device, pipe or socket"
    elif kind == "device":
        path.symlink_to("/dev/zero")
        message = "is a device, pipe or socket"
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made, monkeypatch.context() as patch:
            patch.chdir(folder)  # the path of a socket is short
            made.bind(name)
        message = "is a device, pipe or socket"
    elif kind == "dangling":
        path.symlink_to("nowhere")
        message = "is a link to 'nowhere', which does not exist"
    elif kind == "loop":
        path.symlink_to(name)
        message = "cannot be read"
    else:
        path.mkdir()
        message = "is a folder, expected a regular file"
    problem = only_problem(folder)
    assert problem.startswith(f"{name}: ")
    assert message in problem


# The index
def test_index_names_a_missing_shard(tmp_path: Path) -> None:
    weight_map = {
        "a.weight": "one.safetensors",
        "b.weight": "two.safetensors",
        "b.bias": "two.safetensors",
    }
    folder = write_folder(tmp_path, {"one.safetensors": ONE}, weight_map=weight_map)
    assert problems_of(folder) == {
        "two.safetensors": f"does not exist; {INDEX} places 2 tensors in it; was the download "
        "complete?"
    }


def test_index_names_a_tensor_that_the_shard_lacks(tmp_path: Path) -> None:
    weight_map = {"a.weight": "one.safetensors", "a.bias": "one.safetensors"}
    problems = problems_of(write_folder(tmp_path, {"one.safetensors": ONE}, weight_map=weight_map))
    assert problems.pop(INDEX).startswith("does not fit the files, which lack 1 tensor")
    assert problems == {f"{INDEX}: a.bias": "is not in one.safetensors, where the index places it"}


def test_tensor_that_the_index_does_not_know(tmp_path: Path) -> None:
    """Every loader takes the tensors of the files that the index names."""
    folder = write_folder(
        tmp_path, {"one.safetensors": ONE | TWO}, weight_map={"a.weight": "one.safetensors"}
    )
    checkpoint = read_checkpoint(folder)
    assert list(checkpoint.tensors) == ["a.weight", "b.weight"]
    assert note_texts(checkpoint.notes) == (
        f"{INDEX} does not fit the files (b.weight): their tensors are read where the files have "
        "them.",
    )


def test_tensor_that_the_index_places_elsewhere(tmp_path: Path) -> None:
    """Each of two shards holds both; which is the right one?"""
    folder = write_folder(
        tmp_path,
        {"one.safetensors": ONE | TWO, "two.safetensors": TWO},
        weight_map={"a.weight": "one.safetensors", "b.weight": "two.safetensors"},
    )
    assert problems_of(folder) == {
        "one.safetensors: b.weight": "is in two.safetensors too, where the index places it; which "
        "of the two is the model's is not known: remove it from one of them"
    }


def test_shard_that_the_index_does_not_name(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path,
        {"one.safetensors": ONE, "two.safetensors": TWO},
        weight_map={"a.weight": "one.safetensors"},
    )
    problem = only_problem(folder)
    assert problem.startswith("two.safetensors: shard not in the index; ")
    assert "move the file out of the folder" in problem


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("/etc/one.safetensors", "leads out of the folder"),
        ("../one.safetensors", "leads out of the folder"),
        ("sub/../../one.safetensors", "leads out of the folder"),
        ("..\\one.safetensors", "leads out of the folder"),
        ("./one.safetensors", "expected 'one.safetensors'"),
        ("sub//one.safetensors", "expected 'sub/one.safetensors'"),
        ("", "is not a file name"),
        ("a\0b.safetensors", "is not a file name"),
        ("a\nb.safetensors", "is not a file name"),
        ("x" * 300 + ".safetensors", "is not a file name"),
        ("pytorch_model.bin", "is not a .safetensors file"),
        ("link/one.safetensors", "leads through a link to a folder"),
        (7, "is 7, expected a file name"),
        (None, "is null, expected a file name"),
    ],
)
def test_index_with_a_bad_path(tmp_path: Path, shard: object, message: str) -> None:
    outside = write_folder(tmp_path / "outside", {"one.safetensors": TWO}, config=None)
    folder = write_folder(
        tmp_path / "in" / "source",
        {"model.safetensors": ONE},
        weight_map={"a.weight": "model.safetensors", "b.weight": shard},
    )
    (folder / "link").symlink_to(outside)
    problem = only_problem(folder)
    assert problem.startswith(f"{INDEX}: b.weight: ")
    assert message in problem
    assert len(problem) < 300


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        (b"{", INDEX, "not JSON"),
        (b"[]", INDEX, "is [], expected an object"),
        (b"[" * 100_000, INDEX, "nested too deeply"),
        (b"{}", f"{INDEX}: weight_map", "is missing"),
        (b'{"weight_map": {}}', f"{INDEX}: weight_map", "is empty, expected an object"),
        (b'{"weight_map": ["a"]}', f"{INDEX}: weight_map", "is a list of 1, expected an object"),
        (b'{"weight_map": NaN}', INDEX, "NaN"),
        (
            b'{"weight_map": {"a.weight": "model.safetensors", "a.weight": "model.safetensors"}}',
            INDEX,
            "the key 'a.weight' occurs more than once",
        ),
        (
            b'{"weight_map": {"a.weight": "model.safetensors", "": "model.safetensors"}}',
            f"{INDEX}: ''",
            "the name of a tensor is empty",
        ),
        (
            b'{"weight_map": {"a\\u0007": "model.safetensors"}}',
            f"{INDEX}: 'a\\x07'",
            "control character U+0007",
        ),
    ],
)
def test_index_that_says_nothing(tmp_path: Path, text: bytes, where: str, message: str) -> None:
    """Its fault is named once, and not repeated for each tensor or file."""
    problems = problems_of(write_folder(tmp_path, {"model.safetensors": ONE, INDEX: text}))
    assert list(problems) == [where]
    assert message in problems[where]


# Files without an index
def test_tensor_in_two_files(tmp_path: Path) -> None:
    files = {"one.safetensors": ONE, "two.safetensors": ONE | TWO}
    problem = only_problem(write_folder(tmp_path, files))
    assert problem.startswith("two.safetensors: a.weight: is in one.safetensors too")


def test_file_next_to_the_single_one(tmp_path: Path) -> None:
    """To take its tensors, or to leave them, could both be wrong."""
    files = {"model.safetensors": ONE, "mtp.safetensors": TWO}
    problem = only_problem(write_folder(tmp_path, files))
    assert problem.startswith("mtp.safetensors: is next to model.safetensors")


def test_shards_that_are_not_all_there(tmp_path: Path) -> None:
    files = {"model-00001-of-00004.safetensors": ONE, "model-00003-of-00004.safetensors": TWO}
    problem = only_problem(write_folder(tmp_path, files))
    assert problem.startswith(
        "model-00001-of-00004.safetensors: 2 of the 4 shards of this set are missing, the first "
        "is number 2"
    )


def test_shards_counted_from_zero(tmp_path: Path) -> None:
    files = {"m-00000-of-00002.safetensors": ONE, "m-00001-of-00002.safetensors": TWO}
    assert len(read_checkpoint(write_folder(tmp_path, files)).files) == 2


# Headers inside a folder
def test_a_name_that_claims_a_million_shards(tmp_path: Path) -> None:
    """Each file is of another set of nearly a million: counting up would take hours."""
    files = {f"model-00000-of-9{n:05d}.safetensors": b"" for n in range(300)}
    folder = write_folder(tmp_path, files)
    began = time.process_time()
    with pytest.raises(CheckpointError, match="shards of this set are missing"):
        read_checkpoint(folder)
    assert time.process_time() - began < 2


def test_more_files_than_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("requant.checkpoints.folder_listing.MAX_ENTRIES", 10)
    folder = write_folder(tmp_path, {"model.safetensors": ONE})
    assert read_checkpoint(folder)
    for number in range(9):
        (folder / f"{number}.txt").touch()
    assert only_problem(folder).endswith("holds more than 10 files and folders, which are not read")


def test_more_shards_than_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("requant.checkpoints.safetensors_folder.MAX_SHARDS", 2)
    names = {f"t{n}.weight": f"{n}.safetensors" for n in range(3)}
    files = {file: weights({tensor: ("U8", [1])}) for tensor, file in names.items()}
    folder = write_folder(tmp_path / "files", files)
    assert only_problem(folder).endswith("3 weight files, at most 2 are read")
    folder = write_folder(tmp_path / "index", files, weight_map=names)
    with pytest.raises(CheckpointError, match="names 3 files, at most 2 are read"):
        read_checkpoint(folder)


def test_a_pipe_that_takes_the_place_of_a_file_blocks_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "pipe")


def test_a_tensor_too_large_to_look_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = read_checkpoint(write_folder(tmp_path, {"model.safetensors": ONE}))
    assert checkpoint.read_small_tensor("a.weight").size
    monkeypatch.setattr("requant.checkpoints.checkpoint.MAX_SMALL_TENSOR_BYTES", 3)
    with pytest.raises(CheckpointError, match=r"a\.weight: .* at most 3 bytes are read"):
        checkpoint.read_small_tensor("a.weight")


def test_an_error_lists_some_problems_and_counts_the_rest(tmp_path: Path) -> None:
    bad = {f"t{n}": "nothing" for n in range(5000)}
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(write_folder(tmp_path, {"model.safetensors": header(bad)}))
    assert len(raised.value.problems) == MAX_PROBLEMS
    assert len(str(raised.value).splitlines()) == MAX_PROBLEMS_SHOWN + 2
    assert str(raised.value).endswith(f"and {MAX_PROBLEMS - MAX_PROBLEMS_SHOWN} more problems")


def test_bad_headers_are_named_with_file_and_tensor(tmp_path: Path) -> None:
    """The rules have their own tests; here: the file, and no error that follows from it."""
    files = {
        "one.safetensors": header({"a.weight": entry("U8", [4], 0, 5)}) + bytes(5),
        "two.safetensors": b"\0",
    }
    weight_map = {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}
    assert problems_of(write_folder(tmp_path, files, weight_map=weight_map)) == {
        "one.safetensors: a.weight": "U8 [4] takes 4 bytes, but data_offsets [0, 5] hold 5",
        "two.safetensors": "the file ends after 1 byte, expected 8 with the length of the header",
    }


def test_file_cut_short(tmp_path: Path) -> None:
    raw = weights({"a": ("U8", [4]), "b": ("U8", [4]), "c": ("U8", [4])})
    folder = write_folder(tmp_path, {"model.safetensors": raw[:-6]})
    assert only_problem(folder) == (
        "model.safetensors: b: ends at byte 8 of the data, of which the file has 6 "
        "(and 1 more tensor); was it downloaded to its end?"
    )


def test_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_folder(tmp_path, {"model.safetensors": weights(ONE)})
    size = (folder / "model.safetensors").stat().st_size
    os.truncate(folder / "model.safetensors", 20)
    real = safetensors_folder.file_size
    monkeypatch.setattr(
        safetensors_folder,
        "file_size",
        lambda at, name: (size, "") if name.endswith(".safetensors") else real(at, name),
    )
    assert only_problem(folder).startswith("model.safetensors: header: the length says")


# What is copied, and what is not
def read_with(tmp_path: Path, files: dict[str, bytes]) -> Checkpoint:
    return read_checkpoint(write_folder(tmp_path, {"model.safetensors": ONE, **files}))


def test_side_files(tmp_path: Path) -> None:
    copied = {
        **{".gitattributes": b"x", "README.md": b"x", "modeling_x.py": b"x"},
        **{"tokenizer.json": b"{}", "vocab.bin": bytes(1 << 20), "sub/config.json": b"{}"},
        "sub/deep/er/chat_template.jinja": b"x",
        "sub/ä.txt": b"x",
    }
    skipped = [".git/HEAD", ".cache/huggingface/x", "__pycache__/x.pyc", "sub/__pycache__/y.pyc"]
    checkpoint = read_with(tmp_path, copied | dict.fromkeys(skipped, b"x"))
    assert checkpoint.side_files == tuple(sorted(copied))
    assert checkpoint.left_out == ()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pytorch_model.bin", "pickle"),
        ("pytorch_model-00001-of-00002.bin", "pickle"),
        ("pytorch_model.bin.index.json", "pickle"),
        ("optimizer.pt", "pickle"),
        ("model.pth", "pickle"),
        ("last.ckpt", "pickle"),
        ("m.Q4_K_M.gguf", "GGUF"),
        ("tf_model.h5", "HDF5"),
        ("flax_model.msgpack", "Flax"),
        ("onnx/model.onnx", "ONNX"),
        ("onnx/model.onnx_data", "ONNX"),
        ("openvino/openvino_model.bin", "OpenVINO"),
        ("openvino/openvino_model.xml", "OpenVINO"),
        ("model.SAFETENSORS", "end it in .safetensors"),
        ("rust_model.ot", "Rust"),
        ("consolidated.safetensors", "second copy"),
        ("consolidated.00.pth", "pickle"),
        ("consolidated.safetensors.index.json", "second copy"),
        ("diffusion.safetensors.index.json", "index of other weights"),
        ("vae/diffusion.safetensors", "weights in a subfolder"),
    ],
)
def test_stale_weights_are_left_out(tmp_path: Path, name: str, reason: str) -> None:
    checkpoint = read_with(tmp_path, {name: b"x"})
    assert checkpoint.side_files == ()
    ((left, why),) = checkpoint.left_out
    assert left == name
    assert reason in why


def test_large_bin_is_weights(tmp_path: Path) -> None:
    checkpoint = read_with(tmp_path, {"decoder.bin": bytes((1 << 20) + 1)})
    assert checkpoint.left_out == (
        ("decoder.bin", "weights in another format (a .bin file of 1048577 bytes)"),
    )


def test_original_folder_is_left_out_as_a_whole(tmp_path: Path) -> None:
    checkpoint = read_with(
        tmp_path, {"original/params.json": b"x", "original/a/consolidated.0": b"x"}
    )
    assert [name for name, _ in checkpoint.left_out] == ["original/"]
    assert checkpoint.side_files == ()


def test_second_copy_next_to_an_index(tmp_path: Path) -> None:
    """Mistral's repositories hold the weights twice."""
    checkpoint = read_checkpoint(
        write_folder(
            tmp_path,
            {"one.safetensors": ONE, "consolidated.safetensors": TWO},
            weight_map={"a.weight": "one.safetensors"},
        )
    )
    assert list(checkpoint.tensors) == ["a.weight"]
    assert [name for name, _ in checkpoint.left_out] == ["consolidated.safetensors"]


def test_the_only_copy_is_not_a_second_one(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_folder(tmp_path, {"consolidated.safetensors": ONE}))
    assert checkpoint.tensors["a.weight"].file == "consolidated.safetensors"
    assert checkpoint.left_out == ()


def test_links_and_special_files_next_to_the_weights(tmp_path: Path) -> None:
    outside = write_folder(tmp_path / "outside", {"x.txt": b"x"})
    folder = write_folder(tmp_path / "source", {"model.safetensors": ONE, "sub/x.txt": b"x"})
    (folder / "good.txt").symlink_to("sub/x.txt")
    (folder / "sub" / "good.txt").symlink_to("../good.txt")
    (folder / "secret.txt").symlink_to(outside / "x.txt")
    (folder / "dangling.txt").symlink_to("nowhere")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "folder").symlink_to(outside)
    (folder / "above").symlink_to("..")
    os.mkfifo(folder / "pipe")
    checkpoint = read_checkpoint(folder)
    assert checkpoint.side_files == ("good.txt", "sub/good.txt", "sub/x.txt")
    left_out = dict(checkpoint.left_out)
    names = ["above", "dangling.txt", "folder", "loop.txt", "pipe", "secret.txt"]
    assert sorted(left_out) == names
    assert left_out["folder"] == left_out["above"] == "a link to a folder is not followed"
    assert "'nowhere', which does not exist" in left_out["dangling.txt"]
    assert "device, pipe or socket" in left_out["pipe"]
    assert "is a link out of its folder" in left_out["secret.txt"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, name: str) -> None:
    """An untrusted checkpoint could name any file of this machine."""
    index = {"a.weight": "model.safetensors"} if name == INDEX else None
    folder = write_folder(tmp_path / "source", {"model.safetensors": ONE}, weight_map=index)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to("../elsewhere")
    assert only_problem(folder).startswith(f"{name}: is a link out of its folder")


def test_a_link_out_of_the_cache_is_not_followed(tmp_path: Path) -> None:
    blobs = write_folder(tmp_path / "blobs", {"0": weights(ONE)})
    folder = write_folder(tmp_path / "snapshots" / "main", {"model.safetensors": b""})
    (tmp_path / "secret").write_bytes(b"x")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(blobs / "0")
    (folder / "merges.txt").symlink_to("../../blobs/../secret")
    (left_out,) = read_checkpoint(folder).left_out
    assert left_out[0] == "merges.txt"


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"model.safetensors": ONE})
    try:
        (folder / os.fsdecode(b"bad\xff.txt")).write_bytes(b"x")
        (folder / os.fsdecode(b"dir\xff")).mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert read_checkpoint(folder).left_out == (
        ("bad\\xff.txt", "the name is not UTF-8"),
        ("dir\\xff/", "the name is not UTF-8"),
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "sub"])
def test_no_permission(tmp_path: Path, name: str) -> None:
    """Found now, not when the output is half written."""
    files = {"model.safetensors": weights(ONE), "tokenizer.json": b"{}", "sub/x": b"x"}
    folder = write_folder(tmp_path, files)
    (folder / name).chmod(0)
    try:
        problem = only_problem(folder)
    finally:
        (folder / name).chmod(0o700)
    assert problem.startswith(name)
    assert "ermission denied" in problem


# Everything at once
def test_every_problem_in_one_run(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path,
        {
            "one.safetensors": header({"a": entry("Q9", [4], 0, 4)}) + bytes(4),
            "two.safetensors": TWO,
            "three.safetensors": ONE,
        },
        config=b"{",
        weight_map={
            "a": "one.safetensors",
            "b.weight": "two.safetensors",
            "b.bias": "two.safetensors",
            "c": "gone.safetensors",
        },
    )
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    assert sorted(problem.where for problem in caught.value.problems) == [
        "config.json",
        "gone.safetensors",
        INDEX,
        f"{INDEX}: b.bias",
        "one.safetensors: a",
        "three.safetensors",
    ]
    text = str(caught.value)
    assert text.startswith(f"{folder} cannot be converted:\n  config.json: ")
    assert len(text.splitlines()) == 7


# Real checkpoints
@pytest.mark.parametrize("name", ["micro-llama", "micro-moe", "qwen3-16m"])
def test_real_models_are_read_as_the_referee_reads_them(name: str) -> None:
    folder = SHARED / "models" / name
    if not folder.is_dir():
        assert os.environ.get("REQUANT_REQUIRE_SHARED") != "1", f"{folder} is missing"
        pytest.skip("the shared models are not here")
    checkpoint = read_checkpoint(folder)
    expected = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        for tensor, parts in safetensors.deserialize(raw):
            stored = checkpoint.tensors[tensor]
            data = raw[stored.offset : stored.offset + stored.info.nbytes]
            assert (stored.file, data) == (file.name, bytes(parts["data"]))
            expected[tensor] = TensorInfo(parts["dtype"], tuple(parts["shape"]))
    assert {t.name: t.info for t in checkpoint.tensors.values()} == expected
    assert checkpoint.config == json.loads((folder / "config.json").read_text())
    assert checkpoint.side_files == (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    )


def test_real_checkpoints_of_every_tool_are_read() -> None:
    for name in NAMES:
        assert len(read_checkpoint(fixture(name) / "checkpoint").tensors) > 0
