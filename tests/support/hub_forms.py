"""Checkpoints as they are published: the class's tensors, renamed and reshaped backwards.

Each entry of ``FORMS`` turns the tensors of mlx-lm's class into what the model's authors
publish; what mlx-lm then makes of them is compared with what we do. Values are random, so a
form need not be inverse to anything: only names, shapes and dtypes count.
"""

import re
from collections.abc import Callable

import mlx.core as mx

from tests.support.mlx_lm_conversion import Weights, random_like

Form = Callable[[Weights], Weights]


def unstacked(pattern: str, template: str, names: dict[str, str] | None = None) -> Form:
    """Write each stacked expert tensor as one tensor an expert.

    Args:
        pattern: Regex with groups ``pre`` (before), ``proj`` and ``part`` (after).
        template: Name of an expert's tensor, with {pre}, {e}, {proj} and {part}.
        names: ``proj`` -> how it is called in the template.
    """

    def form(weights: Weights) -> Weights:
        result: Weights = {}
        for name, array in weights.items():
            match = re.fullmatch(pattern, name)
            if match is None:
                result[name] = array
                continue
            proj = (names or {}).get(match["proj"], match["proj"])
            for e in range(array.shape[0]):
                new = template.format(e=e, pre=match["pre"], proj=proj, part=match["part"])
                result[new] = array[e]
        return result

    return form


SWITCH = r"(?P<pre>.*)\.switch_mlp\.(?P<proj>\w+)\.(?P<part>\w+)"
MLP_EXPERTS = unstacked(SWITCH, "{pre}.experts.{e}.{proj}.{part}")
BARE_EXPERTS = unstacked(
    r"(?P<pre>.*\.experts)\.(?P<proj>\w+_proj)\.(?P<part>\w+)", "{pre}.{e}.{proj}.{part}"
)
W123 = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
W_EXPERTS = unstacked(SWITCH, "{pre}.experts.{e}.{proj}.{part}", W123)


def renamed(*pairs: tuple[str, str]) -> Form:
    """Substitute regexes in every name."""

    def form(weights: Weights) -> Weights:
        result = {}
        for name, array in weights.items():
            for pattern, new in pairs:
                name = re.sub(pattern, new, name)
            result[name] = array
        return result

    return form


def reshaped(pattern: str, change: Callable[[mx.array], mx.array]) -> Form:
    """Change the tensors whose names hold ``pattern``."""

    def form(weights: Weights) -> Weights:
        return {
            name: change(array) if re.search(pattern, name) else array
            for name, array in weights.items()
        }

    return form


def added(*extras: tuple[str, tuple[int, ...]]) -> Form:
    """Tensors that the class does not have."""

    def form(weights: Weights) -> Weights:
        return weights | {name: random_like(name, shape) for name, shape in extras}

    return form


def replaced(pattern: str, *extras: tuple[str, tuple[int, ...]]) -> Form:
    """Other tensors in place of each tensor that ``pattern`` matches; its groups name them."""

    def form(weights: Weights) -> Weights:
        result: Weights = {}
        for name, array in weights.items():
            match = re.fullmatch(pattern, name)
            if match is None:
                result[name] = array
                continue
            for template, shape in extras:
                new = template.format(**match.groupdict())
                result[new] = random_like(new, shape)
        return result

    return form


