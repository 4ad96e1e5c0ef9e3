"""The forward process of Warm Diffusion (arXiv 2511.16904): blur and noise together, equation (1).

    python degrade.py                    # draws the forward process as a film strip, degrade.png
    python degrade.py --image cat.png    # the same with your own image
"""
import math
from functools import lru_cache

import torch

from util import Parser, UserError, normalize, read_image, save_grid, to_uint8


def degrade(x0, alpha, sigma, noise):
    """Equation (1): blur by alpha pixels, then add noise of standard deviation sigma.

    x0, noise [B, C, H, W], x0 in [-1, 1], noise unit normal; alpha, sigma >= 0, each a number, 0-d
    or [B]. Returns x and the blurry image without noise, both [B, C, H, W].
    """
    blurry = blur(x0, alpha)
    return blurry + expand_level(sigma, blurry) * noise, blurry                 # (1)


def blur(x, alpha):
    """V M(alpha) V^T x: a Gaussian blur of standard deviation alpha pixels, reflecting borders.

    x [..., H, W]; alpha a number, 0-d or [B]. Returns float64 for float64 and else float32.
    """
    blurry = idct2(attenuation(alpha, x) * dct2(x.double()))
    return blurry.to(torch.promote_types(x.dtype, torch.float32))


def attenuation(alpha, x):
    """M(alpha) = exp(-lam alpha^2 / 2), float64: [H, W] for one level, [B, 1, H, W] for [B].

    x gives only H, W and the device. Without the upper limit, alpha = inf would make inf * 0 at the
    mean, where lam = 0.
    """
    alpha = expand_level(alpha, x, torch.float64).clamp(max=1e9)
    return torch.exp(-frequencies(*x.shape[-2:], x.device) * alpha ** 2 / 2)


class Path:
    """A curve alpha(t), sigma(t) in the plane of levels, and the law of its training levels.

    A path of your own defines `levels` and inherits the rest; where its t is not sigma, it defines
    t_range, too. It is trained and sampled along sigma, whatever its t is. check_path looks at it.
    """
    P_mean, P_std = -1.2, 1.2                                   # of ln sigma in training (EDM)

    def levels(self, t):
        """t, a tensor -> alpha, blur in pixels, and sigma, noise in image units: tensors like t, or
        numbers where they do not depend on it. Both are 0 at t = 0. As t rises, sigma rises, or is
        always 0 while alpha rises; alpha does not fall."""
        raise NotImplementedError

    def t_range(self, h, w):
        """The smallest and the largest t of sampling for images of h x w pixels."""
        return 0.002, 80.                                       # EDM

    def training_levels(self, n, h, w, device=None):
        """alpha and sigma for n images of h x w, float32 [n] each, from torch's generator."""
        ln_t = self.P_mean + self.P_std * torch.randn(n, device=device)         # (9)
        t = torch.exp(ln_t)
        return tuple(torch.as_tensor(v, dtype=t.dtype, device=device).expand(n)
                     for v in along_sigma(self, h, w).levels(t))


class ConstantBNR(Path):
    """One blur-to-noise ratio throughout, the paper's choice: t = sigma, alpha = BNR sigma.

    BNR 0 is hot (only noise: EDM), 0.5 is the paper's best. UserError for no number of 0 to 1e6.
    """

    def __init__(self, bnr):
        if not isinstance(bnr, (int, float)) or not 0 <= bnr <= 1e6:
            raise UserError(f"BNR must be a number from 0 to 1e6, not {bnr!r}")
        self.bnr = float(bnr)

    def levels(self, t):
        return self.bnr * t, t


class ColdPath(Path):
    """BNR inf: only blur, t = alpha, sigma = 0. In training ln t is uniform (our choice)."""

    def levels(self, t):
        return t, t * 0

    def t_range(self, h, w):
        return 0.1, float(max(h, w))

    def training_levels(self, n, h, w, device=None):
        low, high = map(math.log, self.t_range(h, w))
        return self.levels(torch.exp(low + (high - low) * torch.rand(n, device=device)))


