"""The sampler: from noise to images by deblurring and denoising together, equations (2) to (5)
and (15).

    python sample.py --ckpt run/ema.pt --seeds 0-63                  # a PNG a seed in samples/
    python sample.py --ckpt run/ema.pt --solver multistep            # 12 evaluations instead of 35
    python sample.py --ckpt run/ema.pt --init cat.png --level 1      # your own, degraded and back
    python sample.py --ckpt any/ema.pt --bnr 0.3                     # a network of --bnr any
    python sample.py --ckpt any/ema.pt --restore y.png --blur 1 --noise 0.1     # a degraded image

`euler`, `heun`, `multistep` and `ancestral` carry a state down a list of levels. `sample` chooses
the start and the levels, `generate` gives each image its own seed, and `encode` goes the other way.
The command line comes last.
"""
import argparse
import io
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from degrade import (AnyBNR, ColdSchedule, ConstantBNR, Schedule, append_dims, attenuation,
                     check_schedule, dct2, degrade, idct2, make_schedule)
from util.checkpoint import load_model
from util.cli import Parser, UserError, add_device_option, number, progress, reason, say
from util.datasets import claim_folder
from util.distributed import join_processes, one_after_another, rank, world_size
from util.files import atomic_write, refuse_special
from util.images import normalize, read_image, save_grid, save_image, to_uint8

STEPS = {"euler": 18, "heun": 18, "multistep": 12, "ancestral": 18}             # by default
THIRD_ORDER_FROM = 9                            # steps from which on multistep has order 3
WRITERS = 4                                     # threads that save images beside the sampling


@torch.no_grad()
def euler(net, schedule: Schedule, x: torch.Tensor, times, churn=None, watch=None):
    """Carry the state x [B, C, H, W] down the levels `times` along the flow (2), in float64.
    One evaluation of the network a step.

    net: (x, alpha, sigma) -> D, R. times: falling, [n + 1]. churn: None, or a function (x, t) ->
    x, t_hat that climbs to a higher level before each step. watch(t, x, D, R) sees the first
    evaluation of each step. UserError for times that do not fall.
    """
    times = falling(times)
    x = x.double()
    for t, s in zip(times[:-1], times[1:]):
        if churn is not None:
            x, t = churn(x, t)                                  # (4)
        d, r, n_hat = evaluate(net, schedule, x, t)
        if watch is not None:
            watch(t.item(), x, d, r)
        x = step(x, d + r, n_hat, t, s, schedule)               # (3)
    return x


@torch.no_grad()
def heun(net, schedule: Schedule, x: torch.Tensor, times, churn=None, watch=None):
    """The same by Heun's method, the paper's sampler: two evaluations a step, but one for a last
    step to 0. At BNR 0 it is Algorithm 2 of EDM."""
    times = falling(times)
    x = x.double()
    for t, s in zip(times[:-1], times[1:]):
        if churn is not None:
            x, t = churn(x, t)                                  # (4)
        d, r, n_hat = evaluate(net, schedule, x, t)
        if watch is not None:
            watch(t.item(), x, d, r)
        x0_hat = d + r
        x_s = step(x, x0_hat, n_hat, t, s, schedule)            # (3), Euler's
        if s > 0:                                               # again, with both ends' average
            d_s, r_s, n_hat_s = evaluate(net, schedule, x_s, s)
            x0_hat = (x0_hat + d_s + r_s) / 2
            n_hat = (n_hat + n_hat_s) / 2
            x_s = step(x, x0_hat, n_hat, t, s, schedule)        # (3)
        x = x_s
    return x


def evaluate(net, schedule: Schedule, x: torch.Tensor, t):
    """D, R and n_hat = (x - D) / sigma, the slope in sigma of the flow, 0 where there is no noise:
    float64."""
    alpha, sigma = schedule.levels(t)
    d, r = net(x, alpha.to(x.device, non_blocking=True), sigma.to(x.device, non_blocking=True))
    d = d.double()
    r = r.double()
    sigma = append_dims(sigma, x)
    n_hat = torch.where(sigma > 0, (x - d) / sigma, 0)                          # (2)
    return d, r, n_hat


