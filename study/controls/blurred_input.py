"""A hot process whose network sees a blurred input, as Spectral Forcing has it. For --bnr 0.

x = x0 + sigma n, and the network is given V M V^T x at the blur of BNR 0.5, scaled to a variance of
1 as the inputs of hot and warm networks are. Of x0 it is what a warm network sees, V M V^T x0; but
the noise is blurred with it, so the signal-to-noise ratio of each frequency stays that of the hot
process.
"""
import torch

from degrade import append_dims, attenuation, blur, frequencies
from model import SIGMA_DATA, Denoiser, UNet

BNR = 0.5


class BlurredInput(Denoiser):
    def forward(self, x: torch.Tensor, alpha, sigma, augment=None, label=None):
        return super().forward(blur(x, BNR * sigma), alpha, sigma, augment, label)


class ScaledUNet(UNet):
    """Its input is c_in V M V^T x, whose variance is below 1: it is scaled to 1."""

    def forward(self, x, c_noise, augment=None, label=None):
        sigma = torch.exp(4 * c_noise)
        return super().forward(x / blurred_std(sigma, x), c_noise, augment, label)


def blurred_std(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The standard deviation of c_in V M V^T (x0 + sigma n) for images x0 of power 1 / lam and
    variance sigma_data^2, as r_out (8) has them: [B, 1, 1, 1]. x gives H, W, type and device."""
    h, w = x.shape[-2:]
    lam = frequencies(h, w, x.device)
    power = torch.where(lam > 0, 1 / lam, 0)
    m_squared = attenuation(BNR * sigma, x) ** 2                                # [B, 1, H, W]
    of_image = (m_squared * power / power.sum()).sum((-2, -1), keepdim=True)    # [B, 1, 1, 1]
    of_noise = m_squared.mean((-2, -1), keepdim=True)
    image = SIGMA_DATA ** 2
    noise = append_dims(sigma, x, torch.float64) ** 2
    variance = (image * of_image + noise * of_noise) / (image + noise)
    return variance.sqrt().to(x.dtype)


def network(shape, classes: int) -> Denoiser:
    """The preset `tiny` for images of shape [C, H, W]."""
    c, h, w = shape
    unet = ScaledUNet(c, 2 * c, channels=24, mult=(1, 2), blocks=1, attention=(max(h, w) // 2,),
                      resolution=max(h, w), classes=classes)
    return BlurredInput(unet)
