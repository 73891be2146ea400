"""Infinity's visual tokenizer: a convolutional autoencoder around binary spherical quantisation.

Modules are named as in the published ``infinity_vae_d*.pth`` files, so these load as they are.

Shapes: pictures (B, 3, H, W) in [-1, 1]; features (B, d, H / 16, W / 16).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .quantizer import Quantizer
from .scales import PIXELS_PER_TOKEN

EPS = 1e-6
HALVINGS = PIXELS_PER_TOKEN.bit_length() - 1


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Sizes; the defaults are those of ``infinity_vae_d32reg``."""

    width: int = 32
    """Bits per vector, d."""
    channels: int = 128
    """Of the convolutions at full resolution."""
    factors: tuple[int, ...] = (1, 2, 4, 4, 4)
    """Of ``channels``, per resolution from fine to coarse."""
    blocks: int = 2
    """Residual blocks per resolution of the encoder; the decoder has one more."""
    groups: int | None = None
    """Of the group norms; published models have 32, or 24 where channels ask for it."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per resolution from fine to coarse."""
        return tuple(self.channels * f for f in self.factors)


def groups_of(channels: int, groups: int | None) -> int:
    """Groups of a group norm, by the published rule if ``groups`` does not say."""
    return groups or (24 if channels % 24 == 0 and channels % 32 else 32)


class Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Norm(nn.Module):
    def __init__(self, channels: int, groups: int | None):
        super().__init__()
        self.norm = nn.GroupNorm(groups_of(channels, groups), channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int | None):
        super().__init__()
        self.norm1, self.conv1 = Norm(inputs, groups), Conv(inputs, outputs)
        self.norm2, self.conv2 = Norm(outputs, groups), Conv(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = Conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (self.nin_shortcut(x) if "nin_shortcut" in self._modules else x) + y


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv(channels, channels)
        self.conv.conv.stride, self.conv.conv.padding = (2, 2), (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution; what resizes after them comes last."""

    def __init__(self, inputs: int, outputs: int, blocks: int, groups: int | None):
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(inputs if i == 0 else outputs, outputs, groups) for i in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.block, *list(self.children())[1:]):
            x = module(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int | None):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class Encoder(nn.Module):
    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths, groups = config.widths, config.groups
        self.conv_in = Conv(3, config.channels)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[i - 1] if i else config.channels, width, config.blocks, groups)
            if i < HALVINGS:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = Norm(widths[-1], groups)
        self.conv_out = Conv(widths[-1], config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths, groups = config.widths, config.groups
        self.conv_in = Conv(config.width, widths[-1])
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[min(i + 1, len(widths) - 1)], width, config.blocks + 1, groups)
            if 1 <= i <= HALVINGS:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = Norm(widths[0], groups)
        self.conv_out = Conv(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Tokenizer(nn.Module):
    """Pictures to features and back; ``quantizer`` makes bits of features and codes of bits."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = Quantizer(config.width)
        # The published files hold the quantiser's buffer under both names.
        self.quantize = self.quantizer

    def encode(self, pictures: Tensor) -> Tensor:
        """Features in float32, before any quantisation."""
        return self.encoder(pictures).float()

    def decode(self, z: Tensor) -> Tensor:
        """Pictures in [-1, 1] of a sum of codes."""
        return self.decoder(z).clamp(-1, 1)
