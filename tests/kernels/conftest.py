"""Every test here runs once over each build of the kernels that this processor can run."""

import numpy as np
import pytest

from requant.kernels import _native


@pytest.fixture
def set_isa():
    """Takes another build of the kernels until the test ends."""
    before = _native.isa()
    yield _native.set_isa
    _native.set_isa(before)


@pytest.fixture(autouse=True, params=_native.available_isas())
def isa(request, set_isa):
    set_isa(request.param)
    return request.param


@pytest.fixture(autouse=True)
def quiet():
    """The references meet infinities and NaN on purpose."""
    with np.errstate(all="ignore"):
        yield
