"""A Checkpoint and options become a Plan; no tensor data is read."""
