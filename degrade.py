"""The forward process of Warm Diffusion (arXiv 2511.16904): blur and noise together, equation (1).

    python degrade.py                    # draws the forward process as a film strip, degrade.png
    python degrade.py --image cat.png    # the same with your own image

Below the equation: schedules, which say how much blur goes with how much noise, and the DCT, in
which blur is a product. The numbers in brackets are those of the README's list of equations.
"""
import math
from functools import lru_cache, wraps

import torch

from util.cli import Parser, UserError
from util.images import labeled_grid, normalize, read_image


def degrade(x0: torch.Tensor, alpha, sigma, noise: torch.Tensor):
    """Equation (1): blur by alpha pixels, then add noise of standard deviation sigma.

    x0, noise [B, C, H, W], x0 in [-1, 1], noise unit normal; alpha, sigma >= 0, each a number, 0-d
    or [B]. Returns x and the blurry image without noise, both [B, C, H, W].
    """
    blurry = blur(x0, alpha)
    x = blurry + append_dims(sigma, blurry) * noise                             # (1)
    return x, blurry


def blur(x: torch.Tensor, alpha) -> torch.Tensor:
    """V M(alpha) V^T x: a Gaussian blur of standard deviation alpha pixels, reflecting borders.

    x [..., H, W]; alpha a number, 0-d or [B]. Returns float64 for float64 and else float32.
    """
    blurry = idct2(attenuation(alpha, x) * dct2(x.double()))
    return blurry.to(torch.promote_types(x.dtype, torch.float32))


def attenuation(alpha, x: torch.Tensor) -> torch.Tensor:
    """M(alpha) = exp(-lam alpha^2 / 2), float64: [H, W] for one level, [B, 1, H, W] for [B].

    x gives only H, W and the device. Without the upper limit, alpha = inf would make inf * 0 at the
    mean, where lam = 0.
    """
    h, w = x.shape[-2:]
    alpha = append_dims(alpha, x, torch.float64).clamp(max=1e9)
    return torch.exp(-frequencies(h, w, x.device) * alpha ** 2 / 2)


# Schedules


class Schedule:
    """How much blur goes with how much noise: a function alpha(sigma).

    A schedule of your own defines `alpha` and inherits the rest. alpha(0) is 0, and alpha does not
    fall as sigma rises: check_schedule looks at that.
    The level of a step or of an image is called t. It is sigma; only ColdSchedule, which has no
    noise, takes the blur for its t.
    """
    P_mean = -1.2                               # of ln sigma in training (EDM)
    P_std = 1.2

    def alpha(self, sigma: torch.Tensor):
        """sigma, noise in image units -> blur in pixels: a tensor like sigma, or a number."""
        raise NotImplementedError

    def sigma_range(self, h: int, w: int):
        """The smallest and the largest level t of sampling for images of h x w pixels."""
        return 0.002, 80.                       # EDM

    def levels(self, t):
        """A level t, a number or a tensor -> alpha, sigma: float64 tensors of the shape of t."""
        sigma = torch.as_tensor(t, dtype=torch.float64)
        alpha = torch.as_tensor(self.alpha(sigma), dtype=torch.float64, device=sigma.device)
        return alpha.expand(sigma.shape), sigma

    def training_levels(self, n: int, h: int, w: int, device=None):
        """The distribution of training noise levels: alpha and sigma for n images of h x w,
        float32 [n] each, from torch's generator."""
        ln_sigma = self.P_mean + self.P_std * torch.randn(n, device=device)     # (9)
        sigma = torch.exp(ln_sigma)
        alpha = torch.as_tensor(self.alpha(sigma), dtype=sigma.dtype, device=device)
        return alpha.expand(n), sigma


class ConstantBNR(Schedule):
    """One blur-to-noise ratio throughout, the paper's choice: alpha = BNR sigma.

    BNR 0 is hot (only noise: EDM), 0.5 is the paper's best. UserError for no number of 0 to 1e6.
    """

    def __init__(self, bnr: float):
        if not isinstance(bnr, (int, float)) or not 0 <= bnr <= 1e6:
            raise UserError(f"BNR must be a number from 0 to 1e6, not {bnr!r}")
        self.bnr = float(bnr)

    def alpha(self, sigma):
        return self.bnr * sigma


class ColdSchedule(Schedule):
    """BNR infinity: only blur, sigma = 0. Here t is alpha, and so is what sigma_range returns.
    In training ln t is uniform (our choice)."""

    def sigma_range(self, h, w):
        return 0.1, float(max(h, w))

    def levels(self, t):
        alpha = torch.as_tensor(t, dtype=torch.float64)
        return alpha, torch.zeros_like(alpha)

    def training_levels(self, n, h, w, device=None):
        low, high = self.sigma_range(h, w)
        ln_low = math.log(low)
        ln_high = math.log(high)
        alpha = torch.exp(ln_low + (ln_high - ln_low) * torch.rand(n, device=device))
        return alpha, torch.zeros_like(alpha)


