"""``requant calibrate``: statistics of the inputs of a model's layers over a text.

``block_run`` takes the model through the text block by block, so that one block's weights are in
memory at a time; ``collector`` observes the layers; ``text_model`` finds the part of a model that
reads text. Needs mlx-lm.
"""
