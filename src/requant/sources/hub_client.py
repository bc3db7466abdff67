"""Requests to the model hub: byte ranges of files, and the translation of errors to HubError.

huggingface_hub provides the HTTP session, the token and the URLs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from requant.errors import HubError

_TIMEOUT_S = 30.0
_BLOCK_BYTES = 256 << 10
_RETRYABLE_CODES = (408, 429, 500, 502, 503, 504)
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def stream_range(repository: str, commit: str, file: str, start: int, stop: int) -> Iterator[bytes]:
    """Stream the bytes of a range of a file with one request; fewer if the connection is cut.

    Raises:
        HubError: The hub cannot be reached or rejects the request.
    """
    import huggingface_hub
    from huggingface_hub import utils as known

    if stop <= start:
        return
    utils: Any = known  # its type stubs do not export all names
    url = huggingface_hub.hf_hub_url(repository, file, revision=commit)
    headers = utils.build_hf_headers()
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    session = utils.get_session()
    with (
        hub_errors(repository, commit, file),
        session.stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response,
    ):
        if response.status_code >= 400:
            response.read()
        utils.hf_raise_for_status(response)
        skipped = start if response.status_code == 200 else 0  # a server without range requests
        left = stop - start
        for block in response.iter_bytes(_BLOCK_BYTES):
            wanted = block[skipped : skipped + left]
            skipped -= min(skipped, len(block))
            left -= len(wanted)
            if wanted:
                yield wanted
            if not left:
                return


def read_range(repository: str, commit: str, file: str, start: int, stop: int) -> bytes:
    """The bytes of a range of a file.

    Raises:
        HubError: The hub cannot be reached, rejects the request, or sends less.
    """
    data = b"".join(stream_range(repository, commit, file, start, stop))
    if len(data) != stop - start:
        raise HubError(f"{repository}: {file}: {len(data):,} bytes came, expected {stop - start:,}")
    return data


@contextmanager
def hub_errors(
    repository: str, revision: str | None = None, file: str = "", *, sending: bool = False
) -> Iterator[None]:
    """Translate errors of huggingface_hub and of the network to a HubError with advice.

    Any other error passes through unchanged. ``file`` is "" for a request about the repository;
    ``sending`` says that the request is part of an upload.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        cause: BaseException = error
        if isinstance(error, RuntimeError) and error.__cause__ is not None:
            # An upload of many files: the message names the file, the cause is the HTTP error.
            file, cause = str(error).splitlines()[0], error.__cause__
        message_of = next((f for kind, f in _messages().items() if isinstance(cause, kind)), None)
        if message_of is None:
            raise
        translated = HubError(message_of(_Request(repository, revision, file, sending), cause))
        # The hub answered that the same request may succeed later, or did not answer.
        translated.temporary = message_of is _not_reached or _status_of(cause) in _RETRYABLE_CODES
        raise translated from cause


@dataclass(frozen=True, slots=True)
class _Request:
    """The arguments of ``hub_errors`` and the phrases that error messages make of them."""

    repository: str
    revision: str | None
    file: str
    sending: bool

    @property
    def target(self) -> str:
        return f"{self.repository}: {self.file}" if self.file else self.repository

    @property
    def subject(self) -> str:
        """The target; a repository's name could also be a mistyped path."""
        known = self.file or self.sending
        return f"{self.target}:" if known else f"{self.target} is not a folder here, and"

    @property
    def page(self) -> str:
        return f"the page of {self.repository} on the hub"

    @property
    def kept(self) -> str:
        return "Files that arrived are not sent again" if self.sending else "What came is kept"


def _no_repository(request: _Request, _: Any) -> str:
    name = request.repository
    if request.sending:
        return f"{name}: the hub takes nothing for it from you; check the name, {_LOG_IN}"
    return (
        f"there is no folder {name}, and no such model on the hub, or it is private; for a "
        f"private one {_LOG_IN}"
    )


def _bad_status(request: _Request, error: Any) -> str:
    """Message for an ``HfHubHTTPError`` without a subclass."""
    code = _status_of(error)
    reason = (error.server_message or str(error)).splitlines()[0].rstrip(".")
    hint = f"; {_LOG_IN}" if code in (401, 403) else ""
    if code in _RETRYABLE_CODES:
        hint = f". {request.kept}: try again in a while"
    return f"{request.target}: the hub answers {code or '?'}: {reason}{hint}"


def _not_reached(request: _Request, error: Any) -> str:
    found = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{request.subject} the hub cannot be reached ({found}). {request.kept}: try again"


_Message = Callable[[_Request, Any], str]


@cache
def _messages() -> Mapping[type, _Message]:
    """Exception class -> function that gives its message; the first class that fits counts.

    The order matters: most classes are derived from HfHubHTTPError.
    """
    from huggingface_hub import errors

    # huggingface_hub 1 uses httpx, 2 uses httpx2; HfHubHTTPError is derived from its HTTPError.
    library: Any = import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    return {
        errors.GatedRepoError: lambda r, _: (
            f"{r.target} is gated: accept its terms on {r.page}, then {_LOG_IN}"
        ),
        errors.RevisionNotFoundError: lambda r, _: (
            f"{r.repository} has no revision {r.revision!r}: see {r.page}"
        ),
        errors.RepositoryNotFoundError: _no_repository,
        errors.EntryNotFoundError: lambda r, _: f"{r.target} is not on the hub at {r.revision}",
        errors.OfflineModeIsEnabled: lambda r, _: (
            f"{r.subject} HF_HUB_OFFLINE forbids to ask the hub for it"
        ),
        errors.HfHubHTTPError: _bad_status,
        errors.HFValidationError: lambda r, error: f"{r.target}: {error}",
        library.HTTPError: _not_reached,
        library.InvalidURL: _not_reached,
        OSError: _not_reached,
    }


def _status_of(error: Any) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)
