"""What is replaced in MLX, in the MLX libraries and in the process while one of them runs.

One lock is held meanwhile, by whoever replaces something: it concerns the whole process. Functions
that are replaced stay as they are for the other threads.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

lock = threading.RLock()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module or a class; one that it lacks is not added.

    A function is replaced for the calling thread only.
    """
    if not hasattr(owner, name):
        yield
        return
    own = vars(owner).get(name)  # None: inherited
    setattr(owner, name, _in_this_thread(value, getattr(owner, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _in_this_thread(value: Any, original: Callable[..., Any]) -> Any:
    if isinstance(value, staticmethod) or not callable(value):
        return value
    thread = threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        function = value if threading.get_ident() == thread else original
        return function(*args, **kwargs)

    return call


@contextmanager
def cpu() -> Iterator[None]:
    """Run MLX on the CPU, with the kernels that classes choose for it.

    Nothing is compiled, which takes a C++ compiler and seconds; and ``mx.gather_mm``, which takes
    float32 alone on the CPU, computes in it.
    """
    import mlx.core as mx

    gather = mx.gather_mm

    def gather_mm(a: mx.array, b: mx.array, *indices: Any, **options: Any) -> mx.array:
        product = gather(a.astype(mx.float32), b.astype(mx.float32), *indices, **options)
        return product.astype(a.dtype)

    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    try:
        with lock, mx.stream(mx.cpu), replaced(mx, "gather_mm", gather_mm):
            yield
    finally:
        mx.enable_compile()
        mx.set_default_device(device)


@contextmanager
def without_checkpoint_code() -> Iterator[None]:
    """Let transformers reject Python files of a checkpoint, whatever a class asks of it."""
    from transformers import dynamic_module_utils

    def get_class_in_module(name: str, *_: Any, **__: Any) -> None:
        raise ValueError(f"{name} is code of the checkpoint, which is not run")

    with lock, replaced(dynamic_module_utils, "get_class_in_module", get_class_in_module):
        yield


@contextmanager
def offline() -> Iterator[None]:
    """Let whatever would be downloaded fail."""
    from huggingface_hub import constants

    with replaced(constants, "HF_HUB_OFFLINE", True):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Discard what the libraries print, log and warn of."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.ERROR))
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
