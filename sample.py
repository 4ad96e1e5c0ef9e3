"""The sampler: deblurring and denoising together, from noise to pictures. README, equations (2) to (5).

    python sample.py --ckpt run/ema.pt --seeds 0-63 --out samples/         # a PNG for each seed, and samples-grid.png
    python sample.py --ckpt run/ema.pt --seeds 0-2 --strip                 # how the two heads make a picture: samples-strip.png
    python sample.py --ckpt run/ema.pt --init cat.png --level 1            # your own picture, degraded and brought back
    python sample.py --ckpt run/ema.pt --manifold 1000                     # does it keep to the forward process? a distance for each level
"""
import argparse
import math
import os
import zipfile
from functools import partial
from itertools import zip_longest

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (Options, UserError, device, film_strip, joined, load, normalize, rank, ranks, read_picture, save_grid, save_picture, to_uint8,
                  within)
from degrade import attenuation, dct2, degrade, frequencies, idct2, level_range, spread
from model import build


def time_steps(n, t_min=0.002, t_max=80., rho=7.):
    """EDM's n levels from t_max to t_min, then 0: float64 [n + 1]."""
    i = torch.linspace(0, 1, n, dtype=torch.float64)
    t = (t_max ** (1 / rho) + i * (t_min ** (1 / rho) - t_max ** (1 / rho))) ** rho
    return torch.cat([t, torch.zeros(1, dtype=torch.float64)])


def sample(net, path, latents, steps=18, solver="heun", churn=0., colour=None, **options):
    """Unit normal latents [B, C, H, W] -> pictures, float64, not clamped. net: (x, t) -> blurry, residual. options: see solve.

    colour: where a cold path starts, {"mean": [C], "cov": [C][C]} of the pictures' mean colours.
    """
    if path.cold and colour is None:
        raise ValueError("a cold path starts from a plain colour: give colour, the Gaussian of the pictures' mean colours")
    t_min, t_max = level_range(path, *latents.shape[-2:])
    x = plain(latents.double(), **colour) if path.cold else latents.double() * t_max
    return solve(net, path, x, time_steps(steps, t_min, t_max), solver, churn, **options)


def plain(latents, mean, cov):
    """Pictures of one colour each, from the Gaussian with that mean [C] and cov [C][C]; latents [B, C, H, W] unit normal."""
    mean, cov = torch.tensor(mean).to(latents), torch.tensor(cov).to(latents)
    values, vectors = torch.linalg.eigh(cov)                    # pictures of one colour in all have no Cholesky factor
    z = latents.mean((2, 3)) * math.sqrt(latents[0, 0].numel())                                 # [B, C], unit normal
    return (mean + z @ (vectors * values.clamp(min=0).sqrt()).T)[:, :, None, None].expand_as(latents)


@torch.no_grad()
def solve(net, path, x, times, solver="heun", churn=0., s_min=0., s_max=math.inf, noise=None, watch=None, blind=False):
    """Carry the state x [B, C, H, W] from level times[0] down the falling tensor of times to its last along the probability-flow ODE (2), in float64.

    solver: "euler" and "multistep" evaluate net once a step, "heun" twice but for a last step to 0. churn: EDM's S_churn, for levels
    from s_min to s_max, with fresh noise from noise(), unit normal like x. watch(t, x, blurry, residual) sees each step's first
    evaluation. blind: net is told no level; each picture's is read from the answer, and times only say by which ratio it falls.
    Raises ValueError for another solver, for multistep with churn or without noise, and for either when blind.
    """
    if solver not in ("euler", "heun", "multistep"):
        raise ValueError(f"solver is euler, heun or multistep, not {solver}")
    if solver == "multistep" and (churn or path.cold or blind) or churn and blind:
        raise ValueError("multistep needs a path with noise and no churn, and both need a network that knows its level: use heun or euler")
    x, times, before = x.double(), times.tolist(), None
    for t, s in zip(times[:-1], times[1:]):
        if churn and s_min <= t <= s_max:
            t_hat = t * (1 + min(churn / (len(times) - 1), math.sqrt(2) - 1))
            x, t = climb(x, t, t_hat, path, torch.randn_like(x) if noise is None else noise().to(x)), t_hat
        d, r = evaluate(net, x, t)
        if watch:
            watch(t, x, d, r)
        if solver == "multistep":
            x, before = multistep(x, d + r, t, s, path, before), (d + r, t)
            continue
        a = read_level(x, d) if blind else t                    # the levels of this step, from a
        b = a * s / t if blind else s                           # to b
        x0_hat, n_hat = d + r, noise_estimate(x, d, a, path)
        x_s = step(x, x0_hat, n_hat, a, b, path)
        if solver == "heun" and s > 0:
            d, r = evaluate(net, x_s, s)
            x_s = step(x, (x0_hat + d + r) / 2, (n_hat + noise_estimate(x_s, d, b, path)) / 2, a, b, path)
        x = x_s
    return x


