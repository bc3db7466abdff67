"""GGUF files: headers, and the config, tokenizer and tensor names that their metadata describe.

Files are read up to the tensor table; ``packings`` and ``formats.gguf`` read the blocks.
"""
