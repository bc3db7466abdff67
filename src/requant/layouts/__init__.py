"""The names, shapes and choice of layers that an MLX library gives a checkpoint, without its data.

A library renames, stacks, splits and shifts tensors before it loads them: its rule, for the most
part ``Model.sanitize``. Its own converter runs on a checkpoint without data (``conversion_trace``),
the rule on placeholders (``tracer``), so that each tensor of the result is known to be bytes of the
source, moved, or to be computed; then it is computed alone, by the rule itself, from its own
inputs.
"""
