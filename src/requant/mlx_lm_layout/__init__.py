"""What mlx-lm makes of a checkpoint: names, shapes, choice of layers and config.

mlx-lm renames, stacks, splits and shifts tensors in ``Model.sanitize``. Its own pipeline is
run here on a checkpoint without data (``pipeline``), the rule on placeholders (``trace``), so
that for each tensor of the result we know whether it is bytes of the source, moved, or has to
be computed; then it is computed alone, by the rule itself, from its own inputs.

Importing this package needs MLX; calling it needs mlx-lm.
"""

from requant.mlx_lm_layout.any_form import layout_in_any_form
from requant.mlx_lm_layout.layout import MlxLmLayout, mlx_lm_layout

__all__ = ["MlxLmLayout", "layout_in_any_form", "mlx_lm_layout"]
