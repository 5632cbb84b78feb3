"""D of the NeuralTalk2 baseline: GoogLeNet (Szegedy et al., "Going Deeper with Convolutions", CVPR 2015).

With batch normalisation behind every convolution and without the auxiliary classifiers, as torchvision publishes it:
modules are named as there, and the third branch's convolution is 3x3 as there where the paper has 5x5, so that its
weights load as they are (`mdnet_dist.pretrained`).

Shapes: B images, C channels, h x w map positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mdnet_dist.config import GoogLeNetImageModel

MODULES: dict[str, tuple[int, ...]] = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "maxpool3": (3,),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "maxpool4": (2,),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}
"""Behind the stem: six widths of an inception module (1x1; 3x3 reduced, 3x3; 5x5 reduced, 5x5; pooled) as in the
paper's Table 1, or the side of a pooling window."""


class Convolution(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, side: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, side, stride, side // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        return torch.relu_(self.bn(self.conv(x)))


class Inception(nn.Module):
    """Four branches side by side, their outputs concatenated."""

    def __init__(self, channels_in: int, widths: tuple[int, ...]) -> None:
        """Args: widths: a value of `MODULES`."""
        super().__init__()
        one, reduced_three, three, reduced_five, five, pooled = widths
        self.branch1 = Convolution(channels_in, one)
        self.branch2 = nn.Sequential(Convolution(channels_in, reduced_three), Convolution(reduced_three, three, 3))
        self.branch3 = nn.Sequential(Convolution(channels_in, reduced_five), Convolution(reduced_five, five, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), Convolution(channels_in, pooled))
        self.channels = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h, w)."""
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    """Images in, the map that the class maps and the language model read out; 1/32 of the image's side."""

    def __init__(self, config: GoogLeNetImageModel) -> None:
        super().__init__()

        def wide(channels: int) -> int:
            return max(4, 4 * round(channels * config.width / 4))

        self.conv1 = Convolution(3, wide(64), 7, 2)
        self.maxpool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = Convolution(wide(64), wide(64))
        self.conv3 = Convolution(wide(64), wide(192), 3)
        self.maxpool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        channels = wide(192)
        for name, widths in MODULES.items():
            if len(widths) == 1:
                self.add_module(name, nn.MaxPool2d(widths[0], 2, ceil_mode=True))
            else:
                inception = Inception(channels, tuple(map(wide, widths)))
                self.add_module(name, inception)
                channels = inception.channels
        self.channels = channels
        """C, of the map."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images -> the map (B, C, h, w), not negative."""
        x = images
        for module in self.children():
            x = module(x)
        return x
