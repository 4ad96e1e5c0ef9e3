"""The sampler: from noise to images by deblurring and denoising together, equations (2) to (5).

    python sample.py --ckpt run/ema.pt --seeds 0-63                  # a PNG a seed in samples/
    python sample.py --ckpt run/ema.pt --solver multistep            # 12 evaluations instead of 35
    python sample.py --ckpt run/ema.pt --init cat.png --level 1      # your own, degraded and back
    python sample.py --ckpt any/ema.pt --bnr 0.3                     # a network of --bnr any

Equation numbers are those of the README.
"""
import argparse
import json
import math
import os
from functools import partial
from itertools import zip_longest

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from degrade import (AnyBNR, ColdPath, attenuation, check_path, dct2, degrade,
                     expand_level, idct2, levels_of, make_path, time_of)
from model import load_model
from util import (Parser, UserError, add_device_option, atomic_write, full_float32,
                  normalize, number, process_group, rank, read_image, save_grid, save_image, say,
                  to_uint8, world_size)

STEPS = {"euler": 18, "heun": 18, "multistep": 12}              # by default
THIRD = 9                                       # multistep has order 3 from this many steps on


def time_steps(n, t_min=0.002, t_max=80., rho=7.):
    """EDM's n levels from t_max to t_min, then 0: float64 [n + 1]."""
    i = torch.linspace(0, 1, n, dtype=torch.float64)
    t = (t_max ** (1 / rho) + i * (t_min ** (1 / rho) - t_max ** (1 / rho))) ** rho         # (11)
    return torch.cat([t, torch.zeros(1, dtype=torch.float64)])


def multistep_times(n, path, h, w, t_max=None):
    """Multistep's n levels from t_max, the path's by default, then 0: float64 [n + 1].

    They are even in ln(1 + a / sigma): in ln sigma below a, where an image of h x w appears, and in
    1 / sigma above it, where the estimate is still the mean of all images. The last is where the
    image is finished. Order 3 starts with half a step, for its first two steps have less.
    """
    t_min, highest = path.t_range(h, w)
    t_max = highest if t_max is None else t_max
    low, high = (levels_of(path, t)[1].item() for t in (t_min, t_max))
    a, last = 1.5 * math.sqrt(h * w), min(max(180 * low / n, low), math.sqrt(low * high))
    i = torch.arange(n, dtype=torch.float64)
    if n >= THIRD:
        i[1:] -= 0.5
    start, end = math.log1p(a / high), math.log1p(a / last)
    sigma = a / torch.expm1(start + i / i[-1].clamp(min=1) * (end - start))     # [n]
    t = times_at(lambda t: levels_of(path, t)[1], sigma, t_max)
    return torch.cat([torch.full_like(t[:1], t_max), t[1:], torch.zeros_like(t[:1])])


def times_at(level, values, t_max):
    """The t up to t_max where level(t), which rises, has these values, by bisection."""
    below, above = torch.zeros_like(values), torch.full_like(values, t_max)
    for _ in range(100):
        t = (below + above) / 2
        short = level(t) < values
        below, above = torch.where(short, t, below), torch.where(short, above, t)
    return above


@torch.no_grad()
def solve(net, path, x, times, solver="heun", churn=0., s_min=0., s_max=math.inf, s_noise=1.,
          noise=None, watch=None):
    """Carry the state x [B, C, H, W] down the levels `times` along the flow (2), in float64.

    net: (x, alpha, sigma) -> D, R. times: falling, [n + 1]. solver: "euler" and "multistep" call
    net once a step, "heun" twice, but once for a last step to 0. churn: EDM's S_churn, for levels
    from s_min to s_max, with fresh noise from noise(), unit normal like x, times s_noise.
    watch(t, x, D, R) sees the first evaluation of each step. Raises ValueError for another solver,
    for times that do not fall, and for multistep with churn or without noise.
    """
    times = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if solver not in STEPS:
        raise ValueError(f"solver must be euler, heun or multistep, not {solver}")
    if len(times) < 2 or not (times.diff() < 0).all() or times[-1] < 0:
        raise ValueError("the time steps must fall, and there must be at least one step")
    if solver == "multistep" and (churn or levels_of(path, times[0])[1] == 0):
        raise ValueError("multistep needs a path with noise and no churn: use heun or euler")
    x, history, order = x.double(), [], 3 if len(times) > THIRD else 2
    for t, s in zip(times[:-1], times[1:]):
        if churn and s_min <= t <= s_max:
            t_hat = t * (1 + min(churn / (len(times) - 1), math.sqrt(2) - 1))
            fresh = torch.randn_like(x) if noise is None else noise().to(x)
            x, t = churn_step(x, t, t_hat, path, s_noise * fresh), t_hat
        d, r = evaluate(net, path, x, t)
        if watch:
            watch(t.item(), x, d, r)
        x0_hat, n_hat = d + r, noise_estimate(x, d, t, path)
        x_s = step(x, x0_hat, n_hat, t, s, path)                                # (3), Euler
        if solver == "heun" and s > 0:                          # the same with both ends' average
            d, r = evaluate(net, path, x_s, s)
            n_s = noise_estimate(x_s, d, s, path)
            x_s = step(x, (x0_hat + d + r) / 2, (n_hat + n_s) / 2, t, s, path)      # (3)
        if solver == "multistep":
            history = [evaluation(x0_hat, d, t, path)] + history[:order - 1]
            x_s = x0_hat if s == 0 else x_s + curvature(history, t, s, path)        # (5)
        x = x_s
    return x


