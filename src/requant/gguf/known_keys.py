"""Keys that no config was made from: each is proven to change nothing, or it is an error.

What a key does is what llama.cpp's graphs do with it (ggml-org/llama.cpp src/llama-hparams.h,
src/llama-graph.cpp and src/models/). docs/formats/gguf.md has the same as a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from requant.core.reasons import Note, NoteCode
from requant.errors import MAX_PROBLEMS
from requant.gguf.settings import ADVICE, Settings

_ANY_PREFIX = ("rope.", "attention.")

# Changes nothing, whatever its value: key -> why, which a note says.
_NO_VECTOR = "how one vector is made of a text is not in config.json"
_IMAGES = "it is for images, and the file holds the language model"
_NO_WINDOWS = "no block has a window"
_NOTED = {
    "attention.layer_norm_epsilon": "norms of this architecture are RMS norms",
    "classifier.output_labels": "labels are not in config.json",
    "classifier.pooling_type": _NO_VECTOR,
    "decoder_start_token_id": "there is no decoder next to an encoder",
    "deepstack_mapping": _IMAGES,
    "n_deepstack_layers": _IMAGES,
    "num_deepstack_layers": _IMAGES,
    "pooling_type": _NO_VECTOR,
    "rope.scaling.finetuned": "it says how the model was trained",
    "tensor_data_layout": "rows have the order of this architecture",
    "vocab_size": "the embeddings give it",
}
# Of these no note is needed, since every file of an architecture has them.
_USUAL = {
    "qwen2vl": ("rope.dimension_sections",),
    "qwen3vl": ("rope.dimension_sections", "n_deepstack_layers"),
    "qwen3vlmoe": ("rope.dimension_sections", "n_deepstack_layers"),
}
# Off at zero, false or nothing: what other architectures have, and these have not.
_OFF_AT_ZERO_LINES = """
    activation.situ_beta activation.situ_linear_beta activation_sparsity_scale adapters.count
    adapters.lora_rank adapters.router_gain adapters.token_ids_activate
    adapters.token_ids_substitute altup.active_idx altup.num_inputs attention.clamp_kqv
    attention.compress_ratios attention.compress_rope_freq_base attention.decay_lora_rank
    attention.gate_lora_rank attention.group_norm_epsilon attention.group_norm_groups
    attention.iclr_lora_rank attention.indexer.block_size attention.indexer.head_count
    attention.indexer.key_length attention.indexer.kpool attention.indexer.local_blocks
    attention.indexer.top_k attention.indexer.types attention.key_length_mla
    attention.key_length_mla_swa attention.kv_lora_rank attention.kv_lora_rank_swa
    attention.max_alibi_bias attention.output_group_count attention.output_lora_rank
    attention.output_scale attention.q_lora_rank attention.recurrent_layers
    attention.relative_buckets_count attention.scale attention.shared_kv_layers
    attention.sliding_window attention.temperature_length attention.temperature_scale
    attention.value_length_mla attention.value_length_mla_swa
    attention.value_residual_mix_lora_rank attention.value_scale attn_logit_softcapping
    attn_res.block_size block_size conv_group_size conv_kernel_size convnext.block_count
    convnext.embedding_length decoder_block_count dense_2_feat_in dense_2_feat_out
    dense_3_feat_in dense_3_feat_out diffusion.shift_logits embedding_length_out
    embedding_length_per_layer_input embedding_scale expert_chunk_feed_forward_length
    expert_count expert_feed_forward_length expert_gating_func expert_group_count
    expert_group_scale expert_group_used_count expert_latent_length expert_shared_count
    expert_shared_feed_forward_length expert_used_count expert_weights_scale experts_per_group
    features_length final_logit_softcapping full_attention_interval hash_layer_count
    hrm.h_cycles hrm.l_cycles hrm.layers_per_stack hrm.prefix_lm hyper_connection.count
    hyper_connection.epsilon hyper_connection.low_rank hyper_connection.magnitude
    hyper_connection.sinkhorn_iterations interleave_moe_layer_step kda.head_dim kda.safe_gate
    leading_dense_block_count logit_scale moe_every_n_layers moe_latent_size
    n_deepstack_layers nextn_predict_layers norm_before_fc norm_before_residual num_loops
    ple.conv_kernel ple.heads_per_ngram ple.layers ple.ngram_size pooling_type posnet.block_count
    posnet.embedding_length
    rescale_every_n_layers residual_scale rope.dimension_sections rope.scale_linear
    rope.scaling.alpha rope.scaling.factor rope.scaling.yarn_ext_factor
    rope.scaling.yarn_log_multiplier router_logit_softcapping selector_rank selector_top_k
    shortconv.l_cache skip_loop_final_norm ssm.conv_kernel ssm.dt_b_c_rms ssm.group_count
    ssm.inner_size ssm.state_size ssm.time_step_rank swiglu_clamp_exp swiglu_clamp_shexp
    swin_norm target_hidden_size target_layers time_decay_extra_dim time_mix_extra_dim
    token_shift_count use_parallel_residual wkv.head_size xielu.alpha_n xielu.alpha_p
    xielu.beta xielu.eps