class BlurringPath(Path):
    """Hoogeboom & Salimans' schedule (2209.05557), divided by its signal scale: with
    tan(pi u / 2) = sigma, alpha = 20 sin^2(pi u / 2). Its ratio peaks at 10 where sigma = 1."""

    def levels(self, t):
        return 20 * t ** 2 / (1 + t ** 2), t


class AnyBNR(ConstantBNR):
    """For training one network for every ratio (ours): each image has a ratio of its own, which is
    0 for one in four and else log-uniform on [0.1, 10]. To sample it is 0.5; or choose a path."""
    max_bnr = 10

    def __init__(self):
        super().__init__(0.5)

    def training_levels(self, n, h, w, device=None):
        log10_bnr = 2 * torch.rand(n, device=device) - 1
        bnr = torch.where(torch.rand(n, device=device) < 0.25, 0, 10 ** log10_bnr)
        sigma = torch.exp(self.P_mean + self.P_std * torch.randn(n, device=device))     # (9)
        return bnr * sigma, sigma


def make_path(bnr, name=None):
    """The path of a checkpoint or a command line. bnr: a number, inf or "any"; name: "blurring"
    instead of a ratio. UserError for anything else."""
    if name == "blurring":
        return BlurringPath()
    if name is not None:
        raise UserError(f"the path {name!r} is not this project's: give it to generate, in Python")
    if bnr == "any":
        return AnyBNR()
    return ColdPath() if bnr == math.inf else ConstantBNR(bnr)


def levels_of(path, t):
    """alpha and sigma of a path at t, a number or a tensor: float64 tensors of the shape of t."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return tuple(torch.as_tensor(v, dtype=torch.float64, device=t.device).expand(t.shape)
                 for v in path.levels(t.clone()))


def check_path(path, h, w):
    """Raises UserError, with one line, for a path that breaks the contract of Path. It is looked at
    on a grid of t for images of h x w, and 1,000 training levels, which are returned: [2, 1000]."""
    if isinstance(path, type):
        raise UserError(f"{path.__name__} is a class: give a path, {path.__name__}()")
    try:
        low, high = map(float, path.t_range(h, w))
        t = torch.linspace(math.log(low), math.log(high), 500, dtype=torch.float64).exp()
        alpha, sigma = levels_of(path, torch.cat([torch.zeros(1), t]))          # [501] each
        with torch.random.fork_rng(devices=[]):
            drawn = torch.stack(path.training_levels(1000, h, w, "cpu"))        # [2, 1000]
        rules = {
            "t_range must rise, from above 0": low < high < math.inf,
            "at t = 0 there must be no blur and no noise": not (alpha[0] or sigma[0]),
            "alpha and sigma must be finite": (alpha + sigma).isfinite().all(),
            "alpha must not fall as t rises": (alpha.diff() >= -1e-9 * alpha.max()).all(),
            "sigma must rise with t, or be 0 throughout while alpha rises":
                (time_of(alpha, sigma).diff() > 0).all() and (sigma[1:].all() or not sigma.any()),
            "training_levels must be alpha and sigma, [n] each, finite, not below 0, not both 0":
                drawn.shape == (2, 1000) and (drawn.isfinite() & (drawn >= 0)).all()
                and drawn.any(0).all()}
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as e:
        rules = {f"t_range, levels or training_levels fails ({' '.join(str(e).split())})": False}
    for rule in (rule for rule, kept in rules.items() if not kept):
        raise UserError(f"the path {type(path).__name__} cannot be used: {rule}")
    return drawn


def along_sigma(path, h, w):
    """A path whose t is another parameter than time_of, with that for its t; any other path as it
    is. So one curve has the same levels in training and the same steps, whatever its t is."""
    t = torch.linspace(*map(math.log, path.t_range(h, w)), 9, dtype=torch.float64).exp()
    values = time_of(*levels_of(path, t))
    if torch.equal(values, t):
        return path

    def levels(value):
        below = torch.zeros_like(torch.as_tensor(value, dtype=torch.float64))
        above = torch.full_like(below, t[-1])
        for _ in range(100):                                    # bisection
            middle = (below + above) / 2
            short = time_of(*levels_of(path, middle)) < value
            below, above = torch.where(short, middle, below), torch.where(short, above, middle)
        return levels_of(path, below)
    same = Path()
    same.levels, same.t_range = levels, lambda h, w: (values[0].item(), values[-1].item())
    return same


def time_of(alpha, sigma):
    """t of two tensors of levels: sigma, or alpha where there is no noise."""
    return torch.where(sigma > 0, sigma, alpha)


def dct2(x):
    """The orthonormal two-dimensional DCT-II of [..., H, W]: V^T x. float64 for float64, else
    float32. The products run in float64: autocast and TF32 would spoil the third digit."""
    columns, rows = cosines(x.shape[-2], x.device), cosines(x.shape[-1], x.device)
    return (columns @ x.double() @ rows.T).to(torch.promote_types(x.dtype, torch.float32))


def idct2(u):
    """The inverse of dct2: V u."""
    columns, rows = cosines(u.shape[-2], u.device), cosines(u.shape[-1], u.device)
    return (columns.T @ u.double() @ rows).to(torch.promote_types(u.dtype, torch.float32))


@lru_cache(maxsize=None)
@torch.inference_mode(False)                # a cached inference tensor would refuse training later
def cosines(n, device):
    """The [n, n] float64 matrix of the orthonormal DCT-II; row k has frequency k."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    c = torch.cos(math.pi * k * (i + 0.5) / n) * math.sqrt(2 / n)
    c[0] /= math.sqrt(2)
    return c.to(device)