def step(x, x0_hat, n_hat, t, s, schedule: Schedule):
    """Equation (3), from level t to s: deblur along M, denoise along sigma. Written with
    differences, so that a step of zero length returns x whatever the two heads answer."""
    alpha_t, sigma_t = schedule.levels(t)
    alpha_s, sigma_s = schedule.levels(s)
    dm = attenuation(alpha_s, x) - attenuation(alpha_t, x)
    return x + idct2(dm * dct2(x0_hat)) + append_dims(sigma_s - sigma_t, x) * n_hat     # (3)


def time_steps(n: int, t_min: float = 0.002, t_max: float = 80., rho: float = 7.):
    """EDM's n levels from t_max to t_min, then 0: float64 [n + 1]."""
    i = torch.linspace(0, 1, n, dtype=torch.float64)
    t = (t_max ** (1 / rho) + i * (t_min ** (1 / rho) - t_max ** (1 / rho))) ** rho         # (11)
    return torch.cat([t, torch.zeros(1, dtype=torch.float64)])


def falling(times) -> torch.Tensor:
    """The levels of a sampler as float64 on the CPU. UserError where they do not fall."""
    times = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if len(times) < 2 or not (times.diff() < 0).all() or times[-1] < 0:
        raise UserError("the time steps must fall, and there must be at least one step")
    return times


# Stochastic sampling


def climb(x, t, schedule: Schedule, gamma: float, s_min: float, s_max: float, s_noise: float,
          randn):
    """EDM's churn: x at level t -> x and t_hat = (1 + gamma) t, where t lies in [s_min, s_max].
    randn: returns unit normals like x, which are multiplied by s_noise."""
    if not s_min <= t <= s_max:
        return x, t
    t_hat = t * (1 + gamma)
    noise = randn().to(x, non_blocking=True)
    return churn_step(x, t, t_hat, schedule, s_noise * noise), t_hat


def churn_step(x, t, t_hat, schedule: Schedule, noise):
    """Equation (4), from level t up to t_hat, exactly as the forward process goes. UserError where
    the schedule falls between the two."""
    alpha, sigma = schedule.levels(t)
    alpha_hat, sigma_hat = schedule.levels(t_hat)
    if not (alpha_hat >= alpha and sigma_hat >= sigma):
        raise UserError(f"churn climbs to t = {t_hat:.3g}, where the schedule falls: give s_max")
    more_blur = (alpha_hat ** 2 - alpha ** 2).sqrt()
    q = attenuation(more_blur, x)               # M_that / M_t: each of the two can underflow
    sigma = append_dims(sigma, x)
    sigma_hat = append_dims(sigma_hat, x)
    u_hat = q * dct2(x) + (sigma_hat ** 2 - q ** 2 * sigma ** 2).sqrt() * dct2(noise)       # (4)
    return idct2(u_hat)


# Multistep: this project's, not the paper's. It carries DPM-Solver++ (Lu et al., 2211.01095) and
# the corrector of UniPC (Zhao et al., 2302.04867) to blurred schedules. Ours are the integrals
# along a blurred schedule, and e.


@torch.no_grad()
def multistep(net, schedule: Schedule, x: torch.Tensor, times, watch=None):
    """The same with one evaluation a step (5): the flow from t to s is integrated with polynomials
    through the last evaluations, and once more when the network has been evaluated at s, too. Two
    evaluations, or three from THIRD_ORDER_FROM steps on.

    A last step to 0 returns the estimate itself. The schedule must have noise.
    """
    times = falling(times)
    u = dct2(x.double())
    order = 3 if len(times) > THIRD_ORDER_FROM else 2
    nodes = []                                  # the last evaluations, newest first
    previous = None                             # the level and the state before the last step
    for t, s in zip(times[:-1], times[1:]):
        d, r, _ = evaluate(net, schedule, idct2(u), t)
        if watch is not None:
            watch(t.item(), idct2(u), d, r)
        x0_hat = d + r
        if s == 0:
            return x0_hat
        nodes = [multistep_node(d, x0_hat, t, schedule), *nodes[:order - 1]]
        if previous is not None:                # corrector: the last step again, to here
            t_before, u_before = previous
            u = integrate(u_before, t_before, t, nodes, schedule)               # (5)
        previous = (t, u)
        u = integrate(u, t, s, nodes, schedule)                 # predictor, (5)
    return idct2(u)


