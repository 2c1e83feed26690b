"""Architectures of torchvision, on small images."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo._case import CLASSES, Case, image_batch
from benchmarks.zoo._torchvision import define_missing_operators

__all__ = ["CASES"]

# torchvision's name: (image size, options). At 40 pixels most networks end in 2 x 2, so that a batch of 1 has
# a variance for batch norm.
CLASSIFIERS: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (40, {}),
    "resnet50": (40, {}),
    "inception_v3": (96, {"aux_logits": False, "init_weights": False}),
    "squeezenet1_1": (64, {}),
    "densenet121": (64, {}),
    "mobilenet_v2": (40, {}),
    "mobilenet_v3_small": (40, {}),
    "shufflenet_v2_x0_5": (40, {}),
    "mnasnet0_5": (40, {}),
    "efficientnet_b0": (40, {}),
    "regnet_y_400mf": (40, {}),
    "convnext_tiny": (32, {}),
}


def _models() -> ModuleType:
    define_missing_operators()
    import torchvision.models

    return torchvision.models


def _build(arch: str, **options: Any) -> nn.Module:
    return _models().get_model(arch, weights=None, num_classes=CLASSES, **options)


def _build_alexnet() -> nn.Module:
    model = _build("alexnet")
    model.avgpool = nn.AdaptiveAvgPool2d(1)  # instead of 6 x 6, which makes 57 million weights
    model.classifier[1] = nn.Linear(256, 4096)
    return model


def _build_vgg() -> nn.Module:
    model = _build("vgg11")
    model.avgpool = nn.AdaptiveAvgPool2d(1)  # instead of 7 x 7, which makes 129 million weights
    model.classifier[0] = nn.Linear(512, 4096)
    return model


def _build_vit() -> nn.Module:
    return _models().VisionTransformer(
        image_size=64,
        patch_size=16,
        num_layers=3,
        num_heads=4,
        hidden_dim=96,
        mlp_dim=384,
        dropout=0.1,
        num_classes=CLASSES,
    )


def _build_swin() -> nn.Module:
    return _models().SwinTransformer(
        patch_size=[4, 4],
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        stochastic_depth_prob=0.1,
        num_classes=CLASSES,
    )


def _build_maxvit() -> nn.Module:
    return _models().MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=4,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.1,
        num_classes=CLASSES,
    )


def _segments(n: int, *, size: int) -> tuple[Tensor, ...]:
    images, _ = image_batch(size)(n)
    return images, (images.mean(1) > 0).long()


def _googlenet_loss(outputs: Any, labels: Tensor) -> Tensor:
    """The paper's loss: both auxiliary classifiers count 0.3."""
    losses = [F.cross_entropy(each, labels) for each in (outputs.logits, outputs.aux_logits1, outputs.aux_logits2)]
    return losses[0] + 0.3 * (losses[1] + losses[2])


def _segmentation_loss(outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs["out"], labels)


CASES: tuple[Case, ...] = (
    Case("alexnet", "torchvision", "image", _build_alexnet, image_batch(64), F.cross_entropy),
    Case("vgg11", "torchvision", "image", _build_vgg, image_batch(32), F.cross_entropy),
    *(
        Case(
            name,
            "torchvision",
            "image",
            build=partial(_build, **{"arch": name, **options}),
            batch=image_batch(size),
            loss=F.cross_entropy,
        )
        for name, (size, options) in CLASSIFIERS.items()
    ),
    Case("vit_small", "torchvision", "image", _build_vit, image_batch(64), F.cross_entropy),
    Case("swin_small", "torchvision", "image", _build_swin, image_batch(32), F.cross_entropy),
    Case("maxvit_small", "torchvision", "image", _build_maxvit, image_batch(64), F.cross_entropy),
    Case(
        "googlenet",
        "torchvision",
        "image",
        build=partial(_build, "googlenet", aux_logits=True, init_weights=False),
        batch=image_batch(64),
        loss=_googlenet_loss,
        note="three outputs in train mode",
    ),
    Case(
        "lraspp_mobilenet_v3",
        "torchvision",
        "image",
        build=partial(_build, "lraspp_mobilenet_v3_large", weights_backbone=None),
        batch=partial(_segments, size=64),
        loss=_segmentation_loss,
        note="segmentation, a dict of outputs",
    ),
)
