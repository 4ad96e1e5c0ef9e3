"""A hot process whose two heads have a warm network's targets. For --bnr 0.

x = x0 + sigma n, D is trained to be V M V^T x0 and R to be x0 - V M V^T x0, at the blur of BNR 0.5.
What the sampler is given is D + R, the estimate of x0.
"""
import torch

from degrade import blur, degrade
from loss import weights
from model import Denoiser, UNet

BNR = 0.5


class SplitTargets(Denoiser):
    """Called with alpha = 0, as a hot sampler does, it returns D + R and 0. With any other alpha it
    returns both heads."""

    def forward(self, x: torch.Tensor, alpha, sigma, augment=None, label=None):
        d, r = super().forward(x, BNR * sigma, sigma, augment, label)
        if torch.as_tensor(alpha).any():
            return d, r
        return d + r, torch.zeros_like(r)


def loss(net, x0: torch.Tensor, alpha, sigma, noise: torch.Tensor, sigma_data: float):
    """As disentangled_loss with alpha = 0, but that the targets are those of BNR 0.5."""
    x, _ = degrade(x0, 0, sigma, noise)
    target_alpha = BNR * torch.as_tensor(sigma)
    blurry = blur(x0, target_alpha)
    d, r = net(x, target_alpha, sigma)
    w_denoise, w_deblur = weights(x0, target_alpha, sigma, sigma_data)
    denoise = w_denoise * (d - blurry).square().mean((1, 2, 3))
    deblur = w_deblur * (r - (x0 - blurry)).square().mean((1, 2, 3))
    return denoise, deblur


def network(shape, classes: int) -> Denoiser:
    """The preset `tiny` for images of shape [C, H, W]."""
    c, h, w = shape
    unet = UNet(c, 2 * c, channels=24, mult=(1, 2), blocks=1, attention=(max(h, w) // 2,),
                resolution=max(h, w), classes=classes)
    return SplitTargets(unet)
