"""The sampler: from noise to images by deblurring and denoising together, equations (2) to (5).

    python sample.py --ckpt run/ema.pt --seeds 0-63                  # a PNG a seed in samples/
    python sample.py --ckpt run/ema.pt --solver multistep            # 12 evaluations instead of 35
    python sample.py --ckpt run/ema.pt --init cat.png --level 1      # your own, degraded and back
    python sample.py --ckpt any/ema.pt --bnr 0.3                     # a network of --bnr any
"""
import argparse
import math
import os
import re
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from degrade import (AnyBNR, along_sigma, attenuation, check_path, dct2, degrade, expand_level,
                     idct2, levels_of, make_path)
from model import load_model
from util import (Parser, UserError, add_device_option, join_processes, normalize, number, rank,
                  read_image, save_grid, save_image, say, to_uint8, world_size)

STEPS = {"euler": 18, "heun": 18, "multistep": 12}              # by default
THIRD = 9                                       # multistep has order 3 from this many steps on


def time_steps(n, t_min=0.002, t_max=80., rho=7.):
    """EDM's n levels from t_max to t_min, then 0: float64 [n + 1]."""
    i = torch.linspace(0, 1, n, dtype=torch.float64)
    t = (t_max ** (1 / rho) + i * (t_min ** (1 / rho) - t_max ** (1 / rho))) ** rho         # (11)
    return torch.cat([t, torch.zeros(1, dtype=torch.float64)])


def multistep_times(n, h, w, t_min=0.002, t_max=80.):
    """Multistep's n levels from t_max, then 0: float64 [n + 1].

    They are even in ln(1 + a / sigma): in ln sigma below a, where an image of h x w appears, and in
    1 / sigma above it, where the estimate is still the mean of all images. The last is where the
    image is finished. Order 3 starts with half a step, for its first two steps have less.
    """
    a, last = 1.5 * math.sqrt(h * w), min(max(180 * t_min / n, t_min), math.sqrt(t_min * t_max))
    i = torch.arange(n, dtype=torch.float64)
    if n >= THIRD:
        i[1:] -= 0.5
    start, end = math.log1p(a / t_max), math.log1p(a / last)
    t = a / torch.expm1(start + i / i[-1].clamp(min=1) * (end - start))         # [n]
    return torch.cat([torch.full_like(t[:1], t_max), t[1:], torch.zeros_like(t[:1])])


@torch.no_grad()
def solve(net, path, x, times, solver="heun", churn=0., s_min=0., s_max=math.inf, s_noise=1.,
          noise=None, watch=None):
    """Carry the state x [B, C, H, W] down the levels `times` along the flow (2), in float64.

    net: (x, alpha, sigma) -> D, R. times: falling, [n + 1]. solver: "euler" and "multistep" call
    net once a step, "heun" twice, but once for a last step to 0. churn: EDM's S_churn, for levels
    from s_min to s_max, with fresh noise from noise(), unit normal like x, times s_noise.
    watch(t, x, D, R) sees the first evaluation of each step. Raises UserError for another solver,
    for times that do not fall, and for multistep with churn or without noise.
    """
    times = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if solver not in STEPS:
        raise UserError(f"solver must be euler, heun or multistep, not {solver}")
    if len(times) < 2 or not (times.diff() < 0).all() or times[-1] < 0:
        raise UserError("the time steps must fall, and there must be at least one step")
    if solver == "multistep" and (churn or levels_of(path, times[0])[1] == 0):
        raise UserError("multistep needs a path with noise and no churn: use heun or euler")
    x, history, order = x.double(), [], 3 if len(times) > THIRD else 2
    for t, s in zip(times[:-1], times[1:]):
        if churn and s_min <= t <= s_max:
            t_hat = t * (1 + min(churn / (len(times) - 1), math.sqrt(2) - 1))
            fresh = torch.randn_like(x) if noise is None else noise().to(x)
            x, t = churn_step(x, t, t_hat, path, s_noise * fresh), t_hat
        d, r, n_hat = evaluate(net, path, x, t)
        if watch:
            watch(t.item(), x, d, r)
        x0_hat = d + r
        x_s = step(x, x0_hat, n_hat, t, s, path)                                # (3), Euler
        if solver == "heun" and s > 0:                          # the same with both ends' average
            d_s, r_s, n_s = evaluate(net, path, x_s, s)
            x_s = step(x, (x0_hat + d_s + r_s) / 2, (n_hat + n_s) / 2, t, s, path)  # (3)
        if solver == "multistep":
            alpha, sigma = levels_of(path, t)
            u = dct2(x0_hat)
            value = torch.stack([u, dct2(d) - attenuation(alpha, x) * u])   # [2, B, C, H, W]
            history = [(-sigma.log(), value)] + history[:order - 1]
            x_s = x0_hat if s == 0 else x_s + curvature(history, t, s, path)        # (5)
        x = x_s
    if not x.isfinite().all():
        raise UserError("the network's answers led to an image that is not finite")
    return x


