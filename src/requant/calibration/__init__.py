"""``requant calibrate``: what the inputs of a model's layers look like on a text.

``run`` is the door: it cuts the text into windows, takes the model through them and writes the
file. ``blocks`` runs a model of mlx-lm block by block, so that one block's weights are in memory;
``collecting`` watches the layers. Needs mlx-lm.
"""

from requant.calibration.run import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
