"""The sampler: deblurring and denoising together, from noise to pictures. README, equations (2) to (5).

    python sample.py --ckpt run/ema.pt --seeds 0-63 --out samples/         # a PNG for each seed, and samples-grid.png
    python sample.py --ckpt run/ema.pt --seeds 0-2 --strip                 # how the two heads make a picture: samples-strip.png
    python sample.py --ckpt run/ema.pt --init cat.png --level 1            # your own picture, degraded and brought back
"""
import argparse
import math
import os

import numpy as np
import torch
from tqdm import tqdm

from data import Options, UserError, device, film_strip, normalize, read_picture, save_grid, save_picture, to_uint8, within
from degrade import attenuation, dct2, degrade, idct2
from model import build


def time_steps(n, t_min=0.002, t_max=80., rho=7.):
    """EDM's n levels from t_max to t_min, then 0: float64 [n + 1]."""
    i = torch.linspace(0, 1, n, dtype=torch.float64)
    t = (t_max ** (1 / rho) + i * (t_min ** (1 / rho) - t_max ** (1 / rho))) ** rho
    return torch.cat([t, torch.zeros(1, dtype=torch.float64)])


def sample(net, path, latents, steps=18, solver="heun", churn=0., t_min=0.002, t_max=80., rho=7., **options):
    """Unit normal latents [B, C, H, W] -> pictures, float64, not clamped. net: (x, t) -> blurry, residual. options: see solve."""
    return solve(net, path, latents.double() * t_max, time_steps(steps, t_min, t_max, rho), solver, churn, **options)


@torch.no_grad()
def solve(net, path, x, times, solver="heun", churn=0., s_min=0., s_max=math.inf, noise=None, watch=None):
    """Carry the state x [B, C, H, W] from level times[0] down the falling tensor of times to its last along the probability-flow ODE (2), in float64.

    solver: "euler" and "multistep" evaluate net once a step, "heun" twice but for a last step to 0. churn: EDM's S_churn, for levels
    from s_min to s_max, with fresh noise from noise(), unit normal like x. watch(t, x, blurry, residual) sees each step's first
    evaluation. Raises ValueError for another solver and for multistep with churn or without noise.
    """
    if solver not in ("euler", "heun", "multistep"):
        raise ValueError(f"solver is euler, heun or multistep, not {solver}")
    if solver == "multistep" and (churn or path.levels(1.)[1] == 0):
        raise ValueError("multistep needs a path with noise, and takes no churn: use heun or euler")
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
        x0_hat, n_hat = d + r, noise_estimate(x, d, t, path)
        x_s = step(x, x0_hat, n_hat, t, s, path)
        if solver == "heun" and s > 0:
            d, r = evaluate(net, x_s, s)
            x_s = step(x, (x0_hat + d + r) / 2, (n_hat + noise_estimate(x_s, d, s, path)) / 2, t, s, path)
        x = x_s
    return x


