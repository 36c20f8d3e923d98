"""Segmentation nets and classifiers of MONAI."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.architecture import Architecture, Library

nets = Library("monai.networks.nets")
Batch = tuple[Any, Any]


def volume(size: int = 16, channels: int = 1, dims: int = 3, classes: int = 2) -> Batch:
    """A volume and the class of each voxel: whether the volume, smoothed, lies above 0."""
    grid = torch.randn(2, channels, *(size,) * dims)
    pool = functional.avg_pool3d if dims == 3 else functional.avg_pool2d
    smooth = pool(grid.mean(1, keepdim=True), 3, 1, 1)[:, 0]
    return (grid,), (smooth > 0).long().clamp(max=classes - 1)


def plane() -> Batch:
    return volume(32, dims=2)


def large() -> Batch:
    return volume(32)


def picture() -> Batch:
    return (torch.randn(4, 1, 32, 32),), torch.randint(0, 3, (4,))


def voxelwise(output: Any, target: Tensor) -> Tensor:
    """Cross entropy of the logits; of the first where there are several."""
    first = output[0] if isinstance(output, (list, tuple)) else output
    return functional.cross_entropy(first, target)


def unet() -> nn.Module:
    return nets.UNet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)


def basic_unet() -> nn.Module:
    return nets.BasicUNet(3, 1, 2, features=(8, 8, 16, 16, 32, 8))


def nested_unet() -> nn.Module:
    return nets.BasicUNetPlusPlus(2, 1, 2, features=(8, 8, 16, 16, 32, 8))


def attention_unet() -> nn.Module:
    return nets.AttentionUnet(2, 1, 2, channels=(8, 16, 32), strides=(2, 2))


def dynamic_unet() -> nn.Module:
    return nets.DynUNet(
        3, 1, 2, kernel_size=(3, 3, 3), strides=(1, 2, 2), upsample_kernel_size=(2, 2), filters=(8, 16, 32)
    )


def segresnet() -> nn.Module:
    return nets.SegResNet(3, init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 2), blocks_up=(1,))


def unetr() -> nn.Module:
    return nets.UNETR(1, 2, (32, 32), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=2, spatial_dims=2)


def swin_unetr() -> nn.Module:
    return nets.SwinUNETR(
        1, 2, patch_size=2, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), feature_size=12, spatial_dims=2
    )


def vnet() -> nn.Module:
    return nets.VNet(spatial_dims=2, in_channels=1, out_channels=2, dropout_prob_down=0.0, dropout_prob_up=(0.0, 0.0))


def highresnet() -> nn.Module:
    return nets.HighResNet(spatial_dims=2, in_channels=1, out_channels=2)


def flexible_unet() -> nn.Module:
    return nets.SegResNetDS(spatial_dims=2, init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 1, 2))


def densenet() -> nn.Module:
    return nets.DenseNet(2, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2, 2))


def efficientnet() -> nn.Module:
    return nets.EfficientNetBN("efficientnet-b0", pretrained=False, spatial_dims=2, in_channels=1, num_classes=3)


def vit() -> nn.Module:
    return nets.ViT(
        1,
        (32, 32),
        (8, 8),
        hidden_size=24,
        mlp_dim=48,
        num_layers=3,
        num_heads=2,
        classification=True,
        num_classes=3,
        spatial_dims=2,
    )


def autoencoder() -> nn.Module:
    return nets.AutoEncoder(2, 1, 1, channels=(8, 16), strides=(2, 2))


def reconstructed() -> Batch:
    pictures = functional.interpolate(torch.randn(4, 1, 8, 8), scale_factor=4, mode="bilinear")
    return (pictures,), pictures


ARCHITECTURES = (
    Architecture("monai/UNet", "medical", unet, volume, voxelwise),
    Architecture("monai/BasicUNet", "medical", basic_unet, large, voxelwise),
    Architecture("monai/BasicUNetPlusPlus", "medical", nested_unet, plane, voxelwise),
    Architecture("monai/AttentionUnet", "medical", attention_unet, plane, voxelwise),
    Architecture("monai/DynUNet", "medical", dynamic_unet, volume, voxelwise),
    Architecture("monai/SegResNet", "medical", segresnet, volume, voxelwise),
    Architecture("monai/SegResNetDS", "medical", flexible_unet, plane, voxelwise),
    Architecture("monai/UNETR", "medical", unetr, plane, voxelwise),
    Architecture("monai/SwinUNETR", "medical", swin_unetr, lambda: volume(64, dims=2), voxelwise),
    Architecture("monai/VNet", "medical", vnet, lambda: volume(16, dims=2), voxelwise),
    Architecture("monai/HighResNet", "medical", highresnet, plane, voxelwise),
    Architecture("monai/DenseNet", "medical", densenet, picture, functional.cross_entropy),
    Architecture("monai/EfficientNet", "medical", efficientnet, picture, functional.cross_entropy),
    Architecture("monai/ViT", "medical", vit, picture, voxelwise),
    Architecture("monai/AutoEncoder", "medical", autoencoder, reconstructed, functional.mse_loss),
)
