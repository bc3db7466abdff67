"""An index that does not fit the files: read where the files are whole, else the way out works."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from requant.checkpoints.checkpoint import Checkpoint
from requant.errors import CheckpointError
from requant.sources.open import read_checkpoint
from tests.support.checkpoints import INDEX, write_folder
from tests.support.plan_texts import note_texts

A, B, C = ({f"{x}.weight": ("BF16", [2, 3])} for x in "abc")
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MAP = {"a.weight": ONE, "b.weight": TWO}
Files = dict[str, dict[str, tuple[str, list[int]]]]


def make(tmp_path: Path, files: Files, weight_map: dict[str, str] = MAP) -> Path:
    return write_folder(tmp_path / "source", files, weight_map=weight_map)


def reported(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    return str(caught.value)


def names(checkpoint: Checkpoint) -> list[str]:
    return sorted(checkpoint.tensors)


# -- the files hold all that the index names ---------------------------------------------
@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": A | B},
        {"model.safetensors": A | B | C},
        {"model-00001-of-00001.safetensors": A | B},
        {"x-1.safetensors": A, "x-2.safetensors": B},
    ],
)
def test_an_index_of_files_that_are_not_there(tmp_path: Path, files: Files) -> None:
    folder = make(tmp_path, files)
    checkpoint = read_checkpoint(folder)
    assert names(checkpoint) == sorted({k for tensors in files.values() for k in tensors})
    (note,) = note_texts(checkpoint.notes)
    assert f"{INDEX} is stale: none of the 2 files that it names is there" in note
    (folder / INDEX).unlink()  # as the note says
    assert names(read_checkpoint(folder)) == names(checkpoint)
    assert read_checkpoint(folder).notes == ()


def test_all_tensors_are_in_those_files_that_are_there(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(make(tmp_path, {ONE: A | B}))
    assert names(checkpoint) == ["a.weight", "b.weight"]
    assert "holds all of its tensors" in note_texts(checkpoint.notes)[0]


def test_tensors_are_in_other_files_than_the_index_says(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(make(tmp_path, {ONE: B, TWO: A | C}))
    assert {t.name: t.file for t in checkpoint.tensors.values()} == {
        "b.weight": ONE,
        "a.weight": TWO,
        "c.weight": TWO,
    }
    assert "a.weight, b.weight, c.weight" in note_texts(checkpoint.notes)[0]


def test_mistrals_copy_next_to_shards(tmp_path: Path) -> None:
    files = {ONE: A, TWO: B, "consolidated.safetensors": C}
    for index in (True, False):
        folder = write_folder(tmp_path / str(index), files, weight_map=MAP if index else None)
        checkpoint = read_checkpoint(folder)
        assert names(checkpoint) == ["a.weight", "b.weight"]
        assert [name for name, _ in checkpoint.left_out] == ["consolidated.safetensors"]


def test_an_index_of_another_case_is_not_an_index(tmp_path: Path) -> None:
    folder = make(tmp_path, {"model.safetensors": A})
    (folder / INDEX).rename(folder / "Model.Safetensors.Index.json")
    checkpoint = read_checkpoint(folder)
    assert names(checkpoint) == ["a.weight"]
    assert [why for _, why in checkpoint.left_out] == ["index of other weights"]


# -- what is not known is asked, and each answer works -----------------------------------
def delete(*gone: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for name in gone:
            (folder / name).unlink()

    return act


def add(files: Files) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        write_folder(folder, files, config=None)

    return act


def both(one: Callable[[Path], None], other: Callable[[Path], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        one(folder)
        other(folder)

    return act


def rename(old: str, new: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / old).rename(folder / new)

    return act


OLD_THREE = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
Q = {"a.qweight": ("I32", [2, 3]), "b.qweight": ("I32", [2, 3])}
# What is there -> words of the message, what it says to do, and the tensors then.
ASKED: dict[str, tuple[Files, str, Callable[[Path], None], list[str]]] = {
    "other names, the whole model": (
        {"model.safetensors": Q},
        f"holds the whole model, delete {INDEX}",
        delete(INDEX),
        sorted(Q),
    ),
    "not the whole model": (
        {"model.safetensors": A},
        "if not, download the files that it names",
        both(delete("model.safetensors"), add({ONE: A, TWO: B})),
        ["a.weight", "b.weight"],
    ),
    "the whole model next to an old shard": (
        {"model.safetensors": A | B, ONE: A},
        f"holds the whole model. Delete {INDEX} and move what else it names ({ONE}) out",
        delete(INDEX, ONE),
        ["a.weight", "b.weight"],
    ),
    "a shard did not come": (
        {ONE: A},
        f"{TWO}: does not exist; {INDEX} places 1 tensor in it; was the download complete?",
        add({TWO: B}),
        ["a.weight", "b.weight"],
    ),
    "nothing came": (
        {},
        "was the download complete?",
        add({ONE: A, TWO: B}),
        ["a.weight", "b.weight"],
    ),
    "a name in another case": (
        {ONE: A, TWO.upper().replace(".SAFETENSORS", ".safetensors"): B},
        f"rename {TWO.upper().replace('.SAFETENSORS', '.safetensors')} to it",
        rename(TWO.upper().replace(".SAFETENSORS", ".safetensors"), TWO),
        ["a.weight", "b.weight"],
    ),
    "shards of an older save": (
        {ONE: A, TWO: B, OLD_THREE[0]: A, OLD_THREE[1]: B},
        f"holds 1 tensor that {INDEX} places in other files: move the file out of the folder",
        delete(*OLD_THREE[:2]),
        ["a.weight", "b.weight"],
    ),
    "one more file, wanted": (
        {ONE: A, TWO: B, "mtp.safetensors": C},
        f"if its tensors belong to the model, delete {INDEX}",
        delete(INDEX),
        ["a.weight", "b.weight", "c.weight"],
    ),
    "one more file, not wanted": (
        {ONE: A, TWO: B, "mtp.safetensors": C},
        "otherwise move the file out of the folder",
        delete("mtp.safetensors"),
        ["a.weight", "b.weight"],
    ),
    "quantized in place": (
        {ONE: {"a.qweight": ("I32", [2, 3])}, TWO: {"b.qweight": ("I32", [2, 3])}},
        f"the index is of another save, delete {INDEX}",
        delete(INDEX),
        sorted(Q),
    ),
    "a tensor twice": (
        {ONE: A, TWO: A | B},
        "remove it from one of them",
        add({TWO: B}),
        ["a.weight", "b.weight"],
    ),
    "Mistral's copy only": (
        {"consolidated.safetensors": C},
        f"If consolidated.safetensors holds the whole model, delete {INDEX}",
        delete(INDEX),
        ["c.weight"],
    ),
}


@pytest.mark.parametrize("case", ASKED)
def test_what_the_message_says_to_do_works(tmp_path: Path, case: str) -> None:
    files, words, act, then = ASKED[case]
    folder = make(tmp_path, files)
    assert words in reported(folder)
    act(folder)
    assert names(read_checkpoint(folder)) == then


@pytest.mark.parametrize("weight_map", [{}, [], 7, None])
def test_an_index_that_says_nothing_can_be_deleted(tmp_path: Path, weight_map: object) -> None:
    folder = write_folder(tmp_path, {"model.safetensors": A})
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "delete the file to read every .safetensors file of the folder" in reported(folder)
    (folder / INDEX).unlink()
    assert names(read_checkpoint(folder)) == ["a.weight"]


def test_a_damaged_file_is_not_believed_whole(tmp_path: Path) -> None:
    folder = make(tmp_path, {"model.safetensors": A | B})
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "was it downloaded to its end?" in reported(folder)
