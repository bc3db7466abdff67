"""Reasons and notes of a plan: a code for programs and a text for people.

Control flow compares codes. The texts may be reworded at any time, and contain names and numbers of
the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ReasonCode(StrEnum):
    """Codes of the reasons for the treatment of a layer."""

    # What was asked for.
    NONFINITE = "nonfinite"
    SKIPPED_BY_OVERRIDE = "skipped_by_override"
    SKIPPED_BY_RECIPE = "skipped_by_recipe"
    NOT_IN_ONLY = "not_in_only"
    ROTATION_FOLDED = "rotation_folded"
    # What the layer is.
    CONVOLUTION = "convolution"
    NORM = "norm"
    ROUTER = "router"
    POSITION_TABLE = "position_table"
    NOT_A_WEIGHT = "not_a_weight"
    UNSUPPORTED_RANK = "unsupported_rank"
    UNSUPPORTED_DTYPE = "unsupported_dtype"
    EMPTY = "empty"
    TOWER = "tower"
    TIED_EMBEDDING = "tied_embedding"
    # Which group size fits.
    NO_GROUP_SIZE = "no_group_size"
    SMALLER_GROUP_SIZE = "smaller_group_size"
    SOURCE_GROUP_SIZE = "source_group_size"
    # What mlx-lm's class does.
    UNUSED_BY_CLASS = "unused_by_class"
    DENSE_IN_CLASS = "dense_in_class"
    DENSE_BY_LIBRARY = "dense_by_library"
    REENCODED_BY_RULE = "reencoded_by_rule"
    MEMBERS_MOVED = "members_moved"
    MEMBERS_REENCODED = "members_reencoded"
    # How the source stores the layer.
    CODES_WIDENED = "codes_widened"
    NO_MLX_GROUP = "no_mlx_group"
    NO_MLX_MODE = "no_mlx_mode"
    ACT_ORDER = "act_order"
    ACT_ORDER_MOVED = "act_order_moved"
    TENSOR_SCALE = "tensor_scale"
    INPUT_SCALE_FOLDED = "input_scale_folded"
    # What the format of an export holds.
    DENSE_FOR_READERS = "dense_for_readers"
    NOT_IN_FORMAT = "not_in_format"
    # What the statistics file has.
    WITHOUT_STATISTICS = "without_statistics"
    GPTQ_SKIPPED = "gptq_skipped"
    OTHER = "other"  # of a format that another package brings


@dataclass(frozen=True, slots=True)
class Reason:
    """The reason for the treatment of a layer."""

    code: ReasonCode  # for programs
    text: str  # for people; a clause without a full stop

    def __str__(self) -> str:
        return self.text


class NoteCode(StrEnum):
    """Codes of the notes of a plan."""

    # Files of the source.
    COPIED_WEIGHTS = "copied_weights"
    MISSING_MODULE_WEIGHTS = "missing_module_weights"
    STALE_INDEX = "stale_index"
    DOWNLOAD = "download"
    # GGUF.
    UNKNOWN_ARCHITECTURE = "unknown_architecture"
    UNKNOWN_TENSOR_NAMES = "unknown_tensor_names"
    NO_TOKENIZER = "no_tokenizer"
    GUESSED_PRETOKENIZER = "guessed_pretokenizer"
    MISSING_CHAT_TEMPLATES = "missing_chat_templates"
    IGNORED_METADATA = "ignored_metadata"
    IGNORED_WINDOW = "ignored_window"
    VISION_PART = "vision_part"
    # Config and tensors of a quantized source.
    CONTRADICTING_BLOCKS = "contradicting_blocks"
    STALE_BLOCK = "stale_block"
    CONFIG_CONTRADICTED = "config_contradicted"
    QUANTIZED_THOUGH_EXCLUDED = "quantized_though_excluded"
    DENSE_THOUGH_NAMED = "dense_though_named"
    UNDECLARED_LAYERS = "undeclared_layers"
    OTHER_PREFIX = "other_prefix"
    RUNTIME_SCALES = "runtime_scales"
    FINAL_SCALES = "final_scales"
    NO_TENSOR_SCALE = "no_tensor_scale"
    ROUNDED_ACTIVATIONS = "rounded_activations"
    ACT_ORDER_MOVED = "act_order_moved"
    # A library's layout, and what it does.
    TEXT_ONLY = "text_only"
    LIBRARY_REJECTED = "library_rejected"
    LAYOUT_KEPT = "layout_kept"
    TIED_HEAD = "tied_head"
    IDLE_TENSORS = "idle_tensors"
    EXTRA_TENSORS = "extra_tensors"
    EXPERTS_IN_OTHER_FORM = "experts_in_other_form"
    REENCODED_BY_RULE = "reencoded_by_rule"
    MEMBERS_REENCODED = "members_reencoded"
    DENSE_IN_CLASS = "dense_in_class"
    # What the options come to.
    DEFAULT_TARGET = "default_target"
    UNMATCHED_PATTERN = "unmatched_pattern"
    BUDGET = "budget"
    NOTHING_QUANTIZED = "nothing_quantized"
    UNNAMED_MATRICES = "unnamed_matrices"
    TIED_EMBEDDING = "tied_embedding"
    DENSE_IN_SOURCE = "dense_in_source"
    SEARCHED = "searched"
    NOTHING_TO_SEARCH = "nothing_to_search"
    IMPORTANCE = "importance"
    WITHOUT_STATISTICS = "without_statistics"
    EXPERTS_WITHOUT_TOKENS = "experts_without_tokens"
    GPTQ = "gptq"
    GPTQ_SKIPPED = "gptq_skipped"
    # Who can load the output.
    ROTATED_INPUTS = "rotated_inputs"
    GLOBAL_SCALES = "global_scales"
    MIXED_DTYPES = "mixed_dtypes"
    EXACT_DTYPE = "exact_dtype"
    UNLOADABLE_DTYPES = "unloadable_dtypes"
    UNLOADABLE_EXPERTS = "unloadable_experts"
    MODULE_NAMES = "module_names"
    OTHER = "other"  # of a format that another package brings


@dataclass(frozen=True, slots=True)
class Note:
    """Something that the user should know about a plan."""

    code: NoteCode  # for programs
    text: str  # for people; whole sentences

    def __str__(self) -> str:
        return self.text
