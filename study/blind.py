"""Blind diffusion: a model that is told no noise level, and reads it from the image itself
(Kadkhodaie et al., arXiv 2602.09639). Any trained model becomes blind by training a small reader.

    python -m study.blind --ckpt run/ema.pt
    python -m study.blind --ckpt any-0/ema.pt any-1/ema.pt --bnr 0 0.5      # of --bnr any

It trains a reader for each model and ratio, and compares samples that are told the level with blind
ones, also where the noise is not what the schedule says. Equation numbers are those of the README.
"""
import math
from functools import cache, partial
from itertools import product
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from degrade import ColdPath, cosines, degrade
from model import load_model
from sample import evaluate, sampling_path, solve, step, time_steps
from study.common import (REFERENCES, Cells, Measure, deviation, digest, groups, load_once,
                          matching, mean, parser, plotted, references, seed_noise, top_bands)
from util import UserError, add_device_option, normalize, number, seed_for, to_uint8

LEVELS = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1., 3., 10., 80.]     # where readers are tested
HELD_OUT = 1000                                 # images that the reader is not trained on, at most
# the noise over the schedule's at the start, and after over before more is added half-way
WRONG = [(0.5, 1.), (0.7, 1.), (1.5, 1.), (2., 1.), (1., 1.5)]


# The reader

class Reader(nn.Module):
    """reader(x [B, C, H, W] of any float type) -> sigma [B], float64: the noise in each image.

    sigma = rho exp(g(x / rho)), rho the root mean square of x, so that reader(c x) = c reader(x).
    g is small convolutions without norms, which would hide how strong the noise is, and at most 0:
    where the noise drowns the image, rho is the answer. It sees the power of linear filters, which
    pass the less of the image the higher their frequency, and of features that see the image. The
    mean of the logarithm is that of the flat parts of an image, where noise shows first.
    """

    def __init__(self, channels):
        super().__init__()
        self.filters = nn.Conv2d(channels, 9 * channels, 3, bias=False)
        across, patch = cosines(channels, "cpu").float(), cosines(3, "cpu").float()
        start = torch.einsum("ac,ih,jw->aijchw", across, patch, patch)          # the DCT of a patch
        self.filters.weight.data.copy_(start.reshape(self.filters.weight.shape))
        self.convs = nn.ModuleList([nn.Conv2d(channels, 32, 3, padding=1),
                                    nn.Conv2d(32, 48, 3, padding=1, stride=2),
                                    nn.Conv2d(48, 48, 3, padding=1)])
        self.last = nn.Linear(2 * 9 * channels + 3 * 48, 1)
        # it starts as what the highest filter says: in white noise of deviation sigma, the mean
        # logarithm of the square is 2 ln sigma - 1.27
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(self.last.weight[:, 18 * channels - 1], -0.5)
        nn.init.constant_(self.last.bias, -1.27 / 2 - 0.3)      # in noise alone, exactly rho

    def forward(self, x):
        rho = x.double().square().mean((1, 2, 3)).sqrt().clamp(min=1e-30)       # [B]
        f = (x / rho[:, None, None, None]).float()
        filtered = self.filters(f)                              # [B, 9 C, H - 2, W - 2]
        for conv in self.convs:
            f = F.silu(conv(f))                                 # [B, 48, H / 2, W / 2] at the end
        features = torch.cat([*log_power(filtered), *log_power(f), f.mean((2, 3))], 1)
        g = -F.softplus(self.last(features)[:, 0], beta=20)     # [B]; nearly max(0, .)
        return rho * g.double().exp()


def log_power(f):
    """The logarithm of the mean square, and the mean logarithm of the square: [B, C] each."""
    power = f.square() + 1e-8
    return power.mean((2, 3)).log(), power.log().mean((2, 3))