def step(x, x0_hat, n_hat, t, s, path):
    """Equation (3), from level t to s: deblur along M, denoise along sigma."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels_of(path, t), levels_of(path, s)
    deblurred = idct2((attenuation(alpha_s, x) - attenuation(alpha_t, x)) * dct2(x0_hat))
    return x + deblurred + expand_level(sigma_s - sigma_t, x) * n_hat           # (3)


def noise_estimate(x, d, t, path):
    """n_hat = (x - D) / sigma, the slope in sigma of the flow; 0 where there is no noise."""
    sigma = expand_level(levels_of(path, t)[1], x)
    return torch.where(sigma > 0, (x - d) / sigma, 0)                           # (2)


def evaluation(x0_hat, d, t, path):
    """What (5) keeps of an evaluation: l = -ln sigma and, in the DCT domain, x0_hat and what the
    heads disagree by, e = D - V M V^T x0_hat: [2, B, C, H, W]."""
    alpha, sigma = levels_of(path, t)
    u = dct2(x0_hat)
    return -sigma.log(), torch.stack([u, dct2(d) - attenuation(alpha, x0_hat) * u])


def curvature(history, t, s, path, cells=200):
    """What (5) adds to Euler's step from t to s: the integrals of x0_hat d(M / sigma) and of
    e d(1 / sigma), less their values at t, for polynomials in l through the evaluations of the
    history, the newest first. In Newton's form, summed over cells that are even in ln t."""
    (newest, value), *older = history
    history = [(newest, value)] + [h for h in older if h[0] < newest]   # sigma may stand still
    nodes, values = zip(*history)
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
        raise ValueError(f"churn climbs to t = {t_hat:.3g}, where the path falls: give s_max")
    climb = (alpha_hat ** 2 - alpha ** 2).sqrt()
    q = attenuation(climb, x)                                   # M_that / M_t: both can underflow
    sigma, sigma_hat = expand_level(sigma, x), expand_level(sigma_hat, x)
    u_hat = q * dct2(x) + (sigma_hat ** 2 - q ** 2 * sigma ** 2).sqrt() * dct2(noise)       # (4)
    return idct2(u_hat)


def evaluate(net, path, x, t):
    alpha, sigma = (v.to(x.device) for v in levels_of(path, t))
    d, r = net(x, alpha, sigma)
    return d.double(), r.double()


def sample(net, path, latents, steps=None, colour=None, init=None, level=None, solver="heun",
           **options):
    """Unit normal latents [B, C, H, W] -> images, float64, not clamped. options: see solve.

    steps: 18, or 12 for multistep, which has time steps of its own. colour: where a path without
    noise starts, {"mean": [C], "cov": [C][C]} of the mean colours of the images. init [1, C, H, W]:
    degraded to `level`, the start instead. Raises UserError for a path that breaks its contract,
    and ValueError for an impossible start.
    """
    h, w = latents.shape[-2:]
    check_path(path, h, w)
    t_min, t_max = path.t_range(h, w)
    t_max = t_max if level is None else level
    alpha, sigma = levels_of(path, t_max)
    if init is not None:
        if init.shape != (1, *latents.shape[1:]) or not init.is_floating_point():
            raise ValueError(f"init must be float {[1, *latents.shape[1:]]} in [-1, 1], not "
                             f"{init.dtype} {list(init.shape)}")
        x, _ = degrade(init.to(latents).double(), alpha, sigma, latents.double())
    elif sigma > 0:
        x = sigma.item() * latents.double()
    elif colour is None:
        raise ValueError("a path without noise starts from a plain image: give its colour")
    else:
        x = plain_image(latents.double(), **colour)
    steps = STEPS.get(solver, 1) if steps is None else steps
    times, ends = time_steps(steps, t_min, t_max), torch.tensor([t_min, t_max]).double()
    if solver == "multistep" and sigma > 0:
        times = multistep_times(steps, path, h, w, t_max)
    elif (time_of(*levels_of(path, ends)) != ends).any():       # t is a parameter of its own
        low, high = sum(levels_of(path, ends)).tolist()
        values = time_steps(steps, low, high)[1:-1]
        times[1:-1] = times_at(lambda t: sum(levels_of(path, t)), values, t_max)
    return solve(net, path, x, times, solver, **options)


