"""The sampler: from noise to images by deblurring and denoising together, equations (2) to (5).

    python sample.py --ckpt run/ema.pt --seeds 0-63                  # a PNG a seed in samples/
    python sample.py --ckpt run/ema.pt --seeds 0-2 --strip           # the steps: samples-strip.png
    python sample.py --ckpt run/ema.pt --init cat.png --level 1      # your own, degraded and back
    python sample.py --ckpt run/ema.pt --interpolate 3-8 10          # from one seed to another
    python sample.py --ckpt any/ema.pt --bnr 0.3                     # a network of --bnr any

Equation numbers are those of the README.
"""
import argparse
import math
import os
import re
from functools import partial
from itertools import zip_longest

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from degrade import (AnyBNR, ColdPath, ConstantBNR, attenuation, dct2, degrade, expand_level, idct2,
                     make_path)
from model import load_model
from util import (Parser, UserError, add_device_option, film_strip, full_float32, normalize, number,
                  process_group, rank, read_image, save_grid, save_image, say, to_uint8, warn,
                  world_size, writable_folder)

GAUSS_LEGENDRE = np.polynomial.legendre.leggauss(64)            # nodes in [-1, 1] and weights


def time_steps(n, t_min=0.002, t_max=80., rho=7.):
    """EDM's n levels from t_max to t_min, then 0: float64 [n + 1]."""
    i = torch.linspace(0, 1, n, dtype=torch.float64)
    t = (t_max ** (1 / rho) + i * (t_min ** (1 / rho) - t_max ** (1 / rho))) ** rho         # (11)
    return torch.cat([t, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def solve(net, path, x, times, solver="heun", churn=0., s_min=0., s_max=math.inf, noise=None,
          watch=None):
    """Carry the state x [B, C, H, W] down the levels `times` along the flow (2), in float64.

    net: (x, alpha, sigma) -> D, R. times: falling, [n + 1]. solver: "euler" and "multistep" call
    net once a step, "heun" twice, but once for a last step to 0. churn: EDM's S_churn, for levels
    from s_min to s_max, with fresh noise from noise(), unit normal like x. watch(t, x, D, R) sees
    the first evaluation of each step. Raises ValueError for another solver, and for multistep with
    churn or without noise.
    """
    if solver not in ("euler", "heun", "multistep"):
        raise ValueError(f"solver must be euler, heun or multistep, not {solver}")
    x, times, before = x.double(), times.tolist(), None
    if solver == "multistep" and (churn or path.levels(times[0])[1] == 0):
        raise ValueError("multistep needs a path with noise and no churn: use heun or euler")
    for t, s in zip(times[:-1], times[1:]):
        if churn and s_min <= t <= s_max:
            t_hat = t * (1 + min(churn / (len(times) - 1), math.sqrt(2) - 1))
            fresh = torch.randn_like(x) if noise is None else noise().to(x)
            x, t = churn_step(x, t, t_hat, path, fresh), t_hat
        d, r = evaluate(net, path, x, t)
        if watch:
            watch(t, x, d, r)
        x0_hat, n_hat = d + r, noise_estimate(x, d, t, path)
        x_s = step(x, x0_hat, n_hat, t, s, path)                                # (3), Euler
        if solver == "heun" and s > 0:                          # the same with both ends' average
            d, r = evaluate(net, path, x_s, s)
            n_s = noise_estimate(x_s, d, s, path)
            x_s = step(x, (x0_hat + d + r) / 2, (n_hat + n_s) / 2, t, s, path)      # (3)
        if solver == "multistep":
            if s == 0:
                x_s = x0_hat
            elif before is not None:
                x_s = x_s + slope_correction(x0_hat, t, *before, s, path)
            before = x0_hat, t
        x = x_s
    return x


def step(x, x0_hat, n_hat, t, s, path):
    """Equation (3), from level t to s: deblur along M, denoise along sigma."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path.levels(t), path.levels(s)
    deblurred = idct2((attenuation(alpha_s, x) - attenuation(alpha_t, x)) * dct2(x0_hat))
    return x + deblurred + expand_level(sigma_s - sigma_t, x) * n_hat           # (3)


def noise_estimate(x, d, t, path):
    """n_hat = (x - D) / sigma, the slope in sigma of the flow; 0 where there is no noise."""
    sigma = expand_level(path.levels(t)[1], x)
    return torch.where(sigma > 0, (x - d) / sigma, 0)                           # (2)


def slope_correction(x0_hat, t, x0_before, t_before, s, path):
    """What (5) adds to Euler's step from t to s, for an x0_hat linear in l = -ln sigma through the
    evaluations at t_before and t."""
    sigma_before, sigma_t, sigma_s = (path.levels(level)[1] for level in (t_before, t, s))
    k = (dct2(x0_hat) - dct2(x0_before)) / math.log(sigma_before / sigma_t)
    m_s = attenuation(path.levels(s)[0], x0_hat)
    j = integral(sigma_t, sigma_s, path, x0_hat)
    return sigma_s * idct2(k * (math.log(sigma_t / sigma_s) * m_s / sigma_s - j))           # (5)


def integral(sigma_t, sigma_s, path, x):
    """J of (5), the integral of M e^l dl from sigma_t to sigma_s, l = -ln sigma: float64 [H, W].
    Gauss-Legendre, for any path whose t is sigma."""
    nodes, weights = GAUSS_LEGENDRE
    middle, half = -math.log(sigma_t * sigma_s) / 2, math.log(sigma_t / sigma_s) / 2
    l = middle + half * torch.from_numpy(nodes).to(x.device)                    # [64]
    m = attenuation(path.levels(torch.exp(-l))[0], x)                           # [64, 1, H, W]
    w = half * torch.from_numpy(weights).to(x.device) * torch.exp(l)
    return (w[:, None, None, None] * m).sum((0, 1))                             # J of (5)


def churn_step(x, t, t_hat, path, noise):
    """Equation (4), from level t up to t_hat, exactly as the forward process goes."""
    (alpha, sigma), (alpha_hat, sigma_hat) = path.levels(t), path.levels(t_hat)
    q = attenuation(math.sqrt(alpha_hat ** 2 - alpha ** 2), x)  # M_that / M_t: both can underflow
    u_hat = q * dct2(x) + (sigma_hat ** 2 - q ** 2 * sigma ** 2).sqrt() * dct2(noise)       # (4)
    return idct2(u_hat)


def evaluate(net, path, x, t):
    alpha, sigma = path.levels(torch.as_tensor(t, dtype=torch.float64, device=x.device))
    d, r = net(x, alpha, sigma)
    return d.double(), r.double()


def sample(net, path, latents, steps=18, colour=None, **options):
    """Unit normal latents [B, C, H, W] -> images, float64, not clamped. options: see solve.

    colour: where a path without noise starts, {"mean": [C], "cov": [C][C]} of the mean colours of
    the images. Raises ValueError where such a path has none.
    """
    t_min, t_max = path.t_range(*latents.shape[-2:])
    x = path.levels(t_max)[1] * latents.double()
    if path.levels(t_max)[1] == 0:
        if colour is None:
            raise ValueError("a path without noise starts from a plain image: give its colour")
        x = plain_image(latents.double(), **colour)
    return solve(net, path, x, time_steps(steps, t_min, t_max), **options)


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


def walk(first, last, n):
    """Like seed_noise, but of n places: from the noise of one seed to that of another, along the
    great circle, so that the noise stays unit normal."""
    def places_noise(places, shape):
        ends = seed_noise([first, last], shape)

        def draw():
            a, b = ends()
            angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
            shares = [i / (n - 1) for i in places]
            return torch.stack([(torch.sin((1 - s) * angle) * a + torch.sin(s * angle) * b)
                                / torch.sin(angle) for s in shares])
        return draw
    return places_noise


def fast_solver(path):
    """The solver and steps of grids and of --fid-every, as keywords of generate."""
    if isinstance(path, ColdPath):
        return dict(solver="heun", steps=18)
    return dict(solver="multistep", steps=12)


def generate(net, path, shape, seeds, device=None, batch=64, init=None, level=None, label=None,
             steps=18, colour=None, noise_of=seed_noise, counts=None, **options):
    """Yields the images of the seeds, batch by batch: float64 [b, C, H, W], shape = (C, H, W), on
    the device, the net's by default.

    init [1, C, H, W]: degraded to `level` and restored, instead of starting from noise. label: the
    class of a class-conditional net; None: the seed modulo their number. options: see solve.
    """
    classes, heads = getattr(net, "classes", 0), net
    device = device or next(net.parameters()).device
    for i in range(0, len(seeds), batch):
        some = seeds[i:i + batch]
        noise = noise_of(some, shape)
        latents = noise().to(device)
        if classes:
            labels = [s % classes if label is None else label for s in some]
            heads = partial(net, label=torch.tensor(labels, device=device))
        if init is None:
            yield sample(heads, path, latents, steps, colour, noise=noise, **options)
        else:
            x, _ = degrade(init.double().to(device), *path.levels(level), latents)
            times = time_steps(steps, path.t_range(*shape[1:])[0], level)
            yield solve(heads, path, x, times, noise=noise, **options)


def sampling_path(checkpoint, bnr=None, name=None):
    """The path to sample a checkpoint along. A network of --bnr any takes a ratio, 0.5 by default,
    or the path "blurring"; any other network takes its own path only. Raises UserError."""
    config, channels = checkpoint["config"], checkpoint["data"]["shape"][0]
    try:
        trained = make_path(config["bnr"], config.get("path"))
        if isinstance(trained, ColdPath):
            if config["param"] == "noise":
                raise ValueError("a cold model has no noise to predict")
            start = plain_image(torch.ones(1, channels, 1, 1), **config["colour"])
            if not start.isfinite().all():
                raise ValueError("the colour that it starts from is not finite")
    except (ValueError, TypeError, KeyError, RuntimeError) as e:
        raise UserError(f"this model cannot be sampled from the command line: {e}") from None
    if isinstance(trained, AnyBNR):
        if name is not None:
            return make_path(None, name)
        if not 0 <= (bnr or 0) <= AnyBNR.max_bnr:
            raise UserError(f"--bnr {bnr:g}: this model was trained for ratios from 0 to "
                            f"{AnyBNR.max_bnr}")
        return ConstantBNR(0.5 if bnr is None else bnr)
    if bnr is not None or name is not None:
        own = f"the path {config['path']}" if config.get("path") else f"BNR {config['bnr']:g}"
        raise UserError("--bnr and --path are for a model trained with --bnr any; this one has "
                        f"{own}")
    return trained


def sampler_options(p):
    a = p.add_argument
    a("--steps", type=number(int, 1, 10000),
      help="steps; Heun evaluates the network 2 steps - 1 times, the others once a step "
           "(default: the model's --sample-steps)")
    a("--solver", choices=["euler", "heun", "multistep"], default="heun", help="default heun")
    a("--path", choices=["blurring"], help="for a model of --bnr any: Hoogeboom & Salimans' path")
    a("--churn", type=number(float, 0, 1e6), default=0.,
      help="EDM's S_churn: fresh noise before each step (default 0)")
    a("--s-min", type=number(float, 0), default=0., help="churn from this level (default 0)")
    a("--s-max", type=number(float, 0), default=math.inf,
      help="churn up to this level (default inf)")
    a("--precision", choices=["fp32", "bf16"], default="fp32",
      help="of the network; bf16 is faster on a GPU (default fp32)")
    a("--compile", action="store_true",
      help="torch.compile the network: takes a minute or two, then faster on a GPU")
    a("--class", dest="label", help="of a class-conditional model: the name or the number of a "
                                    "class (default: seed modulo their number)")
    add_device_option(p)


def sampler(args, net, checkpoint):
    """The sampler's options as keywords of generate, and the NFE. Raises UserError."""
    if args.solver == "multistep" and (args.churn or checkpoint["config"]["bnr"] == math.inf):
        raise UserError("--solver multistep takes no churn and no cold model: use heun or euler")
    if (args.s_min, args.s_max) != (0, math.inf) and not args.churn:
        raise UserError("--s-min and --s-max are the levels of --churn, which is 0")
    if args.s_min > args.s_max:
        raise UserError(f"--s-min {args.s_min:g} is above --s-max {args.s_max:g}")
    steps = args.steps or checkpoint["options"]["sample_steps"]
    nfe = 2 * steps - 1 if args.solver == "heun" else steps
    options = dict(steps=steps, solver=args.solver, churn=args.churn, s_min=args.s_min,
                   s_max=args.s_max, colour=checkpoint["config"].get("colour"))
    if args.label is not None:
        classes = checkpoint["data"]["classes"][:net.classes]
        if args.label not in classes + [str(i) for i in range(len(classes))]:
            raise UserError(f"--class {args.label}: the classes are {', '.join(classes)}" if classes
                            else "--class is for a model trained with --cond")
        named = args.label in classes
        options["label"] = classes.index(args.label) if named else int(args.label)
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


def interpolation(words):
    """A-B and N, as given -> the seeds A and B and the number N. Raises UserError."""
    match = re.fullmatch(r"(\d{1,18})-(\d{1,18}) (\d{1,6})", " ".join(words))
    first, last, n = map(int, match.groups()) if match else (0, 0, 0)
    if first == last or n < 2:
        raise UserError("--interpolate takes two different seeds and at least 2 images, like "
                        f"3-8 10, not {' '.join(words)}")
    return first, last, n


def main():
    p = Parser(description="Draw images from a trained model.")
    a = p.add_argument
    a("--ckpt", required=True, help="the model: ema.pt of train.py")
    a("--seeds", type=seed_list, help="one image a seed (default 0-63, with --init 0-7)")
    a("--interpolate", nargs=2, metavar=("A-B", "N"),
      help="instead of --seeds: N images on the way from the noise of seed A to that of seed B")
    a("--out", default="samples", help="folder of the PNGs, or of .npy files where the images have "
                                       "neither 1 nor 3 channels (default samples)")
    only = p.add_mutually_exclusive_group().add_argument
    only("--grid", action="store_true", help="write only the grid, OUT-grid.png")
    only("--strip", action="store_true", help="write only the film strip of the first three seeds, "
                                              "OUT-strip.png")
    a("--bnr", type=number(float, 0), nargs="+", metavar="R",
      help="for a model of --bnr any: the ratio, 0 to 10; with --strip up to three (default 0.5)")
    sampler_options(p)
    a("--init", help="start from this image, degraded to --level")
    a("--level", type=number(float, 0.01), help="level t of --init (default 1)")
    a("--batch", type=number(int, 1), default=64, help="images at a time (default 64)")
    args = p.parse_args()
    if args.level and not args.init:
        p.error("--level is for --init: the level that your own image is degraded to")
    if args.bnr and args.path:
        p.error("--bnr and --path are two ways to choose the path: give one of them")
    if args.interpolate and (args.seeds or args.strip):
        p.error("--interpolate has seeds of its own and no strip: leave --seeds and --strip out")
    if len(args.bnr or []) > (3 if args.strip else 1):
        p.error("--bnr takes one ratio, or with --strip up to three")
    with process_group(), p.one_line_errors():
        full_float32()
        net, checkpoint = load_model(args.ckpt, args.device, args.precision, args.compile)
        options, nfe = sampler(args, net, checkpoint)
        paths = [sampling_path(checkpoint, bnr, args.path) for bnr in args.bnr or [None]]
        low, high = paths[0].t_range(*checkpoint["data"]["shape"][1:])
        if args.level and not low < args.level <= high:
            raise UserError(f"--level {args.level:g}: must be above {low} and at most {high:g}")
        if args.init:
            init = normalize(read_image(args.init, *checkpoint["data"]["shape"]))
            options.update(init=init, level=args.level or 1.)
        if not args.seeds:
            alike = isinstance(paths[0], ColdPath) and (args.label or not net.classes)  # no noise
            args.seeds = range((1 if alike else 8) if args.init else 64)
        args.prefix = ""
        if args.interpolate:
            first, last, n = interpolation(args.interpolate)
            args.seeds, args.prefix = range(n), f"{first}-{last}-"
            options["noise_of"] = walk(first, last, n)
            if net.classes:
                options.setdefault("label", first % net.classes)
        out = args.out.rstrip("/")
        if os.path.basename(out) in ("", ".", ".."):
            out = os.path.abspath(args.out)                     # grid and strip are named after it
        draw = draw_strip if args.strip else draw_images
        draw(args, net, paths, checkpoint, out, options, nfe)


def draw_images(args, net, paths, checkpoint, out, options, nfe):
    """One file a seed in the folder out, and a grid of the first 256. Processes share the seeds."""
    shape, seeds = checkpoint["data"]["shape"], args.seeds[rank()::world_size()]
    writable_folder(os.path.dirname(out) or ".")
    if not args.grid:
        writable_folder(out)
        others = sum(not is_drawn_here(name, args) for name in os.listdir(out))
        if others and rank() == 0:
            warn(f"{out} holds {others} files of other seeds already, which stay")
    bar = progress(net, nfe * math.ceil(len(seeds) / args.batch))
    shown, done = [], 0
    try:
        for x in generate(net, paths[0], shape, seeds, args.device, args.batch, **options):
            images = to_uint8(x).cpu()
            for seed, image, state in zip(seeds[done:], images, x) if not args.grid else ():
                if shape[0] in (1, 3):
                    save_image(image, f"{out}/{args.prefix}{seed:06d}.png")
                else:
                    np.save(f"{out}/{args.prefix}{seed:06d}.npy", state.float().cpu().numpy())
            shown += images[:math.ceil(256 / world_size()) - len(shown)]
            done += len(images)
    except KeyboardInterrupt:                                   # keep what is drawn
        if shown and world_size() == 1:
            save_grid(torch.stack(shown), f"{out}-grid.png")
        raise
    bar.close()
    if world_size() > 1:                                        # back to the order of the seeds
        parts = [None] * world_size()
        dist.all_gather_object(parts, shown)
        shown = [image for some in zip_longest(*parts) for image in some if image is not None]
    if rank() == 0:
        save_grid(torch.stack(shown[:256]), f"{out}-grid.png")
        files = f"{out}-grid.png" if args.grid else f"{out}/ and {out}-grid.png"
        report(len(args.seeds), options, nfe, files)


def is_drawn_here(name, args):
    """Whether a file of the folder has the name of an image that is drawn now."""
    stem, _ = os.path.splitext(name)
    place = stem[len(args.prefix):]
    return stem.startswith(args.prefix) and place.isdecimal() and int(place) in args.seeds


def draw_strip(args, net, paths, checkpoint, out, options, nfe):
    """At most ten states of three seeds, or of one seed along up to three paths: four rows each."""
    if rank() > 0:
        return
    seeds = args.seeds[:3] if len(paths) == 1 else args.seeds[:1]
    writable_folder(os.path.dirname(out) or ".")
    bar = progress(net, nfe * len(paths))
    rows = []
    for path in paths:
        states = []
        for _ in generate(net, path, checkpoint["data"]["shape"], seeds, args.device, 3,
                          watch=lambda *state: states.append(state), **options):
            pass
        states = [states[round(i)] for i in np.linspace(0, len(states) - 1, min(10, len(states)))]
        for j, seed in enumerate(seeds):
            name = f"BNR {path.bnr:g}: " if len(paths) > 1 else f"{seed}: "
            # divided by sqrt(1 + sigma^2), or the noise would clip; R is small beside D
            rows.append((name + "x", [x[j] / math.sqrt(1 + path.levels(t)[1] ** 2)
                                      for t, x, d, r in states]))
            rows.append((name + "D", [d[j] for t, x, d, r in states]))
            rows.append((name + "4 R", [4 * r[j] for t, x, d, r in states]))
            rows.append((name + "D + R", [d[j] + r[j] for t, x, d, r in states]))
    bar.close()
    film_strip(rows, [f"t = {t:.3g}" for t, *_ in states], f"{out}-strip.png")
    report(len(seeds) * len(paths), options, nfe, f"{out}-strip.png")


def progress(net, evaluations):
    """A progress bar that counts the network's evaluations."""
    bar = tqdm(total=evaluations, unit=" evaluations", disable=rank() > 0)
    net.register_forward_hook(lambda *_: bar.update() and None)
    return bar


def report(n, options, nfe, files):
    say(f"{n} images, {options['solver']} {options['steps']} steps, NFE {nfe} (network evaluations "
        f"an image): {files}")


if __name__ == "__main__":
    main()