@lru_cache(maxsize=None)
@torch.inference_mode(False)
def frequencies(h, w, device=None):
    """lam[i, j] = pi^2 (i^2 / h^2 + j^2 / w^2), float64 [h, w]: the eigenvalues of the negative
    Laplacian at a pixel pitch of 1."""
    i, j = (torch.arange(n, dtype=torch.float64, device=device) / n for n in (h, w))
    return math.pi ** 2 * (i[:, None] ** 2 + j ** 2)


def expand_level(level, x, dtype=None):
    """A level (number, 0-d or [B]) -> 0-d or [B, 1, 1, 1], on x's device, of dtype or else x's."""
    level = torch.as_tensor(level, dtype=dtype or x.dtype, device=x.device)
    return level.reshape(-1, 1, 1, 1) if level.ndim else level


def three_discs():
    """A test image: overlapping discs of flat colours, [1, 3, 32, 32]."""
    pixel = (torch.arange(32) + 0.5) / 32
    x0 = torch.tensor([-0.7, -0.5, -0.1])[:, None, None].repeat(1, 32, 32)
    for x, y, r, colour in ((0.3, 0.3, 0.35, (0.9, 0.5, -0.6)), (0.75, 0.6, 0.3, (-0.6, 0.6, 0.7)),
                            (0.4, 0.75, 0.18, (0.9, 0.9, 0.8))):
        inside = torch.hypot(pixel - x, pixel[:, None] - y) < r
        x0 = torch.where(inside, torch.tensor(colour)[:, None, None], x0)
    return x0[None]


def main():
    p = Parser(description="Draw the forward process: blur alone, and with the noise over it, for "
                           "four BNRs (rows) at growing levels t (columns).")
    p.add_argument("--image", help="an image of your own, made 32 x 32 (default: three discs)")
    p.add_argument("--out", default="degrade.png", help="the picture (default degrade.png)")
    args = p.parse_args()
    with p.one_line_errors():
        x0 = normalize(read_image(args.image, 3, 32, 32)) if args.image else three_discs()
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        times = torch.tensor([0, 0.1, 0.2, 0.4, 0.7, 1, 2, 4, 8, 16])
        rows = []                                                               # [10, 3, 32, 32]
        for bnr in (0, 0.5, 2, math.inf):
            x, blurry = degrade(x0, *make_path(bnr).levels(times), noise)
            rows.append(blurry)
            if bnr != math.inf:             # divided by sqrt(1 + sigma^2), or the noise would clip
                rows.append(x / expand_level((1 + times ** 2).sqrt(), x))
        save_grid(to_uint8(torch.cat(rows)), args.out, columns=len(times))
        print(f"{args.out}: rows: BNR 0, 0.5 and 2, each without and with noise, and inf; columns: "
              f"t = {', '.join(f'{t:.3g}' for t in times)}; t is sigma, for inf the blur in pixels")


if __name__ == "__main__":
    main()
