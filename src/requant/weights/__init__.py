"""Weight maps that are in memory already: the public functions that take and return dicts."""