def read_level(x, d):
    """sigma_hat = |x - D| / sqrt(d), [B]: the noise level as a blind denoiser's answer shows it."""
    return (x - d).square().mean((1, 2, 3)).sqrt()


def step(x, x0_hat, n_hat, t, s, path):
    """Equation (3): x_s = x_t + V (M_s - M_t) V^T x0_hat + (sigma_s - sigma_t) n_hat."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path.levels(t), path.levels(s)
    deblurred = idct2((attenuation(alpha_s, x) - attenuation(alpha_t, x)) * dct2(x0_hat))
    return x + deblurred + spread(sigma_s - sigma_t, x) * n_hat                                 # (3)


def noise_estimate(x, d, t, path):
    """n_hat = (x - D) / sigma; 0 where there is no noise."""
    sigma = spread(path.levels(t)[1], x)
    return torch.where(sigma > 0, (x - d) / sigma, 0)


def climb(x, t, t_hat, path, noise):
    """Equation (4): from level t up to t_hat, with as much fresh noise in each frequency as the forward process has there."""
    (alpha, sigma), (alpha_hat, sigma_hat) = path.levels(t), path.levels(t_hat)
    ratio = attenuation(math.sqrt(alpha_hat ** 2 - alpha ** 2), x)                              # M_that / M_t; both may underflow
    return idct2(ratio * dct2(x) + (sigma_hat ** 2 - ratio ** 2 * sigma ** 2).sqrt() * dct2(noise))        # (4)


def multistep(x, x0_hat, t, s, path, before=None):
    """Equation (5), with x0_hat constant, or linear in l = -ln sigma through `before` = (x0_hat, t) of the last step."""
    if s == 0:
        return x0_hat                                           # the linear term has no limit there
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path.levels(t), path.levels(s)
    m_t, m_s, ratio, u0 = attenuation(alpha_t, x), attenuation(alpha_s, x), sigma_s / sigma_t, dct2(x0_hat)
    u = ratio * dct2(x) + (m_s - ratio * m_t) * u0                                              # (5), x0_hat constant
    if before is not None:
        slope = (u0 - dct2(before[0])) / math.log(path.levels(before[1])[1] / sigma_t)          # of x0_hat in l
        u = u + sigma_s * slope * (math.log(sigma_t / sigma_s) * m_s / sigma_s - integral(sigma_t, sigma_s, path, x))
    return idct2(u)


def integral(sigma_t, sigma_s, path, x):
    """J = integral of M e^l dl from sigma_t to sigma_s, l = -ln sigma, by Gauss-Legendre: any path, float64 accurate. [H, W]"""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    middle, half = -math.log(sigma_t * sigma_s) / 2, math.log(sigma_t / sigma_s) / 2
    sigma = torch.exp(-(middle + half * torch.from_numpy(nodes)))                               # [64]
    m = attenuation(path.levels(sigma)[0], x)                                                   # [64, 1, H, W]
    return (torch.from_numpy(weights * half).to(x)[:, None, None, None] * m / sigma.to(x)[:, None, None, None]).sum((0, 1))


def evaluate(net, x, t):
    d, r = net(x, torch.as_tensor(t, dtype=torch.float64, device=x.device))
    return d.double(), r.double()


def seed_noise(seeds, shape):
    """A function that gives float64 unit normals [len(seeds), *shape], one generator a seed: a picture does not see its batch.

    The generators stay on the CPU, for the same bits on every device.
    """
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g, dtype=torch.float64) for g in generators])


def generate(net, shape, seeds, device, batch=64, init=None, level=None, label=None, steps=18, **options):
    """The states at t = 0 of a Denoiser, batch by batch, for those seeds; from init [1, C, H, W] degraded to level where given.

    label: the class, of a model that has classes; None: seed modulo their number.
    """
    heads = net
    for i in range(0, len(seeds), batch):
        some = seeds[i:i + batch]
        noise = seed_noise(some, shape)
        latents = noise().to(device)
        if net.unet.classes:
            heads = partial(net, label=torch.tensor([s % net.unet.classes if label is None else label for s in some], device=device))
        if init is None:
            yield sample(heads, net.path, latents, steps, colour=net.colour, noise=noise, blind=net.blind, **options)
        else:
            x = degrade(init.double().to(device), level, net.path, latents)[0]
            times = time_steps(steps, level_range(net.path, *shape[1:])[0], level)
            yield solve(heads, net.path, x, times, noise=noise, blind=net.blind, **options)


def manifold(net, pictures, device, n, batch=64, **options):
    """Do n samples pass where the forward process does? Rows (t, distance, floor), and t = 0 last.

    distance: Frechet, between projections of the sampler's states and of degraded pictures (uint8 [N, C, H, W], drawn with replacement)
    at the same level; floor: between two such sets of degraded pictures, what chance alone gives. The projections, the same for every
    model, are eight fixed random directions in each octave of frequency, each divided by sqrt(v + sigma^2), v its variance over the
    pictures: or the mean colour alone would count.
    """
    from fid import frechet_distance
    shape, g = pictures.shape[1:], torch.Generator().manual_seed(0)
    lam = frequencies(*shape[1:]).expand(*shape).flatten()
    octave = torch.floor(torch.log2(lam / lam[lam > 0].min()) / 2 + 1e-9)                       # of frequency; the mean is at -inf
    bands = [torch.randn(len(lam), 8, dtype=torch.float64, generator=g) * (octave == o)[:, None] for o in octave.unique()]
    basis = torch.cat([torch.linalg.svd(b, full_matrices=False)[0][:, :min(8, (b[:, 0] != 0).sum())] for b in bands], 1).to(device)
    project = lambda x: (dct2(x.double()).flatten(1) @ basis).cpu()                             # [B, K]

    def degraded(t):
        noisy = lambda x0: degrade(x0.to(device), t, net.path, torch.randn(x0.shape, generator=g).to(device))[0]
        index = torch.randint(len(pictures), (n,), generator=g)
        return torch.cat([project(noisy(normalize(pictures[i]))) for i in index.split(batch)])  # [n, K]

    v, states = degraded(0.).var(0), {}
    watch = lambda t, x, d, r: states.setdefault(t, []).append(project(x))
    for x in generate(net, shape, range(n), device, batch, watch=watch, **options):
        watch(0., x, None, None)
    for t, ours in states.items():
        scale = (v + net.path.levels(t)[1] ** 2).clamp(min=1e-8).sqrt()
        sets = (s / scale for s in (torch.cat(ours), degraded(t), degraded(t)))
        (a, b), (c, d), (e, f) = ((s.mean(0).numpy(), s.T.cov().numpy()) for s in sets)
        yield t, frechet_distance(a, b, c, d), frechet_distance(c, d, e, f)


def load_model(path, device="cpu", precision="fp32", compiled=False):
    """A checkpoint of train.py -> its Denoiser in eval mode, and the checkpoint's other entries. Raises UserError."""
    checkpoint = read_checkpoint(path)
    if "net" in checkpoint:
        raise UserError(f"{path} is what a run resumes from: take the ema.pt beside it")
    try:
        weights, (c, h, w) = checkpoint.pop("weights"), checkpoint["data"]["shape"]
        with torch.device("meta"):                              # nothing is allocated or initialised before the shapes are known to fit
            net = build(checkpoint["config"])
        net.load_state_dict(weights, assign=True)
        net.unet.check(h, w)
        if c != net.unet.in_channels or not all(type(n) is int and 0 < n <= 4096 for n in (h, w)):
            raise ValueError("it makes pictures of no known shape")
        if any((v.dtype, v.layout, v.device.type) != (torch.float32, torch.strided, "cpu") for v in weights.values()):
            raise ValueError("its weights are not float32")
        if sum(v.numel() * 4 for v in weights.values()) > os.path.getsize(path):
            raise ValueError("its weights say that they are larger than the file")
        classes, trained = checkpoint["data"]["classes"], checkpoint["options"]
        if type(trained["sample_steps"]) is not int or not 1 <= trained["sample_steps"] <= 10000 or trained["resolution"] not in (0, max(h, w)) \
                or not all(isinstance(v, str) for v in (trained["data"], *classes)) or len(classes) < net.unet.classes:
            raise TypeError("its options or classes are none of train.py's")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as e:
        raise UserError(f"{path} is no model of this project, or its weights do not fit its config: {' '.join(str(e).split())[:200]}") from None
    net = net.float().to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if precision == "bf16":
        net.forward = torch.autocast(torch.device(device).type, torch.bfloat16)(net.forward)
    if compiled:
        net.unet.compile()
    return net, checkpoint


