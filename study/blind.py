"""Blind diffusion: a model that is told no noise level, and reads it from the image itself
(Kadkhodaie et al., arXiv 2602.09639). Any trained model becomes blind by training a small reader.

    python -m study.blind --ckpt run/ema.pt                      # trains the reader: run/blind.pt
    python -m study.blind --ckpt run/ema.pt --sample             # draws: run/blind-grid.png
    python -m study.blind --ckpt any-0/ema.pt any-1/ema.pt --bnr 0 0.5 --table

A network of --bnr any takes --bnr or --path, and has a reader for each. Equation numbers are those
of the README.
"""
import math
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import load
from degrade import ColdPath, cosines, degrade
from model import load_model
from sample import (evaluate, noise_estimate, sampling_path, seed_list, seed_noise,
                    slope_correction, solve, step, time_steps)
from study.common import (REFERENCES, Cells, Measure, deviation, digest, groups, matching, mean,
                          parser, plotted, references, top_bands)
from util import (UserError, add_device_option, full_float32, normalize, number, read_checkpoint,
                  save_checkpoint, save_grid, seed_for, to_uint8)

LEVELS = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1., 3., 10., 80.]     # where errors are printed
HELD_OUT = 1000                                 # images that the reader is not trained on, at most
STARTS = [0.5, 0.7, 1.5, 2.]                    # the noise of a wrong start over the right one
READ_ALSO = 2.                                  # a BNR whose reader's errors are shown as well
HALF_WAY = 1.5                                  # the noise after, over before, noise is added


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
def solve_blind(net, read, path, x, times, solver="heun", watch=None):
    """sample.solve told no level: before each step, the level of each image is read from it, and
    the step goes down from there by the ratio of two of the `times`.

    net: (x, alpha, sigma) -> D, R, sigma [B]; read: x -> sigma [B]; path: one whose t is sigma.
    watch(t, sigma) sees the schedule's level and the reading of each step.
    """
    x, times, before = x.double(), times.tolist(), None
    for t_told, s_told in zip(times[:-1], times[1:]):
        t = read(x)                                             # [B]
        s = t * (s_told / t_told)                               # [B]
        if watch:
            watch(t_told, t)
        d, r = evaluate(net, path, x, t)
        x0_hat, n_hat = d + r, noise_estimate(x, d, t, path)
        x_s = step(x, x0_hat, n_hat, t, s, path)                                # (3): Euler
        if solver == "heun" and s_told > 0:
            d, r = evaluate(net, path, x_s, s)
            n_s = noise_estimate(x_s, d, s, path)
            x_s = step(x, (x0_hat + d + r) / 2, (n_hat + n_s) / 2, t, s, path)
        if solver == "multistep":
            if s_told == 0:
                x_s = x0_hat
            elif before is not None:
                # the schedule's ratio here too: two readings may lie close together by chance
                x0_before, t_before = before[0], t * (before[1] / t_told)
                x_s = x_s + torch.cat([
                    slope_correction(x0_hat[i:i + 1], t[i].item(), x0_before[i:i + 1],
                                     t_before[i].item(), s[i].item(), path)     # (5)
                    for i in range(len(x))])
            before = x0_hat, t_told
        x = x_s
    return x


def draw(net, read, path, shape, seeds, steps, solver="heun", start=1., half_way=1., watch=None,
         device="cpu", batch=125):
    """uint8 [N, C, H, W]: the samples of these seeds, of a blind model or, where read is None, of
    the same model told its levels. From the same seed both start at the same noise.

    start: the noise of the start over that of the schedule. half_way: the noise after the middle
    step over that before, by adding some. watch: as solve_blind has it.
    """
    times, drawn = time_steps(steps, *path.t_range(*shape[1:])), []
    classes = getattr(net, "classes", 0)
    middle = steps // 2
    parts = [slice(0, middle + 1), slice(middle, None)] if half_way > 1 else [slice(None)]
    for i in tqdm(range(0, len(seeds), batch), "sampling"):
        some, heads = seeds[i:i + batch], net
        noise = seed_noise(some, shape)
        x = start * times[0].item() * noise().to(device)
        if classes:
            label = torch.tensor([s % classes for s in some], device=device)
            heads = partial(net, label=label)
        for j, part in enumerate(parts):
            if j == 1:
                added = times[middle].item() * math.sqrt(half_way ** 2 - 1)
                x = x + added * noise().to(device)
            if read is None:
                x = solve(heads, path, x, times[part], solver)
            else:
                x = solve_blind(heads, read, path, x, times[part], solver, watch)
        drawn.append(to_uint8(x).cpu())
    return torch.cat(drawn)