def multistep_node(d, x0_hat, t, schedule: Schedule):
    """What multistep keeps of an evaluation at t: l = -ln sigma, and in the DCT domain x0_hat and
    e = D - M x0_hat, what the two heads disagree by: [2, B, C, H, W]."""
    alpha, sigma = schedule.levels(t)
    u0 = dct2(x0_hat)
    e = dct2(d) - attenuation(alpha, d) * u0
    return -sigma.log(), torch.stack([u0, e])


def integrate(u, t, s, nodes, schedule: Schedule, cells: int = 200):
    """Equation (5), from level t to s, in the DCT domain: sigma_s times the integrals of
    x0_hat d(M / sigma) and e d(1 / sigma). Both are Lagrange's polynomials in l through the nodes,
    and summed over cells that are even in ln t."""
    i = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    alpha, sigma = schedule.levels(t ** (1 - i) * s ** i)       # [cells + 1]
    l = -(sigma[1:] * sigma[:-1]).log() / 2                     # in the middle of each cell
    ratio = attenuation(alpha, u) / append_dims(sigma, u)
    d_blurred = ratio.diff(dim=0).squeeze(1)                    # d(M / sigma), [cells, H, W]
    d_noise = (1 / sigma).diff()                                # d(1 / sigma), [cells]
    y = u / sigma[0]
    for l_j, (x0_hat, e) in nodes:
        basis = torch.ones_like(l)                              # 1 at this node, 0 at the others
        for l_k, _ in nodes:
            if l_k is not l_j:
                basis = basis * (l - l_k) / (l_j - l_k)
        on_device = basis.to(u.device, non_blocking=True)
        of_x0_hat = torch.tensordot(on_device, d_blurred, 1)                    # [H, W]
        of_e = (basis * d_noise).sum()
        y = y + of_x0_hat * x0_hat + of_e * e
    return sigma[-1] * y                                                        # (5)


def multistep_times(n: int, h: int, w: int, schedule: Schedule, t_min: float = 0.002,
                    t_max: float = 80.):
    """Multistep's n levels from t_max, then 0: float64 [n + 1].

    They are even in ln(1 + a / sigma): in ln sigma below a, where an image of h x w appears, and in
    1 / sigma above it, where the estimate is still the mean of all images. The last is where the
    image is finished: the noise is at most 4.5 / n^2 there and the blur 0.8 / n pixels. A short
    range from t_min to t_max ends above it.
    """
    a = 4 * (h * w) ** 0.25
    last = 4.5 / n ** 2
    alpha, sigma = schedule.levels(last)
    if alpha > 0.8 / n:
        last = (0.8 / n * sigma / alpha).item()
    last = min(max(last, t_min), math.sqrt(t_min * t_max))
    start = math.log1p(a / t_max)
    end = math.log1p(a / last)
    t = a / torch.expm1(torch.linspace(start, end, n, dtype=torch.float64))     # [n]
    t[0] = t_max
    return torch.cat([t, torch.zeros(1, dtype=torch.float64)])


# Ancestral: the random process backwards. From a given x it draws from p(x0 | x)


@torch.no_grad()
def ancestral(net, schedule: Schedule, x: torch.Tensor, times, randn=None, watch=None):
    """The same along the reverse of the random process (1) instead of the flow (2), which has the
    same marginals: from one degraded image x, many images that it may have been.

    One evaluation a step. randn: returns unit normals like x. In each step x0_hat is replaced by
    what it will be half a step ahead, on the line in ln sigma through the last two. A last step to
    0 returns the estimate itself. The schedule must have noise.
    """
    times = falling(times)
    x = x.double()
    if randn is None:
        randn = partial(torch.randn_like, x)
    before = None
    for t, s in zip(times[:-1], times[1:]):
        d, r, _ = evaluate(net, schedule, x, t)
        if watch is not None:
            watch(t.item(), x, d, r)
        x0_hat = d + r
        if s == 0:
            return x0_hat
        ahead = x0_hat
        if before is not None:
            x0_before, t_before = before
            steps_ahead = (s / t).log() / (t / t_before).log() / 2
            ahead = x0_hat + steps_ahead * (x0_hat - x0_before)
        before = x0_hat, t
        noise = randn().to(x, non_blocking=True)
        x = ancestral_step(x, d, x0_hat, ahead, t, s, schedule, noise)
    return x


