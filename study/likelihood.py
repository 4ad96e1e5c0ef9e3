"""A bound on the likelihood of held-out images, which compares ratios that the loss cannot.

    python -m study.likelihood --ckpt any/ema.pt --data photos/ --bnr 0 0.1 0.2 0.5 1 2
    python -m study.likelihood --ckpt runs/compare/*/*/ema-000240.pt --data photos/

Along a schedule the DCT coefficients u_k = M_k x0_k + sigma n_k have the signal-to-noise ratios
SNR_k = M_k^2 / sigma^2, and for x0_hat = D + R and levels from sigma_min to sigma_max

    -log p(x0) <=   1/2 sum_k ln(2 pi e / SNR_k(sigma_min))           the last step, to the image
                  + 1/2 int sum_k E (x0_k - x0_hat_k)^2 d(-SNR_k)     along the schedule
                  + 1/2 sum_k M_k(sigma_max)^2 x0_k^2 / sigma_max^2   the start, from noise alone

It is the variational bound of the reverse process with infinitely many steps: the terms are those
of a Gaussian decoder around u_k / M_k, of the steps, and of the prior N(0, sigma_max^2). For the
exact posterior mean the integrand is the gradient of one function of all SNR_k (I-MMSE), so that
the value does not depend on the schedule; only how it is shared among levels and bands does. So
where ratios differ, a network estimates worse along one of them. Images of 8 bits have no density:
the value is a density at the resolution of sigma_min, and only differences mean something.
"""
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch

import train
from degrade import Schedule, attenuation, dct2, degrade
from sample import sampling_schedule
from study.common import Cells, bands, digest, matching, mean, parser, run, split
from study.compare import FIXED, interval, read_parts
from util.checkpoint import load_model, read_checkpoint
from util.cli import UserError, add_device_option, number
from util.images import normalize

LEVELS = 41                                     # an odd number
TURN = 10.                                      # sigma
EDGES = (0.1, 1., 10.)                          # of sigma, between the groups of levels
BANDS = 3                                       # groups of bands, from the lowest frequencies up
LEVEL_NAMES = ("sigma < 0.1", "0.1 to 1", "1 to 10", "> 10")
BAND_NAMES = ("low", "middle", "high")
FIELDS = [{"bnr": float, "network": {"preset": str, "bnr": (float, str)}, "seed": int,
           "kimg": float, "images": str, "checkpoint": str, "levels": int, "nats": [float],
           "by_level": [[float]], "by_band": [[float]],
           "grid": {"sigma": [float], "nats": [float]}}]


def options():
    p = parser("likelihood", "A bound on the likelihood of held-out images, in nats an image: "
                             "ratios and networks are compared image by image, with one noise.")
    a = p.add_argument
    a("--ckpt", nargs="+", default=[],
      help="checkpoints; a network of --bnr any is measured at each --bnr, others at their own")
    a("--data", help="the images, a tenth of which was held out as study.compare does")
    a("--bnr", type=number(float, 0, 10), nargs="+", default=[0., 0.1, 0.2, 0.5, 1., 2.],
      help="ratios of a network of --bnr any (default 0 0.1 0.2 0.5 1 2)")
    a("--parts", metavar="FILE.py", help="with the networks' own network or schedule")
    a("--images", type=number(int, 2), default=100, help="held-out images (default 100)")
    a("--levels", type=number(int, 3), default=LEVELS, help=f"an odd number (default {LEVELS})")
    add_device_option(p)
    args = p.parse_args()
    if args.quick:
        args.images = 4
        args.levels = 5
    if args.levels % 2 == 0:
        p.error("--levels must be an odd number: the integral is taken by Simpson's rule")
    if not args.plot_only and not (args.ckpt and args.data):
        p.error("--ckpt and --data are needed: the networks, and the images")
    return p, args


# The bound


def bound(net, schedule: Schedule, x0: torch.Tensor, levels: int = LEVELS, seed: int = 0):
    """The terms of the bound for images x0 [N, C, H, W] in [-1, 1], summed over channels: the
    ends [N, H, W], the integral by level [L, N, H, W], and the levels, [L] from sigma_min up.

    net: (x, alpha, sigma) -> D, R. The noise of a level depends on seed and level alone. The
    integral is taken by Simpson's rule over ln(1 + S_k SNR_k), S the mean power of x0: without an
    error for Gaussian images of that power, however few the levels, which are an odd number.
    """
    x0 = x0.double()
    u0 = dct2(x0)
    power = u0.square().mean((0, 1)).clamp(min=1e-9)            # [H, W]
    low, high = schedule.sigma_range(*x0.shape[2:])
    sigmas = grid(low, high, levels)
    alphas, _ = schedule.levels(sigmas)
    snr = attenuation(alphas, x0)[:, 0].square() / sigmas[:, None, None].to(x0.device) ** 2
    weights = simpson(snr, power)                               # [L, H, W]
    steps = []
    for i, (alpha, sigma) in enumerate(zip(alphas, sigmas)):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64).to(x0.device)
        x, _ = degrade(x0, alpha, sigma, noise)                                 # (1)
        d, r = net(x, alpha, sigma)
        error = (u0 - dct2(d.double() + r.double())).square()
        error = error + chance(x, u0, attenuation(alpha, x0), sigma, power)
        steps.append(weights[i] * error.sum(1) / 2)                             # [N, H, W]
    decoder = x0.shape[1] / 2 * (2 * math.pi * math.e / snr[0]).log()           # [H, W]
    prior = snr[-1] * u0.square().sum(1) / 2                                    # [N, H, W]
    return decoder + prior, torch.stack(steps), sigmas


