"""GGUF files: headers, and the config, tokenizer and names that their metadata stand for.

Files are read here up to the tensor table; the blocks themselves are the business of
``formats.gguf``.
"""