class BlurringSchedule(Schedule):
    """Hoogeboom & Salimans' schedule (2209.05557), divided by its signal scale: with
    tan(pi u / 2) = sigma, alpha = 20 sin^2(pi u / 2). Its ratio peaks at 10 where sigma = 1."""

    def alpha(self, sigma):
        return 20 * sigma ** 2 / (1 + sigma ** 2)


class AnyBNR(ConstantBNR):
    """For training one network for every ratio (ours): each image has a ratio of its own, which is
    0 for one in four and else log-uniform on [0.1, 10]. To sample it is 0.5, or another schedule's.
    """
    max_bnr = 10

    def __init__(self):
        super().__init__(0.5)

    def training_levels(self, n, h, w, device=None):
        log10_bnr = 2 * torch.rand(n, device=device) - 1
        is_hot = torch.rand(n, device=device) < 0.25
        bnr = torch.where(is_hot, 0, 10 ** log10_bnr)
        sigma = torch.exp(self.P_mean + self.P_std * torch.randn(n, device=device))     # (9)
        return bnr * sigma, sigma


def make_schedule(bnr, name: str | None = None) -> Schedule:
    """The schedule of a checkpoint or a command line. bnr: a number, inf or "any"; name: "blurring"
    instead of a ratio. UserError for anything else."""
    if name == "blurring":
        return BlurringSchedule()
    if name is not None:
        raise UserError(f"the schedule {name!r} is not one of this project: give it to generate, "
                        "in Python")
    if bnr == "any":
        return AnyBNR()
    if bnr == math.inf:
        return ColdSchedule()
    return ConstantBNR(bnr)