def fast_solver(path):
    """Options of generate for pictures on the way: few evaluations, and near the flow's end."""
    solver = "heun" if isinstance(path, ColdPath) else "multistep"
    return dict(solver=solver, steps=STEPS[solver])


def plain_image(latents, mean, cov):
    """Images of one colour each, drawn from a Gaussian with mean [C] and cov [C][C]."""
    mean, cov = torch.tensor(mean).to(latents), torch.tensor(cov).to(latents)
    values, vectors = torch.linalg.eigh(cov)                    # cov may be singular: no Cholesky
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T     # whatever signs eigh has chosen
    z = latents.mean((2, 3)) * math.sqrt(latents[0, 0].numel())         # [B, C], unit normal
    colour = mean + z @ root
    return colour[:, :, None, None].expand_as(latents)          # [B, C, H, W]


def seed_noise(seeds, shape):
    """A function that returns float64 unit normals [len(seeds), *shape]. Each seed has a generator
    of its own, so that its image does not depend on its batch, and on the CPU, so that it does not
    depend on the device."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g, dtype=torch.float64)
                                for g in generators])


def classes_of(seeds, classes, counts=None, label=None):
    """The class of each seed: label or else its remainder or, where the counts of the classes are
    known, drawn as often as they are. Multiples of the golden ratio fill [0, 1) evenly, in any
    range of seeds."""
    if label is not None:
        return [label] * len(seeds)
    if counts is None:
        return [s % classes for s in seeds]
    ends = torch.tensor(counts, dtype=torch.float64).cumsum(0)
    place = [(s * 0x9E3779B97F4A7C15 % 2 ** 64) / 2 ** 64 for s in seeds]
    place = torch.tensor(place, dtype=torch.float64) * ends[-1]
    return torch.searchsorted(ends, place, right=True).clamp(max=classes - 1).tolist()


def generate(net, path, shape, seeds, device=None, batch=64, label=None, counts=None, **options):
    """Yields the images of the seeds, batch by batch: float64 [b, C, H, W], shape = (C, H, W), on
    the device, the net's by default.

    label: the class of a class-conditional net; None: that of classes_of. options: see sample.
    """
    classes, heads = getattr(net, "classes", 0), net
    device = device or next(net.parameters()).device
    for i in range(0, len(seeds), batch):
        some = seeds[i:i + batch]
        noise = seed_noise(some, shape)
        if classes:
            labels = classes_of(some, classes, counts, label)
            heads = partial(net, label=torch.tensor(labels, device=device))
        yield sample(heads, path, noise().to(device), noise=noise, **options)


def sampling_path(checkpoint, bnr=None, name=None):
    """The path to sample a checkpoint along. A network of --bnr any takes a ratio, 0.5 by default,
    or the path "blurring"; any other network takes its own path only. Raises UserError."""
    config, channels = checkpoint["config"], checkpoint["data"]["shape"][0]
    try:
        trained = make_path(config["bnr"], config.get("path"))
        if isinstance(trained, ColdPath) and (config["param"] == "noise" or not plain_image(
                torch.ones(1, channels, 1, 1), **config["colour"]).isfinite().all()):
            raise ValueError("a cold model predicts no noise, and starts from a finite colour")
    except (ValueError, TypeError, KeyError, RuntimeError) as e:
        raise UserError(f"this model cannot be sampled from the command line: {e}") from None
    if isinstance(trained, AnyBNR):
        if (bnr or 0) > AnyBNR.max_bnr:
            raise UserError(f"--bnr {bnr:g}: this model was trained for ratios from 0 to "
                            f"{AnyBNR.max_bnr}")
        return make_path(0.5 if bnr is None else bnr, name)
    if bnr is not None or name is not None:
        own = f"the path {config['path']}" if config.get("path") else f"BNR {config['bnr']:g}"
        raise UserError("--bnr and --path are for a model trained with --bnr any; this one has "
                        f"{own}")
    return trained


def sampler_options(p):
    a = p.add_argument
    a("--steps", type=number(int, 1, 10000),
      help="steps; Heun evaluates the network 2 steps - 1 times, the others once a step "
           "(default: 12 for multistep, else the model's --sample-steps)")
    a("--solver", choices=list(STEPS), default="heun",
      help="heun with 18 steps (NFE 35) for the paper's numbers; multistep, with time steps of its "
           "own, 9 steps for a look and 12 for results, up to about BNR 0.5 (default heun)")
    a("--path", choices=["blurring"], help="for a model of --bnr any: Hoogeboom & Salimans' path")
    a("--churn", type=number(float, 0, 1e6), default=0.,
      help="EDM's S_churn: fresh noise before each step (default 0)")
    a("--s-min", type=number(float, 0), default=0., help="churn from this level (default 0)")
    a("--s-max", type=number(float, 0), default=math.inf,
      help="churn up to this level (default inf)")
    a("--s-noise", type=number(float, 0, 10), default=1.,
      help="EDM's S_noise: the standard deviation of that noise (default 1)")
    a("--precision", choices=["fp32", "bf16"], default="fp32",
      help="of the network; bf16 is faster on a GPU (default fp32)")
    a("--compile", action="store_true",
      help="torch.compile the network: takes a minute or two, then faster on a GPU")
    a("--class", dest="label", help="of a class-conditional model: the name of a class, or its "
                                    "position where no name is a number")
    add_device_option(p)


def sampler(args, net, checkpoint):
    """The sampler's options as keywords of generate, and the NFE. Raises UserError."""
    if args.solver == "multistep" and (args.churn or checkpoint["config"]["bnr"] == math.inf):
        raise UserError("--solver multistep takes no churn and no cold model: use heun or euler")
    if (args.s_min, args.s_max, args.s_noise) != (0, math.inf, 1) and not args.churn:
        raise UserError("--s-min, --s-max and --s-noise belong to --churn, which is 0")
    if args.s_min > args.s_max:
        raise UserError(f"--s-min {args.s_min:g} is above --s-max {args.s_max:g}")
    heuns = checkpoint["options"].get("sample_steps", STEPS["heun"])
    steps = args.steps or (STEPS["multistep"] if args.solver == "multistep" else heuns)
    nfe = 2 * steps - 1 if args.solver == "heun" else steps
    options = dict(steps=steps, solver=args.solver, churn=args.churn, s_min=args.s_min,
                   s_max=args.s_max, s_noise=args.s_noise,
                   colour=checkpoint["config"].get("colour"))
    if args.label is not None:
        classes = checkpoint["data"]["classes"][:net.classes]
        positions = [] if any(c.isdecimal() for c in classes) else map(str, range(len(classes)))
        names = classes if args.label in classes else list(positions)
        if args.label not in names:
            raise UserError(f"--class {args.label}: the classes are {', '.join(classes)}" if classes
                            else "--class is for a model trained with --cond")
        options["label"] = names.index(args.label)
    return options, nfe


