"""Errors of huggingface_hub and of the network, translated by ``hub_errors``."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from requant.errors import HubError
from requant.sources.hub_client import hub_errors

errors: Any = pytest.importorskip("huggingface_hub.errors")
HTTP: Any = import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])


def answer(kind: Any, code: int) -> BaseException:
    """An exception as huggingface_hub raises it for an answer with this status."""
    response = SimpleNamespace(status_code=code, headers={}, request=None)
    error: BaseException = kind("Said by the server.", response=response)
    return error


@pytest.mark.parametrize(
    ("raised", "declared", "retryable"),
    [
        (answer(errors.GatedRepoError, 403), "a/b: x is gated: accept its terms", False),
        (answer(errors.RepositoryNotFoundError, 401), "there is no folder a/b, and no", False),
        (answer(errors.RevisionNotFoundError, 404), "a/b has no revision 'v9'", False),
        (answer(errors.RemoteEntryNotFoundError, 404), "a/b: x is not on the hub at v9", False),
        (answer(errors.HfHubHTTPError, 403), "answers 403: Said by the server; log in", False),
        (answer(errors.HfHubHTTPError, 410), "answers 410: Said by the server", False),
        (answer(errors.HfHubHTTPError, 429), "429: Said by the server. What came is kept", True),
        (answer(errors.HfHubHTTPError, 503), "503: Said by the server. What came is kept", True),
        (errors.OfflineModeIsEnabled("off"), "a/b: x: HF_HUB_OFFLINE forbids", False),
        (errors.HFValidationError("too long"), "a/b: x: too long", False),
        (HTTP.ConnectError("reset"), "cannot be reached (ConnectError: reset)", True),
        (HTTP.ReadTimeout("slow"), "cannot be reached (ReadTimeout: slow)", True),
        (HTTP.InvalidURL("port"), "cannot be reached (InvalidURL: port)", True),
        (ConnectionResetError("reset"), "(ConnectionResetError: reset). What came", True),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_each_class_has_its_message(raised: BaseException, declared: str, retryable: bool) -> None:
    with pytest.raises(HubError) as caught, hub_errors("a/b", "v9", "x"):
        raise raised
    assert declared in str(caught.value)
    assert caught.value.temporary is retryable
    assert caught.value.__cause__ is raised


def test_an_upload_of_many_files_names_the_file() -> None:
    with pytest.raises(HubError) as caught, hub_errors("a/b", sending=True):
        raise RuntimeError("Error while uploading 'x'") from HTTP.ConnectError("reset")
    assert str(caught.value).startswith("a/b: Error while uploading 'x': the hub cannot be reached")
    assert "Files that arrived are not sent again" in str(caught.value)
    assert caught.value.temporary


@pytest.mark.parametrize("raised", [KeyError("x"), RuntimeError("x"), HubError("x")])
def test_other_errors_pass_through(raised: Exception) -> None:
    with pytest.raises(type(raised)) as caught, hub_errors("a/b"):
        raise raised
    assert caught.value is raised
