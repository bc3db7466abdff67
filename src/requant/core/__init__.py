"""Helpers without knowledge of models: dtypes, limits, strict JSON, files, patterns."""
