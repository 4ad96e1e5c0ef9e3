"""The network of the FID: TensorFlow's Inception-v3 of 2015-12-05, with the names of its
published PyTorch port, so that the published weights load as they are. fid.py uses it.
"""
import hashlib
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from util.cli import UserError, reason
from util.files import fetch, refuse_special

WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
WEIGHTS_SHA256 = "6726825d"                     # its first digits
WIDTH = 2048                                    # features of an image


class InceptionV3(nn.Module):
    """The FID network: uint8 [B, 1 or 3, H, W] -> float32 features [B, 2048].

    resize: how images come to 299 x 299, bilinear. "tf1" is the original's: source pixel =
    target pixel * size / 299. "pytorch" is pytorch-fid's: with half-pixel centers.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b = inception_a(192, 32)
        self.Mixed_5c = inception_a(256, 64)
        self.Mixed_5d = inception_a(288, 64)
        self.Mixed_6a = inception_b()
        self.Mixed_6b = inception_c(128)
        self.Mixed_6c = inception_c(160)
        self.Mixed_6d = inception_c(160)
        self.Mixed_6e = inception_c(192)
        self.Mixed_7a = inception_d()
        self.Mixed_7b = inception_e(1280, average_pool)
        self.Mixed_7c = inception_e(2048, max_pool)
        self.fc = nn.Linear(2048, 1008)                         # in the file, not in FID

    def forward(self, images: torch.Tensor, resize: str = "tf1") -> torch.Tensor:
        """Images on any device -> features on the network's. Raises UserError for other
        channels or types."""
        if images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
            raise UserError("FID needs images of 1 or 3 channels, torch.uint8, not of "
                            f"{images.shape[1]}, {images.dtype}")
        x = images.to(self.fc.weight.device).float().expand(-1, 3, -1, -1)      # [B, 3, H, W]
        if resize == "tf1":
            x = resize_tf1_along(x, 2)
            x = resize_tf1_along(x, 3)                                  # [B, 3, 299, 299]
            x = (x - 128) / 128
        elif resize == "pytorch":
            x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
            x = x * (2 / 255) - 1
        else:
            raise ValueError(f"resize must be tf1 or pytorch, not {resize}")
        with torch.autocast(x.device.type, enabled=False):
            x = x.contiguous(memory_format=torch.channels_last)         # [B, 3, 299, 299]
            x = self.Conv2d_1a_3x3(x)
            x = self.Conv2d_2a_3x3(x)
            x = self.Conv2d_2b_3x3(x)                                   # [B, 64, 147, 147]
            x = F.max_pool2d(x, 3, 2)                                   # [B, 64, 73, 73]
            x = self.Conv2d_3b_1x1(x)
            x = self.Conv2d_4a_3x3(x)                                   # [B, 192, 71, 71]
            x = F.max_pool2d(x, 3, 2)                                   # [B, 192, 35, 35]
            x = self.Mixed_5b(x)
            x = self.Mixed_5c(x)
            x = self.Mixed_5d(x)                                        # [B, 288, 35, 35]
            x = self.Mixed_6a(x)
            x = self.Mixed_6b(x)
            x = self.Mixed_6c(x)
            x = self.Mixed_6d(x)
            x = self.Mixed_6e(x)                                        # [B, 768, 17, 17]
            x = self.Mixed_7a(x)
            x = self.Mixed_7b(x)
            x = self.Mixed_7c(x)                                        # [B, 2048, 8, 8]
            return x.mean((2, 3))                                               # [B, 2048]


def resize_tf1_along(x: torch.Tensor, dim: int, size: int = 299) -> torch.Tensor:
    """TensorFlow 1's bilinear resize of one dimension: no half-pixel centers; the right
    neighbor of the last pixel is that pixel."""
    n = x.shape[dim]
    source = torch.arange(size, device=x.device) * (n / size)
    left = source.long().clamp(max=n - 1)
    right = (left + 1).clamp(max=n - 1)
    shape = [1] * x.ndim
    shape[dim] = size
    share_of_right = (source - left).reshape(shape)
    return torch.lerp(x.index_select(dim, left), x.index_select(dim, right), share_of_right)


average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1,
                       count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
half_size_pool = partial(F.max_pool2d, kernel_size=3, stride=2)


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. size: a number or (height, width). padding: by default
    the output has the size of the input."""

    def __init__(self, cin: int, cout: int, size=1, stride: int = 1, padding=None):
        super().__init__()
        if isinstance(size, int):
            size = (size, size)
        if padding is None:
            padding = (size[0] // 2, size[1] // 2)
        self.conv = nn.Conv2d(cin, cout, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Branches(nn.Module):
    """Branches side by side, concatenated. branches: lists of layers; a tuple in them holds
    two convolutions that share their input. The published file numbers the convolutions of a
    branch that has several: branch_1, and branch_2a and branch_2b in a tuple.
    """

    def __init__(self, **branches):
        super().__init__()
        self.branches = list(branches.values())
        for name, layers in branches.items():
            convs = [layer for layer in layers if isinstance(layer, (Conv, tuple))]
            for i, conv in enumerate(convs, 1):
                number = f"_{i}" if len(convs) > 1 else ""
                if isinstance(conv, tuple):
                    self.add_module(f"{name}{number}a", conv[0])
                    self.add_module(f"{name}{number}b", conv[1])
                else:
                    self.add_module(f"{name}{number}", conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [self.run(layers, x) for layers in self.branches]
        return torch.cat(outputs, 1)

    def run(self, layers: list, x: torch.Tensor) -> torch.Tensor:
        """One branch."""
        for layer in layers:
            if isinstance(layer, tuple):
                a, b = layer
                x = torch.cat([a(x), b(x)], 1)
            else:
                x = layer(x)
        return x


def inception_a(cin, pooled):
    return Branches(
        branch1x1=[Conv(cin, 64)],
        branch5x5=[Conv(cin, 48), Conv(48, 64, 5)],
        branch3x3dbl=[Conv(cin, 64), Conv(64, 96, 3), Conv(96, 96, 3)],
        branch_pool=[average_pool, Conv(cin, pooled)])


def inception_b():
    return Branches(
        branch3x3=[Conv(288, 384, 3, stride=2, padding=0)],
        branch3x3dbl=[Conv(288, 64), Conv(64, 96, 3), Conv(96, 96, 3, stride=2, padding=0)],
        branch_pool=[half_size_pool])


def inception_c(c):
    return Branches(
        branch1x1=[Conv(768, 192)],
        branch7x7=[Conv(768, c), Conv(c, c, (1, 7)), Conv(c, 192, (7, 1))],
        branch7x7dbl=[Conv(768, c), Conv(c, c, (7, 1)), Conv(c, c, (1, 7)),
                      Conv(c, c, (7, 1)), Conv(c, 192, (1, 7))],
        branch_pool=[average_pool, Conv(768, 192)])


def inception_d():
    return Branches(
        branch3x3=[Conv(768, 192), Conv(192, 320, 3, stride=2, padding=0)],
        branch7x7x3=[Conv(768, 192), Conv(192, 192, (1, 7)), Conv(192, 192, (7, 1)),
                     Conv(192, 192, 3, stride=2, padding=0)],
        branch_pool=[half_size_pool])


def inception_e(cin, pool):
    """pool: the original's two blocks have different ones."""
    return Branches(
        branch1x1=[Conv(cin, 320)],
        branch3x3=[Conv(cin, 384), (Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1)))],
        branch3x3dbl=[Conv(cin, 448), Conv(448, 384, 3),
                      (Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1)))],
        branch_pool=[pool, Conv(cin, 192)])


def load_inception(weights=None, device="cpu", folder="data") -> tuple[InceptionV3, str]:
    """The network and the SHA-256 of its weights file, which is fetched once into folder.
    weights: instead, a file of the same layout. Raises UserError."""
    if weights is None:
        path = Path(folder, WEIGHTS_URL.rsplit("/", 1)[1])
        fetch(WEIGHTS_URL, path, WEIGHTS_SHA256, ", or name a file with --weights")
    else:
        path = Path(weights)
    refuse_special(path)
    net = InceptionV3()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:                                  # zip, pickle and torch differ
        raise UserError(f"{path} is no weights file: {reason(error).partition('.')[0]}") from None
    net = net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return net, hashlib.sha256(path.read_bytes()).hexdigest()
