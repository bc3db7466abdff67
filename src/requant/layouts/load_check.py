"""Check whether a library loads a set of tensors by running its loader on files without data."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from requant.core.dtypes import TensorInfo
from requant.errors import RequantError
from requant.layouts.outputs import ByteCopy
from requant.libraries import MLX_LM, UnknownModelError

if TYPE_CHECKING:
    from requant.layouts.layout import LibraryLayout


def why_unloadable(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> str:
    """Return why mlx-lm does not load a folder of this config and these tensors; "" if it does."""
    if why := MLX_LM.missing_class_reason(config):
        return why
    try:
        from requant.layouts.conversion_trace import Shown, check_load

        check_load(MLX_LM, Shown(deepcopy(dict(config)), infos))
    except UnknownModelError as error:
        return one_sentence(error.why)
    except RequantError as error:
        return one_sentence(str(error))
    return ""


def find_load_error(layout: LibraryLayout, infos: Mapping[str, TensorInfo]) -> str:
    """Return why a library does not load its own layout with further tensors; "" if it does.

    A library runs its rule when it loads a model, too: it must drop the further tensors again and
    leave the others unchanged.

    Args:
        layout: The library's layout.
        infos: Its tensors and the further ones.
    """
    from requant.layouts.layout import Shown, library_layout

    dense = {k: v for k, v in layout.config.items() if not k.startswith("quantization")}
    try:
        again = library_layout(layout.library, Shown(dense, infos))
    except RequantError as error:
        return " ".join(str(error).split())
    for name, x in again.tensors.items():
        is_same = isinstance(x, ByteCopy) and x.inputs == (name,) and len(x.extents) == 1
        if not is_same or x.info != infos.get(name):
            return f"with them its rule changes {name} once more"
    return ""


def one_sentence(text: str) -> str:
    """A message on one line, without its full stop."""
    return " ".join(text.split()).rstrip(".")
