"""Uploads to a hub on loopback, with huggingface_hub's own client in this process."""

from __future__ import annotations

import base64
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")

from huggingface_hub import constants

import requant
from requant.api import upload as publishing
from requant.cli import run
from requant.errors import CheckpointError, HubError, UsageError
from tests.support.checkpoints import tree
from tests.support.commands import Result
from tests.support.hub_server import Hub, serving
from tests.support.interruptions import Stop, stop_after
from tests.support.number_formats import bf16

# huggingface_hub's own use of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

MICRO = Path(__file__).parents[2] / "examples" / "micro-llama"
NAME = "me/micro-4bit"
CARD = b"""---
license: other
tags: [llama, mlx]
extra_gated_prompt: Accept the terms.
extra_gated_fields: {Name: text}
---
# Of the source
"""
THEIRS = b"---\nlicense: mit\n---\n\n# Written by hand\n\nDo not lose \x1b[31mthis.\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving(Hub({})) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield running


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upload") / "micro-bf16"
    shutil.copytree(MICRO, folder)
    (folder / "README.md").write_bytes(CARD)
    return folder


@pytest.fixture(scope="module")
def output(source: Path) -> Path:
    written = source.parent / "out"
    requant.convert(source, written, bits=4, layout="keep", shard_size=200_000)
    return written


@pytest.fixture
def requant_command(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Result]]:
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as end:
            run([str(argument) for argument in arguments])
        return Result(end.value.code or 0, *capfd.readouterr())

    yield call
    signal.signal(signal.SIGTERM, handler)


def written(hub: Hub) -> list[str]:
    return [path for method, path, _ in hub.log if method not in ("GET", "HEAD")]


def committed_card(hub: Hub, name: str = NAME) -> str:
    found = [x["value"] for x in hub.commits[name] if x["value"].get("path") == "README.md"]
    return base64.b64decode(found[0]["content"]).decode()


def test_the_card_that_arrives_has_the_terms_of_access(hub: Hub, output: Path) -> None:
    done = requant.upload(output, NAME, base_model="org/micro")
    card = committed_card(hub)
    assert done.card == card and done.url.startswith(f"{hub.url}/{NAME}/commit/")
    assert "extra_gated_prompt: Accept the terms.\n" in card and "Name: text" in card
    assert "tags:\n- llama\n- mlx\n- requant\n" in card and f"\n# {NAME}\n" in card
    assert hub.targets[NAME] == ("main", False) and done.difference == ""


# -- an existing README.md ---------------------------------------------------------------------


def test_another_readme_is_shown_and_kept(hub: Hub, output: Path) -> None:
    hub.repositories[NAME] = {"README.md": THEIRS, "notes.txt": b"own"}
    with pytest.raises(HubError) as caught:
        requant.upload(output, NAME)
    text = str(caught.value)
    assert f"{NAME}: has a README.md that the upload would change. --force replaces it" in text
    assert "\n-# Written by hand\n" in text and f"\n+# {NAME}\n" in text
    assert not written(hub) and not hub.objects and NAME not in hub.commits


def test_force_replaces_a_readme_and_shows_it(
    hub: Hub, output: Path, requant_command: Callable[..., Result]
) -> None:
    hub.repositories[NAME] = {"README.md": THEIRS, "notes.txt": b"own"}
    rejected = requant_command("upload", output, NAME)
    assert rejected.code == 1 and "-# Written by hand" in rejected.err and not written(hub)
    assert "\x1b" not in rejected.err and not rejected.out
    done = requant_command("upload", output, NAME, "--force")
    assert done.code == 0 and "\n-# Written by hand\n" in done.err
    assert f"\n# {NAME}\n" in committed_card(hub)
    assert not [x for x in hub.commits[NAME] if x["value"].get("path") == "notes.txt"]


def test_the_same_card_needs_no_force(hub: Hub, output: Path) -> None:
    card = requant.upload(output, NAME, preview=True).card
    hub.repositories[NAME] = {"README.md": card.encode()}
    done = requant.upload(output, NAME)
    assert done.difference == "" and NAME in hub.commits