def chance(x, u0, m, sigma, power) -> torch.Tensor:
    """A control variate, [N, C, H, W]: what the squared error of the linear estimate for Gaussian
    images of this power lacks to its mean over the noise. Its own mean is 0, and the error of any
    good network shares most of it, so that the sum needs far fewer images."""
    gain = m * power / (m ** 2 * power + sigma ** 2)
    error = (u0 - gain * dct2(x)).square()
    expected = (1 - gain * m).square() * u0.square() + (gain * sigma).square()
    return expected - error


def grid(low: float, high: float, n: int) -> torch.Tensor:
    """n levels from low up to high, float64: even in ln sigma below TURN, in 1 / sigma above it,
    where little of an image is left."""
    start = math.log1p(TURN / low)
    end = math.log1p(TURN / high)
    sigmas = TURN / torch.linspace(start, end, n, dtype=torch.float64).expm1()
    return sigmas.clamp(low, high)


def simpson(snr: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """Weights [L, H, W] of a sum over levels for an integral over SNR [L, H, W], which falls, by
    Simpson's rule in ln(1 + S SNR): trapezoids over all levels and over every second, extrapolated.
    L is odd. power: S, [H, W]."""
    weights = 4 / 3 * trapezoid(snr, power)
    weights[::2] -= trapezoid(snr[::2], power) / 3
    return weights


def trapezoid(snr: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    y = torch.log1p(power * snr)
    half_widths = -y.diff(dim=0) / 2                            # of the cells, [L - 1, H, W]
    share = torch.zeros_like(y)
    share[:-1] += half_widths
    share[1:] += half_widths
    return share * (1 / power + snr)                            # dSNR = (1 / S + SNR) dy


@torch.no_grad()
def measured(net, schedule: Schedule, x0: torch.Tensor, levels: int, device) -> dict:
    """What a cell holds: nats for each image, whole, by group of levels (the integral alone) and
    by group of bands; and their mean at each level."""
    ends, steps, sigmas = bound(net, schedule, x0.to(device), levels)
    group = torch.bucketize(sigmas, torch.tensor(EDGES, dtype=torch.float64))
    by_level = [steps[group == i].sum((0, 2, 3)) for i in range(len(EDGES) + 1)]
    group = band_groups(*x0.shape[2:])
    of_frequency = ends + steps.sum(0)                          # [N, H, W]
    by_band = [of_frequency[:, group == i].sum(1) for i in range(BANDS)]
    return {"nats": rounded(of_frequency.sum((1, 2))),
            "by_level": rounded(torch.stack(by_level, 1)),
            "by_band": rounded(torch.stack(by_band, 1)),
            "grid": {"sigma": rounded(sigmas, 5), "nats": rounded(steps.sum((2, 3)).mean(1), 4)}}


def band_groups(h: int, w: int) -> torch.Tensor:
    """[h, w]: 0 for the lowest third of the half-octave bands and the mean, to BANDS - 1."""
    _, band = bands(h, w)
    return band.clamp(min=0) * BANDS // (int(band.max()) + 1)


def rounded(values: torch.Tensor, digits: int = 2) -> list:
    return np.round(values.cpu().numpy(), digits).tolist()


# Networks


def compute(args, cells: Cells) -> list:
    parts = {}
    code = None
    if args.parts:
        parts = read_parts(args.parts)
        code = digest(args.parts)
    for filename in args.ckpt:
        net, checkpoint, schedules = network_of(args, filename, parts)
        _, held_out = split(args.data, checkpoint["data"]["shape"][-1])
        if len(held_out.images) < args.images:
            raise UserError(f"{args.data} has {len(held_out.images)} held-out images, and "
                            f"{args.images} are needed")
        order = torch.randperm(len(held_out.images), generator=torch.Generator().manual_seed(0))
        chosen = order[:args.images]                            # the files are sorted by class
        images = held_out.images[chosen]
        heads = net
        if net.classes:
            heads = partial(net, label=held_out.labels[chosen].to(args.device))
        for bnr, schedule in schedules.items():
            cell = cells.compute(
                partial(measured, heads, schedule, normalize(images), args.levels, args.device),
                images, filename, bnr=bnr, network=network_options(checkpoint, args.parts),
                code=code, seed=checkpoint["options"]["seed"], levels=args.levels)
            print(f"{filename}, BNR {bnr}: {mean(cell['nats']):.1f} nats", flush=True)
    return cells.cells


def network_of(args, filename: str, parts: dict):
    """The network of a checkpoint, the checkpoint, and {ratio: schedule} to measure it along."""
    checkpoint = read_checkpoint(filename)
    config = checkpoint["config"]
    if config["unet"] is None and "network" not in parts:
        raise UserError(f"{filename} has a network of its own: give its file as --parts")
    net = None
    if "network" in parts:
        net = parts["network"](tuple(checkpoint["data"]["shape"]), 0)
    net, checkpoint = load_model(filename, args.device, net=net)                # in fp32
    if config["bnr"] == "any" and "schedule" not in parts:
        return net, checkpoint, {bnr: sampling_schedule(checkpoint, bnr) for bnr in args.bnr}
    schedule = parts.get("schedule") or sampling_schedule(checkpoint)
    if config["bnr"] == math.inf or not isinstance(config["bnr"], (int, float)):
        raise UserError(f"{filename}: BNR {config['bnr']} has no noise, and the bound needs it")
    return net, checkpoint, {config["bnr"]: schedule}


def network_options(checkpoint: dict, parts: str | None) -> dict:
    """What its weights depend on, beside data and seed: see study.compare."""
    options = checkpoint["options"]
    usual = vars(train.options(["--preset", options["preset"]]))
    network = {"preset": options["preset"]}
    for name, value in options.items():
        if name == "bnr" or name in usual and name not in FIXED and value != usual[name]:
            network[name] = value
    if parts:
        network["parts"] = Path(parts).stem
    return network


# The table and the figure


def network_name(network: dict) -> str:
    words = [f"BNR {network['bnr']}"]
    for name, value in network.items():
        if name not in ("bnr", "preset"):
            words.append(f"{name} {value}")
    return ", ".join(words)


def comparisons(cells: list) -> dict:
    """{(network, ratio, kimg): pairs of cells, hot's and the other's, of one seed}. A network for
    every ratio is compared with itself at BNR 0, any other with the hot one of the preset."""
    by_row = {}
    for cell in cells:
        network = cell["network"]
        same = {name: cell[name] for name in ("images", "levels", "seed", "kimg")}
        if network["bnr"] == "any":
            hot = matching(cells, bnr=0, checkpoint=cell["checkpoint"], **same)
        else:
            hot = matching(cells, network={"preset": network["preset"], "bnr": 0}, **same)
        if hot and hot[0] is not cell:
            row = (network_name(network), cell["bnr"], cell["kimg"], cell["images"])
            by_row.setdefault(row, []).append((hot[0], cell))
    return by_row


def columns(cell: dict) -> np.ndarray:
    """[N, 1 + levels + bands]: what the table shows of each image."""
    return np.column_stack([cell["nats"], cell["by_level"], cell["by_band"]])


def differences(pairs: list) -> list:
    """For each column the differences: over images for one pair of cells, else over seeds."""
    of_images = [columns(other) - columns(hot) for hot, other in pairs]
    if len(pairs) == 1:
        return of_images[0].T.tolist()
    return np.stack([d.mean(0) for d in of_images]).T.tolist()


def table(cells: list) -> None:
    """Nats less hot's, with 95 % intervals: lower is better."""
    names = ["all", *LEVEL_NAMES, *(f"{name} bands" for name in BAND_NAMES)]
    print("\n| network | BNR | kimg | pairs | hot, nats | " + " | ".join(names) + " |")
    print("|---" * (5 + len(names)) + "|")
    for (name, bnr, kimg, _), pairs in comparisons(cells).items():
        hot = mean(mean(first["nats"]) for first, _ in pairs)
        entries = []
        for d in differences(pairs):
            middle, half = interval(d)
            entries.append(f"{middle:+.2f} +- {half:.2f}")
        print(f"| {name} | {bnr:g} | {kimg:g} | {len(pairs)} | {hot:.1f} | "
              + " | ".join(entries) + " |")


def draw_ratios(plt, cells: list):
    """Nats less hot's by ratio within networks for every ratio, with 95 % intervals: a color for
    each network and kimg. Two networks differ by far more than that."""
    by_network = {}
    networks_for_every_ratio = [c for c in cells if c["network"]["bnr"] == "any"]
    for (name, bnr, kimg, _), pairs in comparisons(networks_for_every_ratio).items():
        middle, half = interval(differences(pairs)[0])
        by_network.setdefault(f"{name}, {kimg:g} kimg", []).append((bnr, middle, half))
    if not by_network:
        return None
    figure, axes = plt.subplots(figsize=(8, 5))
    for label, points in by_network.items():
        bnr, middle, half = zip(*sorted(points))
        axes.errorbar(bnr, middle, np.nan_to_num(half), fmt="o-", capsize=5, label=label)
    axes.axhline(0, color="gray", lw=1.5)
    axes.set_xscale("log")
    axes.set_xlabel("BNR")
    axes.set_ylabel("nats an image, less those of BNR 0\n(below 0: better)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return figure


def main():
    p, args = options()
    run(p, args, "likelihood", FIELDS, compute, table, {"": draw_ratios})


if __name__ == "__main__":
    main()
