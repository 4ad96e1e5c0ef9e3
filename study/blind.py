"""Blind diffusion: a model that is not given the noise level, and reads it from the image itself
(Kadkhodaie et al., arXiv 2602.09639). Any trained model becomes blind by training a small reader.

    python -m study.blind --ckpt run/ema.pt
    python -m study.blind --ckpt any-0/ema.pt any-1/ema.pt --bnr 0 0.5      # of --bnr any

It trains a reader for each model and ratio, and compares samples that are given the level with
blind ones, also where the noise is not what the schedule says. Equation numbers: the README's.
"""
import math
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import seed_for
from degrade import ColdSchedule, Schedule, cosines, degrade
from sample import evaluate, heun, sampling_schedule, seeded_randn, step, time_steps
from study.common import (REFERENCES, Cells, Measure, column, deviation, groups, label_lines,
                          listed, load_once, matching, mean, parser, plot_means, references, run,
                          top_bands)
from util.checkpoint import load_model
from util.cli import UserError, add_device_option, number
from util.images import normalize, to_uint8

LEVELS = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1., 3., 10., 80.]     # where readers are tested
HELD_OUT = 1000                                 # images that the reader is not trained on, at most
NFE = [35, 17, 9]
# The noise over the schedule's at the start, and after over before more is added half-way
WRONG = [(0.5, 1.), (0.7, 1.), (1.5, 1.), (2., 1.), (1., 1.5)]
BASE = {"data": str, "network": str, "kimg": float, "reader_kimg": float, "curve": str,
        "images": (str, None)}
FIELDS = [{**BASE, "kind": "reading", "errors": [[float, float, float]]},
          {**BASE, "kind": "samples", "blind": bool, "seed": int, "checkpoint": (str, None),
           "samples": float, "nfe": int, "start": float, "half_way": float, "draw": int,
           "distance": float, "power": [float]}]


# The reader


