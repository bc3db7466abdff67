"""mlx-lm's layout of a checkpoint whose experts may have another form than its class loads.

First the class is given the checkpoint as it is stored. If it does not load that, the experts are
converted to each form of ``expert_forms`` in turn, until the class loads all tensors strictly. Its
``sanitize`` then works on every tensor, the others (norms, convolutions) included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from requant.core.dtypes import TensorInfo
from requant.layouts.availability import LayoutError
from requant.layouts.expert_forms import Form, Reader, has_experts, words_for
from requant.layouts.layout import MlxLmLayout, mlx_lm_layout
from requant.layouts.outputs import ComputedBySanitize
from requant.quantization.config import Quantization


def layout_in_any_form(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    *,
    quantization: Quantization | None = None,
    recipe: str | None = None,
    dtype: str | None = None,
) -> tuple[MlxLmLayout, str]:
    """Return the result of ``mlx_lm_layout`` with the experts in a form that the class loads.

    Returns:
        The layout, and how the experts were converted; "" where they were not.

    Raises:
        UnknownModelError: mlx-lm is not installed or has no class for the model.
        LayoutError: The class loads no form; the message is about the checkpoint as stored.
    """
    options: dict[str, Any] = {"quantization": quantization, "recipe": recipe, "dtype": dtype}
    try:
        return mlx_lm_layout(config, tensors, **options), ""
    except LayoutError as error:
        if not has_experts(tensors.keys()):
            raise
        reader = Reader.of(config)
        for form in reader.forms(error.class_names):
            try:
                layout = mlx_lm_layout(config, tensors, adapt=reader.adapter(form), **options)
            except LayoutError:
                continue
            done = f"the source has {words_for(tensors.keys())}, its class takes {form.words}"
            return _moved(layout, reader, form, config, tensors, **options), done
        raise


_OWN = re.compile(r".+?\.\d+\.(.+)\.(gate_proj|up_proj|down_proj)\.weight")


def _moved(
    layout: MlxLmLayout,
    reader: Reader,
    form: Form,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    **options: Any,
) -> MlxLmLayout:
    """The layout with experts whose rows are moved instead of transposed there and back.

    The class is given stacks under its own names. That is the same model only if its rule then
    does the same to every other tensor: some rules do nothing where they find their own names.
    """
    experts = {name for name, x in layout.tensors.items() if has_experts(x.inputs)}
    computed = any(isinstance(layout.tensors[name], ComputedBySanitize) for name in experts)
    places = {match[1] for name in experts if (match := _OWN.fullmatch(name))}
    if not computed or len(places) != 1:
        return layout
    own = replace(Form(form.words, place=f"{{layer}}{places.pop()}"), in_turns=form.in_turns)
    try:
        direct = mlx_lm_layout(config, tensors, adapt=reader.adapter(own), **options)
    except LayoutError:
        return layout
    # Of the experts dtypes and shapes must be the same, of the others also how they are made.
    ours, theirs = (
        {name: x.info if name in experts else x for name, x in one.tensors.items()}
        for one in (layout, direct)
    )
    return direct if ours == theirs else layout
