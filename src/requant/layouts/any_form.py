"""A library's layout of a checkpoint whose experts may have another form than its class loads.

First the class is given the checkpoint as it is stored. If it does not load that, the experts are
converted to each form of ``expert_forms`` in turn, until the class loads all tensors strictly. Its
rule then works on every tensor, the others (norms, convolutions) included.
"""

from __future__ import annotations

import re
from dataclasses import replace

from requant.layouts.conversion_trace import Shown
from requant.layouts.expert_forms import Form, Reader, has_experts, words_for
from requant.layouts.layout import LibraryLayout, library_layout
from requant.layouts.outputs import ComputedByRule
from requant.libraries import LayoutError, Library, Request


def layout_in_any_form(
    library: Library, shown: Shown, request: Request
) -> tuple[LibraryLayout, str]:
    """Return the result of ``library_layout`` with the experts in a form that the class loads.

    Returns:
        The layout, and how the experts were converted; "" where they were not.

    Raises:
        UnknownModelError: The library is not installed or has no class for the model.
        LayoutError: The class loads no form; the message is about the checkpoint as stored.
    """
    try:
        return library_layout(library, shown, request), ""
    except LayoutError as error:
        if not error.class_names or not has_experts(shown.tensors.keys()):
            raise
        reader = Reader.of(shown.config)
        for form in reader.forms(error.class_names, shown.tensors.keys()):
            try:
                layout = library_layout(library, shown, request, reader.adapter(form))
            except LayoutError:
                continue
            words = words_for(shown.tensors.keys())
            done = f"the source has {words}, its class takes {form.words}"
            return _moved(layout, reader, form, shown, request), done
        raise


_OWN = re.compile(r".+?\.\d+\.(.+)\.(gate_proj|up_proj|down_proj)\.weight")


def _moved(
    layout: LibraryLayout, reader: Reader, form: Form, shown: Shown, request: Request
) -> LibraryLayout:
    """The layout with experts whose rows are moved instead of transposed there and back.

    The class is given stacks under its own names. That is the same model only if its rule then
    does the same to every other tensor: some rules do nothing where they find their own names.
    """
    experts = {name for name, x in layout.tensors.items() if has_experts(x.inputs)}
    computed = any(isinstance(layout.tensors[name], ComputedByRule) for name in experts)
    places = {match[1] for name in experts if (match := _OWN.fullmatch(name))}
    if not computed or len(places) != 1:
        return layout
    own = replace(Form(form.words, place=f"{{layer}}{places.pop()}"), in_turns=form.in_turns)
    try:
        direct = library_layout(layout.library, shown, request, reader.adapter(own))
    except LayoutError:
        return layout
    # Of the experts dtypes and shapes must be the same, of the others also how they are made.
    ours, theirs = (
        {name: x.info if name in experts else x for name, x in one.tensors.items()}
        for one in (layout, direct)
    )
    return direct if ours == theirs else layout