def step(x, x0_hat, n_hat, t, s, path):
    """Equation (3), from level t to s: deblur along M, denoise along sigma."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels_of(path, t), levels_of(path, s)
    deblurred = idct2((attenuation(alpha_s, x) - attenuation(alpha_t, x)) * dct2(x0_hat))
    return x + deblurred + expand_level(sigma_s - sigma_t, x) * n_hat           # (3)


def evaluate(net, path, x, t):
    """D, R and n_hat = (x - D) / sigma, the slope in sigma of the flow, 0 where there is no noise:
    float64."""
    alpha, sigma = (v.to(x.device) for v in levels_of(path, t))
    d, r = (v.double() for v in net(x, alpha, sigma))
    sigma = expand_level(sigma, x)
    return d, r, torch.where(sigma > 0, (x - d) / sigma, 0)                     # (2)


def curvature(history, t, s, path, cells=200):
    """What (5) adds to Euler's step from t to s: the integrals of x0_hat d(M / sigma) and of
    e d(1 / sigma), less their values at t. history: l = -ln sigma and [2, B, C, H, W], x0_hat and e
    in the DCT domain, of the last evaluations, the newest first. The polynomials in l through them
    are in Newton's form, and summed over cells that are even in ln t."""
    nodes, values = zip(*history)
    value = values[0]
    i = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    alpha, sigma = levels_of(path, t ** (1 - i) * s ** i)
    l = -(sigma[1:] * sigma[:-1]).log() / 2                     # in the middle of each cell
    device, p, total = value.device, torch.ones_like(l), torch.zeros_like(value[0])
    blurred = (attenuation(alpha, value) / expand_level(sigma, value)).diff(dim=0)
    for k in range(1, len(history)):
        p = p * (l - nodes[k - 1])                              # (l - l_0) ... (l - l_(k-1))
        values = [(new - old) / (nodes[j] - nodes[j + k])       # divided differences
                  for j, (new, old) in enumerate(zip(values, values[1:]))]
        of_x0 = torch.tensordot(p.to(device), blurred, 1)       # [1, H, W]
        of_e = (p * (1 / sigma).diff()).sum().to(device)
        total = total + of_x0 * values[0][0] + of_e * values[0][1]
    return expand_level(sigma[-1], total) * idct2(total)                        # (5)


def churn_step(x, t, t_hat, path, noise):
    """Equation (4), from level t up to t_hat, exactly as the forward process goes."""
    (alpha, sigma), (alpha_hat, sigma_hat) = levels_of(path, t), levels_of(path, t_hat)
    if not (alpha_hat >= alpha and sigma_hat >= sigma):
        raise UserError(f"churn climbs to t = {t_hat:.3g}, where the path falls: give s_max")
    climb = (alpha_hat ** 2 - alpha ** 2).sqrt()
    q = attenuation(climb, x)                                   # M_that / M_t: both can underflow
    sigma, sigma_hat = expand_level(sigma, x), expand_level(sigma_hat, x)
    u_hat = q * dct2(x) + (sigma_hat ** 2 - q ** 2 * sigma ** 2).sqrt() * dct2(noise)       # (4)
    return idct2(u_hat)


def sample(net, path, latents, steps=None, colour=None, init=None, level=None, solver="heun",
           **options):
    """Unit normal latents [B, C, H, W] -> images, float64, not clamped. options: see solve.

    Levels here are those of sigma, or alpha without noise, whatever the path's t is. steps: 18, or
    12 for multistep, which has time steps of its own. colour: where a path without noise starts,
    {"mean": [C], "cov": [C][C]} of the mean colours of the images. init [1, C, H, W]: degraded to
    `level`, the start instead. Raises UserError for a path that breaks its contract and for
    an impossible start.
    """
    h, w = latents.shape[-2:]
    check_path(path, h, w)
    path = along_sigma(path, h, w)
    t_min, t_max = path.t_range(h, w)
    t_max = t_max if level is None else level
    alpha, sigma = levels_of(path, t_max)
    if init is not None:
        if init.shape != (1, *latents.shape[1:]) or not init.is_floating_point() or init.max() > 99:
            raise UserError(f"init must be float {[1, *latents.shape[1:]]}, in [-1, 1]")
        x, _ = degrade(init.to(latents).double(), alpha, sigma, latents.double())
    elif sigma > 0:
        x = sigma.item() * latents.double()
    elif colour is None:
        raise UserError("a path without noise starts from a plain image: give its colour")
    else:
        x = plain_image(latents.double(), **colour)
    steps = STEPS.get(solver, 1) if steps is None else steps
    if type(steps) is not int or steps < 1 or (init is None) != (level is None):
        raise UserError("steps must be an int of at least 1, and init and level go together")
    times = multistep_times(steps, h, w, t_min, t_max) if solver == "multistep" \
        else time_steps(steps, t_min, t_max)
    return solve(net, path, x, times, solver, **options)


