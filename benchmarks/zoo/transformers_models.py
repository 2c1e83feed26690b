"""Architectures of transformers: tiny configurations, random weights; the models return their own loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo._case import CLASSES, Case
from benchmarks.zoo._torchvision import define_missing_operators
from benchmarks.zoo.lora import add_lora

__all__ = ["CASES"]

VOCABULARY = 512
LENGTH = 32
PAD = 0
SPECIAL = 3  # the first tokens (padding, start, end) are never drawn as text

# For every model. Keys and values kept for generation are of no use in training, and no graph returns them.
TRAINING: dict[str, Any] = {"num_labels": CLASSES, "use_cache": False}
# What most configurations call the same.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SEGFORMER: dict[str, Any] = {
    "hidden_sizes": [16, 32, 64, 96],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 4, 4],
}
SPEECH: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 8, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 32,
    # Both draw from NumPy or skip layers by a coin: different work in every step.
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
CLIP: dict[str, Any] = {
    "text_config": {**SIZES, "projection_dim": 32},
    "vision_config": {**IMAGE, "projection_dim": 32},
    "projection_dim": 32,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
}
WHISPER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_mel_bins": 16,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_source_positions": 32,
    "max_target_positions": 32,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def _words(n: int) -> Tensor:
    return torch.randint(SPECIAL, VOCABULARY, (n, LENGTH))


def _padded_words(n: int) -> dict[str, Tensor]:
    """Sequences of different lengths, padded at the end: ``input_ids`` and ``attention_mask``, int64."""
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (n, 1))
    lengths[0] = LENGTH // 2  # without any padding, transformers may choose another attention kernel
    mask = (torch.arange(LENGTH) < lengths).long()
    return {"input_ids": _words(n) * mask + PAD * (1 - mask), "attention_mask": mask}


def _classify_text(n: int) -> dict[str, Tensor]:
    return {**_padded_words(n), "labels": torch.randint(CLASSES, (n,))}


def _classify_tokens(n: int) -> dict[str, Tensor]:
    batch = _padded_words(n)
    return {
        **batch,
        "labels": torch.randint(CLASSES, (n, LENGTH)).masked_fill(batch["attention_mask"] == 0, -100),
    }


def _answer_span(n: int) -> dict[str, Tensor]:
    starts = torch.randint(LENGTH // 4, (n,))
    return {**_padded_words(n), "start_positions": starts, "end_positions": starts + 3}


def _masked_words(n: int) -> dict[str, Tensor]:
    batch = _padded_words(n)
    hidden = (torch.rand(n, LENGTH) < 0.2) & (batch["attention_mask"] == 1)
    labels = batch["input_ids"].masked_fill(~hidden, -100)
    labels[:, 0] = batch["input_ids"][:, 0]  # never a batch without a target, whose mean loss is NaN
    return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, SPECIAL), "labels": labels}


def _next_word(n: int) -> dict[str, Tensor]:
    words = _words(n)
    return {"input_ids": words, "labels": words.clone()}


def _next_word_padded(n: int) -> dict[str, Tensor]:
    batch = _padded_words(n)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def _translate(n: int) -> dict[str, Tensor]:
    return {**_padded_words(n), "labels": _words(n)[:, : LENGTH // 2].clone()}


def _classify_images(n: int, *, size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, size, size), "labels": torch.randint(CLASSES, (n,))}


def _images(n: int, *, size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, size, size)}


def _segment_images(n: int, *, size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, size, size), "labels": torch.randint(CLASSES, (n, size, size))}


def _match_images(n: int, *, size: int) -> dict[str, Tensor]:
    words = _words(n)
    words[:, -1] = 2  # CLIP reads the text at its end token
    return {"input_ids": words, **_images(n, size=size)}


def _classify_waveforms(n: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(n, 4000), "labels": torch.randint(CLASSES, (n,))}


def _transcribe_waveforms(n: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(n, 4000), "labels": torch.randint(1, 32, (n, 8))}


def _classify_spectrograms(n: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(n, 64, 32), "labels": torch.randint(CLASSES, (n,))}


def _transcribe_spectrograms(n: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(n, 16, 64), "labels": torch.randint(SPECIAL, VOCABULARY, (n, 12))}


def _classify_features(n: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(n, 16, 64), "labels": torch.randint(CLASSES, (n,))}


def _forecast(n: int) -> dict[str, Tensor]:
    return {"past_values": torch.randn(n, 64, 4), "future_values": torch.randn(n, 16, 4)}


def _build(model: str, config: str, options: dict[str, Any], forward: dict[str, Any] | None = None) -> nn.Module:
    define_missing_operators()
    import transformers

    built = getattr(transformers, model)(getattr(transformers, config)(**{**TRAINING, **options})).train()
    return _WithArguments(built, forward) if forward else built


class _WithArguments(nn.Module):
    """A model that is always called with the same additional keyword arguments."""

    def __init__(self, model: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.arguments = arguments

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch, **self.arguments)


def _build_lora(layers: tuple[str, ...], trained: tuple[str, ...], *args: Any) -> nn.Module:
    return add_lora(_build(*args), layers, trained=trained)


Batch = Callable[[int], dict[str, Tensor]]
Entry = tuple[str, str, Batch, dict[str, Any]]

# name: (model class, config class, batch, options of the config)
TEXT: dict[str, Entry] = {
    # encoders
    "bert": ("BertForSequenceClassification", "BertConfig", _classify_text, SIZES),
    "bert_mlm": ("BertForMaskedLM", "BertConfig", _masked_words, SIZES),
    "bert_tagger": ("BertForTokenClassification", "BertConfig", _classify_tokens, SIZES),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _classify_text, SIZES),
    "roberta_qa": ("RobertaForQuestionAnswering", "RobertaConfig", _answer_span, {**SIZES, "num_labels": 2}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        _classify_text,
        {"vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    ),
    "albert": (
        "AlbertForSequenceClassification",
        "AlbertConfig",
        _classify_text,
        {**SIZES, "embedding_size": 32, "num_hidden_layers": 4},
    ),
    "electra": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        _classify_text,
        {**SIZES, "embedding_size": 32},
    ),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", _classify_text, SIZES),
    "modernbert": ("ModernBertForSequenceClassification", "ModernBertConfig", _classify_text, SIZES),
    "fnet": ("FNetForMaskedLM", "FNetConfig", _next_word, SIZES),
    "squeezebert": (
        "SqueezeBertForSequenceClassification",
        "SqueezeBertConfig",
        _classify_text,
        {**SIZES, "embedding_size": 64},
    ),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        _classify_text,
        {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    ),
    # decoders
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        _next_word,
        GPT2,
    ),
    "gpt2_classifier": (
        "GPT2ForSequenceClassification",
        "GPT2Config",
        _classify_text,
        {**GPT2, "pad_token_id": PAD},
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        _next_word,
        {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _next_word, SIZES),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _next_word, {**SIZES, "num_key_value_heads": 2}),
    "mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        _next_word_padded,
        {**SIZES, "num_key_value_heads": 2, "sliding_window": 16},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        _next_word_padded,
        {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        _next_word,
        {**SIZES, "num_key_value_heads": 2, "head_dim": 16},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _next_word,
        {**SIZES, "num_key_value_heads": 2, "head_dim": 16},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", _next_word, SIZES),
    "falcon": ("FalconForCausalLM", "FalconConfig", _next_word, SIZES),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        _next_word,
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", _next_word, {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        _next_word,
        {"vocab_size": VOCABULARY, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        _next_word,
        {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4},
    ),
    # encoder and decoder
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        _translate,
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": PAD,
        },
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        _translate,
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 64,
        },
    ),
}

IMAGES: dict[str, Entry] = {
    "hf_vit": ("ViTForImageClassification", "ViTConfig", partial(_classify_images, size=64), IMAGE),
    "hf_beit": ("BeitForImageClassification", "BeitConfig", partial(_classify_images, size=64), IMAGE),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", partial(_classify_images, size=64), IMAGE),
    "hf_swin": (
        "SwinForImageClassification",
        "SwinConfig",
        partial(_classify_images, size=32),
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    "hf_convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        partial(_classify_images, size=64),
        {"hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 2, 1]},
    ),
    "segformer": (
        "SegformerForImageClassification",
        "SegformerConfig",
        partial(_classify_images, size=64),
        SEGFORMER,
    ),
    "segformer_segmentation": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        partial(_segment_images, size=64),
        {**SEGFORMER, "decoder_hidden_size": 64},
    ),
    "vit_mae": (
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        partial(_images, size=64),
        {
            **IMAGE,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 64,
        },
    ),
}

AUDIO: dict[str, Entry] = {
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", _classify_waveforms, SPEECH),
    "wav2vec2_ctc": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        _transcribe_waveforms,
        {**SPEECH, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True},
    ),
    "hubert": ("HubertForSequenceClassification", "HubertConfig", _classify_waveforms, SPEECH),
    "wavlm": ("WavLMForSequenceClassification", "WavLMConfig", _classify_waveforms, SPEECH),
    "audio_spectrogram_transformer": (
        "ASTForAudioClassification",
        "ASTConfig",
        _classify_spectrograms,
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_length": 64,
            "num_mel_bins": 32,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _transcribe_spectrograms,
        WHISPER,
    ),
    "whisper_classifier": ("WhisperForAudioClassification", "WhisperConfig", _classify_features, WHISPER),
}

SEQUENCES: dict[str, Entry] = {
    "patchtst": (
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        _forecast,
        {
            "num_input_channels": 4,
            "context_length": 64,
            "prediction_length": 16,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "loss": "mse",
        },
    ),
    "patchtsmixer": (
        "PatchTSMixerForPrediction",
        "PatchTSMixerConfig",
        _forecast,
        {
            "num_input_channels": 4,
            "context_length": 64,
            "prediction_length": 16,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 16,
            "num_layers": 2,
        },
    ),
}

# Frozen models with adapters: (layers with adapters, modules trained as a whole, case adapted)
ADAPTED: dict[str, tuple[tuple[str, ...], tuple[str, ...], str, str]] = {
    "gpt2_lora": (("c_attn", "c_proj"), (), "gpt2", "text"),
    "llama_lora": (("q_proj", "v_proj"), (), "llama", "text"),
    "vit_lora": (("q_proj", "v_proj"), ("classifier",), "hf_vit", "image"),
}

NOTES: dict[str, str] = {
    "fnet": "FFT; two weights of the pooler get no gradient",
    "dinov2": "the mask token gets no gradient",
    "wav2vec2": "the mask embedding gets no gradient",
    "hubert": "the mask embedding gets no gradient",
    "wavlm": "the mask embedding gets no gradient",
    "clip": "its loss takes len() of the batch: the graph holds for one batch size",
    "vit_mae": "random masking in the forward pass",
}
"""What there is to know about some of them, by name."""

NEVER_CAPTURED: dict[str, str] = {
    "deberta_v2": "its loss asks how many labels are not negative",
    "wav2vec2_ctc": "its loss asks for the largest label",
}
"""Those whose forward pass depends on the values in the batch, by name, with the reason."""

_TABLES = {"text": TEXT, "image": IMAGES, "audio": AUDIO, "sequence": SEQUENCES}
_ENTRIES = {name: entry for table in _TABLES.values() for name, entry in table.items()}


def _case(name: str, modality: str, build: Callable[[], nn.Module], batch: Batch) -> Case:
    note = NEVER_CAPTURED.get(name) or NOTES.get(name, "")
    return Case(name, "transformers", modality, build, batch, None, captures=name not in NEVER_CAPTURED, note=note)


CASES: tuple[Case, ...] = (
    *(
        _case(name, modality, partial(_build, model, config, options), batch)
        for modality, table in _TABLES.items()
        for name, (model, config, batch, options) in table.items()
    ),
    _case(
        "clip",
        "image",
        partial(_build, "CLIPModel", "CLIPConfig", CLIP, {"return_loss": True}),
        partial(_match_images, size=64),
    ),
    *(
        _case(
            name,
            modality,
            partial(_build_lora, layers, trained, _ENTRIES[base][0], _ENTRIES[base][1], _ENTRIES[base][3]),
            _ENTRIES[base][2],
        )
        for name, (layers, trained, base, modality) in ADAPTED.items()
    ),
)
