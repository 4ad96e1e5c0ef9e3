"""A film strip of sampling: what the network sees and what both of its heads answer, step by step.

    python -m study.strip --ckpt run/ema.pt --seeds 0-2
    python -m study.strip --ckpt any/ema.pt --bnr 0 0.5 2        # one seed along three ratios
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from model import load_model
from sample import generate, sampler, sampler_options, sampling_path, seed_list
from util import Parser, UserError, number, save_image, to_uint8


def options():
    p = Parser(prog="python -m study.strip",
               description="Draw at most ten states of three seeds, or of one seed along up to "
                           "three ratios: x, D, 4 R and D + R.")
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


def rows_of(net, paths, shape, seeds, device, **options):
    """The rows of film_strip, four for each path and seed, and the levels t of its columns."""
    rows = []
    for path in tqdm(paths, unit=" paths"):
        states = []
        for _ in generate(net, path, shape, seeds, device, 3,
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
    return rows, [t for t, *_ in states]


def film_strip(rows, columns, filename):
    """rows: pairs of a label and its images [C, H, W] in [-1, 1], one for each column label."""
    cells = to_uint8(torch.stack([torch.stack(list(images)) for _, images in rows])).cpu()
    cells = cells[:, :, :3] if cells.shape[2] >= 3 else cells[:, :, :1].expand(-1, -1, 3, -1, -1)
    k = max(1, 64 // cells.shape[-1])
    cells = cells.repeat_interleave(k, -1).repeat_interleave(k, -2)
    cells = F.pad(cells, (0, 2, 0, 2), value=255)               # [rows, columns, 3, H, W]
    _, _, _, h, w = cells.shape
    left, top = 12 + 6 * max(len(label) for label, _ in rows), 16
    canvas = Image.new("RGB", (left + len(columns) * w, top + len(rows) * h), "white")
    draw = ImageDraw.Draw(canvas)
    for j, label in enumerate(columns):
        draw.text((left + j * w + 2, 2), label, fill="black")
    for i, (label, _) in enumerate(rows):
        draw.text((2, top + i * h + h // 2 - 7), label, fill="black")
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
    pixels[:, top:, left:] = cells.permute(2, 0, 3, 1, 4).reshape(3, len(rows) * h, -1)
    save_image(pixels, filename)


def main():
    p, args = options()
    with p.one_line_errors():
        net, checkpoint = load_model(args.ckpt, args.device, args.precision, args.compile)
        options_of_sampler, nfe = sampler(args, net, checkpoint)
        if checkpoint["data"].get("latents"):
            raise UserError(f"{args.ckpt}: a film strip is of images, and its data are latents")
        paths = [sampling_path(checkpoint, bnr, args.path) for bnr in args.bnr]
        seeds = args.seeds[:3] if len(paths) == 1 else args.seeds[:1]
        rows, times = rows_of(net, paths, checkpoint["data"]["shape"], seeds, args.device,
                              **options_of_sampler)
        film_strip(rows, [f"t = {t:.3g}" for t in times], args.out)
        print(f"{args.out}: {nfe} network evaluations an image")


if __name__ == "__main__":
    main()
