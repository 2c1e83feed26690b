"""Architectures of timm, on small images; where an architecture is deep, a shallow sibling of it."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import nn

from benchmarks.zoo._case import CLASSES, Case, image_batch
from benchmarks.zoo._torchvision import define_missing_operators

__all__ = ["CASES"]

# name: (timm's name, image size, options of timm.create_model)
CLASSIFIERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    # convolutions
    "convnextv2": ("convnextv2_atto", 32, {}),
    "dla34": ("dla34", 64, {}),
    "dpn48b": ("dpn48b", 40, {}),
    "ghostnet": ("ghostnet_100", 32, {}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "inception_next": ("inception_next_atto", 64, {}),
    "mobilenetv4": ("mobilenetv4_conv_small", 64, {}),
    "nf_regnet": ("nf_regnet_b0", 64, {}),
    "eca_nfnet": ("eca_nfnet_l0", 64, {}),
    "repvgg": ("repvgg_a0", 40, {}),
    "resnest14d": ("resnest14d", 32, {}),
    "sknet": ("skresnet18", 32, {}),
    "res2net": ("res2net50_14w_8s", 32, {}),
    "starnet": ("starnet_s1", 64, {}),
    # attention
    "beit": ("beit_base_patch16_224", 64, {"img_size": 64, "embed_dim": 96, "depth": 3, "num_heads": 4}),
    "cait": ("cait_xxs24_224", 64, {"img_size": 64, "embed_dim": 96, "depth": 3, "num_heads": 4}),
    "coat": ("coat_lite_tiny", 64, {"img_size": 64}),
    "convit": ("convit_tiny", 64, {"img_size": 64, "depth": 3, "local_up_to_layer": 2}),
    "deit": ("deit_tiny_patch16_224", 64, {"img_size": 64, "depth": 3}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", 64, {"img_size": 64, "depth": 3}),
    "eva02": ("eva02_tiny_patch14_224", 56, {"img_size": 56, "depth": 3}),
    "hiera": ("hiera_tiny_224", 224, {"stages": (1, 1, 1, 1), "embed_dim": 32}),
    "pit": ("pit_ti_224", 64, {"img_size": 64, "depth": (1, 1, 1)}),
    "pvt_v2": ("pvt_v2_b0", 64, {}),
    "swinv2": (
        "swinv2_tiny_window8_256",
        64,
        {"img_size": 64, "embed_dim": 32, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4},
    ),
    "twins": ("twins_svt_small", 64, {"img_size": 64, "depths": (1, 1, 2, 1)}),
    "xcit": ("xcit_nano_12_p16_224", 64, {"img_size": 64, "embed_dim": 64, "depth": 3}),
    # convolutions and attention
    "coatnet": (
        "coatnet_nano_rw_224",
        64,
        {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 96)},
    ),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "fastvit": ("fastvit_t8", 64, {}),
    "levit": ("levit_128s", 64, {"img_size": 64}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "mobilevitv2": ("mobilevitv2_050", 64, {}),
    # pooling, recurrence
    "poolformer": ("poolformer_s12", 64, {}),
    "sequencer2d": ("sequencer2d_s", 64, {"img_size": 64, "layers": (1, 1, 1, 1)}),
}


MIXER: dict[str, Any] = {"img_size": 64, "patch_size": 16, "num_blocks": 3, "embed_dim": 96}


def _timm() -> ModuleType:
    define_missing_operators()
    import timm

    return timm


def _build(arch: str, **options: Any) -> nn.Module:
    return _timm().create_model(arch, pretrained=False, num_classes=CLASSES, **options)


# timm.create_model does not take these architectures' depths; their classes do.


def _build_convmixer() -> nn.Module:
    return _timm().models.ConvMixer(dim=64, depth=4, kernel_size=5, patch_size=4, num_classes=CLASSES)


def _build_mixer() -> nn.Module:
    return _timm().models.MlpMixer(**MIXER, num_classes=CLASSES)


def _build_gmlp() -> nn.Module:
    mixers = _timm().models.mlp_mixer
    blocks = {"block_layer": mixers.SpatialGatingBlock, "mlp_layer": mixers.GatedMlp, "mlp_ratio": 6}
    return mixers.MlpMixer(**MIXER, **blocks, num_classes=CLASSES)


def _build_resmlp() -> nn.Module:
    mixers = _timm().models.mlp_mixer
    blocks = {"block_layer": mixers.ResBlock, "norm_layer": mixers.Affine, "mlp_ratio": 4}
    return mixers.MlpMixer(**MIXER, **blocks, num_classes=CLASSES)


CASES: tuple[Case, ...] = (
    *(
        Case(
            name,
            "timm",
            "image",
            build=partial(_build, arch, **options),
            batch=image_batch(size),
            loss=F.cross_entropy,
        )
        for name, (arch, size, options) in CLASSIFIERS.items()
    ),
    Case("convmixer", "timm", "image", _build_convmixer, image_batch(32), F.cross_entropy),
    Case("mixer", "timm", "image", _build_mixer, image_batch(64), F.cross_entropy),
    Case("gmlp", "timm", "image", _build_gmlp, image_batch(64), F.cross_entropy),
    Case("resmlp", "timm", "image", _build_resmlp, image_batch(64), F.cross_entropy),
)
