"""The output folder: staging, journal, shards, record, and the rename that publishes it."""