def read_checkpoint(path):
    """A file of torch.save, plain tensors and types only -> dict on the CPU. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as z:                        # torch.save stores without compressing: nothing is larger than the file
            if sum(i.file_size for i in z.infolist()) > os.path.getsize(path):
                raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: train a model with train.py first") from None
    except Exception:                                           # zip, pickle and torch each have errors of their own
        raise UserError(f"{path} is no checkpoint of this project, or is damaged") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is no checkpoint of this project: it holds a {type(checkpoint).__name__}")
    return checkpoint


def no_tf32():
    """float32 in full: a seed's picture does not see its batch."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def draw_strip(states, net, seeds, path):
    """states: (t, x, D, R) along the way -> a film strip of at most ten columns, four rows a seed."""
    states = [states[round(i)] for i in np.linspace(0, len(states) - 1, min(10, len(states)))]
    rows = {}
    for j, seed in enumerate(seeds):
        # the state is shown divided by sqrt(1 + sigma^2), or its noise would all clip
        rows[f"{seed}: x"] = [x[j] / math.sqrt(1 + net.path.levels(t)[1] ** 2) for t, x, d, r in states]
        rows[f"{seed}: D"] = [d[j] for t, x, d, r in states]
        rows[f"{seed}: 4 R"] = [4 * r[j] for t, x, d, r in states]                             # small beside D
        rows[f"{seed}: D + R"] = [d[j] + r[j] for t, x, d, r in states]
    film_strip(rows, [f"t = {t:.3g}" for t, *_ in states], path)