# Models and their readers

def blind_model(args, filename, bnr, train=False):
    """A checkpoint along one path, with the reader that is kept beside it: a namespace. The reader
    is trained where there is none, or where `train` is set."""
    net, checkpoint = load_model(filename, args.device)
    config, shape = checkpoint["config"], checkpoint["data"]["shape"]
    path = sampling_path(checkpoint, bnr, args.path)
    if isinstance(path, ColdPath):
        raise UserError(f"{filename} is a model of BNR inf: its images have no noise to read")
    chosen = config["bnr"] == "any"
    curve = args.path or config.get("path") or f"BNR {path.bnr:g}"
    name = "blind" + (f"-{args.path or format(path.bnr, 'g')}" if chosen else "")
    kept = Path(filename).parent / f"{'quick-' if args.quick else ''}{name}.pt"
    model = SimpleNamespace(net=net, path=path, curve=curve, shape=shape, file=kept,
                            digest=digest(filename), duration=args.duration,
                            seed=checkpoint["options"]["seed"], kimg=checkpoint["seen"] / 1000,
                            bnr=str(config["bnr"]), options=checkpoint["options"])
    if train or not kept.exists():
        new_reader(args, model)
    else:
        load_reader(model)
    model.reader.to(args.device)
    return model


def new_reader(args, model):
    """Trains the model's reader, finds its errors and keeps both in model.file."""
    data = args.data or model.options["data"]
    images = training_images(data, model.options["resolution"] or None)
    if list(images.shape[1:]) != list(model.shape):
        raise UserError(f"{data} has images of another shape than the model's, {model.shape}")
    if len(images) < 4:
        raise UserError(f"{data}: a reader needs four images, two of them to be tested on")
    held = min(HELD_OUT, max(2, len(images) // 10))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2))
    reader = train_reader(images[order[held:]], model.path, args.duration, args.device, model.seed)
    model.reader = reader
    model.errors = reading_errors(reader, model.path, images[order[:held]], args.device)
    kept = {"reader": reader.state_dict(), "curve": model.curve, "errors": model.errors,
            "model": model.digest, "duration": args.duration}
    if not save_checkpoint(kept, model.file):
        raise UserError(f"{model.file} could not be saved")


@lru_cache(maxsize=1)
def training_images(data, resolution):
    return load(data, resolution).images


def load_reader(model):
    """The reader and its errors, from the file that new_reader has written. Raises UserError."""
    kept = read_checkpoint(model.file)
    try:
        model.reader = Reader(model.shape[0])
        model.reader.load_state_dict(kept["reader"])
        finite = all(v.isfinite().all() for v in kept["reader"].values())
        if (kept["curve"], kept["model"]) != (model.curve, model.digest) or not finite:
            raise ValueError
        model.errors = [[float(v) for v in row] for row in kept["errors"]]
        model.duration = float(kept["duration"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise UserError(f"{model.file} is not a reader of {model.curve} for this model: train it "
                        "again, with neither --sample nor --table") from None
    model.reader.eval().requires_grad_(False)


# The command line and the tables

def options():
    p = parser("blind", "A reader of the noise level for a trained model, which makes it blind. "
                        "Without --sample and --table it is trained, and the mean and the spread "
                        "of its errors are printed.")
    a = p.add_argument
    a("--ckpt", nargs="+", help="the model: ema.pt of train.py; with --table several")
    a("--bnr", type=number(float, 0), nargs="+",
      help="for a model of --bnr any: the ratio; with --table several (default 0.5; 0 and 0.5)")
    a("--path", choices=["blurring"], help="for a model of --bnr any: that path instead of a ratio")
    a("--data", help="as for train.py (default the model's)")
    a("--duration", type=number(float, 0.001), default=80.,
      help="kimg to train a reader for (default 80)")
    a("--sample", action="store_true", help="draw a grid of samples that are told nothing")
    a("--seeds", type=seed_list, default="0-63", help="one image a seed (default 0-63)")
    a("--steps", type=number(int, 1, 10000), default=18, help="of --sample (default 18)")
    a("--solver", choices=["euler", "heun", "multistep"], default="heun",
      help="of --sample (default heun)")
    a("--out", help="the grid (default blind-grid.png beside the model)")
    a("--table", action="store_true", help="compare blind and told samples, by Frechet distance")
    a("--nfe", type=number(int, 1), nargs="+", default=[35, 17, 9],
      help="of --table; Heun takes odd numbers, so one fewer where even (default 35 17 9)")
    a("--samples", type=number(int, 50), default=1000, help="a cell (default 1000)")
    a("--draws", type=number(int, 1), default=2,
      help="draws of samples at the highest NFE (default 2)")
    add_device_option(p)
    args = p.parse_args()
    if not args.ckpt and not args.plot_only:
        p.error("--ckpt is needed: the model, ema.pt of train.py")
    if args.bnr and args.path:
        p.error("--bnr and --path are two ways to choose the path: give one of them")
    args.nfe = [n - 1 + n % 2 for n in args.nfe]
    if args.quick:
        args.duration, args.samples, args.nfe, args.draws = 0.256, 50, [3], 1
        args.table = not args.sample
    if not (args.table or args.plot_only) and len(args.ckpt) + len(args.bnr or [0]) > 2:
        p.error("several models or ratios are for --table: give one")
    return p, args


def print_errors(model):
    print(f"{model.curve}: read sigma over sigma, on images that the reader has not seen\n"
          "   sigma    mean     +-")
    for level, bias, spread in model.errors:
        print(f"{level:8g}{math.exp(bias):8.3f}{spread:7.3f}")
    print(f"kept in {model.file}")


def sample_grid(args, model):
    images = draw(model.net, model.reader, model.path, model.shape, args.seeds, args.steps,
                  args.solver, device=args.device)
    out = args.out or model.file.with_name(f"{model.file.stem}-grid.png")
    save_grid(images, str(out))
    print(f"{len(images)} images, {args.solver} {args.steps} steps, told nothing: {out}")


def compute(args, cells):
    """The cells in order of their use: reading errors, NFE by NFE, wrong starts."""
    models = []
    for filename in args.ckpt:
        _, checkpoint = load_model(filename)
        several = checkpoint["config"]["bnr"] == "any" and not args.path
        ratios = args.bnr or ([0., 0.5] if several else [None])
        models += [blind_model(args, filename, bnr) for bnr in ratios]
        extra = [READ_ALSO] if several and filename == args.ckpt[0] else []
        for model in models[-len(ratios):] + [blind_model(args, filename, b) for b in extra]:
            cells.compute(key_of(args, model, kind="reading"), lambda: {"errors": model.errors})
            print_errors(model)
    wrong = sorted(args.nfe)[len(args.nfe) // 2]
    conditions = [dict(nfe=nfe, start=1., half_way=1., draw=d) for nfe in args.nfe
                  for d in range(args.draws if nfe == max(args.nfe) else 1)]
    starts = [(f, 1.) for f in STARTS] + [(1., HALF_WAY)]
    conditions += [dict(nfe=wrong, start=f, half_way=h, draw=0) for f, h in starts]
    measure = None
    for condition, model, blind in product(conditions, models, (False, True)):
        usual = condition["start"] == condition["half_way"] == 1
        if not usual and model.digest != models[0].digest:
            continue
        key = key_of(args, model, kind="samples", blind=blind, samples=args.samples, **condition)
        if not cells.find(**key) and measure is None:
            n = args.samples if args.quick else REFERENCES
            resolution = model.options["resolution"] or None
            measure = Measure(references(key["data"], resolution, n), args.device)
        print(row(cells.compute(key, lambda: samples_cell(args, model, key, measure))), flush=True)


def key_of(args, model, **more):
    return dict(data=args.data or model.options["data"], kimg=model.kimg, network=model.bnr,
                seed=model.seed, curve=model.curve, checkpoint=model.digest,
                reader_kimg=model.duration, **more)


def samples_cell(args, model, key, measure):
    """The measure of samples, and of blind ones the levels: [told sigma, mean and standard
    deviation of ln(read / told)] for each step."""
    readings = {}
    images = draw(model.net, model.reader if key["blind"] else None, model.path, model.shape,
                  range(key["draw"] * key["samples"], (key["draw"] + 1) * key["samples"]),
                  (key["nfe"] + 1) // 2, start=key["start"], half_way=key["half_way"],
                  watch=lambda told, t: readings.setdefault(told, []).append((t / told).log()),
                  device=args.device)
    errors = {told: torch.cat(logs) for told, logs in readings.items()}
    levels = [[round(t, 5), round(e.mean().item(), 4), round(e.std().item(), 4)]
              for t, e in errors.items()]
    return {**measure(images), "levels": levels}


def row(cell):
    name = f"{cell['network']}-{cell['seed']}, {cell['curve']}, NFE {cell['nfe']}"
    return (f"{name:28}{'blind' if cell['blind'] else 'told':6} noise x {cell['start']:g}, then x "
            f"{cell['half_way']:g}: {cell['distance']:.1f}   power {top_bands(cell)}")


def comparable(cells):
    """Title and cells of each table: of one data set and one length of training and of sampling.
    Readers belong to every number of samples."""
    by_values = groups(cells.cells, "data", "network", "kimg", "reader_kimg")
    for (data, network, kimg, reader), some in by_values.items():
        for samples in sorted({c["samples"] for c in some if "samples" in c}) or [None]:
            title = f"{data}, networks of BNR {network}, {kimg:g} kimg, readers {reader:g} kimg, " \
                    f"{samples or 'no'} samples"
            yield title, [c for c in some if c.get("samples") in (None, samples)]


def table(cells):
    for title, some in comparable(cells):
        print(f"\n{title}")
        curves = sorted({c["curve"] for c in some})
        for one in (reading_table, schedule_table, nfe_table, start_table):
            one(some, curves)


def reading_table(cells, curves):
    found = [matching(cells, kind="reading", curve=c) for c in curves]
    print("\nread sigma over sigma, on images that the readers have not seen: mean, spread")
    lines(curves, LEVELS, [[e for c in some for e in c["errors"]] for some in found])


def usual(cells, **key):
    """The cells of samples that start from the right noise and are left alone."""
    return matching(cells, kind="samples", start=1., half_way=1., **key)


def schedule_table(cells, curves):
    """The implicit schedule: what is read on the way down."""
    found = [usual(cells, blind=True, curve=c) for c in curves]
    nfe = max([c["nfe"] for some in found for c in some], default=0)
    rows = [[e for c in some if c["nfe"] == nfe for e in c["levels"]] for some in found]
    print(f"\nread sigma over the schedule's while sampling, NFE {nfe}: mean, spread")
    lines(curves, sorted({e[0] for some in rows for e in some}, reverse=True), rows)


def lines(curves, levels, rows):
    """One line a level; columns: exp of the mean, and the spread, of each curve's rows."""
    print(f"{'sigma':>9}" + "".join(f"{c:>16}" for c in curves))
    for level in levels:
        text = ""
        for some in rows:
            same = [(bias, spread) for t, bias, spread in some if t == level]
            if same:
                bias, spread = map(mean, zip(*same))
                text += f"{math.exp(bias):10.3f}{spread:6.3f}"
            else:
                text += f"{'':16}"
        print(f"{level:9.4g}{text}")


def nfe_table(cells, curves):
    print("\nFrechet distance, each network and draw: told; blind; blind - told")
    for nfe, curve in product(sorted({c["nfe"] for c in usual(cells)}), curves):
        pairs = pairs_of(usual(cells, nfe=nfe, curve=curve))
        if pairs:
            told, blind = (" ".join(f"{c['distance']:.1f}" for c in some) for some in zip(*pairs))
            less = [b["distance"] - t["distance"] for t, b in pairs]
            print(f"NFE {nfe:2} {curve:10} {told}; {blind}; {mean(less):+.1f} +- {deviation(less)}")


def pairs_of(found):
    """(told, blind) of the cells that have both and differ in nothing else."""
    names = "seed", "checkpoint", "draw", "curve", "nfe", "start", "half_way"
    by_values = groups(found, *names).values()
    return [(told, blind) for some in by_values for told in some for blind in some
            if blind["blind"] and not told["blind"]]


def start_table(cells, curves):
    wrong = [c["nfe"] for c in matching(cells, kind="samples") if c["start"] != 1]
    nfe = wrong[0] if wrong else None
    print("\nFrechet distance where the noise is not the schedule's"
          + (f", NFE {nfe}" if wrong else "") + ": told, blind")
    print(f"{'noise':24}" + "".join(f"{c:>20}" for c in curves))
    for start, half_way in [(1., 1.), *((f, 1.) for f in STARTS), (1., HALF_WAY)]:
        text = ""
        for curve in curves:
            pairs = pairs_of(matching(cells, kind="samples", curve=curve, start=start, draw=0,
                                      half_way=half_way, nfe=nfe))
            told, blind = pairs[0] if pairs else (None, None)
            text += f"{told['distance']:11.1f}{blind['distance']:9.1f}" if pairs else f"{'':20}"
        name = f"x {start:g} at the start" if half_way == 1 else f"x {half_way:g} half-way"
        print(f"{name:24}{text}")


def draw_plot(cells):
    """A row for each table. Left: the errors of each reader. Right: how much larger the distance of
    blind samples is than that of told ones, a point a network and draw, by NFE."""
    tables = list(comparable(cells))

    def plot(plt):
        figure, axes = plt.subplots(len(tables), 2, figsize=(11, 4.5 * len(tables)), squeeze=False,
                                    layout="constrained")
        for (errors, distance), (title, some) in zip(axes, tables):
            for i, curve in enumerate(sorted({c["curve"] for c in some})):
                for n, cell in enumerate(matching(some, kind="reading", curve=curve)):
                    level, bias, spread = zip(*cell["errors"])
                    errors.errorbar(level, bias, spread, color=f"C{i}", capsize=2,
                                    label=None if n else curve)
                pairs = pairs_of(usual(some, curve=curve))
                nfe = [told["nfe"] for told, _ in pairs]
                more = [blind["distance"] - told["distance"] for told, blind in pairs]
                if pairs:
                    distance.plot(nfe, more, "o", color=f"C{i}", label=curve, alpha=0.7)
            errors.set(xlabel="sigma", ylabel="ln(read sigma / sigma)", xscale="log", title=title)
            distance.axhline(0, color="grey", ls=":")
            distance.set(xlabel="NFE", ylabel="distance, blind - told",
                         xticks=sorted({c["nfe"] for c in usual(some)}))
            for a in (errors, distance):
                if a.get_legend_handles_labels()[0]:
                    a.legend()
        return figure
    if tables:
        plotted(cells.png, plot)


def main():
    p, args = options()
    with p.one_line_errors():
        full_float32()
        if args.table or args.plot_only:
            cells = Cells(args, "blind")
            if not args.plot_only:
                compute(args, cells)
            table(cells)
            draw_plot(cells)
        else:
            bnr = args.bnr[0] if args.bnr else None
            model = blind_model(args, args.ckpt[0], bnr, train=not args.sample)
            sample_grid(args, model) if args.sample else print_errors(model)


if __name__ == "__main__":
    main()
