"""A film strip of sampling: what the network sees and what both of its heads answer, step by step.

    python -m study.strip --ckpt run/ema.pt --seeds 0-2
    python -m study.strip --ckpt any/ema.pt --bnr 0 0.5 2        # one seed at three ratios
"""
import math

import numpy as np
from tqdm import tqdm

from degrade import ColdSchedule
from sample import generate, sampler, sampler_options, sampling_schedule, seed_list
from util.checkpoint import load_model
from util.cli import Parser, UserError, number
from util.images import labeled_grid

COLUMNS = 10                                    # at most


def options():
    p = Parser(prog="python -m study.strip",
               description="Draw at most ten states of three seeds, or of one seed at up to three "
                           "ratios: x, D, 4 R and D + R.")
    a = p.add_argument
    a("--ckpt", required=True, help="the model: ema.pt of train.py")
    a("--seeds", type=seed_list, default=range(3), help="the first three are drawn (default 0-2)")
    a("--bnr", type=number(float, 0), nargs="+", metavar="R", default=[None],
      help="for a model of --bnr any: up to three ratios, 0 to 10 (default 0.5)")
    a("--out", default="strip.png", help="the picture (default strip.png)")
    sampler_options(p)
    args = p.parse_args()
    if len(args.bnr) > 3:
        p.error("--bnr takes up to three ratios")
    return p, args


def rows_of(net, schedules: list, shape, seeds, device, **options):
    """The rows of labeled_grid, four for each schedule and seed, and the levels t of its columns.
    """
    rows = []
    for schedule in tqdm(schedules, unit=" schedules"):
        states = []

        def watch(t, x, d, r):
            states.append((t, x, d, r))
        for _ in generate(net, schedule, shape, seeds, device, 3, watch=watch, **options):
            pass
        columns = np.linspace(0, len(states) - 1, min(COLUMNS, len(states))).round().astype(int)
        states = [states[i] for i in columns]
        for j, seed in enumerate(seeds):
            name = f"BNR {schedule.bnr:g}" if len(schedules) > 1 else f"seed {seed}"
            images = {"x": [], "D": [], "4 R": [], "D + R": []}
            for t, x, d, r in states:
                _, sigma = schedule.levels(t)
                # divided by sqrt(1 + sigma^2), or the noise would clip; R is small beside D
                images["x"].append(x[j] / math.sqrt(1 + sigma.item() ** 2))
                images["D"].append(d[j])
                images["4 R"].append(4 * r[j])
                images["D + R"].append(d[j] + r[j])
            for what, row in images.items():
                rows.append((f"{name}: {what}", row))
    return rows, [t for t, *_ in states]


def main():
    p, args = options()
    with p.one_line_errors():
        net, checkpoint = load_model(args.ckpt, args.device, args.precision, args.compile)
        sampling, nfe = sampler(args, net, checkpoint)
        if checkpoint["data"].get("latents"):
            raise UserError(f"{args.ckpt}: a film strip is of images, and its data are latents")
        schedules = [sampling_schedule(checkpoint, bnr, args.schedule) for bnr in args.bnr]
        seeds = args.seeds[:3]
        if len(schedules) > 1:
            seeds = args.seeds[:1]
        rows, times = rows_of(net, schedules, checkpoint["data"]["shape"], seeds, args.device,
                              **sampling)
        level = "alpha" if isinstance(schedules[0], ColdSchedule) else "sigma"
        labeled_grid(rows, [f"{level} {t:.2g}" for t in times], args.out)
        print(f"{args.out}: {nfe} network evaluations per image")


if __name__ == "__main__":
    main()