def ancestral_step(x, d, x0_hat, ahead, t, s, schedule: Schedule, noise):
    """Equation (15), from level t to s: exactly as the random process goes backwards, if `ahead`
    is x0. A step of zero length returns x whatever the two heads answer."""
    alpha_t, sigma_t = schedule.levels(t)
    alpha_s, sigma_s = schedule.levels(s)
    less_blur = (alpha_t ** 2 - alpha_s ** 2).clamp(min=0).sqrt()
    a = attenuation(less_blur, x)               # M_t / M_s: each of the two can underflow
    ratio = (sigma_s / sigma_t) ** 2
    remains = a ** 2 * ratio                    # of the noise's variance
    e = dct2(d) - attenuation(alpha_t, x) * dct2(x0_hat)        # what both heads disagree by
    m_s = attenuation(alpha_s, x)
    mean = (1 - remains) * m_s * dct2(ahead) + a * ratio * dct2(x) + (1 - ratio) * e
    return idct2(mean + sigma_s * (1 - remains).sqrt() * dct2(noise))              # (15)


# From noise to images

SOLVERS = {"euler": euler, "heun": heun, "multistep": multistep, "ancestral": ancestral}


def sample(net, schedule: Schedule, z: torch.Tensor, steps: int | None = None, mean_color=None,
           init=None, y=None, level: float | None = None, solver: str = "heun",
           churn: float = 0., s_min: float = 0., s_max: float = math.inf, s_noise: float = 1.,
           sigma_min: float | None = None, sigma_max: float | None = None, randn=None,
           watch=None):
    """Unit normal z [B, C, H, W] -> images, float64, not clamped.

    steps: 18, or 12 for multistep; multistep and ancestral have time steps of their own.
    mean_color: where a schedule without noise starts, {"mean": [C], "cov": [C][C]} of the images'
    mean colors. init [1, C, H, W]: degraded to `level`, the start instead. y [1, C, H, W]: an image
    that is degraded already, the state at `level` itself. churn: EDM's S_churn, for levels from
    s_min to s_max, times s_noise. sigma_min, sigma_max: instead of the ends of the schedule's
    sigma_range. randn(): fresh noise for churn and ancestral, unit normal like z. watch: see euler.
    UserError for a schedule that breaks its contract, for an impossible start, for another solver,
    and for multistep or ancestral with churn or without noise.
    """
    h, w = z.shape[-2:]
    check_schedule(schedule, h, w)
    if solver not in SOLVERS:
        raise UserError(f"solver must be euler, heun, multistep or ancestral, not {solver}")
    if steps is None:
        steps = STEPS[solver]
    starts = (init is not None) + (y is not None)
    if type(steps) is not int or steps < 1 or starts > 1 or starts != (level is not None):
        raise UserError("steps must be an int of at least 1, and init and level go together, "
                        "or y and level")
    t_min, t_max = schedule.sigma_range(h, w)
    t_min = sigma_min or t_min
    t_max = level or sigma_max or t_max
    if not 0 < t_min < t_max < math.inf:
        raise UserError(f"sampling must go down, not from level {t_max:g} to {t_min:g}")
    x = start(schedule, t_max, z, mean_color, init, y)

    if solver in ("multistep", "ancestral"):
        has_noise = schedule.levels(t_max)[1] > 0
        if churn or not has_noise:
            raise UserError(f"{solver} needs a schedule with noise and no churn: use heun or "
                            "euler")
        times = multistep_times(steps, h, w, schedule, t_min, t_max)
        if solver == "multistep":
            x = multistep(net, schedule, x, times, watch)
        else:
            x = ancestral(net, schedule, x, times, randn, watch)
    else:
        climber = None
        if churn:
            gamma = min(churn / steps, math.sqrt(2) - 1)
            climber = partial(climb, schedule=schedule, gamma=gamma, s_min=s_min, s_max=s_max,
                              s_noise=s_noise, randn=randn or partial(torch.randn_like, x))
        x = SOLVERS[solver](net, schedule, x, time_steps(steps, t_min, t_max), climber, watch)
    if not x.isfinite().all():
        raise UserError("the outputs of the network led to an image that is not finite")
    return x


def start(schedule: Schedule, t_max: float, z: torch.Tensor, mean_color=None, init=None,
          y=None):
    """The state at level t_max, from unit normal z [B, C, H, W]. See sample."""
    alpha, sigma = schedule.levels(t_max)
    z = z.double()
    shape = [1, *z.shape[1:]]
    for name, image in (("init", init), ("y", y)):
        if image is None:
            continue
        if list(image.shape) != shape or not image.is_floating_point() or image.max() > 99:
            raise UserError(f"{name} must be float {shape}, in [-1, 1] before noise")
    if y is not None:
        return y.to(z).expand_as(z)
    if init is not None:
        x, _ = degrade(init.to(z), alpha, sigma, z)                             # (1)
        return x
    if sigma > 0:
        return sigma.item() * z
    if mean_color is None:
        raise UserError("a schedule without noise starts from a plain image: give its mean_color")
    return plain_image(z, **mean_color)


