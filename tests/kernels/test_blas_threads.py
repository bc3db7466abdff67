"""One thread for linear algebra while a block lasts, and the number before it afterwards."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from requant.kernels.blas_threads import _thread_functions, one_blas_thread

FUNCTIONS = _thread_functions()
needs_openblas = pytest.mark.skipif(FUNCTIONS is None, reason="NumPy links another library")


def test_the_library_of_numpy_s_own_linux_builds_is_found() -> None:
    name = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    if "openblas" in name:
        assert FUNCTIONS is not None


@needs_openblas
def test_blocks_that_overlap_restore_the_number_of_before() -> None:
    assert FUNCTIONS is not None
    get, set_to = FUNCTIONS
    before = get()
    try:
        set_to(2)
        first, second = one_blas_thread(), one_blas_thread()
        first.__enter__()
        second.__enter__()
        assert get() == 1
        first.__exit__(None, None, None)
        assert get() == 1
        second.__exit__(None, None, None)
        assert get() == 2
        with pytest.raises(ZeroDivisionError), one_blas_thread():
            raise ZeroDivisionError
        assert get() == 2
    finally:
        set_to(before)


_WORK = """
import time, numpy as np
from requant.kernels.blas_threads import one_blas_thread
a = np.random.default_rng(0).normal(size=(1000, 1000))
time.sleep(0.3)  # threads that BLAS has started wait in processor time for a while
with one_blas_thread():
    began = time.process_time(), time.thread_time()
    for _ in range(4):
        a @ a
    own = time.thread_time() - began[1]
    print((time.process_time() - began[0] - own) / own)
"""


@needs_openblas
def test_no_other_thread_works_in_a_block() -> None:
    """Processor time of other threads over the caller's, in a process with eight for BLAS.

    Without the block it is about 1 on two cores.
    """
    env = os.environ | {"OPENBLAS_NUM_THREADS": "8"}
    run = subprocess.run([sys.executable, "-c", _WORK], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 0.3


@needs_openblas
def test_products_from_several_threads_are_those_of_one() -> None:
    a = np.random.default_rng(0).normal(size=(200, 200))
    with one_blas_thread():
        expected, found = a @ a, [np.empty(0)] * 4
        threads = [
            threading.Thread(target=lambda n=n: found.__setitem__(n, a @ a)) for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for made in found:
        assert made.tobytes() == expected.tobytes()
