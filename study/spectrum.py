"""The blur-to-noise ratio that the spectrum of the data suggests: "Which ratio?" in docs/method.md.

    python -m study.spectrum                           # dead leaves
    python -m study.spectrum --data my-images/         # your own; the plot shows both

Noise of level sigma hides a frequency f (rad/pixel) once sigma^2 > S, the power of the images
there. Blur of BNR sigma pixels removes it once f BNR sigma > 1. Both happen at the same level where
BNR = 1 / sqrt(A), with A = f^2 S.
"""
import numpy as np
import torch

from data import load
from study.common import Cells, band_power, bands, parser, plotted
from util import UserError, number

IMAGES = 4096                                   # at most: the lowest band is then known to 2 %
BNRS = [0.5, 2, 10]                             # of the plot's lines


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


def spectrum(images):
    """uint8 images or floats [N, C, H, W] -> the mean lam and the mean power of the half-octave
    bands, lowest first, float64 [bands] each. lam is f^2."""
    lam, band = bands(*images.shape[2:])
    mean_lam = torch.stack([lam[band == b].mean() for b in range(int(band.max()) + 1)])
    parts = images.split(256)                                   # to bound the memory
    return mean_lam, sum(band_power(part) * len(part) for part in parts) / len(images)


def measured(args):
    """The result of one data set, as plain types."""
    images = load(args.data, args.resolution).images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    lam, power = spectrum(images[order[:IMAGES]])
    if not power.min() > 0:
        raise UserError(f"{args.data} has bands of frequencies without any power, as images of one "
                        "colour do: it suggests no ratio")
    return {"images": min(len(images), IMAGES), "frequency": lam.sqrt().tolist(),
            "power": power.tolist()}


def table(cell):
    f, power = np.array(cell["frequency"]), np.array(cell["power"])
    ratio = 1 / (f * np.sqrt(power))                            # 1 / sqrt(A)
    slope, _ = np.polyfit(np.log(f), np.log(power), 1)
    print(f"\n{cell['data']}, {cell['images']} images of {cell['resolution']} x "
          f"{cell['resolution']}: frequency in rad/pixel, power, the noise level that hides it,\n"
          "the blur in pixels that removes it, and the ratio (BNR) where both happen together\n"
          f"{'frequency':>10}{'power':>12}{'noise':>10}{'blur':>10}{'ratio':>10}")
    for row in zip(f, power, np.sqrt(power), 1 / f, ratio):
        print("{:10.3f}{:12.4g}{:10.4g}{:10.3g}{:10.3g}".format(*row))
    print(f"power falls as 1 / f^{-slope:.2f}\n"
          f"suggested: a BNR below {ratio.min():.2f}, so that noise hides every band before blur "
          "removes it")


def draw_plot(cells):
    """The levels from which noise hides a frequency, a curve for each data set, and from which blur
    removes it, a line for each ratio."""
    def draw(plt):
        figure, axes = plt.subplots(figsize=(7, 5))
        for c in cells.cells:
            axes.loglog(c["frequency"], np.sqrt(c["power"]), ".-",
                        label=f"noise: {c['data']}, {c['resolution']} x {c['resolution']}")
        f = np.concatenate([c["frequency"] for c in cells.cells])
        ends = np.array([f.min(), f.max()])
        for bnr, style in zip(BNRS, (":", "--", "-.")):
            axes.loglog(ends, 1 / (bnr * ends), style, color="black", label=f"blur: BNR {bnr:g}")
        axes.set(xlabel="frequency, rad/pixel", ylabel="noise level sigma",
                 title="Above its line, noise hides a frequency, or blur removes it")
        axes.legend()
        return figure
    plotted(cells.png, draw)


def main():
    p, args = options()
    with p.one_line_errors():
        cells = Cells(args, "spectrum")
        key = dict(data=args.data, resolution=args.resolution)
        shown = cells.cells if args.plot_only else [cells.compute(key, lambda: measured(args))]
        for cell in shown:
            table(cell)
        draw_plot(cells)


if __name__ == "__main__":
    main()
