"""Nets that look at images: convolutional, deep and shallow, with and without norm; generators."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from clinic import Built, must, scenario
from nets import HE, Residual, Task, adam, adamw, classifier, digits, regressor, scaled, sgd
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def conv(inputs: int, outputs: int, stride: int = 1, norm: bool = True) -> nn.Sequential:
    """Convolution, norm and ReLU (in place)."""
    parts: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not norm)]
    parts += [nn.BatchNorm2d(outputs)] if norm else []
    return nn.Sequential(*parts, nn.ReLU(inplace=True))


def pooled(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


@scenario("CNN with BatchNorm", 100, chain=r"net\.\d", units={r"net\.[0-3]\.1": "relu"})
def cnn() -> Built:
    body = [conv(1, 16), conv(16, 16), conv(16, 32, 2), conv(32, 32)]
    return classifier(nn.Sequential(*body, *pooled(32)), sgd(0.1, momentum=0.9)), digits(100, image=True)


@scenario("VGG-like, 10 convolutions with BatchNorm", 50, chain=r"net\.\d+", units={r"net\.\d\.1": "relu"})
def vgg() -> Built:
    body = [conv(1, 16), *(conv(16, 16) for _ in range(4)), conv(16, 24, 2), *(conv(24, 24) for _ in range(4))]
    return classifier(nn.Sequential(*body, *pooled(24)), adam(1e-3)), digits(50, image=True)


@scenario(
    "30 convolutions without norm, torch's default",
    40,
    chain=r"net\.\d+",
    must=(must("vanishing_gradients", by=50),),
    allow=("stalled_loss", "stalled_layers", "dead_units"),
)
def cnn_deep() -> Built:
    body = [conv(1, 8, norm=False), *(conv(8, 8, norm=False) for _ in range(29))]
    return classifier(nn.Sequential(*body, *pooled(8)), adam(1e-3)), digits(40, batch=32, image=True)


@scenario(
    "30 convolutions without norm, He x 1.6",
    25,
    chain=r"net\.\d+",
    must=(must("exploding_gradients", by=20), must("exploding_activations", by=20)),
    allow=("loss_spike", "oversized_updates", "dead_units"),
)
def cnn_explodes() -> Built:
    body = [conv(1, 12, norm=False), *(conv(12, 12, norm=False) for _ in range(29))]
    net = scaled(nn.Sequential(*body, *pooled(12)), 1.6 * HE)
    return classifier(net, adam(1e-5)), digits(25, batch=32, image=True)


class Basic(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


@scenario("ResNet with BatchNorm, 8 blocks", 50, chain=r"net\.\d+", units={r"net\.\d\.bn1": "relu"})
def resnet() -> Built:
    body = [Basic(16, 16) for _ in range(3)] + [Basic(16, 24, 2)] + [Basic(24, 24) for _ in range(4)]
    return classifier(nn.Sequential(conv(1, 16), *body, *pooled(24)), sgd(0.1, momentum=0.9)), digits(50, image=True)


class Checkpointed(nn.Module):
    """Recomputes the activations of its body in the backward pass."""

    def __init__(self, body: list[nn.Module], head: list[nn.Module]) -> None:
        super().__init__()
        self.body = nn.ModuleList(body)
        self.head = nn.Sequential(*head)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.body:
            x = checkpoint(part, x, use_reentrant=False)
        return self.head(x)


@scenario("gradient checkpointing", 80, units={r"net\.body\.\d\.0": "relu"})
def checkpointed() -> Built:
    body: list[nn.Module] = [conv(1, 16, norm=False), conv(16, 16, norm=False), conv(16, 24, 2, norm=False)]
    return classifier(Checkpointed(body, pooled(24)), adam(3e-3)), digits(80, image=True)


class Dense(nn.Module):
    """Every convolution reads all that came before it."""

    def __init__(self, growth: int = 8, layers: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, growth, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(growth * n), nn.ReLU(), nn.Conv2d(growth * n, growth, 3, padding=1, bias=False)
            )
            for n in range(1, layers + 1)
        )
        self.head = nn.Linear(growth * (layers + 1), 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(torch.cat(features, 1).mean((2, 3)))


@scenario("DenseNet-like", 60, units={r"net\.layers\.\d\.0": "relu"})
def densenet() -> Built:
    return classifier(Dense(), adam(3e-3)), digits(60, image=True)


class UNet(nn.Module):
    """Down to 2x2 and up again, with skips."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down1, self.down2 = conv(1, width), conv(width, 2 * width, 2)
        self.bottom = conv(2 * width, 2 * width, 2)
        self.up1 = nn.ConvTranspose2d(2 * width, 2 * width, 2, 2)
        self.merge1 = conv(4 * width, width)
        self.up2 = nn.ConvTranspose2d(width, width, 2, 2)
        self.merge2 = conv(2 * width, width)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(first)
        x = self.merge1(torch.cat([self.up1(self.bottom(second)), second], 1))
        return self.out(self.merge2(torch.cat([self.up2(x), first], 1)))


@scenario("U-Net that removes noise", 60, units={r"net\.(down1|down2|bottom|merge1|merge2)\.1": "relu"})
def unet() -> Built:
    data = [(x + 0.5 * torch.randn_like(x), x) for x, _ in digits(60, batch=32, image=True)]
    return regressor(UNet(), adam(3e-3)), data


