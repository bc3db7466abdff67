"""Equal values become one object."""

from requant.core.dtypes import TensorInfo, shared_info
from requant.core.sharing import shared


def test_equal_values_are_one_object() -> None:
    first = shared(TensorInfo("F32", (3, 1000)))
    assert shared(TensorInfo("F32", (3, 1000))) is first
    assert shared(TensorInfo("F32", (1000, 3))) is not first
    assert shared_info("BF16", (2, 7)) is shared_info("BF16", (2, 7))
    assert shared_info("BF16", (2, 7)) == TensorInfo("BF16", (2, 7))


def test_values_of_different_types_stay_apart() -> None:
    assert shared(("F32",)) == ("F32",)
    assert isinstance(shared(TensorInfo("F32", ())), TensorInfo)