def step(x, x0_hat, n_hat, t, s, path):
    """Equation (3): x_s = x_t + V (M_s - M_t) V^T x0_hat + (sigma_s - sigma_t) n_hat."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path.levels(t), path.levels(s)
    deblurred = idct2((attenuation(alpha_s, x) - attenuation(alpha_t, x)) * dct2(x0_hat))
    return x + deblurred + (sigma_s - sigma_t) * n_hat                                          # (3)


def noise_estimate(x, d, t, path):
    """n_hat = (x - D) / sigma; 0 where there is no noise."""
    sigma = path.levels(t)[1]
    return (x - d) / sigma if sigma > 0 else torch.zeros_like(x)


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


def generate(net, shape, seeds, device, batch=64, init=None, level=None, steps=18, **options):
    """The states at t = 0, batch by batch, for those seeds; from init [1, C, H, W] degraded to level where given."""
    for i in range(0, len(seeds), batch):
        noise = seed_noise(seeds[i:i + batch], shape)
        latents = noise().to(device)
        if init is None:
            yield sample(net, net.path, latents, steps, noise=noise, **options)
        else:
            x = degrade(init.double().to(device), level, net.path, latents)[0]
            yield solve(net, net.path, x, time_steps(steps, t_max=level), noise=noise, **options)


def load_model(path, device="cpu", precision="fp32", compiled=False):
    """A checkpoint of train.py -> its Denoiser in eval mode, and the checkpoint's other entries. Raises UserError."""
    checkpoint = read_checkpoint(path)
    if "net" in checkpoint:
        raise UserError(f"{path} is what a run resumes from: take the ema.pt beside it")
    try:
        with torch.device("meta"):                              # nothing is allocated or initialised before the shapes are known to fit
            net = build(checkpoint["config"])
        net.load_state_dict(checkpoint.pop("weights"), assign=True)
        if len(checkpoint["data"]["shape"]) != 3:
            raise ValueError("its data have no shape [C, H, W]")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
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
    a("--steps", type=within(int, 1, 10000), help="steps; Heun evaluates the network 2 steps - 1 times (default: the model's preset's, 18 or 40)")
    a("--solver", choices=["euler", "heun", "multistep"], default="heun", help="default heun")
    a("--churn", type=within(float, 0, 1e6), default=0., help="EDM's S_churn: fresh noise before each step (default 0)")
    a("--s-min", type=within(float, 0), default=0., help="churn from this level (default 0)")
    a("--s-max", type=within(float, 0), default=math.inf, help="churn up to this level (default inf)")
    a("--precision", choices=["fp32", "bf16"], default="fp32", help="of the network; bf16 is faster on a GPU (default fp32)")
    a("--compile", action="store_true", help="torch.compile the network: a minute or two first, then faster on a GPU")
    a("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu (default: cuda if there is one)")


def sampler(args, checkpoint):
    """The sampler's options as keywords of generate, and its network evaluations. Raises UserError."""
    if args.solver == "multistep" and args.churn:
        raise UserError("multistep takes no churn: use --solver heun or euler")
    steps = args.steps or checkpoint.get("options", {}).get("sample_steps", 18)
    nfe = 2 * steps - 1 if args.solver == "heun" else steps
    return dict(steps=steps, solver=args.solver, churn=args.churn, s_min=args.s_min, s_max=args.s_max), nfe


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
    p.add_argument("--batch", type=within(int, 1), default=64, help="pictures at a time (default 64)")
    args = p.parse_args()
    if args.level and not args.init:
        p.error("--level is for --init: the level your own picture is degraded to")
    with p.one_line_errors():
        run(args)


def run(args):
    no_tf32()
    out = args.out.rstrip("/")
    if os.path.basename(out) in ("", ".", ".."):
        out = os.path.abspath(args.out)                         # grid and strip bear the folder's name
    net, checkpoint = load_model(args.ckpt, args.device, args.precision, args.compile)
    options, nfe = sampler(args, checkpoint)
    shape = checkpoint["data"]["shape"]
    seeds, batch = (args.seeds[:3], 3) if args.strip else (args.seeds, args.batch)
    init = normalize(read_picture(args.init, *shape)) if args.init else None

    os.makedirs(os.path.dirname(out) or "." if args.grid or args.strip else out, exist_ok=True)
    bar = tqdm(total=nfe * math.ceil(len(seeds) / batch), unit=" evaluations")

    def counted(x, t):
        bar.update()
        return net(x, t)
    counted.path = net.path
    states = []
    watch = (lambda *state: states.append(state)) if args.strip else None
    shown, done = [], 0
    for x in generate(counted, shape, seeds, args.device, batch, init, args.level or 1., watch=watch, **options):
        pictures = to_uint8(x).cpu()
        if not (args.grid or args.strip):
            for seed, picture in zip(seeds[done:], pictures):
                save_picture(picture, f"{out}/{seed:06d}.png")
        shown += pictures[:256 - len(shown)]
        done += len(pictures)
    bar.close()
    if args.strip:
        draw_strip(states, net, seeds, f"{out}-strip.png")
    else:
        save_grid(torch.stack(shown), f"{out}-grid.png")
    written = f"{out}-strip.png" if args.strip else f"{out}-grid.png" if args.grid else f"{out}/ and {out}-grid.png"
    print(f"{len(seeds)} pictures, {args.solver} {options['steps']} steps, NFE {nfe}: {written}")


if __name__ == "__main__":
    main()
