"""Every test here runs once over each build of the kernels that this processor can run."""

import mlx.core as mx
import numpy as np
import pytest

from requant import _native


@pytest.fixture(scope="session", autouse=True)
def mlx_on_its_cpu():
    """Our bits are those of MLX's CPU backend, whatever else the machine has."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture(autouse=True, params=_native.available_isas())
def isa(request):
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.fixture(autouse=True)
def quiet():
    """The references meet infinities and NaN on purpose."""
    with np.errstate(all="ignore"):
        yield