def train_reader(images, path, duration, device, seed=0, batch=128, lr=3e-3):
    """A reader for images (uint8 or float) degraded along path. duration: kimg.

    Least squares in ln sigma. The levels are uniform in their logarithm, and a factor of
    two wider than sampling's at both ends: the model's own law, (9), has a hundredth of its levels
    below 0.02 and above 5, and least squares leans towards the middle where it is not sure.
    """
    torch.manual_seed(seed_for("reader", seed))
    c, h, w = images.shape[1:]
    reader = Reader(c).to(device)
    steps = max(1, round(duration * 1000 / batch))
    optimizer = torch.optim.Adam(reader.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, 20 * (i + 1) / steps) * (1 - i / steps))
    t_min, t_max = path.t_range(h, w)
    bar = tqdm(range(steps), "reader", unit_scale=batch, unit="img")
    for i in bar:
        x0 = normalize(images[torch.randint(len(images), (batch,))].to(device))
        span = torch.rand(batch, device=device, dtype=torch.float64)
        t = t_min / 2 * (4 * t_max / t_min) ** span
        x, _ = degrade(x0, *path.levels(t), torch.randn_like(x0))
        sigma = path.levels(t)[1]
        loss = (reader(x) / sigma).log().square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.)
        optimizer.step()
        schedule.step()
        if i % 50 == 0:
            bar.set_postfix(error=f"{loss.item() ** 0.5:.3f}")
    return reader.eval().requires_grad_(False)


@torch.no_grad()
def reading_errors(reader, path, images, device):
    """The mean and the standard deviation of ln(read sigma / sigma) over images, by level: lists
    [level, mean, deviation]."""
    torch.manual_seed(seed_for("reading errors", 0))
    x0 = normalize(images).to(device)
    errors = []
    for level in LEVELS:
        alpha, sigma = path.levels(level)
        x, _ = degrade(x0, alpha, sigma, torch.randn_like(x0))
        error = (reader(x) / sigma).log()
        errors.append([level, round(error.mean().item(), 4), round(error.std().item(), 4)])
    return errors


# The sampler

@torch.no_grad()
def solve_blind(net, read, path, x, times, watch=None):
    """Heun's method of sample.solve, told no level: before each step, the level of each image is
    read from it, and the step goes down from there by the ratio of two of the `times`.

    net: (x, alpha, sigma) -> D, R, sigma [B]; read: x -> sigma [B]; path: one whose t is sigma.
    watch(t, sigma) sees the schedule's level and the reading of each step.
    """
    x, times = x.double(), times.tolist()
    for t_told, s_told in zip(times[:-1], times[1:]):
        t = read(x)                                             # [B]
        s = t * (s_told / t_told)                               # [B]
        if watch:
            watch(t_told, t)
        d, r, n_hat = evaluate(net, path, x, t)
        x0_hat = d + r
        x_s = step(x, x0_hat, n_hat, t, s, path)                                # (3)
        if s_told > 0:
            d, r, n_s = evaluate(net, path, x_s, s)
            x_s = step(x, (x0_hat + d + r) / 2, (n_hat + n_s) / 2, t, s, path)  # (3)
        x = x_s
    return x


def draw(net, read, path, shape, seeds, steps, start=1., half_way=1., watch=None, device="cpu",
         batch=125):
    """uint8 [N, C, H, W]: the samples of these seeds by Heun's method, of a blind model or, where
    read is None, of the same model told its levels. From a seed both start at the same noise.

    start: the noise of the start over that of the schedule. half_way: the noise after the middle
    step over that before, by adding some. watch: as solve_blind has it.
    """
    times, middle, drawn = time_steps(steps, *path.t_range(*shape[1:])), steps // 2, []
    run = partial(solve, net, path)
    if read is not None:
        run = partial(solve_blind, net, read, path, watch=watch)
    for i in tqdm(range(0, len(seeds), batch), "sampling"):
        noise = seed_noise(seeds[i:i + batch], shape)
        x = start * times[0].item() * noise().to(device)
        if half_way > 1:
            x = run(x, times[:middle + 1])
            x = x + times[middle].item() * math.sqrt(half_way ** 2 - 1) * noise().to(device)
        x = run(x, times[middle:] if half_way > 1 else times)
        drawn.append(to_uint8(x).cpu())
    return torch.cat(drawn)


