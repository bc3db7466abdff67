"""The functions of ``requant.__all__`` that run a conversion or read its result."""
