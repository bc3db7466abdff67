"""Small ranges of a repository's files: neighbours in one request, several requests at a time.

Planning reads some tensors of many layers, each of a few bytes to a few KB. A request takes about
as long as 64 KB of data, so ranges that lie closer than that are one request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from requant.checkpoints.byte_ranges import FileRange, RangeRun, read_runs, runs_of

STREAMS = 8  # requests at a time
_GAP_BYTES = 64 << 10  # between ranges of one request
_REQUEST_BYTES = 1 << 20  # of one request, unless one range is longer
_KEPT_BYTES = 64 << 20  # of ranges that are read without a request when they are needed again


class SmallRanges:
    """Reads ranges and keeps the first 64 MiB of them: a source is often planned several times.

    It is called with ranges and returns their bytes in the same order. At most ``STREAMS`` requests
    of 1 MiB are held next to the bytes that are returned.

    Args:
        read: Reads one range with one request; called from several threads.
    """

    def __init__(self, read: Callable[[FileRange], bytes]) -> None:
        self._read = read
        self._kept: dict[FileRange, bytes] = {}
        self._kept_bytes = 0

    def __call__(self, parts: Sequence[FileRange]) -> list[bytes]:
        """The bytes of each range.

        Raises:
            HubError: Of the first request that failed; those that were not sent are dropped.
        """
        missing = [part for part in dict.fromkeys(parts) if part not in self._kept]
        fetched = dict(zip(missing, self._fetch(missing), strict=True))
        for part, data in fetched.items():
            if self._kept_bytes + len(data) <= _KEPT_BYTES:
                self._kept[part] = data
                self._kept_bytes += len(data)
        return [fetched[part] if part in fetched else self._kept[part] for part in parts]

    def _fetch(self, parts: Sequence[FileRange]) -> list[bytes]:
        """Request ranges, in runs of neighbours."""
        runs = runs_of(parts, _GAP_BYTES, _REQUEST_BYTES)

        def members(run: RangeRun) -> list[bytes]:
            # Copied out of the run at once: what lies between them is not held.
            inside = [parts[position] for position in run.members]
            whole = RangeRun(run.whole, tuple(range(len(inside))))
            return read_runs(inside, [whole], self._read)

        found = [b""] * len(parts)
        for run, pieces in zip(runs, _in_parallel(members, runs), strict=True):
            for position, data in zip(run.members, pieces, strict=True):
                found[position] = data
        return found


def _in_parallel(
    function: Callable[[RangeRun], list[bytes]], runs: Sequence[RangeRun]
) -> list[list[bytes]]:
    """The results of ``function`` for each run; after an error or Ctrl-C none is started."""
    if len(runs) < 2:
        return [function(run) for run in runs]
    pool = ThreadPoolExecutor(min(STREAMS, len(runs)), "requant-range")
    try:
        return list(pool.map(function, runs))
    finally:
        pool.shutdown(cancel_futures=True)
