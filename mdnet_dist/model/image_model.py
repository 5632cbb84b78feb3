"""D, the image model: a pre-activation residual network with ensemble connections (docs/design.md section 1).

In a residual network the classifier sees the sum of all units' outputs through one weight vector. Where a unit
concatenates instead, its output reaches the classifier through weights of its own. `concat_depth` says how many units
at the start of each stage do so: 0 is the pre-activation ResNet, 1 is EcNet as its authors released it.

Shapes: B images, C channels, h x w map positions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mdnet_dist.config import CifarImageModel, MedicalImageModel

Padding = Literal["zeros", "reflect"]


class Unit(nn.Module):
    """A pre-activation bottleneck unit F: BN-ReLU-1x1 (stride here), BN-ReLU-3x3, BN-ReLU-1x1.

    With `concatenate` it is an ensemble connection, y' = [F(y), y], else a residual one, y' = F(y) + y. The first unit
    of a stage changes the shape, so there W y, a 1x1 projection, stands for y.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        stride: int,
        *,
        concatenate: bool,
        project: bool,
        padding: Padding = "zeros",
    ) -> None:
        """Args: channels_out: of F; its bottleneck is a quarter of that."""
        super().__init__()
        bottleneck = channels_out // 4
        self.concatenate = concatenate
        self.residual = nn.Sequential(
            nn.BatchNorm2d(channels_in),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels_in, bottleneck, 1, stride, bias=False),
            nn.BatchNorm2d(bottleneck),
            nn.ReLU(inplace=True),
            nn.Conv2d(bottleneck, bottleneck, 3, 1, 1, bias=False, padding_mode=padding),
            nn.BatchNorm2d(bottleneck),
            nn.ReLU(inplace=True),
            nn.Conv2d(bottleneck, channels_out, 1, bias=False),
        )
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False) if project else nn.Identity()

    def forward(self, y: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        if self.concatenate:
            return torch.cat([self.residual(y), self.shortcut(y)], 1)
        return self.residual(y) + self.shortcut(y)


def build_stage(
    channels_in: int, channels: int, units: int, stride: int, concat_depth: int | str, padding: Padding = "zeros"
) -> tuple[nn.Sequential, int]:
    """One stage of units at the same resolution.

    Args:
        channels: nOut, what each concatenated unit adds. The stage is 2 nOut wide at concat_depth 0 and 1; each further
            concatenated unit makes it nOut wider.
        concat_depth: how many units at its start concatenate; "full" or more than `units`: all.
        padding: of the 3x3 convolutions, "zeros" or "reflect".

    Returns:
        the stage and its channels out.
    """
    concatenated = units if concat_depth == "full" else min(int(concat_depth), units)
    stage: list[Unit] = []
    width = channels_in
    for index in range(units):
        first, concatenate = index == 0, index < concatenated
        if concatenate:
            of_unit, width_out = channels, 2 * channels if first else width + channels
        else:
            of_unit = width_out = 2 * channels if first else width
        stage.append(
            Unit(width, of_unit, stride if first else 1, concatenate=concatenate, project=first, padding=padding)
        )
        width = width_out
    return nn.Sequential(*stage), width


class ImageModel(nn.Module):
    """Stem, stages, and the last BN-ReLU: images in, the map that the class maps and the attention read out."""

    def __init__(self, config: MedicalImageModel | CifarImageModel) -> None:
        super().__init__()
        padding: Padding = "zeros"
        if isinstance(config, CifarImageModel):
            units = [(config.depth - 2) // 9] * 3
            channels, strides = [16 * config.widening, 32 * config.widening, 64 * config.widening // 2], [1, 2, 2]
            width = 16
            self.stem: nn.Module = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        else:
            units, channels, strides = config.units_per_stage, config.stage_channels, list(config.stage_strides)
            width, padding = config.stem_channels, config.padding
            # The stem needs no BN-ReLU of its own: every unit begins with one.
            self.stem = nn.Sequential(
                nn.Conv2d(3, width, 7, 2, 3, bias=False, padding_mode=padding), nn.MaxPool2d(3, 2, 1)
            )
        stages = []
        for nout, count, stride in zip(channels, units, strides):
            stage, width = build_stage(width, nout, count, stride, config.concat_depth, padding)
            stages.append(stage)
        self.stages = nn.Sequential(*stages)
        self.last = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.channels = width
        """C, of the map."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images -> the map (B, C, h, w), not negative."""
        return self.last(self.stages(self.stem(images)))
