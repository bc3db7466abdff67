"""The MLX libraries: what each can load, how it converts, and how it runs a model."""
