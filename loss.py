"""The loss: one term for the denoising head, one for the deblurring head, equations (9) and (10).

train.py calls it; its minimum is a closed form, which tests/test_loss.py checks.
"""
import torch

from degrade import degrade
from model import residual_std


def disentangled_loss(net, x0: torch.Tensor, alpha, sigma, noise: torch.Tensor,
                      sigma_data: float):
    """The denoising and the deblurring term, [B] each: means over the pixels of an image.

    net: (x, alpha, sigma) -> D, R; x0 [B, C, H, W] in [-1, 1]; alpha, sigma: numbers, 0-d or [B];
    noise: unit normal, like x0; sigma_data: the net's. At BNR 0 the first term is EDM's loss and
    the target of the second is 0. A training step adds both over the pixels.
    """
    x, blurry = degrade(x0, alpha, sigma, noise)                                # (1)
    d, r = net(x, alpha, sigma)
    w_denoise, w_deblur = weights(x0, alpha, sigma, sigma_data)
    denoise = w_denoise * (d - blurry).square().mean((1, 2, 3))                 # (9)
    deblur = w_deblur * (r - (x0 - blurry)).square().mean((1, 2, 3))            # (9)
    return denoise, deblur


def weights(x0: torch.Tensor, alpha, sigma, sigma_data: float):
    """The weights of both terms, 0-d, [1] or [B]. They are equal, and EDM's, where there is noise.
    Without noise (cold) the denoising term is dropped, and the other is divided by r_out^2."""
    alpha = torch.as_tensor(alpha, device=x0.device)
    sigma = torch.as_tensor(sigma, device=x0.device)
    w = (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2              # (10)
    w_cold = residual_std(alpha, x0, sigma_data).flatten().to(w.dtype) ** -2    # (10)
    w_denoise = torch.where(sigma > 0, w, 0)
    w_deblur = torch.where(sigma > 0, w, w_cold)
    return w_denoise, w_deblur