def seed_list(text):
    """An argparse type: 0-63 or 1,5,7-9 -> the seeds. A range takes no memory."""
    ranges = []
    for part in text.split(","):
        first, *last = part.split("-", 1)
        last = last[0] if last else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 2 ** 63 - 1):
            raise argparse.ArgumentTypeError(f"must be like 0-63 or 1,5,7-9, not {text!r}")
        ranges.append(range(int(first), int(last) + 1))
    if len(ranges) == 1:
        return ranges[0]
    if sum(r.stop - r.start for r in ranges) > 10 ** 6:
        raise argparse.ArgumentTypeError("must be one range, or at most 1,000,000 seeds in several")
    return [seed for r in ranges for seed in r]


def arguments():
    p = Parser(description="Draw images from a trained model.")
    a = p.add_argument
    a("--ckpt", required=True, help="the model: ema.pt of train.py")
    a("--seeds", type=seed_list, help="one image a seed (default 0-63, with --init 0-7); of a "
                                      "class-conditional model, the seed modulo the number of "
                                      "classes is its class, unless --class is given")
    a("--out", default="samples",
      help="folder of the PNGs, or of .npy files where the data are latents or have neither 1 nor "
           "3 channels; classes.json there says the class of each (default samples)")
    a("--grid", action="store_true", help="write only the grid, OUT-grid.png")
    a("--bnr", type=number(float, 0), metavar="R",
      help="for a model of --bnr any: the ratio, 0 to 10 (default 0.5)")
    sampler_options(p)
    a("--init", help="start from this image, degraded to --level")
    a("--level", type=number(float, 0.01), help="level t of --init (default 1)")
    a("--batch", type=number(int, 1), default=64, help="images at a time (default 64)")
    args = p.parse_args()
    if args.level and not args.init:
        p.error("--level is for --init: the level that your own image is degraded to")
    if args.bnr is not None and args.path:
        p.error("--bnr and --path are two ways to choose the path: give one of them")
    return p, args