def test_every_problem_of_a_repository_in_one_run(hub: Hub, output: Path) -> None:
    hub.repositories[NAME] = {"README.md": THEIRS}
    hub.public.add(NAME)
    with pytest.raises(HubError) as caught:
        requant.upload(output, NAME, private=True)
    text = str(caught.value)
    assert "is public already" in text and "has a README.md" in text and not written(hub)


def test_a_commit_that_came_between_is_not_overwritten(
    hub: Hub, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README.md that was compared is that of the commit which the upload is made on."""
    hub.repositories[NAME] = {}

    def meanwhile(folder: Path) -> Any:
        hub.heads[NAME] = "1" * 40
        return requant.verify(folder)

    monkeypatch.setattr(publishing, "verify", meanwhile)
    with pytest.raises(HubError, match="412"):
        requant.upload(output, NAME)
    assert NAME not in hub.commits


# -- branches and pull requests ------------------------------------------------------------------


def test_a_pull_request_changes_nothing(hub: Hub, output: Path) -> None:
    hub.repositories[NAME] = {"README.md": THEIRS}
    done = requant.upload(output, NAME, pull_request=True)
    assert done.url == f"{hub.url}/{NAME}/discussions/1" and hub.targets[NAME] == ("main", True)
    assert "-# Written by hand" in done.difference
    assert not [path for path in written(hub) if path.endswith(("/create", "/branch"))]


def test_a_pull_request_needs_a_repository(hub: Hub, output: Path) -> None:
    with pytest.raises(HubError, match="does not exist, so it has no pull requests"):
        requant.upload(output, NAME, pull_request=True)
    with pytest.raises(UsageError, match="choose one: --branch or --pull-request"):
        requant.upload(output, NAME, pull_request=True, branch="x")
    assert not written(hub)


def test_a_new_branch_starts_from_main(hub: Hub, output: Path) -> None:
    hub.repositories[NAME] = {"README.md": THEIRS, "model.safetensors": b"old"}
    done = requant.upload(output, NAME, branch="4bit")
    assert hub.targets[NAME] == ("4bit", False) and done.removed == ("model.safetensors",)
    assert f"/api/models/{NAME}/branch/4bit" in written(hub)
    assert hub.repositories[NAME]["README.md"] == THEIRS


def test_a_branch_of_a_new_repository(hub: Hub, output: Path) -> None:
    requant.upload(output, NAME, branch="4bit", private=True)
    assert hub.targets[NAME] == ("4bit", False) and NAME in hub.repositories


def test_the_readme_of_a_branch_counts_there(hub: Hub, output: Path) -> None:
    card = requant.upload(output, NAME, preview=True).card.encode()
    hub.repositories[NAME] = {"README.md": card}
    hub.branches[NAME] = {"dev": {"README.md": THEIRS}, "refs/pr/3": {"README.md": card}}
    with pytest.raises(HubError, match="Written by hand"):
        requant.upload(output, NAME, branch="dev")
    requant.upload(output, NAME, branch="refs/pr/3")
    assert hub.targets[NAME] == ("refs/pr/3", False)
    requant.upload(output, NAME, branch="dev", force=True)
    assert hub.targets[NAME] == ("dev", False)


@pytest.mark.parametrize("where", [{}, {"branch": "4bit"}, {"pull_request": True}])
def test_a_stopped_upload_resumes(hub: Hub, output: Path, where: dict[str, Any]) -> None:
    hub.repositories[NAME] = {}
    hub.reject_objects = 1
    with pytest.raises(HubError):
        requant.upload(output, NAME, **where)
    assert len(hub.objects) == 1 and NAME not in hub.commits
    hub.reject_objects = -1
    before = len(written(hub))
    requant.upload(output, NAME, **where)
    sent = [path for path in written(hub)[before:] if path.startswith("/lfs/")]
    shards = [name for name in tree(output) if name.endswith(".safetensors")]
    assert len(sent) == len(shards) - 1 and len(hub.objects) == len(shards)
    assert hub.targets[NAME] == (where.get("branch", "main"), "pull_request" in where)


# -- metadata that cannot be kept ----------------------------------------------------------------


def test_invalid_metadata_of_the_source_are_named(
    hub: Hub, source: Path, tmp_path: Path, requant_command: Callable[..., Result]
) -> None:
    copy = shutil.copytree(source, tmp_path / "source")
    (copy / "README.md").write_text("---\nlicense: [mit\n---\n")
    requant.convert(copy, tmp_path / "out", bits=4, layout="keep")
    shown = requant_command("upload", tmp_path / "out", NAME, "--dry-run")
    assert shown.code == 0 and "license" not in shown.out.partition("# me")[0]
    assert "warning: the source's README.md: metadata are not valid YAML" in shown.err


# -- names ---------------------------------------------------------------------------------------


def test_a_namespace_is_completed(
    hub: Hub, source: Path, output: Path, requant_command: Callable[..., Result]
) -> None:
    assert requant.upload(output, "me/", preview=True).repository == "me/out-4bit"
    done = requant.upload(output, "me/", base_model="org/Micro-FP8")
    assert done.repository == "me/Micro-4bit" and set(hub.commits) == {"me/Micro-4bit"}
    words = ("convert", source, "never", "--layout", "keep", "--dry-run", "--upload", "me/")
    shown = requant_command(*words, "--bits", 6)
    assert shown.code == 0 and "would upload to me/micro-6bit\n" in shown.out
    shown = requant_command(*words, "--budget", "4.5", "--json")
    assert json.loads(shown.out)["upload"] == "me/micro-4.5bit"
    for wrong in ("me", "/", "me/a/"):
        assert requant_command("convert", source, "never", "--upload", wrong).code == 2
        with pytest.raises(UsageError, match="is not a repository id"):
            requant.upload(output, wrong)


def test_a_conversion_names_its_repository_before_any_work(
    hub: Hub, source: Path, tmp_path: Path, requant_command: Callable[..., Result]
) -> None:
    words = ("convert", source, tmp_path / "out", "--layout", "keep", "--mode", "mxfp4")
    hub.repositories["me/micro-mxfp4"] = {"README.md": THEIRS}
    rejected = requant_command(*words, "--upload", "me/")
    assert rejected.code == 1 and rejected.err.startswith("will upload to me/micro-mxfp4\n")
    assert "has a README.md that the upload would change" in rejected.err
    assert not (tmp_path / "out").exists() and not written(hub)
    done = requant_command(*words, "--upload", "me/", "--pull-request")
    assert done.code == 0 and hub.targets["me/micro-mxfp4"] == ("main", True)
    assert f"uploaded: {hub.url}/me/micro-mxfp4/discussions/1" in done.err


def test_a_conversion_that_deletes_its_source_is_named_when_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[..., Path]
) -> None:
    source = checkpoint({f"l{n}.weight": bf16(64, 128, seed=n) for n in range(8)}, shards=4)
    options = {"bits": 6, "layout": "keep", "consume_source": True, "yes": True}
    with monkeypatch.context() as patched, pytest.raises(Stop):
        stop_after(patched, 75)
        requant.convert(source, tmp_path / "out", chunk_bytes=1 << 12, threads=1, **options)
    assert 0 < len(list(source.glob("*.safetensors"))) < 4
    name = publishing.planned_name("me/", source, tmp_path / "out", **options)
    assert name == f"me/{source.name}-6bit"


def test_a_conversion_whose_upload_fails_says_how_to_upload(
    hub: Hub, source: Path, tmp_path: Path, requant_command: Callable[..., Result]
) -> None:
    hub.reject_objects = 0
    words = ("convert", source, tmp_path / "out", "--layout", "keep", "--upload", "me/m")
    failed = requant_command(*words)
    assert failed.code == 1
    assert f"is complete; upload it with: requant upload {tmp_path / 'out'} me/m" in failed.err


@pytest.mark.parametrize("option", [("--branch", "x"), ("--pull-request",), ("--private",)])
def test_options_of_an_upload_need_one(
    option: tuple[str, ...], requant_command: Callable[..., Result]
) -> None:
    done = requant_command("convert", MICRO, "never", *option)
    assert done.code == 2 and "add --upload ORG/NAME" in done.err


def test_an_output_that_was_changed_is_not_sent(hub: Hub, output: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(output, tmp_path / "copy")
    (copy / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="convert it again"):
        requant.upload(copy, NAME)
    assert not written(hub)


def test_an_upload_prints_as_json() -> None:
    done = publishing.Upload("a/b", "card", {"x": 1}, notes=("n",))
    assert replace(done, difference="-x").to_dict()["difference"] == "-x"
    assert done.to_dict()["notes"] == ["n"]