def plain_image(latents, mean, cov):
    """Images of one colour each, drawn from a Gaussian with mean [C] and cov [C][C]."""
    mean, cov = torch.tensor(mean).to(latents), torch.tensor(cov).to(latents)
    values, vectors = torch.linalg.eigh(cov)                    # cov may be singular: no Cholesky
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T     # whatever signs eigh has chosen
    z = latents.mean((2, 3)) * math.sqrt(latents[0, 0].numel())         # [B, C], unit normal
    return (mean + z @ root)[:, :, None, None].expand_as(latents)               # [B, C, H, W]


def generate(net, path, shape, seeds, device=None, batch=64, label=None, **options):
    """Yields the images of the seeds, batch by batch: float64 [b, C, H, W], shape = (C, H, W), on
    the device, the net's by default. options: see sample.

    label: the class of a class-conditional net; None: the classes take turns. Each seed has a
    generator of its own, so that its image does not depend on its batch, and on the CPU, so that it
    does not depend on the device. Raises UserError for a label that the net does not know.
    """
    classes, heads = getattr(net, "classes", 0), net
    if label is not None and (type(label) is not int or not 0 <= label < classes):
        raise UserError(f"label {label!r} is no int below {classes}, the network's classes")
    device = device or next(net.parameters()).device
    for i in range(0, len(seeds), batch):
        some = seeds[i:i + batch]
        generators = [torch.Generator().manual_seed(int(s)) for s in some]
        noise = lambda: torch.stack([torch.randn(shape, generator=g, dtype=torch.float64)
                                     for g in generators])
        if classes:
            labels = [s % classes if label is None else label for s in some]
            heads = partial(net, label=torch.tensor(labels, device=device))
        yield sample(heads, path, noise().to(device), noise=noise, **options)


def sampling_path(checkpoint, bnr=None, name=None):
    """The path to sample a checkpoint along. A network of --bnr any takes a ratio, 0.5 by default,
    or the path "blurring"; any other network takes its own path only. Raises UserError."""
    trained = make_path(checkpoint["config"]["bnr"], checkpoint["config"].get("path"))
    if bnr is None and name is None:
        return trained
    if not isinstance(trained, AnyBNR):
        raise UserError("--bnr and --path are for a model trained with --bnr any")
    if bnr is not None and name is not None:
        raise UserError("--bnr and --path are two ways to choose the path: give one of them")
    if bnr is not None and bnr > AnyBNR.max_bnr:
        raise UserError(f"--bnr {bnr:g}: the model knows ratios from 0 to {AnyBNR.max_bnr}")
    return make_path(bnr, name)


def sampler_options(p):
    a = p.add_argument
    a("--steps", type=number(int, 1, 10000),
      help="steps of the solver (default: 12 for multistep, else the model's --sample-steps)")
    a("--solver", choices=list(STEPS), default="heun",
      help="heun for the paper's numbers; multistep, with steps of its own, for few evaluations, "
           "up to about BNR 0.5 (default heun)")
    a("--path", choices=["blurring"], help="for a model of --bnr any: Hoogeboom & Salimans' path")
    a("--churn", type=number(float, 0, 1e6), default=0., help="EDM's S_churn (default 0)")
    a("--s-min", type=number(float, 0), default=0., help="churn from this level (default 0)")
    a("--s-max", type=number(float, 0), default=math.inf, help="and up to this one (default inf)")
    a("--s-noise", type=number(float, 0, 10), default=1., help="EDM's S_noise (default 1)")
    a("--precision", choices=["fp32", "bf16"], default="fp32", help="of the network (default fp32)")
    a("--compile", action="store_true", help="torch.compile: slow to start, then faster on a GPU")
    a("--class", dest="label", help="of a class-conditional model: the name of one class")
    add_device_option(p)


