"""Limits on untrusted files, as listed in docs/reliability.md.

With these limits any file is read or rejected in seconds and in bounded memory. Real checkpoints
stay far below all of them.
"""

from __future__ import annotations

# -- safetensors headers ---------------------------------------------------------------
MAX_HEADER_BYTES = 100_000_000  # as the safetensors package
MAX_TENSORS = 1 << 18  # in one file
MAX_NAME_CHARS = 1024  # of a tensor
MAX_RANK = 32
MAX_INT = 2**63 - 1  # offsets and elements
MAX_EMPTY_AXES = 1 << 24  # product of the other axes of a tensor with an axis of 0

# -- GGUF headers ----------------------------------------------------------------------
MAX_GGUF_HEADER_BYTES = 128 << 20  # everything before the data
MAX_GGUF_KEYS = 1 << 16
MAX_GGUF_ITEMS = 1 << 22  # of all arrays together: tokens, scores, merges
MAX_GGUF_STRING_BYTES = 16 << 20

# -- JSON ------------------------------------------------------------------------------
MAX_CONFIG_BYTES = 16 << 20  # config.json and the files next to it that describe quantization
MAX_INDEX_BYTES = 64 << 20
MAX_JSON_VALUES = 1 << 20  # in a config or index; a header may have 16 a tensor
MAX_RECORD_BYTES = 256 << 20  # requant.json, which grows with layers and tensors
MAX_RECORD_VALUES = 1 << 22
MAX_JSON_DEPTH = 64

# -- folders ---------------------------------------------------------------------------
MAX_ENTRIES = 100_000  # files and folders below a source
MAX_SHARDS = 10_000
MAX_SMALL_TENSOR_BYTES = 1 << 30  # of one tensor that is read while planning

# -- GPTQ --------------------------------------------------------------------------------
MAX_GPTQ_INPUTS = 16_384  # of a layer; its Hessian is factored in memory, 40 bytes x inputs^2

# -- regular expressions and wildcards: lists in configs, --override, --only, recipes -------
MAX_PATTERN_CHARS = 4096
MAX_PATTERN_S = 2.0  # seconds that one pattern may take over all the names of a model
MAX_PATTERNS_S = 30.0  # and all of them together, wildcards included