def plain_image(z: torch.Tensor, mean, cov) -> torch.Tensor:
    """Images of one color each, drawn from a Gaussian with mean [C] and cov [C][C]."""
    mean = torch.tensor(mean).to(z)
    cov = torch.tensor(cov).to(z)
    values, vectors = torch.linalg.eigh(cov)                    # cov may be singular: no Cholesky
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T     # whatever signs eigh has chosen
    color = z.mean((2, 3)) * math.sqrt(z[0, 0].numel())         # [B, C], unit normal
    return (mean + color @ root)[:, :, None, None].expand_as(z)                 # [B, C, H, W]


@torch.no_grad()
def encode(net, schedule: Schedule, x0: torch.Tensor, steps: int = 18) -> torch.Tensor:
    """The flow (2) upward, by Heun's method: images x0 [B, C, H, W] -> z, float64, of which
    sample(net, schedule, z, steps) makes x0 again. The schedule must have noise. As time_steps, but
    from 0 up: at the first step, to the lowest level, the heads see x0 itself there."""
    t_min, t_max = schedule.sigma_range(*x0.shape[-2:])
    _, sigma_max = schedule.levels(t_max)
    if sigma_max == 0:
        raise UserError("encode needs a schedule with noise")
    times = time_steps(steps, t_min, t_max)[:-1].flip(0)
    x0 = x0.double()
    _, _, n_hat = evaluate(net, schedule, x0, times[0])
    x = step(x0, x0, n_hat, 0., times[0], schedule)                             # (3)
    for t, s in zip(times[:-1], times[1:]):
        d, r, n_hat = evaluate(net, schedule, x, t)
        x_s = step(x, d + r, n_hat, t, s, schedule)                             # (3)
        d_s, r_s, n_hat_s = evaluate(net, schedule, x_s, s)
        x = step(x, (d + r + d_s + r_s) / 2, (n_hat + n_hat_s) / 2, t, s, schedule)     # (3)
    return x / sigma_max


def generate(net, schedule: Schedule, shape, seeds, device=None, batch: int = 64,
             label: int | None = None, **options):
    """Yields the images of the seeds, batch by batch: float64 [b, C, H, W], shape = (C, H, W), on
    the device, the net's by default. options: see sample.

    label: the class of a class-conditional net; None: the classes take turns. Each seed has a
    generator of its own, so that its image does not depend on its batch, and on the CPU, so that it
    does not depend on the device. Raises UserError for a label that the net does not know.
    """
    if batch < 1 or isinstance(seeds, int) or not all(0 <= seed < 2 ** 32 for seed in seeds):
        raise UserError("batch must be at least 1, and seeds a list of integers from 0 to 2^32 - 1")
    classes = getattr(net, "classes", 0)
    if label is not None and (type(label) is not int or not 0 <= label < classes):
        raise UserError(f"label {label!r} is no int below {classes}, the network's classes")
    device = device or next(net.parameters()).device
    heads = net
    for i in range(0, len(seeds), batch):
        batch_seeds = seeds[i:i + batch]
        randn = seeded_randn(batch_seeds, shape)
        if classes:
            labels = [s % classes if label is None else label for s in batch_seeds]
            heads = partial(net, label=torch.tensor(labels).to(device, non_blocking=True))
        z = randn().to(device, non_blocking=True)
        yield sample(heads, schedule, z, randn=randn, **options)


def seeded_randn(seeds, shape):
    """A function that returns unit normals, float64 [len(seeds), *shape], from a generator a seed.
    """
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def randn():
        return torch.stack([torch.randn(shape, generator=g, dtype=torch.float64)
                            for g in generators])
    return randn