def seed_list(text):
    """0-63 or 1,5,7-9 -> the seeds."""
    seeds = []
    for part in text.split(","):
        first, *last = part.split("-", 1)
        last = last[0] if last else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 2 ** 63):
            raise argparse.ArgumentTypeError(f"{text!r} names no seeds; write 0-63 or 1,5,7-9")
        seeds += range(int(first), int(last) + 1)
    return seeds


def sampler_options(p):
    a = p.add_argument
    a("--steps", type=within(int, 1, 10000), help="steps; Heun evaluates the network 2 steps - 1 times (default: the model's --sample-steps, 18 or 40 by preset)")
    a("--solver", choices=["euler", "heun", "multistep"], default="heun", help="default heun")
    a("--churn", type=within(float, 0, 1e6), default=0., help="EDM's S_churn: fresh noise before each step (default 0)")
    a("--s-min", type=within(float, 0), default=0., help="churn from this level (default 0)")
    a("--s-max", type=within(float, 0), default=math.inf, help="churn up to this level (default inf)")
    a("--precision", choices=["fp32", "bf16"], default="fp32", help="of the network; bf16 is faster on a GPU (default fp32)")
    a("--compile", action="store_true", help="torch.compile the network: a minute or two first, then faster on a GPU")
    a("--class", dest="label", help="of a class-conditional model: a class's name or number (default: seed modulo their number)")
    a("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu (default: cuda if there is one)")


def sampler(args, net, checkpoint):
    """The sampler's options as keywords of generate, and its network evaluations. Raises UserError."""
    if args.solver == "multistep" and (args.churn or net.path.cold or net.blind):
        raise UserError("multistep takes no churn, no cold and no blind model: use --solver heun or euler")
    if args.churn and net.blind:
        raise UserError("--churn needs the level that a blind model is not told: leave it out")
    steps = args.steps or checkpoint["options"]["sample_steps"]
    nfe = 2 * steps - 1 if args.solver == "heun" else steps
    options = dict(steps=steps, solver=args.solver, churn=args.churn, s_min=args.s_min, s_max=args.s_max)
    if args.label is not None:
        classes = checkpoint["data"]["classes"][:net.unet.classes]
        if args.label not in classes + [str(i) for i in range(len(classes))]:
            raise UserError(f"--class {args.label}: the model's classes are {', '.join(classes)}" if classes else
                            "--class is for a model trained with --cond")
        options["label"] = classes.index(args.label) if args.label in classes else int(args.label)
    return options, nfe


def main():
    p = Options(description="Draw pictures from a trained model.")
    p.add_argument("--ckpt", required=True, help="the model: ema.pt of train.py")
    p.add_argument("--seeds", type=seed_list, default="0-63", help="one picture a seed (default 0-63)")
    p.add_argument("--out", default="samples", help="folder of the PNGs; grid and strip stand beside it (default samples)")
    p.add_argument("--grid", action="store_true", help="write the grid alone, no PNG a seed")
    p.add_argument("--strip", action="store_true", help="write the film strip of the first three seeds alone")
    sampler_options(p)
    p.add_argument("--init", help="start from this picture, degraded to --level")
    p.add_argument("--level", type=within(float, 0.01, 80), help="noise level that --init is degraded to (default 1)")
    p.add_argument("--manifold", type=within(int, 100), metavar="N", help="print how far N samples stray from the forward process, level by level")
    p.add_argument("--data", help="with --manifold: the pictures to degrade (default: those that the model was trained on)")
    p.add_argument("--batch", type=within(int, 1), default=64, help="pictures at a time (default 64)")
    args = p.parse_args()
    if args.level and not args.init:
        p.error("--level is for --init: the level your own picture is degraded to")
    if args.data and not args.manifold:
        p.error("--data is for --manifold: the pictures of the forward process")
    if args.manifold and (args.init or args.grid or args.strip):
        p.error("--manifold prints a table of seeds from 0: it takes no --init, --grid or --strip")
    with joined(), p.one_line_errors():
        run(args)