class ConvNeXt(nn.Module):
    """Depthwise convolution, LayerNorm, a wide GELU layer, and a scale that starts near zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.depthwise(x).movedim(1, -1))
        return x + (self.gamma * self.narrow(functional.gelu(self.wide(inner)))).movedim(-1, 1)


@scenario("ConvNeXt-like", 60, chain=r"net\.\d")
def convnext() -> Built:
    body = [nn.Conv2d(1, 24, 2, 2), *(ConvNeXt(24) for _ in range(4))]
    return classifier(nn.Sequential(*body, *pooled(24)), adamw(4e-3)), digits(60, image=True)


@scenario("residual convolutions with GroupNorm", 60, chain=r"net\.\d")
def groupnorm() -> Built:
    def branch() -> nn.Module:
        return nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1))

    body = [nn.Conv2d(1, 16, 3, padding=1), *(Residual(branch()) for _ in range(6))]
    return classifier(nn.Sequential(*body, *pooled(16)), adam(2e-3)), digits(60, image=True)


@scenario("autoencoder", 150, chain=r"net\.\d", units={r"net\.[04]": "relu"})
def autoencoder() -> Built:
    net = nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 12), nn.Linear(12, 48), nn.Identity(), nn.ReLU(), nn.Linear(48, 64)
    )
    return regressor(net, adam(2e-3)), [(x, x) for x, _ in digits(150)]


class VAE(nn.Module):
    """Gives the image again and what it costs to say which."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        drawn = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(-1).mean()
        return self.decoder(drawn), divergence


def evidence(output: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    return 0.5 * (output[0] - x).square().sum(-1).mean() + output[1]


@scenario("VAE", 150, units={r"net\.(encoder|decoder)\.0": "relu"})
def vae() -> Built:
    return Task(VAE(), evidence, adam(2e-3)), [(x, x) for x, _ in digits(150)]


class GAN(pl.LightningModule):
    """Two nets with an optimizer each, which take turns by hand.

    Args:
        saturating: The generator minimises log(1 - D(G(z))), which is flat where the critic is sure.
        ahead: Steps of the critic for each of the generator.
        rates: Of the generator and the critic.
        by_hand: Its backward passes are not Lightning's; the losses are logged.
    """

    def __init__(
        self,
        saturating: bool = False,
        ahead: int = 1,
        rates: tuple[float, float] = (1e-3, 1e-3),
        by_hand: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.saturating, self.ahead, self.rates, self.by_hand = saturating, ahead, rates, by_hand
        self.generator = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 2))
        self.critic = nn.Sequential(
            nn.Linear(2, 48), nn.LeakyReLU(0.2), nn.Linear(48, 48), nn.LeakyReLU(0.2), nn.Linear(48, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0]
        ours, theirs = self.optimizers()
        fake = self.generator(torch.randn(len(real), 8))
        self.toggle_optimizer(theirs)
        for _ in range(self.ahead):
            loss = functional.softplus(-self.critic(real)).mean()
            loss = loss + functional.softplus(self.critic(fake.detach())).mean()
            self._step(theirs, "d_loss", loss)
        self.untoggle_optimizer(theirs)
        self.toggle_optimizer(ours)
        scores = self.critic(fake)
        loss = -functional.softplus(scores).mean() if self.saturating else functional.softplus(-scores).mean()
        self._step(ours, "g_loss", loss)
        self.untoggle_optimizer(ours)

    def _step(self, optimizer: Any, name: str, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.given = loss.item()  # for the twin
        if self.by_hand:
            loss.backward()
        else:
            self.manual_backward(loss)
        optimizer.step()
        self.log(name, loss)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        nets = zip((self.generator, self.critic), self.rates, strict=True)
        return [torch.optim.Adam(net.parameters(), lr=rate, betas=(0.5, 0.999)) for net, rate in nets]


def _ring(batches: int, far: float = 0.0) -> list[Any]:
    """Points on a ring, so far from where generators begin."""
    angle = 2 * torch.pi * torch.rand(batches, 64)
    ring = torch.stack([angle.cos() + far, angle.sin()], -1) + 0.05 * torch.randn(batches, 64, 2)
    return [(points, 0) for points in ring]


FED = {r"generator\.[02]": "relu"}


@scenario("GAN with manual optimization", 300, units=FED, falls=None)
def gan() -> Built:
    return GAN(), _ring(150)


@scenario(
    "GAN whose critic is far ahead, saturating loss",
    540,
    must=(must("vanishing_gradients", layers=r"generator\.\d"),),
    allow=("loss_spike",),
)
def gan_dies() -> Built:
    return GAN(saturating=True, ahead=5, rates=(2e-4, 1e-2)), _ring(90, far=4.0)


@scenario("GAN whose critic is ahead, non-saturating loss", 540, units=FED, falls=None)
def gan_lives() -> Built:
    return GAN(ahead=5, rates=(1e-3, 3e-3)), _ring(90, far=4.0)


@scenario(
    "GAN that steps by loss.backward(), saturating loss",
    540,
    must=(must("vanishing_gradients", layers=r"generator\.\d"),),
    allow=("loss_spike",),
)
def gan_by_hand_dies() -> Built:
    return GAN(saturating=True, ahead=5, rates=(2e-4, 1e-2), by_hand=True), _ring(90, far=4.0)