class Reader(nn.Module):
    """reader(x [B, C, H, W] of any float type) -> sigma [B], float64: the noise in each image.

    sigma = rho exp(g(x / rho)), rho the root mean square of x, so that reader(c x) = c reader(x).
    g is small convolutions without norms, which would hide how strong the noise is, and at most 0:
    where the noise drowns the image, rho is the answer. It sees the power of linear filters, which
    pass the less of the image the higher their frequency, and of features that see the image. The
    mean of the logarithm is that of the flat parts of an image, where noise shows first.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.filters = nn.Conv2d(channels, 9 * channels, 3, bias=False)
        across = cosines(channels, "cpu").float()
        patch = cosines(3, "cpu").float()
        dct_of_patch = torch.einsum("ac,ih,jw->aijchw", across, patch, patch)
        self.filters.weight.data.copy_(dct_of_patch.reshape(self.filters.weight.shape))
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


def log_power(f: torch.Tensor):
    """The logarithm of the mean square, and the mean logarithm of the square: [B, C] each."""
    power = f.square() + 1e-8
    return power.mean((2, 3)).log(), power.log().mean((2, 3))


def train_reader(images: torch.Tensor, schedule: Schedule, duration: float, device, seed: int = 0,
                 batch: int = 128, lr: float = 3e-3) -> Reader:
    """A reader for images (uint8 or float) degraded by a schedule. duration: kimg.

    Least squares in ln sigma. The levels are uniform in their logarithm, and a factor of two wider
    than sampling's at both ends: the model's own distribution of training noise levels (9) has a
    hundredth of them below 0.02 and above 5, and least squares leans towards the middle where it is
    not sure.
    """
    torch.manual_seed(seed_for("reader", seed))
    c, h, w = images.shape[1:]
    reader = Reader(c).to(device)
    steps = max(1, round(duration * 1000 / batch))
    optimizer = torch.optim.Adam(reader.parameters(), lr=lr)
    warm_up_and_decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, 20 * (i + 1) / steps) * (1 - i / steps))
    t_min, t_max = schedule.sigma_range(h, w)
    bar = tqdm(range(steps), "reader", unit_scale=batch, unit="img")
    for i in bar:
        x0 = normalize(images[torch.randint(len(images), (batch,))].to(device))
        u = torch.rand(batch, device=device, dtype=torch.float64)
        alpha, sigma = schedule.levels(t_min / 2 * (4 * t_max / t_min) ** u)
        x, _ = degrade(x0, alpha, sigma, torch.randn_like(x0))
        loss = (reader(x) / sigma).log().square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.)
        optimizer.step()
        warm_up_and_decay.step()
        if i % 50 == 0:
            bar.set_postfix(error=f"{loss.item() ** 0.5:.3f}")
    return reader.eval().requires_grad_(False)


@torch.no_grad()
def reading_errors(reader, schedule: Schedule, images: torch.Tensor, device) -> list:
    """The mean and the standard deviation of ln(read sigma / sigma) over images, by level: lists
    [level, mean, deviation]."""
    torch.manual_seed(seed_for("reading errors", 0))
    x0 = normalize(images).to(device)
    errors = []
    for level in LEVELS:
        alpha, sigma = schedule.levels(level)
        x, _ = degrade(x0, alpha, sigma, torch.randn_like(x0))
        error = (reader(x) / sigma).log()
        errors.append([level, round(error.mean().item(), 4), round(error.std().item(), 4)])
    return errors


# The sampler


@torch.no_grad()
def blind_heun(net, read, schedule: Schedule, x: torch.Tensor, times) -> torch.Tensor:
    """sample.heun that is not given the level: before each step, the level of each image is read
    from it, and the step goes down from there by the ratio of two of the `times`.

    net: (x, alpha, sigma) -> D, R, sigma [B]; read: x -> sigma [B]; schedule: one with noise.
    """
    x = x.double()
    for t_scheduled, s_scheduled in zip(times[:-1].tolist(), times[1:].tolist()):
        t = read(x)                                             # [B]
        s = t * (s_scheduled / t_scheduled)                     # [B]
        d, r, n_hat = evaluate(net, schedule, x, t)
        x0_hat = d + r
        x_s = step(x, x0_hat, n_hat, t, s, schedule)            # (3)
        if s_scheduled > 0:
            d_s, r_s, n_hat_s = evaluate(net, schedule, x_s, s)
            x0_hat = (x0_hat + d_s + r_s) / 2
            n_hat = (n_hat + n_hat_s) / 2
            x_s = step(x, x0_hat, n_hat, t, s, schedule)        # (3)
        x = x_s
    return x


def draw(net, read, schedule: Schedule, shape, seeds, times: torch.Tensor, start: float = 1.,
         half_way: float = 1., device="cpu", batch: int = 125) -> torch.Tensor:
    """The images [N, C, H, W] of these seeds by Heun's method, of a blind model or, where read is
    None, of the same model with its levels. From a seed both start at the same noise.

    start: the noise of the start over that of the schedule. half_way: the noise after the middle
    step over that before, by adding some.
    """
    solve = partial(heun, net, schedule)
    if read is not None:
        solve = partial(blind_heun, net, read, schedule)
    middle = (len(times) - 1) // 2
    images = []
    for i in tqdm(range(0, len(seeds), batch), "sampling"):
        randn = seeded_randn(seeds[i:i + batch], shape)
        x = start * times[0].item() * randn().to(device)
        if half_way > 1:
            x = solve(x, times[:middle + 1])
            x = x + times[middle].item() * math.sqrt(half_way ** 2 - 1) * randn().to(device)
            images.append(solve(x, times[middle:]))
        else:
            images.append(solve(x, times))
    return torch.cat(images)


# The cells


def options():
    p = parser("blind", "Trains a reader of the noise level for each model and ratio, and compares "
                        "samples that are given the level with blind ones, by Frechet distance.")
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
    args.nfe = NFE
    args.wrong = WRONG
    if args.quick:
        args.duration = 0.256
        args.samples = 50
        args.nfe = [3]
        args.wrong = WRONG[-1:]
    return p, args


@dataclass
class Model:
    """A checkpoint at one ratio, the images that it was trained on, and what its cells share."""
    net: nn.Module
    schedule: Schedule
    shape: list
    images: torch.Tensor
    measure: Measure
    key: dict
    device: str

    @cached_property
    def order(self):
        return torch.randperm(len(self.images), generator=torch.Generator().manual_seed(2))

    @cached_property
    def held_out(self):
        return self.order[:min(HELD_OUT, max(2, len(self.order) // 10))]

    @cached_property
    def reader(self) -> Reader:
        """Trained when it is needed, on images that are not held out."""
        seen = self.images[self.order[len(self.held_out):]]
        return train_reader(seen, self.schedule, self.key["reader_kimg"], self.device,
                            self.key["seed"])

    def errors(self) -> dict:
        unseen = self.images[self.held_out]
        return {"errors": reading_errors(self.reader, self.schedule, unseen, self.device)}


def models_of(args, filename: str):
    """Yields the Models of a checkpoint, one for each ratio. Raises UserError."""
    net, checkpoint = load_model(filename, args.device)
    config = checkpoint["config"]
    trained = checkpoint["options"]
    ratios = [None]
    if config["bnr"] == "any":
        ratios = args.bnr
    for bnr in ratios:
        schedule = sampling_schedule(checkpoint, bnr)
        if isinstance(schedule, ColdSchedule) or net.classes:
            raise UserError(f"{filename}: a reader is for models of noise, without classes")
        shape = checkpoint["data"]["shape"]
        images = load_once(trained["data"], shape[1]).images
        count = args.samples if args.quick else REFERENCES
        measure = Measure(references(trained["data"], shape[1], count), args.device)
        key = {"images": images, "checkpoint": filename, "data": trained["data"],
               "network": str(config["bnr"]), "seed": trained["seed"],
               "curve": config["schedule"] or f"BNR {schedule.bnr:g}",
               "reader_kimg": args.duration}
        yield Model(net, schedule, shape, images, measure, key, args.device)


def compute(args, cells: Cells) -> list:
    """The cells in order of their use: readers, NFE by NFE, the wrong amounts of noise."""
    models = []
    for filename in args.ckpt:
        models += models_of(args, filename)
    for model in models:
        cells.compute(model.errors, kind="reading", **model.key)
    conditions = []
    for nfe in args.nfe:
        conditions.append((nfe, 1., 1., 0))
    conditions.append((args.nfe[0], 1., 1., 1))                 # two draws of the most evaluations
    for start, half_way in args.wrong:
        conditions.append((args.nfe[len(args.nfe) // 2], start, half_way, 0))
    for condition in conditions:
        for model in models:
            for is_blind in (False, True):
                sample_cell(args, cells, model, is_blind, *condition)
    return cells.cells


def sample_cell(args, cells: Cells, model: Model, is_blind: bool, nfe: int, start: float,
                half_way: float, i: int) -> None:
    def value():
        seeds = range(i * args.samples, (i + 1) * args.samples)
        times = time_steps((nfe + 1) // 2, *model.schedule.sigma_range(*model.shape[1:]))
        read = model.reader if is_blind else None
        images = draw(model.net, read, model.schedule, model.shape, seeds, times, start, half_way,
                      args.device)
        return model.measure(to_uint8(images).cpu())
    cells.compute(value, kind="samples", blind=is_blind, samples=args.samples, nfe=nfe,
                  start=start, half_way=half_way, draw=i, **model.key)


# The tables


def pairs_of(cells: list) -> list:
    """(given the level, blind) of the cells that have both and differ in nothing else."""
    names = ("seed", "checkpoint", "images", "draw", "curve", "samples", "nfe", "start", "half_way")
    pairs = []
    for same in groups(cells, *names).values():
        given = matching(same, blind=False)
        blind = matching(same, blind=True)
        pairs += list(zip(given[:1], blind[:1]))
    return pairs


def table(cells: list) -> None:
    """One of the readers, one of the distances, for each kind of network."""
    kinds = groups(cells, "data", "network", "kimg", "reader_kimg")
    for (data, bnr, kimg, reader), same in kinds.items():
        print(f"\n{data}, networks of BNR {bnr}, {kimg:g} kimg, readers {reader:g} kimg")
        table_of_readers(matching(same, kind="reading"))
        print("\nFrechet distance, each network and draw: given the level; blind; blind - given")
        conditions = groups(matching(same, kind="samples"), "samples", "nfe", "start", "half_way",
                            "curve")
        for condition in sorted(conditions, key=lambda c: (c[0], -c[1], c)):
            pairs = pairs_of(conditions[condition])
            if pairs:
                print(row(condition, pairs))


def row(condition, pairs: list) -> str:
    n, nfe, start, half_way, curve = condition
    given, blind = zip(*pairs)
    more = differences(pairs)
    return (f"{n} samples, NFE {nfe}, noise x {start:g}, then x {half_way:g}, {curve}: "
            f"{listed(column(given, 'distance'), '.1f', ' ')}; "
            f"{listed(column(blind, 'distance'), '.1f', ' ')}; "
            f"{mean(more):+.1f} +- {deviation(more)}; power of the first: {top_bands(given[0])}; "
            f"{top_bands(blind[0])}")


def differences(pairs: list) -> list:
    """The distance of blind samples less that of the others."""
    return [blind["distance"] - given["distance"] for given, blind in pairs]


def table_of_readers(cells: list) -> None:
    """A line a level: for each curve, the mean over readers of the bias and of the spread."""
    curves = groups(cells, "curve")
    print("\nread over true sigma, on images that no reader has seen: mean, spread\n"
          f"{'sigma':>9}" + "".join(f"{curve:>16}" for (curve,) in curves))
    for level in reversed(LEVELS):
        text = f"{level:9.4g}"
        for of_curve in curves.values():
            errors = []
            for cell in of_curve:
                errors += [error for error in cell["errors"] if error[0] == level]
            if errors:
                _, bias, spread = map(mean, zip(*errors))
                text += f"{math.exp(bias):10.3f}{spread:6.3f}"
        print(text)


def draw_difference(plt, cells: list):
    """How much larger the distance of blind samples is than that of others, by NFE: a line a curve,
    a point a network and draw."""
    pairs = pairs_of(matching(cells, kind="samples", start=1., half_way=1.))
    points = []
    for (given, _), more in zip(pairs, differences(pairs)):
        points.append({"curve": given["curve"], "nfe": given["nfe"], "more": more})
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.8))
    ends = []
    for i, ((curve,), same) in enumerate(groups(points, "curve").items()):
        color = f"C{i % 10}"
        ends.append((plot_means(axes, same, "nfe", "more", color), curve, color))
    axes.axhline(0, color="gray", lw=1.5)
    axes.set_xticks(sorted(set(column(points, "nfe"))))
    axes.set(xlabel="NFE, network evaluations per image",
             ylabel="distance, blind less given", title="Below 0, blind samples are better")
    label_lines(axes, ends)
    return figure


def main():
    p, args = options()
    run(p, args, "blind", FIELDS, compute, table, {"": draw_difference})


if __name__ == "__main__":
    main()