def run(args):
    no_tf32()
    out = args.out.rstrip("/")
    if os.path.basename(out) in ("", ".", ".."):
        out = os.path.abspath(args.out)                         # grid and strip bear the folder's name
    net, checkpoint = load_model(args.ckpt, args.device, args.precision, args.compile)
    options, nfe = sampler(args, net, checkpoint)
    shape = checkpoint["data"]["shape"]
    if args.manifold:
        return show_manifold(args, net, checkpoint, nfe, options) if rank() == 0 else None
    low, high = level_range(net.path, *shape[1:])
    if args.level and not low < args.level <= high:
        raise UserError(f"--level {args.level:g}: this model's are above {low} and up to {high:g}" + ", pixels of blur" * net.path.cold)
    wanted = args.seeds[:3] if args.strip else args.seeds
    seeds, batch = (wanted, 3) if args.strip else (wanted[rank()::ranks()], args.batch)
    init = normalize(read_picture(args.init, *shape)) if args.init else None

    os.makedirs(os.path.dirname(out) or "." if args.grid or args.strip else out, exist_ok=True)
    bar, states, levels = tqdm(total=nfe * math.ceil(len(seeds) / batch), unit=" evaluations", disable=rank() > 0), [], {}
    net.register_forward_hook(lambda *_: bar.update() and None)

    def watch(t, x, d, r):
        if args.strip:
            states.append((t, x, d, r))
        if net.blind:
            levels.setdefault(t, []).append(read_level(x, d).cpu())
    shown, done = [], 0
    for x in generate(net, shape, seeds, args.device, batch, init, args.level or 1., watch=watch, **options):
        pictures = to_uint8(x).cpu()
        if not (args.grid or args.strip):
            for seed, picture in zip(seeds[done:], pictures):
                save_picture(picture, f"{out}/{seed:06d}.png")
        shown += pictures[:math.ceil(256 / ranks()) - len(shown)]
        done += len(pictures)
    bar.close()
    if ranks() > 1:
        each = [None] * ranks()
        dist.all_gather_object(each, shown)
        shown = [x for some in zip_longest(*each) for x in some if x is not None]
        if rank() > 0:
            return
    for t, read in levels.items():
        print(f"sigma of the schedule {t:8.4f}, sigma_hat {torch.cat(read).mean():8.4f} +- {torch.cat(read).std(correction=0):.4f}")
    if args.strip:
        draw_strip(states, net, seeds, f"{out}-strip.png")
    else:
        save_grid(torch.stack(shown), f"{out}-grid.png")
    written = f"{out}-strip.png" if args.strip else f"{out}-grid.png" if args.grid else f"{out}/ and {out}-grid.png"
    print(f"{len(wanted)} pictures, {args.solver} {options['steps']} steps, NFE {nfe}: {written}")


def show_manifold(args, net, checkpoint, nfe, options):
    trained = checkpoint["options"]
    try:
        data = load(args.data or trained["data"], trained["resolution"] or None)
    except UserError as e:
        raise UserError(e if args.data else f"{e}; the model was trained on it, --data says where it is now") from None
    pictures = data.pictures
    if net.unet.classes:
        if "label" not in options:
            raise UserError("--manifold of a class-conditional model compares one class: give --class")
        name = checkpoint["data"]["classes"][options["label"]]
        if name not in data.classes:
            raise UserError(f"the pictures have no class {name}")
        pictures = pictures[data.labels == data.classes.index(name)]
    if list(pictures.shape[1:]) != checkpoint["data"]["shape"]:
        raise UserError(f"the pictures are {list(pictures.shape[1:])}, the model's {checkpoint['data']['shape']}")
    print(f"{args.manifold} samples, {args.solver} {options['steps']} steps, NFE {nfe}\n{'t':>10} {'distance':>12} {'floor':>12}")
    for t, distance, floor in manifold(net, pictures, args.device, args.manifold, args.batch, **options):
        print(f"{t:10.4f} {distance:12.5g} {floor:12.5g}")


if __name__ == "__main__":
    main()