def sampling_schedule(checkpoint: dict, bnr: float | None = None, name: str | None = None):
    """The schedule to sample a checkpoint along. A network of --bnr any takes a ratio, 0.5 by
    default, or the schedule "blurring"; any other network takes its own only. Raises UserError."""
    trained = make_schedule(checkpoint["config"]["bnr"], checkpoint["config"].get("schedule"))
    if bnr is None and name is None:
        return trained
    if not isinstance(trained, AnyBNR):
        raise UserError("--bnr and --schedule are for a model trained with --bnr any")
    if bnr is not None and name is not None:
        raise UserError("--bnr and --schedule are two ways to choose a schedule: give one of them")
    if bnr is not None and bnr > AnyBNR.max_bnr:
        raise UserError(f"--bnr {bnr:g}: the model knows ratios from 0 to {AnyBNR.max_bnr}")
    return make_schedule(bnr, name)


def restoring_schedule(checkpoint: dict, alpha: float, sigma: float) -> Schedule:
    """A schedule through a blur of alpha pixels with noise sigma, to restore such an image along:
    its distribution is the same on all of them. A network of --bnr any knows every ratio up to 10,
    any other network its own. Raises UserError."""
    schedule = sampling_schedule(checkpoint)
    if isinstance(schedule, AnyBNR):
        most = schedule.max_bnr * sigma
        if sigma == 0 or alpha > most:
            raise UserError(f"this model knows noise above 0, and with noise {sigma:g} a blur of "
                            f"at most {most:g} pixels, not {alpha:g}")
        return ConstantBNR(alpha / sigma)
    t = alpha if isinstance(schedule, ColdSchedule) else sigma
    own_alpha, own_sigma = schedule.levels(t)
    if own_sigma != sigma or not math.isclose(own_alpha, alpha, rel_tol=0.01, abs_tol=0.001):
        raise UserError(f"this model knows a blur of {own_alpha:.3g} pixels with noise "
                        f"{own_sigma:.3g}, not {alpha:g} with {sigma:g}; one of --bnr any knows "
                        "all up to a ratio of 10")
    return schedule


# The command line


def sampler_options(p: Parser) -> None:
    """The options that every program has which draws samples."""
    a = p.add_argument
    a("--steps", type=number(int, 1, 10000),
      help="steps of the solver (default: 12 for multistep, 18 for ancestral, else the model's "
           "--sample-steps)")
    a("--solver", choices=list(SOLVERS), default="heun",
      help="heun for the paper's numbers; multistep, with steps of its own, for few evaluations; "
           "ancestral, with fresh noise at each step (default heun)")
    a("--schedule", choices=["blurring"],
      help="for a model of --bnr any: Hoogeboom & Salimans' schedule")
    a("--churn", type=number(float, 0, 1e6), default=0., help="EDM's S_churn (default 0)")
    a("--s-min", type=number(float, 0), default=0., help="churn from this level (default 0)")
    a("--s-max", type=number(float, 0), default=math.inf, help="and up to this one (default inf)")
    a("--s-noise", type=number(float, 0, 10), default=1., help="EDM's S_noise (default 1)")
    a("--sigma-min", type=number(float, 1e-6, 1e6),
      help="lowest level (default 0.002; without noise a blur of 0.1)")
    a("--sigma-max", type=number(float, 1e-6, 1e6),
      help="highest level (default 80; without noise a blur of the longer side)")
    a("--precision", choices=["fp32", "tf32", "bf16"], default="fp32",
      help="of the network; tf32 and bf16 are faster on a GPU (default fp32)")
    a("--compile", action="store_true", help="torch.compile: slow to start, then faster on a GPU")
    a("--class", dest="label", help="of a class-conditional model: the name of one class")
    add_device_option(p)


def sampler(args, net, checkpoint: dict):
    """The sampler's options as keywords of generate, and the NFE. Raises UserError."""
    changed = (args.s_min, args.s_max, args.s_noise) != (0, math.inf, 1)
    if changed and not args.churn:
        raise UserError("--s-min, --s-max and --s-noise belong to --churn, which is 0")
    if args.s_min > args.s_max:
        raise UserError(f"--s-min {args.s_min:g} is above --s-max {args.s_max:g}")
    steps = args.steps
    if steps is None and args.solver in ("multistep", "ancestral"):
        steps = STEPS[args.solver]
    if steps is None:
        steps = checkpoint["options"]["sample_steps"]
    options = {name: getattr(args, name)
               for name in ("solver", "churn", "s_min", "s_max", "s_noise", "sigma_min",
                            "sigma_max")}
    options["steps"] = steps
    options["mean_color"] = checkpoint["config"].get("mean_color")
    if args.label is not None:
        options["label"] = class_index(args.label, checkpoint["data"]["classes"][:net.classes])
    nfe = 2 * steps - 1 if args.solver == "heun" else steps
    return options, nfe


