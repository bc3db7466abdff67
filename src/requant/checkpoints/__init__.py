"""What a checkpoint is, and folders with safetensors files."""
