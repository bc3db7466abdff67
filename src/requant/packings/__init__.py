"""Stored rows of a layer become MLX's words, scales and biases, or values: arrays, no files."""