def sampler(args, net, checkpoint):
    """The sampler's options as keywords of generate, and the NFE. Raises UserError."""
    if (args.s_min, args.s_max, args.s_noise) != (0, math.inf, 1) and not args.churn:
        raise UserError("--s-min, --s-max and --s-noise belong to --churn, which is 0")
    if args.s_min > args.s_max:
        raise UserError(f"--s-min {args.s_min:g} is above --s-max {args.s_max:g}")
    steps = args.steps or (STEPS["multistep"] if args.solver == "multistep"
                           else checkpoint["options"]["sample_steps"])
    options = {k: getattr(args, k) for k in ("solver", "churn", "s_min", "s_max", "s_noise")}
    options.update(steps=steps, colour=checkpoint["config"].get("colour"))
    if args.label is not None:
        classes = checkpoint["data"]["classes"][:net.classes]
        if args.label not in classes:
            raise UserError(f"--class {args.label}: the classes are {', '.join(classes)}" if classes
                            else "--class is for a model trained with --cond")
        options["label"] = classes.index(args.label)
    return options, 2 * steps - 1 if args.solver == "heun" else steps


def seed_list(text):
    """An argparse type: 0-63 or 1,5,7-9 -> the seeds, in a list."""
    seeds = []
    for part in text.split(","):
        found = re.fullmatch("([0-9]{1,18})(-([0-9]{1,18}))?", part)
        some = range(int(found[1]), int(found[3] or found[1]) + 1) if found else ()
        if not 0 < len(some) <= 10 ** 7:
            raise argparse.ArgumentTypeError("must be like 0-63 or 1,5,7-9, with at most 10 "
                                             f"million in a range, not {text!r}")
        seeds += some
    return seeds


def main():
    p = Parser(description="Draw images from a trained model.")
    a = p.add_argument
    a("--ckpt", required=True, help="the model: ema.pt of train.py")
    a("--seeds", type=seed_list, default=range(64),
      help="one image a seed, like 1,5,7-9; classes take turns without --class (default 0-63)")
    a("--out", default="samples",
      help="folder of the images, .npy files where they are not grey or RGB (default samples)")
    a("--bnr", type=number(float, 0), help="for a model of --bnr any: 0 to 10 (default 0.5)")
    sampler_options(p)
    a("--init", help="start from this image, degraded to --level")
    a("--level", type=number(float, 0.01), help="level t of --init (default 1)")
    a("--batch", type=number(int, 1), default=64, help="images at a time (default 64)")
    args = p.parse_args()
    args.out = os.path.abspath(args.out)                        # the grid is named after it
    with p.one_line_errors():
        join_processes()
        net, checkpoint = load_model(args.ckpt, args.device, args.precision, args.compile)
        options, nfe = sampler(args, net, checkpoint)
        path, facts = sampling_path(checkpoint, args.bnr, args.path), checkpoint["data"]
        low, high = path.t_range(*facts["shape"][1:])
        if args.level and not (args.init and low < args.level <= high):
            raise UserError(f"--level is for --init, and must be above {low} and at most {high:g}")
        if args.init and facts.get("latents"):
            raise UserError("--init is for images, and this model's data are latents")
        if args.init:
            init = normalize(read_image(args.init, *facts["shape"]))
            options.update(init=init, level=args.level or 1.)
        draw_images(args, net, path, facts, options)
        if rank() == 0:
            say(f"{len(args.seeds)} images, {args.solver} {options['steps']} steps, NFE {nfe} "
                f"(network evaluations an image): {args.out}/")


def draw_images(args, net, path, facts, options):
    """One file a seed in the folder --out, and a grid of the first 256; processes share them."""
    n, out, latents = world_size(), args.out, facts.get("latents")
    os.makedirs(out, exist_ok=True)
    seeds, shown = args.seeds[rank()::n], []
    total = math.ceil(len(seeds) / args.batch) * options["steps"]
    with tqdm(total=total, unit=" steps", disable=rank() > 0) as bar:
        todo = iter(seeds)
        for x in generate(net, path, facts["shape"], seeds, args.device, args.batch,
                          watch=lambda *_: bar.update(), **options):
            images = to_uint8(x).cpu()
            for image, state, seed in zip(images, x, todo):
                if len(image) in (1, 3) and not latents:
                    save_image(image, f"{out}/{seed:06d}.png")
                else:
                    np.save(f"{out}/{seed:06d}.npy", state.float().cpu().numpy())
            shown += images[:math.ceil(256 / n) - len(shown)]
    parts = [shown] * n
    if n > 1:
        dist.all_gather_object(parts, shown)
    if rank() == 0 and not latents:
        images = [parts[i % n][i // n] for i in range(min(256, len(args.seeds)))]
        save_grid(torch.stack(images), f"{out}-grid.png")


if __name__ == "__main__":
    main()