# The cells and their table

def options():
    p = parser("blind", "Trains a reader of the noise level for each model and ratio, and compares "
                        "samples that are told the level with blind ones, by Frechet distance.")
    a = p.add_argument
    a("--ckpt", nargs="+", default=["run/ema.pt"],
      help="the models: ema.pt of train.py (default run/ema.pt)")
    a("--bnr", type=number(float, 0), nargs="+", default=[0., 0.5],
      help="for models of --bnr any: the ratios (default 0 0.5)")
    a("--duration", type=number(float, 0.001), default=80.,
      help="kimg to train a reader for (default 80)")
    a("--samples", type=number(int, 50), default=1000, help="a cell (default 1000)")
    add_device_option(p)
    args = p.parse_args()
    args.nfe, args.wrong = [35, 17, 9], WRONG                   # the first NFE has two draws
    if args.quick:
        args.duration, args.samples, args.nfe, args.wrong = 0.256, 50, [3], WRONG[-1:]
    return p, args


def models_of(args, filename):
    """A checkpoint along each ratio: namespaces, with a function that trains a reader once and
    returns it and its errors, on images that it has not seen."""
    net, checkpoint = load_model(filename, args.device)
    config, trained = checkpoint["config"], checkpoint["options"]
    data, resolution = trained["data"], trained["resolution"] or None
    for bnr in args.bnr if config["bnr"] == "any" else [None]:
        path = sampling_path(checkpoint, bnr)
        if isinstance(path, ColdPath) or net.classes:
            raise UserError(f"{filename}: a reader is for models of noise, without classes")
        key = dict(data=data, kimg=checkpoint["seen"] / 1000, network=str(config["bnr"]),
                   seed=trained["seed"], curve=config.get("path") or f"BNR {path.bnr:g}",
                   checkpoint=digest(filename), reader_kimg=args.duration)

        @cache
        def reader(path=path):
            images = load_once(data, resolution).images
            held = min(HELD_OUT, max(2, len(images) // 10))
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2))
            read = train_reader(images[order[held:]], path, args.duration, args.device,
                                trained["seed"])
            return read, reading_errors(read, path, images[order[:held]], args.device)
        yield SimpleNamespace(net=net, path=path, shape=checkpoint["data"]["shape"], key=key,
                              reader=reader, data=(data, resolution))


