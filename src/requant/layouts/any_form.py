"""mlx-lm's layout of a checkpoint whose experts may have another form than its class takes.

First the class is shown the checkpoint as it is stored. Where it does not take that, the experts
are brought into each form that some class takes (``expert_forms``) until the class loads all of
it, strictly. Then its rule has seen every tensor, and what it does to the others (norms that are
shifted, convolutions that are transposed) is done.
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
    """What ``mlx_lm_layout`` gives, with the experts in a form that the class takes.

    Returns:
        The layout, and what was done to the experts; "" where nothing was.

    Raises:
        UnknownModelError: mlx-lm is not installed or has no class for the model.
        LayoutError: No form helps; it says what the class has against the checkpoint as stored.
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
                made = mlx_lm_layout(config, tensors, adapt=reader.adapter(form), **options)
            except LayoutError:
                continue
            made = _moved(made, reader, form, config=config, tensors=tensors, options=options)
            done = f"the source has {words_for(tensors.keys())}, its class takes {form.words}"
            return made, done
        raise


_OWN = re.compile(r".+?\.\d+\.(.+)\.(gate_proj|up_proj|down_proj)\.weight")


def _moved(
    made: MlxLmLayout,
    reader: Reader,
    form: Form,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    options: Mapping[str, Any],
) -> MlxLmLayout:
    """The same with experts whose rows are moved, where that needs no transposing there and back.

    The class is shown stacks under its own names. That is the same model only if its rule then
    does the same to every other tensor: some rules do nothing where they find their own names.
    """
    experts = {name for name in made.tensors if _is_of_experts(made, name)}
    computed = any(isinstance(made.tensors[name], ComputedBySanitize) for name in experts)
    places = {match[1] for name in experts if (match := _OWN.fullmatch(name))}
    if not computed or len(places) != 1:
        return made
    own = replace(Form(form.words, place=f"{{layer}}{places.pop()}"), in_turns=form.in_turns)
    try:
        direct = mlx_lm_layout(config, tensors, adapt=reader.adapter(own), **options)
    except LayoutError:
        return made
    others = {name: x for name, x in made.tensors.items() if name not in experts}
    same = others == {name: x for name, x in direct.tensors.items() if name not in experts}
    infos = {name: made.tensors[name].info for name in experts}
    same &= infos == {name: direct.tensors[name].info for name in direct.tensors if name in experts}
    return direct if same else made


def _is_of_experts(made: MlxLmLayout, name: str) -> bool:
    return has_experts(made.tensors[name].inputs)
