"""The disentangled loss: one term for the denoising head, one for the deblurring head. README, "The loss".

    python loss.py                         # the least value each term can have on pictures of power 1 / lam, by level and BNR
"""
import math

import torch

from degrade import BlurNoisePath, attenuation, degrade, frequencies, level_range
from model import residual_size

P_MEAN, P_STD = -1.2, 1.2                                       # of ln sigma in training


def disentangled_loss(net, x0, path, t=None, noise=None, sigma_data=0.5):
    """w(sigma) |D - V M V^T x0|^2 and w(sigma) |R - (x0 - V M V^T x0)|^2, each [B], the mean over a picture's pixels and channels.

    net: (x, t) -> D, R; x0 [B, C, H, W] in [-1, 1]; t a number, 0-d or [B], from training_levels where not given; noise unit normal.
    At BNR 0 the second target is 0 and the first term is EDM's loss. A training step backpropagates their sum over pixels. On a cold
    path D = x has nothing to learn: the first term is 0 and the second is in units of the residual's own size.
    """
    t = training_levels(x0.shape, path, x0.device) if t is None else t
    noise = torch.randn_like(x0) if noise is None else noise
    x, blurry = degrade(x0, t, path, noise)                     # (1)
    d, r = net(x, t)
    denoise, deblur = (d - blurry).square().mean((1, 2, 3)), (r - (x0 - blurry)).square().mean((1, 2, 3))
    alpha, sigma = path.levels(t)
    if path.cold:
        return torch.zeros_like(deblur), deblur / (sigma_data * residual_size(alpha, x0).flatten().to(deblur)) ** 2
    w = weight(sigma, sigma_data)
    return w * denoise, w * deblur


def weight(sigma, sigma_data=0.5):
    """EDM's w(sigma) = 1 / c_out^2."""
    return (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2


def training_levels(shape, path, device=None):
    """A level t for each picture of shape [B, C, H, W], float32 [B]: ln sigma normal, as EDM trains; on a cold path ln alpha uniform."""
    if path.cold:
        low, high = map(math.log, level_range(path, *shape[2:]))
        return torch.exp(low + (high - low) * torch.rand(shape[0], device=device))
    return torch.exp(P_MEAN + P_STD * torch.randn(shape[0], device=device))


def main():
    lam = frequencies(32, 32)
    spectrum = torch.where(lam > 0, 0.25 / lam, 0)
    spectrum = spectrum * 0.25 / spectrum.mean()                # total variance sigma_data^2
    x = torch.zeros(1, 1, 32, 32)
    print("least loss a pixel: denoise + deblur")
    print("sigma " + "".join(f"{f'BNR {bnr}':>18}" for bnr in (0, 0.5, 2)))
    for sigma in (0.01, 0.05, 0.2, 0.5, 1, 3, 10):
        cells = []
        for bnr in (0, 0.5, 2):
            m = attenuation(BlurNoisePath(bnr).levels(sigma)[0], x)
            left = spectrum * sigma ** 2 / (m ** 2 * spectrum + sigma ** 2)                     # the posterior variance of x0
            cells.append(f"{weight(sigma) * (m ** 2 * left).mean():8.3f} + {weight(sigma) * ((1 - m) ** 2 * left).mean():7.3f}")
        print(f"{sigma:<6}" + "".join(f"{c:>18}" for c in cells))


if __name__ == "__main__":
    main()
