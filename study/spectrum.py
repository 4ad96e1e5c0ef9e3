"""The blur-to-noise ratio that the spectrum of the data suggests: "Which ratio?" in docs/method.md.

    python -m study.spectrum                           # dead leaves
    python -m study.spectrum --data my-images/         # your own; the figure shows both

Noise of level sigma hides a frequency f (rad/pixel) once sigma^2 > S, the power of the images
there. Blur of BNR sigma pixels removes it once f BNR sigma > 1. Both happen at the same level where
BNR = 1 / sqrt(A), with A = f^2 S.
"""
import numpy as np
import torch

from study.common import (Cells, band_power, bands, column, label_lines, load_once, mean_by_band,
                          parser, run)
from util.cli import UserError, number

IMAGES = 4096                                   # at most: the lowest band is then known to 2 %
BNRS = [0.5, 2, 10]                             # of the figure's lines
FIELDS = [{"data": str, "resolution": int, "sample": (int, None), "frequency": [float],
           "power": [float]}]


def options():
    p = parser("spectrum", "The ratio that the power spectrum of images suggests: for each band of "
                           "frequencies the noise that hides it and the blur that removes it. The "
                           "paper argues from such spectra, but has no table of them.")
    a = p.add_argument
    a("--data", default="leaves",
      help="leaves, cifar10, or a folder, zip, tar or array of images (default leaves)")
    a("--resolution", type=number(int, 2, 1024), default=32,
      help="side that images are cropped and resized to (default 32)")
    args = p.parse_args()
    if args.quick:
        args.resolution = 16
    return p, args


def spectrum(images: torch.Tensor):
    """uint8 images or floats [N, C, H, W] -> the mean lam and the mean power of the half-octave
    bands, lowest first, float64 [bands] each. lam is f^2."""
    lam, band = bands(*images.shape[2:])
    total = 0
    for part in images.split(256):                              # to bound the memory
        total = total + band_power(part) * len(part)
    return mean_by_band(lam, band), total / len(images)


def compute(args, cells: Cells) -> list:
    """The cell of the data that is asked for; the figure shows it beside the others there are."""
    images = load_once(args.data, args.resolution).images

    def value():
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        lam, power = spectrum(images[order[:IMAGES]])
        if not power.min() > 0:
            raise UserError(f"{args.data} has bands of frequencies without any power, as images of "
                            "one color do: it suggests no ratio")
        return {"frequency": lam.sqrt().tolist(), "power": power.tolist()}
    cells.compute(value, images=images, data=args.data, resolution=args.resolution,
                  sample=min(len(images), IMAGES))
    return cells.cells


def table(cells: list) -> None:
    for cell in cells:
        f = np.array(cell["frequency"])
        power = np.array(cell["power"])
        ratio = 1 / (f * np.sqrt(power))                        # 1 / sqrt(A)
        side = cell["resolution"]
        print(f"\n{cell['data']}, {side} x {side}: frequency in rad/pixel, power, the noise level "
              "that hides it,\nthe blur in pixels that removes it, and the ratio (BNR) where both "
              f"happen together\n{'frequency':>10}{'power':>12}{'noise':>10}{'blur':>10}"
              f"{'ratio':>10}")
        for row in zip(f, power, np.sqrt(power), 1 / f, ratio):
            print("{:10.3f}{:12.4g}{:10.4g}{:10.3g}{:10.3g}".format(*row))
        print(f"power falls as 1 / f^{-slope(np.log(f), np.log(power)):.2f}\n"
              f"suggested: a BNR below {ratio.min():.2f}, so that noise hides every band before "
              "blur removes it")


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Of the straight line of least squares."""
    x = x - x.mean()
    return (x * y).sum() / (x * x).sum()


def draw_levels(plt, cells: list):
    """The levels from which noise hides a frequency, a line for each data set, and from which blur
    removes it, a line for each ratio."""
    figure, axes = plt.subplots(figsize=(8, 4.8))
    ends = []
    for i, cell in enumerate(cells):
        noise = np.sqrt(cell["power"])
        axes.loglog(cell["frequency"], noise, ".-", color=f"C{i % 10}")
        ends.append((noise[-1], f"noise hides it:\n{cell['data']}", f"C{i % 10}"))
    frequencies = np.concatenate(column(cells, "frequency"))
    span = np.array([frequencies.min(), frequencies.max()])
    for bnr in BNRS:
        blur = 1 / (bnr * span)
        axes.loglog(span, blur, "--", color="gray", lw=1.5)
        ends.append((blur[-1], f"blur removes it: BNR {bnr:g}", "gray"))
    axes.minorticks_off()
    axes.set_xticks([0.2, 0.5, 1, 2, 3], ["0.2", "0.5", "1", "2", "3"])
    axes.set(xlabel="frequency, rad/pixel", ylabel="noise level sigma",
             title="From which level on is a frequency gone?")
    label_lines(axes, ends)
    return figure


def main():
    p, args = options()
    run(p, args, "spectrum", FIELDS, compute, table, {"": draw_levels})


if __name__ == "__main__":
    main()
