"""Architectures of `torchvision`: boxes, masks of pixels, optical flow, video, and a few of its own classifiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architecture import Architecture


def _built(path: str, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        import torchvision

        torchvision.extension._has_ops = lambda: True  # nms is all that is needed, and `companions` has one
        make = torchvision.models
        for part in path.split("."):
            make = getattr(make, part)
        return make(*arguments, **options)

    return model


# --- boxes ---


def _detector(name: str, size: int, model: Callable[[], nn.Module], daily: bool = False) -> Architecture:
    """Gives its losses itself, from images and their boxes."""

    def batch() -> tuple[Any, Any]:
        corner = torch.rand(2, 3, 2) * size / 2
        boxes = torch.cat([corner, corner + size / 8 + torch.rand(2, 3, 2) * size / 4], -1)
        targets = [{"boxes": each, "labels": torch.tensor([1, 2, 3])} for each in boxes]
        return (list(torch.rand(2, 3, size, size)), targets), None

    def loss(outputs: dict[str, Tensor], _: None) -> Tensor:
        return torch.stack(list(outputs.values())).sum()

    return Architecture(f"torchvision/{name}", "detection", model, batch, loss, daily)


def _thin(kind: str, size: int) -> Callable[[], nn.Module]:
    """A detector on a ResNet of one block a stage and a pyramid of 64 channels."""

    def model() -> nn.Module:
        import torchvision

        torchvision.extension._has_ops = lambda: True
        models, detection = torchvision.models, torchvision.models.detection
        net = models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
        layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
        more = torchvision.ops.feature_pyramid_network.LastLevelP6P7(64, 64)
        backbone = detection.backbone_utils.BackboneWithFPN(net, layers, [128, 256, 512], 64, more)
        return getattr(detection, kind)(backbone, num_classes=4, min_size=size, max_size=size)

    return model


def _ssdlite() -> nn.Module:
    """Its images scaled to 96 instead of 320."""
    model = _built("detection.ssdlite320_mobilenet_v3_large", weights_backbone=None, num_classes=4)()
    model.transform.fixed_size = (96, 96)
    return model


# --- one number for every pixel ---


def _segmenter(name: str) -> Architecture:
    def batch() -> tuple[Any, Any]:
        return (torch.randn(2, 3, 48, 48),), torch.randint(0, 5, (2, 48, 48))

    def loss(outputs: dict[str, Tensor], classes: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs["out"], classes)

    model = _built(f"segmentation.{name}", weights_backbone=None, num_classes=5)
    return Architecture(f"torchvision/{name}", "segmentation", model, batch, loss)


def _raft() -> nn.Module:
    """The small RAFT, of fewer channels."""
    import torchvision

    raft = torchvision.models.optical_flow.raft
    block, norm = raft.BottleneckBlock, nn.InstanceNorm2d
    hidden, context = 32, 16
    motion = raft.MotionEncoder(in_channels_corr=2 * 49, corr_layers=(32,), flow_layers=(32, 16), out_channels=30)
    update = raft.UpdateBlock(
        motion_encoder=motion,
        recurrent_block=raft.RecurrentBlock(
            input_size=30 + context, hidden_size=hidden, kernel_size=((3, 3),), padding=((1, 1),)
        ),
        flow_head=raft.FlowHead(in_channels=hidden, hidden_size=32),
    )
    return raft.RAFT(
        feature_encoder=raft.FeatureEncoder(block=block, layers=(16, 16, 24, 32, 48), norm_layer=norm),
        context_encoder=raft.FeatureEncoder(block=block, layers=(16, 16, 24, 32, hidden + context), norm_layer=None),
        corr_block=raft.CorrBlock(num_levels=2, radius=3),
        update_block=update,
    )


def _frames() -> tuple[Any, Any]:
    frames = torch.rand(2, 1, 3, 64, 64) * 2 - 1
    return {"image1": frames[0], "image2": frames[1], "num_flow_updates": 3}, torch.randn(1, 2, 64, 64)


def _flow_loss(outputs: list[Tensor], flow: Tensor) -> Tensor:
    return torch.stack([0.8 ** (len(outputs) - n) * (each - flow).abs().mean() for n, each in enumerate(outputs)]).sum()


# --- classifiers ---


def _images(shape: tuple[int, ...]) -> tuple[Callable[[], Any], Callable[[Any, Any], Tensor]]:
    """A batch of four, and the loss."""

    def batch() -> tuple[Any, Any]:
        return (torch.randn(4, *shape),), torch.arange(4)

    def loss(outputs: Any, classes: Tensor) -> Tensor:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)  # GoogLeNet: and two from the middle
        return torch.stack([nn.functional.cross_entropy(each, classes) for each in outputs]).sum()

    return batch, loss


def _classifier(name: str, **options: Any) -> Architecture:
    model = _built(name, num_classes=10, **options)
    return Architecture(f"torchvision/{name}", "vision", model, *_images((3, 64, 64)))


def _vgg() -> nn.Module:
    """VGG-11 of an eighth of its channels."""
    import torchvision

    vgg = torchvision.models.vgg
    widths = [each if each == "M" else each // 4 for each in vgg.cfgs["A"]]
    model = vgg.VGG(vgg.make_layers(widths, batch_norm=True), num_classes=10, dropout=0.0)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(
        nn.Linear(128, 128), nn.ReLU(True), nn.Linear(128, 128), nn.ReLU(True), nn.Linear(128, 10)
    )
    return model


def _resnet() -> nn.Module:
    import torchvision

    resnet = torchvision.models.resnet
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, zero_init_residual=True)


def _r3d() -> nn.Module:
    import torchvision

    video = torchvision.models.video.resnet
    return video.VideoResNet(
        video.BasicBlock,
        [video.Conv3DSimple] * 4,
        [1, 1, 1, 1],
        video.BasicStem,
        num_classes=10,
        zero_init_residual=True,
    )


ARCHITECTURES = (
    _detector("retinanet", 64, _thin("RetinaNet", 64), daily=True),
    _detector("fcos", 64, _thin("FCOS", 64)),
    _detector("ssdlite", 96, _ssdlite),
    _segmenter("deeplabv3_mobilenet_v3_large"),
    _segmenter("lraspp_mobilenet_v3_large"),
    Architecture("torchvision/raft_small", "optical flow", _raft, _frames, _flow_loss, daily=True),
    _classifier("googlenet", init_weights=True, dropout=0.0, dropout_aux=0.0),
    _classifier("shufflenet_v2_x0_5"),
    _classifier("squeezenet1_1", dropout=0.0),
    _classifier("mnasnet0_5", dropout=0.0),
    Architecture("torchvision/resnet", "vision", _resnet, *_images((3, 48, 48))),
    Architecture("torchvision/vgg", "vision", _vgg, *_images((3, 64, 64))),
    Architecture("torchvision/r3d", "video", _r3d, *_images((3, 4, 16, 16))),
)
