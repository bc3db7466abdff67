"""Turn any model checkpoint into Apple MLX's quantized formats and back."""
