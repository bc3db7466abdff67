"""What a calibration keeps: the state of the run, and the files of hidden states."""

import json
from pathlib import Path

import numpy as np
import pytest

from requant.calibration.run_folder import BlockRunState, HiddenStates, RunFolder
from requant.errors import OutputError


def test_a_state_is_read_back_for_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    layers = {"up": {"without_tokens": 2, "hessian": True}}
    state = BlockRunState("key", 3, ("00001.safetensors",), layers, ("wide",), ("up", "wide"))
    state.save(path)
    assert BlockRunState.load(path, "key") == state
    assert BlockRunState.load(path, "another") == BlockRunState("another")
    assert [x.name for x in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"key": "key", "unknown": 1}', "{}"])
def test_a_file_that_is_not_a_state_starts_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    assert BlockRunState.load(tmp_path / "state.json", "key") == BlockRunState("key")
    assert BlockRunState.load(tmp_path / "none", "key").done == -1


def test_two_files_of_hidden_states_take_turns(tmp_path: Path) -> None:
    states = np.arange(48, dtype=np.float32).reshape(2, 4, 6)
    hidden = HiddenStates(tmp_path, states.shape)
    for number in range(3):
        hidden.write(number, states + number)
        assert np.array_equal(list(hidden.read(number)), states + number)
    assert np.array_equal(list(hidden.read(1)), states + 1)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["hidden-0", "hidden-1"]
    (tmp_path / "hidden-0").write_bytes((tmp_path / "hidden-0").read_bytes()[:-1])
    rows = hidden.read(2)
    assert np.array_equal(next(rows), states[0] + 2)
    with pytest.raises(OutputError, match="--no-resume starts over"):
        next(rows)
    assert hidden.is_cut


@pytest.mark.parametrize("resume", [True, False])
def test_only_a_run_that_resumes_keeps_the_files(tmp_path: Path, resume: bool) -> None:
    output = tmp_path / "s.safetensors"
    folder = tmp_path / ".s.safetensors.requant-calibrating"
    folder.mkdir()
    (folder / "00001.safetensors").write_text("")
    (folder / "state.json").write_text(json.dumps({"key": "key", "done": 1}))
    with RunFolder("model", output, "key", resume) as run:
        assert run.state.done == (1 if resume else -1)
        assert (folder / "00001.safetensors").exists() == resume
        with (
            pytest.raises(OutputError, match="another process"),
            RunFolder("model", output, "key", resume),
        ):
            pass
