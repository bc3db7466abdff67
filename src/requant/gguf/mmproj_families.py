"""Vision parts of llama.cpp (mmproj): what their tensors are called in Hugging Face's checkpoints.

The facts are those of llama.cpp's converters (ggml-org/llama.cpp conversion/*.py, gguf-py's tensor
map, tools/mtmd/legacy-models) and of its reader (tools/mtmd/clip.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# Tower and blocks of CLIP and SigLIP.
_CLIP_BLOCK = {
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}


def _clip_tops(tower: str) -> dict[str, str]:
    return {
        "v.class_embd": f"{tower}.embeddings.class_embedding",
        "v.patch_embd": f"{tower}.embeddings.patch_embedding",
        "v.position_embd": f"{tower}.embeddings.position_embedding",
        "v.pre_ln": f"{tower}.pre_layrnorm",
        "v.post_ln": f"{tower}.post_layernorm",
    }


_LLAVA_TOWER = "vision_tower.vision_model"
_IDEFICS_TOWER = "model.vision_model"
_PIXTRAL_BLOCK = {
    "ln1": "attention_norm",
    "ln2": "ffn_norm",
    "attn_q": "attention.q_proj",
    "attn_k": "attention.k_proj",
    "attn_v": "attention.v_proj",
    "attn_out": "attention.o_proj",
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
}
_INTERNVL_BLOCK = {
    "ln1": "layernorm_before",
    "ln2": "layernorm_after",
    "attn_q": "attention.q_proj",
    "attn_k": "attention.k_proj",
    "attn_v": "attention.v_proj",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "attn_out": "attention.projection_layer",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
    "ls1.weight": "lambda_1",
    "ls2.weight": "lambda_2",
}
_QWEN_BLOCK = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_q": "attn.qkv",  # three tensors of the file are one of the checkpoint
    "attn_k": "attn.qkv",
    "attn_v": "attn.qkv",
    "attn_qkv": "attn.qkv",
    "attn_out": "attn.proj",
}
_QWEN_MERGER = {"v.post_ln": "merger.ln_q", "mm.0": "merger.mlp.0", "mm.2": "merger.mlp.2"}
_QWEN_3_MERGER = {
    "v.position_embd": "pos_embed",
    "v.post_ln": "merger.norm",
    "mm.0": "merger.linear_fc1",
    "mm.2": "merger.linear_fc2",
}
# Both frames of a convolution over two: the file has one tensor for each.
_QWEN_PATCHES = {
    "v.patch_embd": "patch_embed.proj",
    "v.patch_embd.weight.1": "patch_embed.proj.weight",
}
_BELOW_LANGUAGE_MODEL = {"": "language_model."}


def _below(path: str, names: Mapping[str, str]) -> dict[str, str]:
    return {name: f"{path}.{below}" for name, below in names.items()}


@dataclass(frozen=True, kw_only=True)
class VisionFamily:
    """The multimodal model of a kind of projector.

    Attributes:
        model_type: As config.json says it.
        cls: The class in transformers.
        texts: The values of ``general.architecture`` that its language model may have.
        text_types: ``model_type`` of a language model alone -> in the config of this model, where
            that is another.
        text_starts: Start of a tensor's name in the language model alone -> in this checkpoint;
            the first that fits counts.
        block: Path of the blocks, to which their number is added.
        blocks: Part of a block in the file -> in the checkpoint. A key with ``.weight`` is for
            that tensor alone, and its value the whole name.
        tops: The same for tensors outside of blocks.
        deepstack: Path of the mergers behind some blocks, and their parts.
        ranks: Name in the checkpoint -> axes; files have other numbers of leading axes of one.
        permuted: Parts of a block whose rows are in the order of llama.cpp's rotary embedding.
        shifted: Norms to whose weight one was added.
        copies: Tensors that are rows of others -> what they are.
        stand_ins: Weights that the class has and never uses, and files leave out -> a tensor of the
            file of the same shape.
        tokens: Key of config.json -> the token that it is the number of.
        named_tokens: What the processor asks the tokenizer for -> the token.
    """

    model_type: str
    cls: str
    texts: tuple[str, ...]
    text_types: Mapping[str, str] = field(default_factory=dict)
    text_starts: Mapping[str, str] = field(default_factory=lambda: _BELOW_LANGUAGE_MODEL)
    block: str
    blocks: Mapping[str, str]
    tops: Mapping[str, str]
    deepstack: tuple[str, Mapping[str, str]] = ("", {})
    ranks: Mapping[str, int] = field(default_factory=dict)
    permuted: tuple[str, ...] = ()
    shifted: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, str]
    named_tokens: Mapping[str, str] = field(default_factory=dict)

    def text_name(self, name: str) -> str:
        """The name of a tensor of the language model in this checkpoint."""
        for start, instead in self.text_starts.items():
            if name.startswith(start):
                return instead + name.removeprefix(start)
        return name


_GEMMA_3 = VisionFamily(
    model_type="gemma3",
    cls="Gemma3ForConditionalGeneration",
    texts=("gemma3",),
    block=f"{_LLAVA_TOWER}.encoder.layers",
    blocks=_CLIP_BLOCK,
    tops={
        **_clip_tops(_LLAVA_TOWER),
        "mm.input_projection.weight": "multi_modal_projector.mm_input_projection_weight",
        "mm.soft_emb_norm": "multi_modal_projector.mm_soft_emb_norm",
    },
    shifted=("mm.soft_emb_norm.weight",),
    tokens={
        "image_token_index": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
    },
    named_tokens={
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
)
_QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_QWEN_2 = VisionFamily(
    model_type="qwen2_vl",
    cls="Qwen2VLForConditionalGeneration",
    texts=("qwen2vl",),
    text_types={"qwen2": "qwen2_vl"},
    text_starts={},
    block="visual.blocks",
    blocks={**_QWEN_BLOCK, "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
    tops=_below("visual", _QWEN_PATCHES | _QWEN_MERGER),
    tokens=_QWEN_TOKENS,
)
_QWEN_2_5 = replace(
    _QWEN_2,
    model_type="qwen2_5_vl",
    cls="Qwen2_5_VLForConditionalGeneration",
    text_types={"qwen2": "qwen2_5_vl"},
    blocks={
        **_QWEN_BLOCK,
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
)
_QWEN_3 = VisionFamily(
    model_type="qwen3_vl",
    cls="Qwen3VLForConditionalGeneration",
    texts=("qwen3vl",),
    text_types={"qwen3": "qwen3_vl_text"},
    text_starts={"model.": "model.language_model."},
    block="model.visual.blocks",
    blocks={**_QWEN_BLOCK, "ffn_up": "mlp.linear_fc1", "ffn_down": "mlp.linear_fc2"},
    tops=_below("model.visual", _QWEN_PATCHES | _QWEN_3_MERGER),
    deepstack=(
        "model.visual.deepstack_merger_list",
        {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"},
    ),
    tokens=_QWEN_TOKENS,
)
_QWEN_3_MOE = replace(
    _QWEN_3,
    model_type="qwen3_vl_moe",
    cls="Qwen3VLMoeForConditionalGeneration",
    texts=("qwen3vlmoe",),
    text_types={"qwen3_moe": "qwen3_vl_moe_text"},
)
_LLAVA = VisionFamily(
    model_type="llava",
    cls="LlavaForConditionalGeneration",
    texts=("llama",),
    block=f"{_LLAVA_TOWER}.encoder.layers",
    blocks=_CLIP_BLOCK,
    tops={
        **_clip_tops(_LLAVA_TOWER),
        "mm.0": "multi_modal_projector.linear_1",
        "mm.2": "multi_modal_projector.linear_2",
    },
    ranks={f"{_LLAVA_TOWER}.embeddings.class_embedding": 1},
    stand_ins={
        f"{_LLAVA_TOWER}.post_layernorm.{suffix}": f"v.blk.0.ln1.{suffix}"
        for suffix in ("weight", "bias")
    },
    tokens={"image_token_index": "<image>"},
)
_LLAVA_NEXT = replace(
    _LLAVA,
    model_type="llava_next",
    cls="LlavaNextForConditionalGeneration",
    tops={**_LLAVA.tops, "model.image_newline": "image_newline"},
)
_IDEFICS_3 = VisionFamily(
    model_type="idefics3",
    cls="Idefics3ForConditionalGeneration",
    texts=("llama",),
    text_starts={"model.": "model.text_model."},
    block=f"{_IDEFICS_TOWER}.encoder.layers",
    blocks=_CLIP_BLOCK,
    tops={
        **_clip_tops(_IDEFICS_TOWER),
        "mm.model.fc": "model.connector.modality_projection.proj",
    },
    tokens={"image_token_id": "<image>"},
)
_PIXTRAL_PROJECTOR = {
    "mm.1": "multi_modal_projector.linear_1",
    "mm.2": "multi_modal_projector.linear_2",
}
_PIXTRAL = VisionFamily(
    model_type="pixtral",
    cls="LlavaForConditionalGeneration",
    texts=("llama",),
    text_types={"llama": "mistral"},
    block="vision_tower.transformer.layers",
    blocks=_PIXTRAL_BLOCK,
    tops={
        "v.patch_embd": "vision_tower.patch_conv",
        "v.pre_ln": "vision_tower.ln_pre",
        **_PIXTRAL_PROJECTOR,
    },
    permuted=("attn_q", "attn_k"),
    copies={"v.token_embd.img_break": "it is the row of [IMG_BREAK] of the embeddings"},
    tokens={"image_token_index": "[IMG]"},
)
_MISTRAL_3 = replace(
    _PIXTRAL,
    model_type="mistral3",
    cls="Mistral3ForConditionalGeneration",
    texts=("llama", "mistral3"),
    tops={
        **_PIXTRAL.tops,
        "mm.input_norm": "multi_modal_projector.norm",
        "mm.patch_merger": "multi_modal_projector.patch_merger.merging_layer",
    },
)
_INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_INTERNVL = VisionFamily(
    model_type="internvl",
    cls="InternVLForConditionalGeneration",
    texts=("llama", "qwen3", "qwen3moe"),
    block="vision_tower.encoder.layer",
    blocks=_INTERNVL_BLOCK,
    tops={
        "v.class_embd": "vision_tower.embeddings.cls_token",
        "v.patch_embd": "vision_tower.embeddings.patch_embeddings.projection",
        "v.position_embd.weight": "vision_tower.embeddings.position_embeddings",
        "mm.model.mlp.0": "multi_modal_projector.layer_norm",
        "mm.model.mlp.1": "multi_modal_projector.linear_1",
        "mm.model.mlp.3": "multi_modal_projector.linear_2",
    },
    ranks={
        "vision_tower.embeddings.cls_token": 3,
        "vision_tower.embeddings.position_embeddings": 3,
    },
    tokens={"image_token_id": "<IMG_CONTEXT>"},
    named_tokens=_INTERNVL_TOKENS,
)
_INTERNVL_CHAT = VisionFamily(  # by the authors; MLX-VLM's class of the other takes no Qwen 2
    model_type="internvl_chat",
    cls="InternVLChatModel",
    texts=("qwen2",),
    block="vision_model.encoder.layers",
    blocks={
        **_QWEN_BLOCK,
        "attn_q_norm": "attn.q_norm",
        "attn_k_norm": "attn.k_norm",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
        "ls1.weight": "ls1",
        "ls2.weight": "ls2",
    },
    tops={
        "v.class_embd": "vision_model.embeddings.class_embedding",
        "v.patch_embd": "vision_model.embeddings.patch_embedding",
        "v.position_embd.weight": "vision_model.embeddings.position_embedding",
        **{f"mm.model.mlp.{number}": f"mlp1.{number}" for number in (0, 1, 3)},
    },
    ranks={
        "vision_model.embeddings.class_embedding": 3,
        "vision_model.embeddings.position_embedding": 3,
    },
    tokens={"image_token_index": "<IMG_CONTEXT>"},
    named_tokens=_INTERNVL_TOKENS,
)
_FAMILIES: Mapping[str, tuple[VisionFamily, ...]] = {
    "gemma3": (_GEMMA_3,),
    "idefics3": (_IDEFICS_3,),
    "internvl": (_INTERNVL, _INTERNVL_CHAT),
    "mlp": (_LLAVA, _LLAVA_NEXT),
    "pixtral": (_PIXTRAL, _MISTRAL_3),
    "qwen2vl_merger": (_QWEN_2,),
    "qwen2.5vl_merger": (_QWEN_2_5,),
    "qwen3vl_merger": (_QWEN_3, _QWEN_3_MOE),
}
PROJECTORS = tuple(_FAMILIES)
"""The values of ``clip.projector_type`` that are read."""
# Tensors that only the second family of a kind has.
_MARKS = {"mlp": "model.image_newline", "pixtral": "mm.patch_merger.weight"}


def families_of(projector: str, names: frozenset[str]) -> tuple[VisionFamily, ...]:
    """The families that a vision part may belong to, by its projector and names of tensors."""
    found = _FAMILIES.get(projector, ())
    mark = _MARKS.get(projector)
    if mark is None:
        return found
    return (found[1] if mark in names else found[0],)
