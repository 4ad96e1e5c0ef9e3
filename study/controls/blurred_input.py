"""A hot process whose network sees a blurred input, as Spectral Forcing has it. For --bnr 0.

x = x0 + sigma n, and the network is given V M V^T x at the blur of BNR 0.5: of the high frequencies
it sees as little of the image as a warm network does, and less of the noise.
"""
import torch

from degrade import blur
from model import Denoiser, UNet

BNR = 0.5


class BlurredInput(Denoiser):
    def forward(self, x: torch.Tensor, alpha, sigma, augment=None, label=None):
        return super().forward(blur(x, BNR * sigma), alpha, sigma, augment, label)


def network(shape, classes: int) -> Denoiser:
    """The preset `tiny` for images of shape [C, H, W]."""
    c, h, w = shape
    unet = UNet(c, 2 * c, channels=24, mult=(1, 2), blocks=1, attention=(max(h, w) // 2,),
                resolution=max(h, w), classes=classes)
    return BlurredInput(unet)
