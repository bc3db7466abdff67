"""SOURCE, as the user types it (folder, GGUF file, repository of the hub), becomes a Checkpoint."""