def float8_blocks(pattern: str) -> Form:
    """FP8 codes (as the bytes that MLX loads them as) and a scale a block of 128 x 128."""

    def form(weights: Weights) -> Weights:
        result: Weights = {}
        for name, array in weights.items():
            if not re.search(pattern, name):
                result[name] = array
                continue
            rows, columns = array.shape
            values = random_like(name, (rows, columns), mx.float32)
            result[name] = mx.to_fp8(values * 20)
            scales = mx.abs(random_like(name + "_scale_inv", (-(-rows // 128), -(-columns // 128))))
            result[f"{name}_scale_inv"] = scales.astype(mx.float32)
        return result

    return form


def in_turn(*forms: Form) -> Form:
    """One form after the other."""

    def form(weights: Weights) -> Weights:
        for step in forms:
            weights = step(weights)
        return weights

    return form


def fused_experts(pre: str, gate_up: str, down: str, transposed: bool) -> Form:
    """Gate and up of all experts in one tensor, as recent transformers releases save them."""

    def form(weights: Weights) -> Weights:
        result: Weights = {}
        for name, array in weights.items():
            match = re.fullmatch(rf"(.*)\.{re.escape(pre)}\.(gate|up|down)_proj\.weight", name)
            if match is None:
                result[name] = array
            elif match[2] == "gate":
                experts, rows, columns = array.shape
                shape = (experts, 2 * rows, columns)
                shape = (experts, columns, 2 * rows) if transposed else shape
                result[f"{match[1]}.{gate_up}"] = random_like(name, shape)
            elif match[2] == "down":
                array = mx.contiguous(array.swapaxes(1, 2)) if transposed else array
                result[f"{match[1]}.{down}"] = array
        return result

    return form


KV_B = in_turn(
    replaced(r"(?P<pre>.*)\.embed_q\.weight", ("{pre}.kv_b_proj.weight", (4 * 64, 32))),
    replaced(r".*\.unembed_out\.weight"),
)
CONV = reshaped(r"conv_?1d\.weight|\.conv\.conv\.weight", lambda a: mx.contiguous(a.moveaxis(2, 1)))
TOWER = added(("vision_tower.blocks.0.weight", (32, 64)), ("multi_modal_projector.w", (8, 8)))

# family -> its form
FORMS: dict[str, Form] = {
    "Klear": BARE_EXPERTS,
    "afmoe": BARE_EXPERTS,
    "bailing_moe": in_turn(MLP_EXPERTS, renamed((r"\.gate\.gate_proj\.", ".gate."))),
    "dbrx": lambda w: (
        {k: v for k, v in w.items() if ".experts." not in k}
        | {
            f"transformer.blocks.{layer}.ffn.experts.mlp.{p}": random_like(
                f"{layer}{p}", (4 * 128, 128)
            )
            for layer in range(2)
            for p in ("w1", "v1", "w2")
        }
    ),
    "deepseek": MLP_EXPERTS,
    "deepseek_v2": MLP_EXPERTS,
    "deepseek_v3": in_turn(MLP_EXPERTS, KV_B),
    "dots1": BARE_EXPERTS,
    "ernie4_5_moe": in_turn(MLP_EXPERTS, added(("model.mtp_block.0.w", (4, 4)))),
    "exaone_moe": MLP_EXPERTS,
    "falcon_h1": CONV,
    "gemma3": TOWER,
    "gemma4_text": fused_experts("switch_glu", "gate_up_proj", "down_proj", False),
    "glm4_moe": in_turn(MLP_EXPERTS, added(("model.layers.2.enorm.weight", (128,)))),
    "glm4_moe_lite": in_turn(MLP_EXPERTS, KV_B),
    "gpt2": in_turn(
        reshaped(r"(c_attn|c_proj|c_fc)\.weight", lambda a: mx.contiguous(a.T)),
        renamed((r"^model\.", "")),
        added(("h.0.attn.bias", (1, 1, 8, 8))),
    ),
    "gpt_neox": in_turn(
        renamed((r"^model\.h\.", "gpt_neox.layers."), (r"^model\.", "gpt_neox.")),
        renamed((r"^gpt_neox\.embed_out", "embed_out")),
    ),
    "gpt_oss": in_turn(
        fused_experts("experts", "experts.gate_up_proj", "experts.down_proj", False),
        replaced(r"(?P<pre>.*)\.gate_proj\.bias", ("{pre}.gate_up_proj_bias", (4, 256))),
        replaced(r".*\.up_proj\.bias"),
        renamed((r"down_proj\.bias", "down_proj_bias")),
        renamed((r"experts\.down_proj$", "experts.down_proj.weight")),
        renamed((r"experts\.gate_up_proj$", "experts.gate_up_proj.weight")),
    ),
    "granitemoe": in_turn(
        fused_experts("switch_mlp", "input_linear.weight", "output_linear.weight", False)
    ),
    "hunyuan": MLP_EXPERTS,
    "jamba": in_turn(MLP_EXPERTS, CONV),
    "kimi_linear": in_turn(
        unstacked(SWITCH, "{pre}.block_sparse_moe.experts.{e}.{proj}.{part}", W123),
        renamed((r"\.mlp\.block_sparse_moe", ".block_sparse_moe")),
    ),
    "lfm2": reshaped(r"conv\.conv\.weight", lambda a: mx.contiguous(a.moveaxis(2, 1))),
    "lfm2_moe": in_turn(
        W_EXPERTS, reshaped(r"conv\.conv\.weight", lambda a: mx.contiguous(a.moveaxis(2, 1)))
    ),
    "llama4": in_turn(
        fused_experts("experts", "experts.gate_up_proj", "experts.down_proj", True),
        added(("vision_model.w.weight", (8, 8))),
    ),
    "mamba": CONV,
    "mamba2": CONV,
    "minimax": in_turn(W_EXPERTS, float8_blocks(r"self_attn\.q_proj\.weight")),
    "mixtral": W_EXPERTS,
    "nemotron_h": in_turn(
        unstacked(
            SWITCH, "{pre}.experts.{e}.{proj}.{part}", {"fc1": "up_proj", "fc2": "down_proj"}
        ),
        CONV,
    ),
    "olmoe": MLP_EXPERTS,
    "phimoe": W_EXPERTS,
    "phixtral": unstacked(
        r"(?P<pre>.*\.moe)\.switch_mlp\.(?P<proj>fc\d)\.(?P<part>\w+)",
        "{pre}.mlp.{e}.{proj}.{part}",
    ),
    "qwen2_moe": MLP_EXPERTS,
    "qwen2_vl": in_turn(
        renamed((r"^language_model\.", "")), added(("visual.patch.weight", (8, 8)))
    ),
    "qwen3_5_moe": in_turn(
        fused_experts("switch_mlp", "experts.gate_up_proj", "experts.down_proj", False),
        CONV,
        renamed((r"^language_model\.model", "model.language_model")),
        renamed((r"^language_model\.lm_head", "lm_head")),
        added(("mtp.layers.0.w", (4, 4)), ("model.visual.w", (4, 4))),
    ),
    "qwen3_moe": MLP_EXPERTS,
    "qwen3_next": in_turn(MLP_EXPERTS, CONV, added(("mtp.fc.weight", (4, 4)))),
    "qwen3_vl_moe": in_turn(
        fused_experts("switch_mlp", "experts.gate_up_proj", "experts.down_proj", True),
        renamed((r"^language_model\.model", "model.language_model")),
        renamed((r"^language_model\.lm_head", "lm_head")),
        added(("model.visual.w", (4, 4))),
    ),
    "recurrent_gemma": CONV,
    "step3p5": in_turn(
        renamed(
            (r"\.mlp\.switch_mlp\.", ".moe."),
            (r"\.mlp\.gate\.gate\.", ".moe.gate."),
            (r"\.mlp\.gate\.router_bias", ".moe.router_bias"),
            (r"\.mlp\.share_expert\.", ".share_expert."),
        )
    ),
    "apertus": reshaped(r"alpha_[pn]$", lambda a: a.reshape(1, -1)),
    "bailing_hybrid": in_turn(MLP_EXPERTS, renamed((r"\.gate\.gate_proj\.", ".gate.")), KV_B),
    "bailing_moe_linear": in_turn(MLP_EXPERTS, renamed((r"\.gate\.gate_proj\.", ".gate."))),
    "bailing_moe_v3": in_turn(MLP_EXPERTS, KV_B, CONV),
    "deepseek_v32": in_turn(MLP_EXPERTS, KV_B),
    "gemma3n": added(("model.vision_tower.w", (4, 4)), ("model.audio_tower.w", (4, 4))),
    "gemma4": in_turn(
        fused_experts("switch_glu", "gate_up_proj", "down_proj", False),
        renamed((r"^language_model\.model\.", "model.language_model.")),
        added(("model.vision_tower.w", (4, 4))),
    ),
    "glm_moe_dsa": in_turn(MLP_EXPERTS, KV_B),
    "granitemoehybrid": in_turn(
        fused_experts("switch_mlp", "input_linear.weight", "output_linear.weight", False), CONV
    ),
    "kimi_k25": in_turn(MLP_EXPERTS, KV_B, TOWER),
    "kimi_vl": in_turn(MLP_EXPERTS, TOWER),
    "laguna": in_turn(MLP_EXPERTS, renamed((r"\.gate\.proj\.", ".gate."))),
    "lfm2-vl": TOWER,
    "llama": added(("model.layers.0.self_attn.rotary_emb.inv_freq", (16,))),
    "longcat_flash": in_turn(MLP_EXPERTS, KV_B),
    "longcat_flash_ngram": in_turn(MLP_EXPERTS, KV_B),
    "mellum": MLP_EXPERTS,
    "mimo_v2_flash": in_turn(MLP_EXPERTS, added(("model.mtp.layers.0.w", (4, 4)))),
    "minimax_m3_vl": in_turn(W_EXPERTS, TOWER),
    "mistral3": in_turn(renamed((r"^language_model\.model\.", "model.language_model.")), TOWER),
    "mistral4": in_turn(
        fused_experts("switch_mlp", "experts.gate_up_proj", "experts.down_proj", False), KV_B
    ),
    "olmo_hybrid": CONV,
    "pixtral": TOWER,
    "plamo2": CONV,
    "qwen3_5": in_turn(
        CONV,
        renamed((r"^language_model\.model", "model.language_model")),
        renamed((r"^language_model\.lm_head", "lm_head")),
        added(("mtp.layers.0.w", (4, 4)), ("model.visual.w", (4, 4))),
    ),
    "qwen3_vl": in_turn(
        renamed((r"^language_model\.", "")), added(("visual.patch.weight", (8, 8)))
    ),
    "rwkv7": reshaped(r"k_k|k_a|g_norm", lambda a: a.reshape(-1)),
    "solar_open": MLP_EXPERTS,
    "spark2_5": renamed((r"^model\.embedding\.", "model.embed_tokens.")),
}
# Families whose rule computes values; all others get their bytes moved.
COMPUTED = {"dbrx", "deepseek_v3", "falcon_h1", "glm4_moe_lite", "gpt2", "llama4", "minimax"}
COMPUTED |= {"qwen3_5_moe", "qwen3_next", "qwen3_vl_moe", "step3p5", "bailing_hybrid"}
COMPUTED |= {"bailing_moe_v3", "deepseek_v32", "glm_moe_dsa", "kimi_k25", "longcat_flash"}
COMPUTED |= {"longcat_flash_ngram", "mistral4", "qwen3_5"}
