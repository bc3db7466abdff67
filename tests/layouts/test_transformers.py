"""Small random models that transformers makes and saves; needs torch, else skipped.

transformers 5 leaves settings out of config.json that published ones have and mlx-lm's classes
demand (rope_theta and others); ``small_config`` fills them in.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from requant.quantization.config import Quantization
from tests.support.families import model_types, small_config
from tests.support.mlx_lm_conversion import compare

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

COMMON: dict[str, Any] = {
    **{"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256},
    "max_position_embeddings": 512,
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
_TIED = {"tie_word_embeddings": True}
_GROUPS = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_LATENT = _GROUPS | {
    **{"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16},
    **{"v_head_dim": 32, "head_dim": 16, "num_key_value_heads": 4},
}
OWN: dict[str, dict[str, Any]] = {
    "apertus": {},
    **{"cohere": _TIED, "cohere2": _TIED, "deepseek_v2": _LATENT, "deepseek_v3": _LATENT},
    "dots1": _GROUPS,
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16},
    "gemma": _TIED,
    "gemma2": _TIED,
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": _GROUPS,
    "gptj": {"n_embd": 128, "n_head": 4, "n_layer": 2, "n_positions": 256, "rotary_dim": 16},
    "granite": {},
    "granitemoe": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
        **{"expert_layer_offset": 1, "mamba_d_state": 16, "mamba_d_conv": 4},
        "use_mamba_kernels": False,
    },
    "llama": {},
    "mamba": {"state_size": 16, "time_step_rank": 8, "expand": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 16},
    "mixtral": {},
    "nemotron": {},
    "olmo2": {},
    "olmoe": {},
    "phi": {},
    "phi3": {},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}


@pytest.mark.parametrize("model_type", [t for t in OWN if t in model_types()])
def test_saved_by_transformers(model_type: str, tmp_path: Path):
    folder = tmp_path / "model"
    config = transformers.AutoConfig.for_model(model_type, **{**COMMON, **OWN[model_type]})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    filled = small_config(model_type)
    saved = json.loads((folder / "config.json").read_text())
    filled |= {key: value for key, value in saved.items() if value is not None or key not in filled}
    (folder / "config.json").write_text(json.dumps(filled))
    _, different = compare(folder, Quantization.affine(32, 4))
    assert different == []