"""
_OFF_AT_ZERO = frozenset(_OFF_AT_ZERO_LINES.split())
# Further values that change nothing, whatever the architecture.
_NEUTRAL: Mapping[str, Sequence[float | bool]] = {
    **dict.fromkeys(("attention.causal", "attention.rope_pattern"), (True,)),
    **dict.fromkeys(("expert_group_count", "expert_group_used_count", "num_loops"), (1,)),
    **dict.fromkeys(("full_attention_interval", "interleave_moe_layer_step"), (1,)),
    **dict.fromkeys(("moe_every_n_layers", "embedding_scale", "expert_group_scale"), (1,)),
    **dict.fromkeys(("expert_weights_scale", "logit_scale", "residual_scale"), (1,)),
    **dict.fromkeys(("rope.scale_linear", "rope.scaling.alpha", "rope.scaling.factor"), (1,)),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"), (1,)),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
}
_SOFTMAX, _SIGMOID, _SOFTMAX_OF_CHOSEN = 1, 2, 3
# The softmax of the chosen experts alone is that of all, divided by the sum of the chosen.
_NORMED = {
    "expert_gating_func": (_SOFTMAX, _SOFTMAX_OF_CHOSEN),
    "expert_weights_norm": (True,),
}
# What a class computes whatever config.json says: model_type -> key -> the values that say so.
_OWN: Mapping[str, Mapping[str, Sequence[float | bool]]] = {
    "granite": {"rope.scaling.finetuned": (True,), "expert_weights_norm": (False,)},
    "mixtral": {"expert_gating_func": (_SOFTMAX,), "expert_weights_norm": (True,)},
    "qwen2_moe": {"expert_gating_func": (_SOFTMAX,), "expert_weights_norm": (False,)},
    "qwen3_moe": {"expert_gating_func": (_SOFTMAX,)},
    "qwen3_5_moe": {"expert_gating_func": (_SOFTMAX,), "expert_weights_norm": (True,)},
    "deepseek_v2": {"expert_gating_func": (_SOFTMAX,), "expert_weights_norm": (False,)},
    "deepseek_v3": {"expert_gating_func": (_SIGMOID,)},
    "glm4_moe_lite": {"expert_gating_func": (_SIGMOID,)},
    "glm4_moe": {"expert_gating_func": (_SIGMOID,)},
    "lfm2_moe": {"expert_gating_func": (_SIGMOID,), "expert_weights_norm": (True,)},
    "minimax_m2": {"expert_gating_func": (_SIGMOID,), "expert_weights_norm": (True,)},
    "nemotron_h": {"expert_gating_func": (_SIGMOID,)},
    "granitemoe": _NORMED,
    "granitemoehybrid": _NORMED,
    "gemma4_text": _NORMED,
    "gpt_oss": {"expert_gating_func": (_SOFTMAX_OF_CHOSEN,), "expert_weights_norm": (True, False)},
}
_WITHOUT_EXPERTS: Mapping[str, Sequence[float | bool]] = {"expert_weights_norm": (False,)}
_OF_SCALINGS = {  # without these scalings of positions
    "rope.scaling.original_context_length": "only YaRN and longrope count from it",
    "rope.scaling.yarn_beta_fast": "there is no YaRN",
    "rope.scaling.yarn_beta_slow": "there is no YaRN",
    "rope.scaling.yarn_log_multiplier": "there is no YaRN",
}
_OF_WINDOWS = (
    *("attention.sliding_window_pattern", "attention.key_length_swa"),
    *("attention.value_length_swa", "rope.dimension_count_swa", "rope.freq_base_swa"),
)


def report_unread(settings: Settings, config: Mapping[str, Any]) -> None:
    """Make an error of every key that nothing was made from and that may change the computation.

    ``config`` was made from ``settings``, which knows the keys that were read.
    """
    metadata = settings.metadata
    ignored = []
    for key, value in metadata.values.items():
        mine = key.startswith(settings.prefix)
        if key in metadata.read or not (mine or key.startswith(_ANY_PREFIX)):
            continue
        if len(metadata.problems) >= MAX_PROBLEMS:
            break
        name = key.removeprefix(settings.prefix)
        if name in _USUAL.get(metadata.architecture, ()):
            continue
        if _changes_nothing(name, value, settings, config):
            continue
        why = _why_harmless(name, value, config)
        if why:
            ignored.append(f"{key} ({why})")
            continue
        verb = "changes" if name in _KNOWN else "is not known here and may change"
        metadata.report(
            key,
            f"is {metadata.shown(key)}: that {verb} what the model computes, and config.json of "
            f"model_type '{config['model_type']}' has no place for it; {ADVICE}",
        )
    if ignored:
        text = f"Nothing is made of {', '.join(ignored)}."
        settings.notes.append(Note(NoteCode.IGNORED_METADATA, text))


def _why_harmless(name: str, value: object, config: Mapping[str, Any]) -> str:
    """The reason why a key changes nothing in this model, "" if it may."""
    if name == "rope.dimension_sections":  # of time, height and width: one number in a text
        is_three = isinstance(value, np.ndarray) and not value[3:].any()
        return _IMAGES if is_three else ""
    if name == "rope.scaling.finetuned" and config["model_type"] == "granite":
        return ""  # its files turn positions off by that
    has_windows = config.get("sliding_window") and config["model_type"] != "phi3"
    if name in _OF_WINDOWS and not has_windows:
        return _NO_WINDOWS
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if name in _OF_SCALINGS and rope.get("type") not in ("yarn", "longrope"):
        return _OF_SCALINGS[name]
    return _NOTED.get(name, "")


def _changes_nothing(
    name: str, value: object, settings: Settings, config: Mapping[str, Any]
) -> bool:
    """Whether a value says what is so without it."""
    items = _items(value)
    if items is None:
        return False
    own = _OWN.get(config["model_type"], _WITHOUT_EXPERTS)
    neutral = [*_NEUTRAL.get(name, ()), *own.get(name, ())]
    if name in _OFF_AT_ZERO:
        neutral.append(0)
    equal = _same_as(name, settings, config)
    if equal is not None:
        neutral.append(equal)
    # Equal but for what float32 rounds.
    return all(any(abs(item - x) <= 1e-5 * abs(x) for x in neutral) for item in items)


def _same_as(name: str, settings: Settings, config: Mapping[str, Any]) -> float | None:
    """The value that config.json or the tensors have without a key."""
    if name == "expert_shared_feed_forward_length":
        return settings.width("ffn_up_shexp.weight")
    if name == "expert_shared_count":
        return 1 if settings.width("ffn_up_shexp.weight") else None
    if name == "expert_feed_forward_length":
        return settings.stored_expert_width or None
    if name == "attention.scale":
        return float(config["head_dim"] ** -0.5) if "head_dim" in config else None
    if name == "attention.temperature_length":
        rope = config.get("rope_parameters", {})
        return float(rope.get("original_max_position_embeddings", 0))
    same = config.get(_SAME.get(name, ""))
    return None if same is None else float(same)


_SAME = {
    **dict.fromkeys(("attention.value_length", "attention.value_length_swa"), "head_dim"),
    **dict.fromkeys(("rope.dimension_count", "rope.dimension_count_swa"), "head_dim"),
    "attention.key_length_swa": "head_dim",
    "embedding_length_out": "hidden_size",
    "rope.freq_base_swa": "rope_theta",
    "vocab_size": "vocab_size",
}
_KNOWN = {
    *(*_OFF_AT_ZERO, *_NEUTRAL, *_NOTED, *_OF_SCALINGS, *_OF_WINDOWS, *_SAME),
    *("expert_weights_norm",),
}


def _items(value: object) -> list[Any] | None:
    """The numbers of a value, none of an empty one; None where it is not a number."""
    if isinstance(value, np.ndarray):
        return list(np.unique(value).tolist())
    if isinstance(value, (bool, int, float)):
        return [value]
    return [] if value in ("", ()) else None
