"""Architectures of `timm` by its own names: classifiers of images of 64 x 64, the wide ones with fewer channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from zoo.architecture import Architecture

CLASSES = 10


def _classifier(
    name: str, size: int = 64, daily: bool = False, build: Callable[[], nn.Module] | None = None, **options: Any
) -> Architecture:
    def model() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, **options)

    def batch() -> tuple[Any, Any]:
        return (torch.randn(4, 3, size, size),), torch.arange(4)

    return Architecture(f"timm/{name}", "vision", build or model, batch, nn.functional.cross_entropy, daily)


# --- where the registered names fix the widths ---


def _mvit() -> nn.Module:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    return MultiScaleVit(MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=48), img_size=(64, 64), num_classes=CLASSES)


def _volo() -> nn.Module:
    from timm.models.volo import VOLO

    widths, heads = (48, 96, 96, 96), (2, 4, 4, 4)
    return VOLO((1, 1, 2, 1), img_size=64, num_classes=CLASSES, embed_dims=widths, num_heads=heads, mlp_ratio=3.0)


def _poolformer() -> nn.Module:
    from timm.models.metaformer import GroupNorm1, MetaFormer

    return MetaFormer(
        depths=(1, 1, 2, 1),
        dims=(32, 64, 96, 128),
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
        num_classes=CLASSES,
    )


def _repvgg() -> nn.Module:
    from timm.models.byobnet import ByobNet, model_cfgs

    blocks = tuple(dataclasses.replace(block, d=1, c=max(block.c // 8, 16)) for block in model_cfgs["repvgg_a0"].blocks)
    return ByobNet(dataclasses.replace(model_cfgs["repvgg_a0"], blocks=blocks, stem_chs=16), num_classes=CLASSES)


_SMALL = {"img_size": 64}
_VIT = {"img_size": 64, "embed_dim": 96, "depth": 6, "num_heads": 3}

_STAGES = {"depths": (1, 1, 2, 1), "embed_dim": 48, "img_size": 64}

ARCHITECTURES = (
    _classifier("resnet10t", channels=(16, 32, 48, 64), daily=True),  # the last norm of each branch begins at 0
    _classifier("resnet50", channels=(16, 32, 48, 64), layers=(1, 2, 2, 1)),
    _classifier("resnetv2_50", channels=(32, 64, 96, 128), layers=(1, 2, 2, 1)),
    _classifier("skresnet18", channels=(16, 32, 48, 64)),
    _classifier("resnest14d", channels=(16, 32, 48, 64)),
    _classifier("res2net50_14w_8s", layers=(1, 1, 1, 1), channels=(16, 32, 48, 64)),
    _classifier("repvgg", build=_repvgg),
    _classifier("mvitv2", build=_mvit),
    _classifier("volo", build=_volo),
    _classifier("poolformer", build=_poolformer),
    _classifier("test_efficientnet"),
    _classifier("dpn48b", k_sec=(1, 2, 2, 1)),
    _classifier("xcit_nano_12_p16_224", depth=4, img_size=64),
    replace(_classifier("convit_tiny", depth=4, img_size=64), uncovered="cls_token"),  # joins after the last of four
    _classifier("vit_tiny_patch16_224", depth=6, img_size=64),
    _classifier("deit_tiny_distilled_patch16_224", depth=6, img_size=64),
    _classifier("eva02_tiny_patch14_224", depth=4, size=56, img_size=56),
    _classifier("mambaout_femto", depths=(1, 1, 2, 1)),
    _classifier("regnetx_002"),
    _classifier("regnety_002"),
    _classifier("densenet121", block_config=(2, 2, 2, 2)),
    _classifier("dla46_c"),
    _classifier("inception_next_atto"),
    _classifier("test_nfnet"),
    _classifier("convnext_atto", daily=True),
    _classifier("convnextv2_atto"),
    _classifier("mobilenetv2_050"),
    _classifier("mobilenetv3_small_050"),
    _classifier("mobilenetv4_conv_small"),
    _classifier("tinynet_e"),
    _classifier("lcnet_050"),
    _classifier("rexnet_100"),
    _classifier("ghostnet_050"),
    _classifier("hgnetv2_b0"),
    _classifier("starnet_s1"),
    _classifier("mobilevit_xxs"),
    _classifier("edgenext_xx_small"),
    _classifier("swiftformer_xs"),
    _classifier("shvit_s1"),
    _classifier("vit_relpos_small_patch16_224", **_VIT),
    _classifier("deit3_small_patch16_224", **_VIT),
    _classifier("beit_base_patch16_224", **_VIT),
    _classifier("cait_xxs24_224", **_VIT),
    _classifier("pit_ti_224", **_SMALL),
    _classifier("levit_128s", **_SMALL),
    _classifier("gmlp_ti16_224", **_SMALL),  # gates of almost 0
    _classifier("swin_tiny_patch4_window7_224", **_STAGES),
    _classifier("swinv2_tiny_window8_256", **_STAGES),
    _classifier("swinv2_cr_tiny_ns_224", **_STAGES),
    _classifier("test_maxvit", **_SMALL),
    _classifier("pvt_v2_b0"),
    _classifier("twins_svt_small", embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4), depths=(1, 1, 2, 1), **_SMALL),
    _classifier("hiera_tiny_224", stages=(1, 1, 2, 1), embed_dim=48, **_SMALL),
)
