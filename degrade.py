"""The forward process of Warm Diffusion (arXiv 2511.16904): blur and noise together. README, equation (1).

    python degrade.py                      # draws the forward process as a film strip, on built-in pictures
    python degrade.py --image cat.png      # on your own
"""
import math
from functools import lru_cache

import torch


class BlurNoisePath:
    """The path of one constant blur-to-noise ratio (BNR = alpha / sigma), the paper's choice.

    bnr 0 is hot (noise alone: EDM), 0.5 the paper's best, inf is cold (blur alone). Raises ValueError below 0 and for NaN.
    Anything with this `levels` can stand in its place: a path is a curve alpha(t), sigma(t).
    """

    def __init__(self, bnr):
        self.bnr = float(bnr)
        if not self.bnr >= 0:
            raise ValueError(f"BNR is a number from 0 to inf, not {bnr}")

    def levels(self, t):
        """t (number or tensor) -> alpha, the blur's standard deviation in pixels, and sigma, the noise's in picture units."""
        return (t, t * 0) if self.bnr == math.inf else (self.bnr * t, t)


def degrade(x0, t, path, noise):
    """Equation (1): x = V M(alpha) V^T x0 + sigma n.

    x0, noise [B, C, H, W], x0 in [-1, 1], noise unit normal; t a number, 0-d or [B]. Returns x and the blurry, noiseless x0.
    """
    alpha, sigma = path.levels(t)
    blurry = blur(x0, alpha)
    return blurry + spread(sigma, blurry) * noise, blurry       # (1)


def blur(x, alpha):
    """V M(alpha) V^T x: a Gaussian blur of alpha pixels (a number, 0-d or [B]) with reflecting borders; x [..., H, W]."""
    return idct2(attenuation(alpha, x) * dct2(x.double())).to(at_least_float32(x))


def attenuation(alpha, x):
    """M(alpha) = exp(-lam alpha^2 / 2) in float64: [H, W] for one level, [B, 1, H, W] for [B] levels; x gives H, W and device."""
    alpha = spread(alpha, x.double()).clamp(max=1e9)            # inf keeps the mean, where lam = 0 and 0 * inf has no value
    return torch.exp(-frequencies(*x.shape[-2:], x.device) * alpha ** 2 / 2)


def dct2(x):
    """Orthonormal two-dimensional DCT-II of [..., H, W]: V^T x. float64 in, float64 out; anything else comes out as float32.

    The products run in float64 always: autocast and TF32 leave that type alone, and either would spoil a blur's third digit.
    """
    return (cosines(x.shape[-2], x.device) @ x.double() @ cosines(x.shape[-1], x.device).T).to(at_least_float32(x))


def idct2(u):
    """The inverse of dct2: V u."""
    return (cosines(u.shape[-2], u.device).T @ u.double() @ cosines(u.shape[-1], u.device)).to(at_least_float32(u))


@lru_cache(maxsize=None)
@torch.inference_mode(False)                                    # a cached inference tensor could not be trained through later
def cosines(n, device):
    """The [n, n] float64 matrix of the orthonormal DCT-II: row k is frequency k."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    c = torch.cos(math.pi * k * (i + 0.5) / n) * math.sqrt(2 / n)
    c[0] /= math.sqrt(2)
    return c.to(device)


def frequencies(h, w, device=None):
    """lam[i, j] = pi^2 (i^2 / h^2 + j^2 / w^2), float64 [h, w]: the Laplacian's eigenvalues at a pixel pitch of 1."""
    i, j = (torch.arange(n, dtype=torch.float64, device=device) / n for n in (h, w))
    return math.pi ** 2 * (i[:, None] ** 2 + j ** 2)


def spread(level, x):
    """A level (number, 0-d or [B]) as a tensor of x's type and device that broadcasts over pictures: 0-d or [B, 1, 1, 1]."""
    level = torch.as_tensor(level, dtype=x.dtype, device=x.device)
    return level.reshape(-1, 1, 1, 1) if level.ndim else level


def at_least_float32(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def main():
    from data import Options, film_strip, leaves, normalize, read_picture, within
    p = Options(description="Draw the forward process: a row for each BNR, a column for each level.")
    p.add_argument("--image", help="a picture of your own; default: dead leaves made here")
    p.add_argument("--resolution", type=within(int, 2, 1024), default=32, help="side in pixels (default 32)")
    p.add_argument("--out", default="degrade.png", help="the film strip (default degrade.png)")
    args = p.parse_args()
    with p.one_line_errors():
        x0 = read_picture(args.image, 3, args.resolution, args.resolution) if args.image else leaves(1, args.resolution, seed=167)
        x0 = normalize(x0).double()
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        times = [0, 0.1, 0.2, 0.4, 0.7, 1, 2, 4, 8, 16]
        rows = {}
        for bnr in (0, 0.5, 2, math.inf):
            path = BlurNoisePath(bnr)
            # a column of noise level sigma is shown divided by sqrt(1 + sigma^2), or it would all clip
            rows[f"BNR {bnr}"] = [degrade(x0, t, path, noise)[0][0] / math.sqrt(1 + path.levels(t)[1] ** 2) for t in times]
        film_strip(rows, [f"t = {t}" for t in times], args.out)
        print(f"{args.out}: rows BNR 0 (hot) to inf (cold), columns t; t is sigma, and for BNR inf the blur in pixels")


if __name__ == "__main__":
    main()
