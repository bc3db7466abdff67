"""The threads of the library behind NumPy's linear algebra.

OpenBLAS has one pool of threads for the process: calls from several threads wait for each other in
it and use processor time while they wait. With one thread each call is carried out by its caller,
so that calls run side by side, and their results do not depend on the number of processors.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from numpy.linalg import _umath_linalg  # the module that links BLAS

# Of NumPy's own builds: 2.x, 1.26, and those of distributions.
_NAMES = (
    "scipy_openblas_{}_num_threads64_",
    "scipy_openblas_{}_num_threads",
    "openblas_{}_num_threads64_",
    "openblas_{}_num_threads",
)
_lock = threading.Lock()
_users, _before = 0, 0


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let linear algebra of this process use one thread for each caller, if it is OpenBLAS.

    The last of several blocks that overlap restores the number that was set before the first.
    """
    global _users, _before
    functions = _thread_functions()
    if functions is None:
        yield
        return
    get, set_to = functions
    with _lock:
        if not _users:
            _before = get()
            set_to(1)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                set_to(_before)


def _thread_functions() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """OpenBLAS's functions that return and set the number of threads; None for another library."""
    library = ctypes.CDLL(_umath_linalg.__file__)  # a name is looked up in what it links, too
    for name in _NAMES:
        if hasattr(library, name.format("set")):
            return getattr(library, name.format("get")), getattr(library, name.format("set"))
    return None
