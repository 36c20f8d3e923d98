"""Deeper models, on standard normal inputs: does the signal keep its size?

They are as wide as a test can bear. A layer of n random rectifiers multiplies the signal by a random factor, whose
logarithm has a variance of about 5 / n (`measure.rectifier_log_growth`): narrow deep nets leave any bounds by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from samples import Probed, Sample, normal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


def mlp(activation: Callable[[], nn.Module], depth: int = 8, width: int = 512, inputs: int = 128) -> nn.Sequential:
    widths = [inputs] + [width] * depth
    hidden = [module for i, o in zip(widths, widths[1:], strict=False) for module in (nn.Linear(i, o), activation())]
    return nn.Sequential(*hidden, nn.Linear(width, 128))


def weight_normed(depth: int = 6, width: int = 512) -> nn.Sequential:
    model = mlp(nn.ReLU, depth, width)
    for module in model:
        if isinstance(module, nn.Linear):
            parametrizations.weight_norm(module)
    return model


def cnn(padding_mode: str) -> nn.Sequential:
    """Plain, strided, grouped, depthwise, pointwise and transposed convolutions."""

    def conv(inputs: int, outputs: int, size: int = 3, **more: Any) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, size, padding=size // 2, padding_mode=padding_mode, **more)

    return nn.Sequential(
        conv(3, 64),
        nn.ReLU(),
        conv(64, 128, stride=2),
        nn.ReLU(),
        conv(128, 256, groups=4),
        nn.ReLU(),
        conv(256, 256, groups=256),
        nn.ReLU(),
        conv(256, 128, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1),
        nn.ReLU(),
        conv(64, 64, 5),
        nn.GELU(),
        conv(64, 32),
    )


def padded(depth: int = 10, width: int = 64) -> nn.Sequential:
    """Convolutions whose signal zero padding eats away."""
    widths = [3] + [width] * depth
    pairs = zip(widths, widths[1:], strict=False)
    return nn.Sequential(*(module for i, o in pairs for module in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU())))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        conv = {"padding": 1, "padding_mode": "circular", "bias": False}
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride=stride, **conv), norm(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, **conv), norm(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(F.relu(x))))))


class ResNet(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, padding_mode="circular")
        sizes = [(width, width, 1), (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)]
        self.blocks = nn.Sequential(*(Block(*size, norm=norm) for size in sizes))
        self.head = nn.Linear(2 * width, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.blocks(self.stem(x))).mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self, norm_first: bool, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(24, width), nn.Linear(width, 64)
        # Each layer drawn anew: copies of one layer are no random net.
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=norm_first)
                for _ in range(layers)
            )
        )
        self.norm = nn.LayerNorm(width) if norm_first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.stem(x))))


class LSTMStack(nn.Module):
    def __init__(self, width: int = 96, layers: int = 3) -> None:
        super().__init__()
        sizes = [24] + [width] * layers
        pairs = zip(sizes, sizes[1:], strict=False)
        self.layers = nn.ModuleList(nn.LSTM(i, o, batch_first=True) for i, o in pairs)
        self.head = nn.Linear(width, 64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x)


class UNet(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, padding_mode="circular")

        self.enter, self.down1 = conv(3, width), conv(width, 2 * width, 2)
        self.down2, self.middle = conv(2 * width, 4 * width, 2), conv(4 * width, 4 * width)
        self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join1, self.up2 = conv(4 * width, 2 * width), nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join2, self.head = conv(2 * width, width), nn.Conv2d(width, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        top = F.relu(self.enter(x))
        half = F.relu(self.down1(top))
        low = F.relu(self.middle(F.relu(self.down2(half))))
        x = F.relu(self.join1(torch.cat([half, self.up1(low)], 1)))
        return self.head(F.relu(self.join2(torch.cat([top, self.up2(x)], 1))))


class MixerBlock(Probed):
    """An MLP over the tokens and one over the channels, both raw parameters in einsum."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.token_in = nn.Parameter(torch.empty(tokens, 2 * tokens).normal_())
        self.token_out = nn.Parameter(torch.empty(2 * tokens, tokens).normal_())
        self.channel_in = nn.Parameter(torch.empty(2, channels, channels).normal_())
        self.channel_out = nn.Parameter(torch.empty(2, channels, channels).normal_())

    def forward(self, x: Tensor) -> Tensor:
        h = self.probe("token_in", torch.einsum("btc,th->bhc", self.norms[0](x), self.token_in))
        x = x + self.probe("token_out", torch.einsum("bhc,ht->btc", F.gelu(h), self.token_out))
        h = self.probe("channel_in", torch.einsum("btc,gcd->btgd", self.norms[1](x), self.channel_in))
        return x + self.probe("channel_out", torch.einsum("btgd,gdc->btc", F.gelu(h), self.channel_out))


class Mixer(nn.Module):
    def __init__(self, tokens: int = 32, channels: int = 48, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(24, channels)
        self.blocks = nn.Sequential(*(MixerBlock(tokens, channels) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))))


IMAGES = normal(8, 3, 16, 16)
TOKENS = normal(8, 32, 24)

DEEP: dict[str, Sample] = {
    "mlp_relu": Sample(lambda: mlp(nn.ReLU), normal(64, 128)),
    "mlp_gelu": Sample(lambda: mlp(nn.GELU), normal(64, 128)),
    "mlp_tanh": Sample(lambda: mlp(nn.Tanh), normal(64, 128)),
    "cnn_circular": Sample(lambda: cnn("circular"), IMAGES),
    "cnn_zeros": Sample(lambda: cnn("zeros"), IMAGES),
    "cnn_zeros_deep": Sample(padded, normal(16, 3, 8, 8)),
    "resnet": Sample(lambda: ResNet(lambda width: nn.Identity()), IMAGES),
    "resnet_normed": Sample(lambda: ResNet(nn.BatchNorm2d), IMAGES),
    "encoder_pre": Sample(lambda: Encoder(norm_first=True), TOKENS),
    "encoder_post": Sample(lambda: Encoder(norm_first=False), TOKENS),
    "lstm_stack": Sample(LSTMStack, TOKENS),
    "unet": Sample(UNet, IMAGES),
    "mixer": Sample(Mixer, TOKENS),
    "weight_normed": Sample(weight_normed, normal(64, 128)),
}


class DeepRectifier(nn.Module):
    """`depth` layers of Linear and ReLU, and a head; `body` gives the signal behind the last rectifier."""

    def __init__(self, width: int, depth: int = 30) -> None:
        super().__init__()
        self.body = mlp(nn.ReLU, depth, width, inputs=width)[:-1]
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))
