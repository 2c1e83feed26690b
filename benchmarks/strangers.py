"""Architectures that no other benchmark and no test knows, as a stranger would give them: classes with their defaults,
but small, and the inputs alone (no labels, caches as they come)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo._case import Case, image_batch
from benchmarks.zoo._torchvision import define_missing_operators

__all__ = ["CASES"]

# timm's name: (image size, options of timm.create_model)
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "botnet26t_256": (64, {"img_size": 64}),
    "caformer_s18": (64, {}),
    "convnext_zepto_rms": (64, {}),
    "crossvit_tiny_240": (240, {}),
    "cspdarknet53": (64, {}),
    "davit_tiny": (64, {"depths": (1, 1, 1, 1)}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (64, {"img_size": 64}),
    "ese_vovnet19b_slim_dw": (64, {}),
    "fasternet_t0": (64, {}),
    "focalnet_tiny_srf": (64, {}),
    "gcvit_xxtiny": (64, {"img_size": 64}),
    "halonet26t": (128, {}),
    "hgnetv2_b0": (64, {}),
    "inception_resnet_v2": (96, {}),
    "lambda_resnet26t": (64, {"img_size": 64}),
    "mambaout_femto": (64, {"depths": (1, 1, 1, 1)}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "nest_tiny": (64, {"img_size": 64}),
    "rdnet_tiny": (64, {}),
    "repvit_m0_9": (64, {}),
    "rexnet_100": (64, {}),
    "swiftformer_xs": (64, {}),
    "tiny_vit_5m_224": (64, {"img_size": 64}),
    "tnt_s_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "visformer_tiny": (64, {"img_size": 64}),
    "volo_d1_224": (64, {"img_size": 64, "layers": (1, 1, 1, 1)}),
    "xception41": (64, {}),
}

SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TWO = {
    "vocab_size": 128, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}

# name: (class, class of its configuration, options of that, inputs)
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "big_bird": ("BigBirdForMaskedLM", "BigBirdConfig", {**SMALL, "attention_type": "original_full"}, "words"),
    "blip": ("BlipForImageTextRetrieval", "BlipConfig", {"text_config": SMALL, "vision_config": IMAGE}, "both"),
    "clip_vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", IMAGE, "images"),
    "codegen": (
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
        "words",
    ),
    "cohere": ("CohereForCausalLM", "CohereConfig", GROUPED, "words"),
    "convbert": ("ConvBertForSequenceClassification", "ConvBertConfig", {**SMALL, "embedding_size": 32}, "words"),
    "cvt": (
        "CvtForImageClassification",
        "CvtConfig",
        {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 1, 2]},
        "images64",
    ),
    "deberta": (
        "DebertaForSequenceClassification",
        "DebertaConfig",
        {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        "words",
    ),
    "deberta_v3": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {
            **SMALL,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 16,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
        "words",
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
        "words",
    ),
    "falcon_multi_query": (
        "FalconForCausalLM",
        "FalconConfig",
        {**SMALL, "multi_query": True, "new_decoder_architecture": False},
        "words",
    ),
    "falcon_grouped": (
        "FalconForCausalLM",
        "FalconConfig",
        {**SMALL, "num_kv_heads": 2, "new_decoder_architecture": True},
        "words",
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8}, "words"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 8}, "words"),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {**GROUPED, "head_dim": 8}, "words"),
    "gpt_bigcode": (
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "words",
    ),
    "gpt2_with_cache": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4},
        "words",
    ),
    "gptj": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
        "words",
    ),
    "granite": ("GraniteForCausalLM", "GraniteConfig", GROUPED, "words"),
    "layoutlm": ("LayoutLMForTokenClassification", "LayoutLMConfig", SMALL, "words"),
    "led": ("LEDForConditionalGeneration", "LEDConfig", {**TWO, "attention_window": 4}, "words"),
    "marian": ("MarianMTModel", "MarianConfig", TWO, "translation"),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": 128,
            "hidden_size": 32,
            "state_size": 8,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
        "words",
    ),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", TWO, "translation"),
    "mobilebert": (
        "MobileBertForSequenceClassification",
        "MobileBertConfig",
        {**SMALL, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        "words",
    ),
    "mobilevit_hf": (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96]},
        "images64",
    ),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": 128, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        "words",
    ),
    "nystromformer": (
        "NystromformerForSequenceClassification",
        "NystromformerConfig",
        {**SMALL, "segment_means_seq_len": 16, "num_landmarks": 4},
        "words",
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED, "words"),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", TWO, "translation"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED, "words"),
    "pvt": (
        "PvtForImageClassification",
        "PvtConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 3, 4],
        },
        "images64",
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS, "words"),
    "roformer": ("RoFormerForSequenceClassification", "RoFormerConfig", SMALL, "words"),
    "rwkv": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
        "words",
    ),
    "siglip": (
        "SiglipForImageClassification",
        "SiglipConfig",
        {"text_config": SMALL, "vision_config": IMAGE},
        "images",
    ),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", GROUPED, "words"),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED, "words"),
    "swinv2_hf": (
        "Swinv2ForImageClassification",
        "Swinv2Config",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        "images",
    ),
    "t5_encoder": (
        "T5EncoderModel",
        "T5Config",
        {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        "words",
    ),
    "timesformer": ("TimesformerForVideoClassification", "TimesformerConfig", {**IMAGE, "num_frames": 2}, "video"),
    "videomae": ("VideoMAEForVideoClassification", "VideoMAEConfig", {**IMAGE, "num_frames": 4}, "video"),
    "xglm": (
        "XGLMForCausalLM",
        "XGLMConfig",
        {
            "vocab_size": 128,
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 64,
        },
        "words",
    ),
    "xlnet": (
        "XLNetForSequenceClassification",
        "XLNetConfig",
        {"vocab_size": 128, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        "words",
    ),
    "yolos": (
        "YolosForObjectDetection",
        "YolosConfig",
        {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 4},
        "images",
    ),
}


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    define_missing_operators()
    import timm

    return timm.create_model(name, pretrained=False, num_classes=10, **options)


def _transformers(model: str, config: str, options: dict[str, Any]) -> nn.Module:
    define_missing_operators()
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options)).train()


def _inputs(n: int, kind: str) -> dict[str, Tensor]:
    words, images = torch.randint(3, 128, (n, 16)), torch.randn(n, 3, 32, 32)
    if kind == "both":
        return {"input_ids": words, "pixel_values": images}
    if kind == "translation":
        return {"input_ids": words, "decoder_input_ids": torch.randint(3, 128, (n, 8))}
    if kind == "video":
        return {"pixel_values": torch.randn(n, 4, 3, 32, 32)}
    if kind == "images64":
        return {"pixel_values": torch.randn(n, 3, 64, 64)}
    return {"input_ids": words} if kind == "words" else {"pixel_values": images}


CASES: tuple[Case, ...] = (
    *(
        Case(f"timm/{name}", "timm", "image", partial(_timm, name, options), image_batch(size), F.cross_entropy)
        for name, (size, options) in TIMM.items()
    ),
    *(
        Case(f"hf/{name}", "transformers", "", partial(_transformers, *entry), partial(_inputs, kind=kind), None)
        for name, (*entry, kind) in TRANSFORMERS.items()
    ),
)
"""A batch of them holds no target for those of transformers."""
