"""A Plan becomes bytes: chunks of rows, on threads, within the memory limit."""
