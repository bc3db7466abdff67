"""``--budget``: measures layers, then chooses bits and group size of each within a target size."""
