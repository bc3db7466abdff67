"""The names, shapes and choice of layers that an MLX library gives a checkpoint, without its data.

mlx-lm renames, stacks, splits and shifts tensors in ``Model.sanitize``. Its own converter runs
on a checkpoint without data (``conversion_trace``), ``sanitize`` on placeholders (``tracer``), so
that each tensor of the result is known to be bytes of the source, moved, or to be computed;
then it is computed alone, by ``sanitize`` itself, from its own inputs.
"""