def class_index(name: str, classes) -> int:
    if not classes:
        raise UserError("--class is for a model trained with --cond")
    if name not in classes:
        raise UserError(f"--class {name}: the classes are {', '.join(classes)}")
    return classes.index(name)


def seed_list(text: str):
    """An argparse type: 0-63 or 1,5,7-9 -> the seeds, in a list."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch("([0-9]{1,18})(-([0-9]{1,18}))?", part)
        interval = range(0)
        if match:
            first = int(match[1])
            last = int(match[3] or match[1])
            interval = range(first, last + 1)
        if not 0 < len(interval) <= 10 ** 7 or last >= 2 ** 32:
            raise argparse.ArgumentTypeError("must be like 0-63 or 1,5,7-9, below 2^32, with at "
                                             f"most 10 million in a range, not {text!r}")
        seeds += interval
    return list(dict.fromkeys(seeds))                           # each once


def main():
    p = Parser(description="Draw images from a trained model.")
    a = p.add_argument
    a("--ckpt", required=True, help="the model: ema.pt of train.py")
    a("--seeds", type=seed_list, default=range(64),
      help="one image a seed, like 1,5,7-9; classes take turns without --class (default 0-63)")
    a("--out", default="samples",
      help="folder of the images, .npy files where they are not gray or RGB (default samples)")
    a("--bnr", type=number(float, 0), help="for a model of --bnr any: 0 to 10 (default 0.5)")
    sampler_options(p)
    p.set_defaults(solver=None)
    a("--init", metavar="IMAGE", help="start from this image, degraded to --level, for others like "
      "it; one that is degraded already is for --restore")
    a("--level", type=number(float, 0.01), help="level t of --init (default 1)")
    a("--restore", metavar="IMAGE", help="draw images, one a seed, that this one may have been "
      "before --blur and --noise. Its size is the model's; a .npy file of floats [C, H, W] keeps "
      "the noise that a .png clips")
    a("--blur", type=number(float, 0), help="of --restore: standard deviation in pixels")
    a("--noise", type=number(float, 0), help="of --restore: where pixels go from -1 to 1")
    a("--mean", action="store_true", help="of --restore: the mean of all such images, D + R")
    a("--batch", type=number(int, 1), help="images at a time (default 64, on a GPU 256)")
    args = p.parse_args()
    args.out = os.path.abspath(args.out)                        # the grid is named after it
    if args.batch is None:
        args.batch = 256 if args.device == "cuda" else 64
    with p.one_line_errors():
        join_processes()
        net, checkpoint = load_model(args.ckpt, args.device, args.precision, args.compile)
        prepare_restoring(args)
        options, nfe = sampler(args, net, checkpoint)
        facts = checkpoint["data"]
        if args.restore:
            schedule = restoring_schedule(checkpoint, args.blur, args.noise)
        else:
            schedule = sampling_schedule(checkpoint, args.bnr, args.schedule)
        options.update(start_options(args, schedule, facts))
        draw_images(args, net, schedule, facts, options)
        if rank() == 0:
            places = f"{args.out}/"
            if image_suffix(facts) == ".png":
                places += f", {draw_grid(args, facts, options)}"
            say(f"{len(args.seeds)} images in {places}; {args.solver}, {options['steps']} steps, "
                f"NFE {nfe} (network evaluations per image)")


def prepare_restoring(args) -> None:
    """The options that --restore leaves no choice of. Raises UserError."""
    if not args.restore:
        args.solver = args.solver or "heun"
        if args.mean or args.blur is not None or args.noise is not None:
            raise UserError("--blur, --noise and --mean belong to --restore")
        return
    others = [args.init, args.level, args.bnr, args.schedule, args.solver, args.churn or None,
              args.sigma_max]
    if args.blur is None or args.noise is None or others.count(None) < len(others):
        raise UserError("--restore needs --blur and --noise, and takes none of --init, "
                        "--level, --bnr, --schedule, --solver, --churn and --sigma-max")
    args.solver = "ancestral" if args.noise else "heun"         # without noise: one answer
    if args.mean:
        args.steps = 1                                          # straight to 0, which is D + R
        args.seeds = args.seeds[:1]


def start_options(args, schedule: Schedule, facts: dict) -> dict:
    """init and level of --init and --level, or y and level of --restore, as keywords of generate.
    Raises UserError."""
    filename = args.restore or args.init or ""
    if filename and not filename.endswith(".npy") and facts.get("latents"):
        raise UserError(f"{filename} is an image, and this model's data are latents")
    if args.restore:
        return {"y": read_degraded(filename, facts["shape"]), "level": args.noise or args.blur}
    if not args.init and not args.level:
        return {}
    c, h, w = facts["shape"]
    low, high = schedule.sigma_range(h, w)
    level = args.level or 1.
    if not args.init or not low < level <= high:
        raise UserError(f"--level is for --init, and must be above {low} and at most {high:g}")
    return {"init": normalize(read_image(filename, c, h, w)), "level": level}


def read_degraded(filename: str, shape) -> torch.Tensor:
    """A blurred and noisy image, float [1, C, H, W]: an image file, or floats in a .npy file. It is
    not resized, which would change its blur and its noise. Raises UserError."""
    if not filename.endswith(".npy"):
        return normalize(read_image(filename, *shape, resize=False))
    refuse_special(filename)
    try:
        y = np.load(filename, allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise UserError(f"{filename} is not an array: {reason(e)}") from None
    if y.dtype.kind != "f" or list(y.shape) != list(shape) or not np.isfinite(y).all():
        raise UserError(f"{filename} has {y.dtype} {list(y.shape)}, and must have finite floats "
                        f"{list(shape)}, in [-1, 1] but for the noise")
    return torch.from_numpy(y)[None]


def image_suffix(facts: dict) -> str:
    """.png for gray and RGB images; .npy for latents and other numbers of channels."""
    if facts["shape"][0] in (1, 3) and not facts.get("latents"):
        return ".png"
    return ".npy"


def draw_images(args, net, schedule: Schedule, facts: dict, options: dict) -> None:
    """One file a seed in the folder --out, but for those that are there; processes share them. A
    batch is saved while the next one is computed."""
    suffix = image_suffix(facts)
    ours = args.seeds[rank()::world_size()]
    draw = {**vars(args), "steps": options["steps"], "seeds": sorted(args.seeds)}
    draw.update(out=None, batch=None, device=None, compile=None)                # they change none
    with one_after_another():
        there = claim_folder(args.out, draw)
    seeds = [seed for seed in ours if f"{seed:06d}{suffix}" not in there]
    padding = []
    if args.compile and len(seeds) > args.batch:                # a smaller batch compiles again
        padding = seeds[-1:] * (-len(seeds) % args.batch)
    names = (f"{args.out}/{seed:06d}{suffix}" for seed in seeds)
    total = math.ceil(len(seeds) / args.batch) * options["steps"]
    written = ()
    with progress(total=total, unit=" steps", disable=rank() > 0) as bar, \
            ThreadPoolExecutor(WRITERS) as pool:
        for x in generate(net, schedule, facts["shape"], seeds + padding, args.device, args.batch,
                          watch=lambda *_: bar.update(), **options):
            list(written)                   # waits for the batch before, and raises its errors
            if suffix == ".png":
                written = pool.map(save_image, to_uint8(x).cpu(), names)
            else:
                written = pool.map(save_array, x.float().cpu(), names)
        list(written)
    with one_after_another():               # the first has to wait for the others here
        pass


def draw_grid(args, facts: dict, options: dict) -> str:
    """Saves the first 256 images as one picture, after the one that was given, and returns what it
    holds and its name, in words."""
    c, h, w = facts["shape"]
    first = [read_image(f"{args.out}/{seed:06d}.png", c, h, w) for seed in args.seeds[:256]]
    which = f"the first {len(first)}" if len(first) < len(args.seeds) else "all"
    given = options.get("y", options.get("init"))
    if given is not None:
        first = [to_uint8(given), *first]
        which += ", after the given one,"
    save_grid(torch.cat(first), f"{args.out}-grid.png")
    return f"{which} in {args.out}-grid.png"


def save_array(state: torch.Tensor, filename: str) -> None:
    array = io.BytesIO()                        # np.save into an open file hides a full disk
    np.save(array, state.numpy())
    with atomic_write(filename, flush=False) as f:
        f.write(array.getvalue())


if __name__ == "__main__":
    main()