def level_to_t(alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """t of two tensors of levels: sigma, or alpha where there is no noise."""
    return torch.where(sigma > 0, sigma, alpha)


def check_schedule(schedule: Schedule, h: int, w: int) -> None:
    """Raises UserError, with one line, for a schedule that breaks the contract of Schedule. It is
    looked at on a grid of levels for images of h x w, and at 1,000 training levels."""
    if isinstance(schedule, type):
        raise UserError(f"{schedule.__name__} is a class: give a schedule, {schedule.__name__}()")
    name = type(schedule).__name__
    try:
        rules = schedule_rules(schedule, h, w)
    except (ArithmeticError, AttributeError, NotImplementedError, RuntimeError, TypeError,
            ValueError) as e:
        message = " ".join(str(e).split())
        raise UserError(f"the schedule {name} cannot be used: alpha, sigma_range or "
                        f"training_levels fails ({type(e).__name__} {message})") from None
    for rule, holds in rules.items():
        if not holds:
            raise UserError(f"the schedule {name} cannot be used: {rule}")


def schedule_rules(schedule: Schedule, h: int, w: int) -> dict:
    """The contract of Schedule: {rule: whether it holds}."""
    low, high = map(float, schedule.sigma_range(h, w))
    rules = {"sigma_range must rise, from above 0": 0 < low < high < math.inf}
    if not all(rules.values()):
        return rules
    grid = torch.linspace(math.log(low), math.log(high), 500, dtype=torch.float64).exp()
    alpha, sigma = schedule.levels(torch.cat([torch.zeros(1), grid]))           # [501] each
    with torch.random.fork_rng(devices=[]):
        drawn = torch.stack(schedule.training_levels(1000, h, w, "cpu"))        # [2, 1000]
    rules["without noise there must be no blur: alpha(0) = 0"] = not alpha[0]
    rules["alpha must be finite"] = alpha.isfinite().all()
    rules["alpha must not fall as sigma rises"] = (alpha.diff() >= -1e-9 * alpha.max()).all()
    rules["levels must rise with t: sigma, or alpha where there is no noise"] = \
        (level_to_t(alpha, sigma).diff() > 0).all()
    rules["training_levels must be alpha and sigma, [n] each, finite, not below 0, not both 0"] = \
        drawn.shape == (2, 1000) and (drawn.isfinite() & (drawn >= 0)).all() and drawn.any(0).all()
    return rules


# The DCT


def dct2(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal two-dimensional DCT-II of [..., H, W]: V^T x. float64 for float64, else
    float32. The products run in float64: autocast and TF32 would spoil the third digit."""
    columns = cosines(x.shape[-2], x.device)
    rows = cosines(x.shape[-1], x.device)
    return (columns @ x.double() @ rows.T).to(torch.promote_types(x.dtype, torch.float32))


def idct2(u: torch.Tensor) -> torch.Tensor:
    """The inverse of dct2: V u."""
    columns = cosines(u.shape[-2], u.device)
    rows = cosines(u.shape[-1], u.device)
    return (columns.T @ u.double() @ rows).to(torch.promote_types(u.dtype, torch.float32))


def cache_tensors(function):
    """A decorator: computes each tensor once, and lets every later call have it."""
    # a cached inference tensor would refuse training later
    cached = lru_cache(maxsize=None)(torch.inference_mode(False)(function))

    @wraps(function)
    def cached_unless_traced(*args):
        if torch.compiler.is_compiling():       # a trace's tensors are no later call's
            return function(*args)
        return cached(*args)
    return cached_unless_traced


@cache_tensors
def cosines(n: int, device=None) -> torch.Tensor:
    """The [n, n] float64 matrix of the orthonormal DCT-II; row k has frequency k."""
    k = torch.arange(n, dtype=torch.float64)[:, None]
    i = torch.arange(n, dtype=torch.float64)
    c = torch.cos(math.pi * k * (i + 0.5) / n) * math.sqrt(2 / n)
    c[0] /= math.sqrt(2)
    return c.to(device)


@cache_tensors
def frequencies(h: int, w: int, device=None) -> torch.Tensor:
    """lam[i, j] = pi^2 (i^2 / h^2 + j^2 / w^2), float64 [h, w]: the eigenvalues of the negative
    Laplacian at a pixel pitch of 1."""
    i = torch.arange(h, dtype=torch.float64, device=device) / h
    j = torch.arange(w, dtype=torch.float64, device=device) / w
    return math.pi ** 2 * (i[:, None] ** 2 + j ** 2)


def append_dims(level, x: torch.Tensor, dtype=None) -> torch.Tensor:
    """A level (number, 0-d or [B]) -> 0-d or [B, 1, 1, 1], on x's device, of dtype or else x's."""
    level = torch.as_tensor(level, dtype=dtype or x.dtype)
    level = level.to(x.device, non_blocking=True)               # else it synchronizes with the GPU
    if level.ndim == 0:
        return level
    return level.reshape(-1, 1, 1, 1)


# The picture


def three_discs() -> torch.Tensor:
    """A test image: overlapping discs of flat colors, [1, 3, 32, 32]."""
    pixel = (torch.arange(32) + 0.5) / 32
    background = torch.tensor([-0.7, -0.5, -0.1])
    x0 = background[:, None, None].repeat(1, 32, 32)
    discs = [                                   # x, y, radius, color
        (0.3, 0.3, 0.35, (0.9, 0.5, -0.6)),
        (0.75, 0.6, 0.3, (-0.6, 0.6, 0.7)),
        (0.4, 0.75, 0.18, (0.9, 0.9, 0.8)),
    ]
    for x, y, radius, color in discs:
        inside = torch.hypot(pixel - x, pixel[:, None] - y) < radius
        x0 = torch.where(inside, torch.tensor(color)[:, None, None], x0)
    return x0[None]


def film_strip(x0: torch.Tensor, times: torch.Tensor):
    """Rows for labeled_grid: x0 [1, C, H, W] at the levels `times`, for four ratios, first without
    and then with noise."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    rows = []
    for bnr in (0, 0.5, 2, math.inf):
        alpha, sigma = make_schedule(bnr).levels(times)
        x, blurry = degrade(x0, alpha, sigma, noise)                            # [T, C, H, W]
        if bnr == math.inf:
            rows.append(("BNR inf: blur", list(blurry)))
            continue
        # divided by sqrt(1 + sigma^2), or the noise would clip
        visible = x / append_dims((1 + sigma ** 2).sqrt(), x)
        rows.append((f"BNR {bnr}: blur", list(blurry)))
        rows.append(("+ noise = x", list(visible)))
    return rows


def main():
    p = Parser(description="Draw the forward process: blur alone, and with the noise over it, for "
                           "four BNRs (rows) at growing levels t (columns).")
    p.add_argument("--image", help="an image of your own, made 32 x 32 (default: three discs)")
    p.add_argument("--out", default="degrade.png", help="the picture (default degrade.png)")
    args = p.parse_args()
    with p.one_line_errors():
        x0 = three_discs()
        if args.image:
            x0 = normalize(read_image(args.image, 3, 32, 32))
        times = torch.tensor([0, 0.1, 0.2, 0.4, 0.7, 1, 2, 4, 8, 16])
        labels = [f"t = {t:.3g}" for t in times]
        labeled_grid(film_strip(x0, times), labels, args.out)
        print(f"{args.out}: t is sigma, the noise; for BNR inf it is the blur in pixels")


if __name__ == "__main__":
    main()