def compute(args, cells):
    """The cells in order of their use: readers, NFE by NFE, the wrong amounts of noise."""
    models = [model for filename in args.ckpt for model in models_of(args, filename)]
    for model in models:
        cells.compute({**model.key, "kind": "reading"}, lambda: {"errors": model.reader()[1]})
    count = args.samples if args.quick else REFERENCES
    measure = cache(lambda: Measure(references(*models[0].data, count), args.device))
    conditions = [(nfe, 1., 1., 0) for nfe in args.nfe] + [(args.nfe[0], 1., 1., 1)]
    conditions += [(args.nfe[len(args.nfe) // 2], *wrong, 0) for wrong in args.wrong]
    for (nfe, start, half_way, i), model, blind in product(conditions, models, (False, True)):
        key = dict(model.key, kind="samples", blind=blind, samples=args.samples, nfe=nfe,
                   start=start, half_way=half_way, draw=i)
        cells.compute(key, lambda: samples_cell(args, model, key, measure))


def samples_cell(args, model, key, measure):
    """The measure of samples, and of blind ones the levels: [told sigma, mean and standard
    deviation of ln(read / told)] for each step."""
    readings, n = {}, key["samples"]
    images = draw(model.net, model.reader()[0] if key["blind"] else None, model.path, model.shape,
                  range(key["draw"] * n, (key["draw"] + 1) * n), (key["nfe"] + 1) // 2,
                  key["start"], key["half_way"], device=args.device,
                  watch=lambda told, t: readings.setdefault(told, []).append((t / told).log()))
    errors = {told: torch.cat(logs) for told, logs in readings.items()}
    return {**measure()(images),
            "levels": [[round(t, 5), round(e.mean().item(), 4), round(e.std().item(), 4)]
                       for t, e in errors.items()]}


def right(cells, **key):
    """Those of samples with the noise that the schedule has."""
    return matching(cells, kind="samples", start=1., half_way=1., **key)


def pairs_of(cells):
    """(told, blind) of the cells that have both and differ in nothing else."""
    names = ("seed", "checkpoint", "draw", "curve", "samples", "nfe", "start", "half_way")
    return [(told, blind) for some in groups(cells, *names).values()
            for told in matching(some, blind=False) for blind in matching(some, blind=True)]


def table(cells):
    """One of the readers, one while sampling, one of the distances, for each kind of network."""
    kinds = groups(cells.cells, "data", "network", "kimg", "reader_kimg")
    for (data, bnr, kimg, reader), some in kinds.items():
        print(f"\n{data}, networks of BNR {bnr}, {kimg:g} kimg, readers {reader:g} kimg")
        lines("read over true sigma, on images that no reader has seen",
              matching(some, kind="reading"), "errors")
        nfe = max([c["nfe"] for c in right(some)], default=0)
        lines(f"read sigma over the schedule's while sampling, NFE {nfe}",
              right(some, blind=True, nfe=nfe), "levels")
        print("\nFrechet distance, each network and draw: told; blind; blind - told")
        conditions = groups(matching(some, kind="samples"), "samples", "nfe", "start", "half_way",
                            "curve")
        for condition in sorted(conditions, key=lambda c: (c[0], -c[1], c)):
            n, nfe, start, half_way, curve = condition
            pairs = pairs_of(conditions[condition])
            distances = [[c["distance"] for c in some] for some in zip(*pairs)]
            more = [blind - told for told, blind in zip(*distances)]
            if pairs:
                print(f"{n} samples, NFE {nfe}, noise x {start:g}, then x {half_way:g}, {curve}: "
                      + "; ".join(" ".join(f"{d:.1f}" for d in some) for some in distances)
                      + f"; {mean(more):+.1f} +- {deviation(more)}; power of the first: "
                      + "; ".join(top_bands(cell) for cell in pairs[0]))


def lines(title, cells, name):
    """A line a level: for each curve, the mean over cells of exp of the mean and of the spread in
    their [level, mean, spread]."""
    curves = groups(cells, "curve")
    print(f"\n{title}: mean, spread\n{'sigma':>9}" + "".join(f"{c:>16}" for c, in curves))
    errors = [[e for c in some for e in c[name]] for some in curves.values()]
    for level in sorted({e[0] for some in errors for e in some}, reverse=True):
        text = f"{level:9.4g}"
        for some in errors:
            bias, spread = map(mean, zip(*(e[1:] for e in some if e[0] == level)))
            text += f"{math.exp(bias):10.3f}{spread:6.3f}"
        print(text)


def draw_plot(cells):
    """Left: the errors of each reader. Right: how much larger the distance of blind samples is than
    that of told ones, a point a network and draw, by NFE."""
    def plot(plt):
        figure, (errors, distance) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        for i, ((curve,), some) in enumerate(groups(cells.cells, "curve").items()):
            for n, cell in enumerate(matching(some, kind="reading")):
                level, bias, spread = zip(*cell["errors"])
                errors.errorbar(level, bias, spread, color=f"C{i}", capsize=2,
                                label=None if n else curve)
                errors.legend()
            for told, blind in pairs_of(right(some)):
                distance.plot(told["nfe"], blind["distance"] - told["distance"], "o",
                              color=f"C{i}", alpha=0.7)
        errors.set(xlabel="sigma", ylabel="ln(read sigma / sigma)", xscale="log")
        distance.axhline(0, color="grey", ls=":")
        distance.set(xlabel="NFE", ylabel="distance, blind - told")
        return figure
    plotted(cells.png, plot)


def main():
    p, args = options()
    with p.one_line_errors():
        cells = Cells(args, "blind")
        if not args.plot_only:
            compute(args, cells)
        table(cells)
        draw_plot(cells)


if __name__ == "__main__":
    main()