def main():
    p, args = arguments()
    with process_group(), p.one_line_errors():
        full_float32()
        net, checkpoint = load_model(args.ckpt, args.device, args.precision, args.compile)
        options, nfe = sampler(args, net, checkpoint)
        path = sampling_path(checkpoint, args.bnr, args.path)
        facts, label = checkpoint["data"], options.get("label")
        low, high = path.t_range(*facts["shape"][1:])
        if args.level and not low < args.level <= high:
            raise UserError(f"--level {args.level:g}: must be above {low} and at most {high:g}")
        if facts.get("latents") and (args.init or args.grid):
            raise UserError("--init and --grid are for images, and this model's data are latents")
        if args.init:
            init = normalize(read_image(args.init, *facts["shape"]))
            options.update(init=init, level=args.level or 1.)
        if not args.seeds:
            alike = isinstance(path, ColdPath) and (args.label or not net.classes)      # no noise
            args.seeds = range((1 if alike else 8) if args.init else 64)
        if net.classes and rank() == 0:
            names = facts["classes"][:net.classes]
            say(f"class {names[label]}" if label is not None else
                f"the classes of seeds 0, 1, ...: {', '.join(names)}, in turn")
        draw_images(args, net, path, facts, options, nfe)


def draw_images(args, net, path, facts, options, nfe):
    """One file a seed in the folder --out, and a grid of the first 256; processes share them."""
    seeds, latents = args.seeds[rank()::world_size()], facts.get("latents")
    suffix = "png" if facts["shape"][0] in (1, 3) and not latents else "npy"
    out, shown = args.out.rstrip("/"), []
    if os.path.basename(out) in ("", ".", ".."):
        out = os.path.abspath(args.out)                         # the grid is named after it
    os.makedirs((os.path.dirname(out) or ".") if args.grid else out, exist_ok=True)
    bar = progress(net, nfe * math.ceil(len(seeds) / args.batch))
    todo = iter(seeds)
    for x in generate(net, path, facts["shape"], seeds, args.device, args.batch, **options):
        images = to_uint8(x).cpu()
        for image, state, seed in zip(images, x, todo) if not args.grid else ():
            if suffix == "png":
                save_image(image, f"{out}/{seed:06d}.png")
            else:
                np.save(f"{out}/{seed:06d}.npy", state.float().cpu().numpy())
        shown += images[:math.ceil(256 / world_size()) - len(shown)]
    bar.close()
    if world_size() > 1:                                        # back to the order of the seeds
        parts = [None] * world_size()
        dist.all_gather_object(parts, shown)
        shown = [image for some in zip_longest(*parts) for image in some if image is not None]
    if rank() > 0:
        return
    if net.classes and not args.grid:
        labels = classes_of(args.seeds, net.classes, label=options.get("label"))
        with atomic_write(f"{out}/classes.json", "w") as f:
            json.dump({f"{seed:06d}.{suffix}": facts["classes"][label]
                       for seed, label in zip(args.seeds, labels)}, f)
    if not latents:
        save_grid(torch.stack(shown[:256]), f"{out}-grid.png")
    files = ([] if args.grid else [f"{out}/"]) + ([] if latents else [f"{out}-grid.png"])
    say(f"{len(args.seeds)} images, {options['solver']} {options['steps']} steps, NFE {nfe} "
        f"(network evaluations an image): {' and '.join(files)}")


def progress(net, evaluations):
    """A progress bar that counts the network's evaluations."""
    bar = tqdm(total=evaluations, unit=" evaluations", disable=rank() > 0)
    net.register_forward_hook(lambda *_: bar.update() and None)
    return bar


if __name__ == "__main__":
    main()
