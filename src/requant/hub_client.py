"""Talking to the model hub: ranges of files, and errors that say what to do.

huggingface_hub brings the session, the token and the addresses; this module, what is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from requant.errors import HubError

_TIMEOUT_S = 30.0
_BLOCK_BYTES = 256 << 10
_TEMPORARY = (408, 429, 500, 502, 503, 504)  # answers of a server that may think better of it


def stream_range(repository: str, commit: str, file: str, start: int, stop: int) -> Iterator[bytes]:
    """The bytes of a range of a file as they come, by one request; fewer where it is cut short.

    Raises:
        HubError: The hub is not reached, or refuses.
    """
    import huggingface_hub
    from huggingface_hub import utils as known

    if stop <= start:
        return
    utils: Any = known  # not all of its names are exported by the letter
    url = huggingface_hub.hf_hub_url(repository, file, revision=commit)
    headers = utils.build_hf_headers()
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    session = utils.get_session()
    with (
        asking(repository, commit, file),
        session.stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response,
    ):
        if response.status_code >= 400:
            response.read()
        utils.hf_raise_for_status(response)
        skipped = start if response.status_code == 200 else 0  # a server that knows no ranges
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
        HubError: The hub is not reached, refuses, or gives less.
    """
    data = b"".join(stream_range(repository, commit, file, start, stop))
    if len(data) != stop - start:
        raise HubError(f"{repository}: {file}: {len(data):,} bytes came, expected {stop - start:,}")
    return data


def _temporary(message: str) -> HubError:
    error = HubError(message)
    error.temporary = True
    return error


@contextmanager
def asking(
    repository: str, revision: str | None = None, file: str = "", *, sending: bool = False
) -> Iterator[None]:
    """Turn what huggingface_hub and the network raise into a HubError that says what to do."""
    from huggingface_hub import errors

    where = f"{repository}: {file}" if file else repository
    neither = f"{where}:" if file or sending else f"{where} is no folder here, and"
    kept = "Files that arrived are not sent again" if sending else "What came is kept"
    page = f"the page of {repository} on the hub"
    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError as error:
        message = (
            f"{where} is gated: accept its terms on {page}, then log in with `hf auth login` or "
            "set HF_TOKEN"
        )
        raise HubError(message) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repository} has no revision {revision!r}: see {page}") from error
    except errors.RepositoryNotFoundError as error:
        missing = (
            f"{repository}: the hub takes nothing for it from you; check the name,"
            if sending
            else f"there is no folder {repository}, and no such model on the hub, or it is "
            "private; for a private one"
        )
        message = f"{missing} log in with `hf auth login` or set HF_TOKEN"
        raise HubError(message) from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{where} is not on the hub at {revision}") from error
    except errors.OfflineModeIsEnabled as error:
        message = f"{neither} HF_HUB_OFFLINE forbids to ask the hub for it"
        raise HubError(message) from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "?"
        said = (error.server_message or str(error)).splitlines()[0].rstrip(".")
        hint = "; log in with `hf auth login` or set HF_TOKEN" if code in (401, 403) else ""
        if code in _TEMPORARY:
            hint = f". {kept}: try again in a while"
        answer = f"{where}: the hub answers {code}: {said}{hint}"
        raise (_temporary(answer) if code in _TEMPORARY else HubError(answer)) from error
    except errors.HFValidationError as error:
        raise HubError(f"{where}: {error}") from error
    except Exception as error:
        # Connections fail with the classes of whichever HTTP library huggingface_hub uses.
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _HTTP:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            message = f"{neither} the hub cannot be reached ({what}). {kept}: try again"
            raise _temporary(message) from error
        if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of one file of many
            with asking(repository, revision, str(error).splitlines()[0], sending=sending):
                raise error.__cause__ from error
        raise


_HTTP = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
