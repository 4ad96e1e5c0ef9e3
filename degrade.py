"""The forward process of Warm Diffusion (arXiv 2511.16904): blur and noise together. README, equation (1).

    python degrade.py                      # draws the forward process as a film strip, on built-in pictures, and what it does to their spectrum
    python degrade.py --image cat.png      # on your own; --data my-pictures/ takes the spectrum of a whole set
"""
import math
import os
from functools import lru_cache

import numpy as np
import torch


class BlurNoisePath:
    """The path of one constant blur-to-noise ratio (BNR = alpha / sigma), the paper's choice.

    bnr 0 is hot (noise alone: EDM), 0.5 the paper's best, inf is cold (blur alone). Raises ValueError below 0 and for NaN.
    Anything with this `levels` can stand in its place: a path is a curve alpha(t), sigma(t).
    """

    def __init__(self, bnr):
        self.bnr = float(bnr)
        self.cold = self.bnr == math.inf
        if not self.bnr >= 0:
            raise ValueError(f"BNR is a number from 0 to inf, not {bnr}")

    def levels(self, t):
        """t (number or tensor) -> alpha, the blur's standard deviation in pixels, and sigma, the noise's in picture units."""
        return (t, t * 0) if self.cold else (self.bnr * t, t)


class BlurringPath:
    """Hoogeboom & Salimans' schedule (2209.05557) without its signal scale and its floor: alpha = 20 sin^2(pi u / 2) where tan(pi u / 2) = sigma."""
    cold = False

    def levels(self, t):
        return 20 * t ** 2 / (1 + t ** 2), t


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


def level_range(path, h, w):
    """The least and the greatest level t of sampling: EDM's, or of a cold path a tenth of a pixel and the longer side of the picture."""
    return (0.1, float(max(h, w))) if path.cold else (0.002, 80.)


def spread(level, x):
    """A level (number, 0-d or [B]) as a tensor of x's type and device that broadcasts over pictures: 0-d or [B, 1, 1, 1]."""
    level = torch.as_tensor(level, dtype=x.dtype, device=x.device)
    return level.reshape(-1, 1, 1, 1) if level.ndim else level


def at_least_float32(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def spectrum(x):
    """Pictures [B, C, H, W] -> lam and power S, the mean square of a DCT coefficient, in bands half an octave wide, lowest first."""
    power, lam = dct2(x.double()).square().mean((0, 1)), frequencies(*x.shape[-2:], x.device)
    band = torch.floor(torch.log2(lam / lam[lam > 0].min()) + 1e-9)                             # lam doubles in half an octave; the mean is at -inf
    bands = [band == b for b in band[lam > 0].unique()]
    return torch.stack([lam[b].mean() for b in bands]), torch.stack([power[b].mean() for b in bands])


def cut_offs(lam, power, h, w, bnr, times):
    """For each level t the plane of frequencies [3, h, w], lowest in the corner: white, blue where blur has taken M below e^-1/2, orange
    where noise exceeds power (by straight lines in its log), black where both."""
    s = torch.from_numpy(np.interp(frequencies(h, w).clamp(min=lam[0]).log(), lam.log(), power.log())).exp()
    drowned, blurred = ([f(t) for t in times] for f in (lambda t: t ** 2 > s, lambda t: frequencies(h, w) * (bnr * t) ** 2 > 1))
    return [1 - torch.stack([2. * b, 0.6 * d + b + 0.4 * (d & b), 2. * d]) for d, b in zip(drowned, blurred)]


def main():
    from data import Options, UserError, film_strip, leaves, load, normalize, read_picture, within
    p = Options(description="Draw the forward process, a row for each BNR and a column for each level, and the spectrum that it meets.")
    a = p.add_argument
    a("--image", help="a picture of your own (default: the first of --data, or dead leaves made here)")
    a("--data", help="take the spectrum of these: leaves, cifar10, or a folder, zip or tar of pictures (default: --image, or 256 leaves)")
    a("--bnr", type=within(float, 0, 1e6), nargs="+", default=[0.5, 2, 10], help="rows of the spectrum's picture (default 0.5 2 10)")
    a("--resolution", type=within(int, 2, 1024), default=32, help="side in pixels (default 32)")
    a("--out", default="degrade.png", help="the film strip; the spectrum's has -spectrum in its name (default degrade.png)")
    args = p.parse_args()
    with p.one_line_errors():
        own = read_picture(args.image, 3, args.resolution, args.resolution) if args.image else None
        seen = load(args.data, args.resolution).pictures if args.data else leaves(256, args.resolution) if own is None else own
        x0 = own if own is not None else seen[:1] if args.data else leaves(1, args.resolution, seed=167)
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

        lam, power = spectrum(normalize(seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))[:4096]]))
        if not power.min() > 0:
            raise UserError("a picture of one colour has no spectrum")
        print(f"\nfrequency (rad/pixel), power S, and the level from which noise of power sigma^2 drowns it and blur of alpha pixels takes it;\n"
              f"both at once at BNR 1 / sqrt(A), A = lam S ({min(len(seen), 4096)} pictures of {args.data or args.image or 'leaves'})\n\n"
              f"{'frequency':>10}{'S':>12}{'sigma':>10}{'alpha':>10}{'1 / sqrt(A)':>14}")
        for l, s in zip(lam.tolist(), power.tolist()):
            print(f"{l ** 0.5:10.3f}{s:12.4g}{s ** 0.5:10.4g}{l ** -0.5:10.3g}{(l * s) ** -0.5:14.3g}")
        print(f"\npower falls as 1 / f^{-2 * np.polyfit(lam.log(), power.log(), 1)[0]:.2f}")
        times = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
        out = "-spectrum".join(os.path.splitext(args.out))
        film_strip({f"BNR {bnr:g}": cut_offs(lam, power, *x0.shape[-2:], bnr, times) for bnr in args.bnr}, [f"sigma = {t}" for t in times], out)
        print(f"{out}: frequencies, lowest in the corner; blue: blurred, orange: drowned, black: both")


if __name__ == "__main__":
    main()
