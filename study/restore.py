"""Restoring blurred and noisy images: the posterior mean in one evaluation, and draws from
p(x0 | y).

    python -m study.restore --ckpt any/ema.pt --data held-out/        # a network of --bnr any

The network has not been trained to restore: a degraded image y = blur(x0, alpha) + sigma n is a
state of the forward process. Beside it stands the Wiener filter, which is the posterior mean for
Gaussian images of the same mean and spectrum. Then the levels that the network is given are wrong.
"""
import torch
from tqdm import tqdm

from degrade import AnyBNR, ConstantBNR, attenuation, dct2, degrade, idct2
from sample import STEPS, ancestral, multistep_times, sampling_schedule
from study.common import (REFERENCES, Cells, Measure, column, groups, load_once, loaded, parser,
                          references, run, top_bands)
from util.cli import UserError, add_device_option, number
from util.images import labeled_grid, normalize, to_uint8

LEVELS = [(1., 0.1), (1., 0.3), (0.5, 0.3), (2., 0.4)]          # blur in pixels, noise
WRONG = [(1, 0.5), (1, 2), (0.5, 1), (2, 1)]    # what the given blur and noise are multiplied by
DRAWS = 8                                       # of an image, for their mean
FIRST = 64                                      # images with so many draws; all others have one
SHOWN = 10                                      # images in the picture
PSNR = {"methods": [str], "psnr": [float]}
BASE = {"network": str, "data": str, "kimg": float, "alpha": float, "sigma": float, "steps": int,
        "count": int, "first": int}
FIELDS = [{**BASE, **PSNR, "distance": [float], "power": [[float]], "given": None,
           "floor": float, "of_first": PSNR, "spread": float},
          {**BASE, "given": {"alpha": float, "sigma": float}, "of_first": PSNR}]


def options():
    p = parser("restore", "PSNR and distance of restored images: the input, the Wiener filter, the "
                          "network's mean and its draws.")
    a = p.add_argument
    a("--ckpt", default="run/ema.pt", help="the model: ema.pt of train.py (default run/ema.pt)")
    a("--data", help="images that it was not trained on: some are restored, the others make the "
      "reference and the filter (default: those that it was trained on)")
    a("--images", type=number(int, 10), default=500,
      help=f"to restore; the first {FIRST} have {DRAWS} draws each (default 500)")
    a("--steps", type=number(int, 1), default=STEPS["ancestral"],
      help=f"evaluations of a draw (default {STEPS['ancestral']})")
    add_device_option(p)
    args = p.parse_args()
    if args.quick:
        args.images = 10
        args.steps = 3
    return p, args


def compute(args, cells: Cells) -> list:
    net, checkpoint = loaded(args.ckpt, args.device)
    if net.classes or checkpoint["data"].get("latents"):
        raise UserError(f"{args.ckpt}: restoring is tried with images and without classes")
    data = args.data or checkpoint["options"]["data"]
    side = checkpoint["data"]["shape"][1]
    count = len(load_once(data, side).images)
    if count < 2 * args.images:
        raise UserError(f"{data} has {count} images: --images {args.images} needs twice as many")
    images = references(data, side, args.images)
    others = references(data, side, min(count - args.images, REFERENCES), skip=args.images)
    first = min(FIRST, args.images)
    measure = Measure(others[:50] if args.quick else others, args.device)
    key = {"images": torch.cat([images, others]), "checkpoint": args.ckpt, "steps": args.steps,
           "network": str(checkpoint["config"]["bnr"]), "data": load_once(data, side).name,
           "count": args.images, "first": first}

    pairs = levels_of(checkpoint)
    wrong_pairs = WRONG
    if args.quick:
        pairs = pairs[:2]
        wrong_pairs = WRONG[:1]
    for alpha, sigma in pairs:
        def right():
            return restored(net, images, others, alpha, sigma, args.steps, first, measure)
        cells.compute(right, alpha=alpha, sigma=sigma, given=None, **key)
    alpha, sigma = pairs[min(1, len(pairs) - 1)]
    for more_blur, more_noise in wrong_pairs:
        given = {"alpha": more_blur * alpha, "sigma": more_noise * sigma}

        def wrong():
            return misled(net, images[:first], alpha, sigma, given, args.steps)
        if given["alpha"] <= AnyBNR.max_bnr * given["sigma"] and key["network"] == "any":
            cells.compute(wrong, alpha=alpha, sigma=sigma, given=given, **key)
    picture(net, images[:SHOWN], others, alpha, sigma, args.steps, cells.file.with_suffix(".png"))
    return cells.cells


def levels_of(checkpoint: dict) -> list:
    """LEVELS, or the same noise with the blur that a network of one ratio knows."""
    schedule = sampling_schedule(checkpoint)
    if isinstance(schedule, AnyBNR):
        return LEVELS
    if checkpoint["config"]["mean_color"]:
        raise UserError("restoring is tried with noise, which --bnr inf does not have")
    sigmas = sorted({sigma for _, sigma in LEVELS})
    return [(round(schedule.levels(sigma)[0].item(), 6), sigma) for sigma in sigmas]


def degraded(images: torch.Tensor, alpha: float, sigma: float, device) -> torch.Tensor:
    """float64 [N, C, H, W]: equation (1) with one draw of the noise for all."""
    x0 = normalize(images).double().to(device)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, _ = degrade(x0, alpha, sigma, noise.to(device))
    return y


def wiener(y: torch.Tensor, others: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """The best linear estimate of x0, from the mean and the variance of each DCT coefficient over
    other images."""
    u = dct2(normalize(others).double()).to(y.device)
    mean = u.mean(0)
    variance = u.var(0)
    m = attenuation(alpha, y)
    gain = m * variance / (m ** 2 * variance + sigma ** 2)
    return idct2(mean + gain * (dct2(y) - m * mean))


@torch.no_grad()
def posterior_mean(net, y, alpha: float, sigma: float) -> torch.Tensor:
    levels = torch.tensor([alpha, sigma], dtype=torch.float64, device=y.device)
    d, r = net(y, *levels)
    return d.double() + r.double()


def draws(net, y, alpha: float, sigma: float, steps: int, n: int) -> torch.Tensor:
    """n draws for each image: float64 [n, N, C, H, W]."""
    generator = torch.Generator().manual_seed(1)
    schedule = ConstantBNR(alpha / sigma)
    times = multistep_times(steps, *y.shape[2:], schedule, t_max=sigma)

    def randn():
        return torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return torch.stack([ancestral(net, schedule, y, times, randn)
                        for _ in tqdm(range(n), f"alpha {alpha:g}, sigma {sigma:g}", delay=1)])


def psnr(names: list, pictures: list, images: torch.Tensor) -> dict:
    """The mean PSNR over images of some sets of pictures, float [N, C, H, W] in [-1, 1]."""
    x0 = normalize(images).double()
    values = []
    for x in pictures:
        error = (x.cpu().clamp(-1, 1) - x0).square().mean((1, 2, 3))            # [N]
        values.append(round((10 * (4 / error).log10()).mean().item(), 3))
    return {"methods": names, "psnr": values}


def restored(net, images, others, alpha, sigma, steps: int, first: int, measure: Measure) -> dict:
    """PSNR, distance and power. of_first: PSNR of the images that have several draws. spread: the
    variance of these draws over the mean square error of D + R; 1 for exact heads and draws."""
    y = degraded(images, alpha, sigma, next(net.parameters()).device)
    mean = posterior_mean(net, y, alpha, sigma)
    draw = draws(net, y, alpha, sigma, steps, 1)[0]
    pictures = [y, wiener(y, others, alpha, sigma), mean, draw]
    cell = psnr(["input", "Wiener", "D + R", "a draw"], pictures, images)
    measured = [measure(to_uint8(x).cpu()) for x in pictures]
    cell["distance"] = column(measured, "distance")
    cell["power"] = column(measured, "power")
    cell["floor"] = measure(images)["distance"]
    x = draws(net, y[:first], alpha, sigma, steps, DRAWS)
    cell["of_first"] = psnr(["D + R", "a draw", f"mean of {DRAWS} draws"],
                            [mean[:first], x[0], x.mean(0)], images[:first])
    error = (mean.cpu() - normalize(images))[:first].square().mean()
    cell["spread"] = round((x.var(0).mean().cpu() / error).item(), 3)
    return cell


def misled(net, images, alpha, sigma, given: dict, steps: int) -> dict:
    """PSNR where the network is given other levels than the images have."""
    y = degraded(images, alpha, sigma, next(net.parameters()).device)
    mean = posterior_mean(net, y, **given)
    draw = draws(net, y, steps=steps, n=1, **given)[0]
    return {"of_first": psnr(["D + R", "a draw"], [mean, draw], images)}


def picture(net, images, others, alpha, sigma, steps: int, filename) -> None:
    y = degraded(images, alpha, sigma, next(net.parameters()).device)
    rows = [("photograph", normalize(images)), (f"blur {alpha:g}, noise {sigma:g}", y),
            ("Wiener", wiener(y, others, alpha, sigma)),
            ("D + R", posterior_mean(net, y, alpha, sigma))]
    for x in draws(net, y, alpha, sigma, steps, 4):
        rows.append(("a draw", x))
    rows = [(label, list(row.cpu().float())) for label, row in rows]
    labeled_grid(rows, [str(i + 1) for i in range(len(images))], filename)
    print(filename)


def table(cells: list) -> None:
    names = ("network", "data", "kimg", "count", "first", "steps", "checkpoint", "images")
    for (network, data, kimg, count, first, steps, *_), same in groups(cells, *names).items():
        print(f"\n{data}, {count} images; network of {network}, {kimg:g} kimg; {steps} evaluations "
              f"a draw; distance of as many others {same[0].get('floor', 0):.1f}")
        for cell in same:
            print(f"blur {cell['alpha']:g} pixels, noise {cell['sigma']:g}")
            of_first = listed_psnr(cell["of_first"])
            if cell["given"]:
                print(f"  given as blur {cell['given']['alpha']:g}, noise "
                      f"{cell['given']['sigma']:g}: the first {first} have PSNR {of_first}")
                continue
            for method, value, distance, power in zip(cell["methods"], cell["psnr"],
                                                      cell["distance"], cell["power"]):
                print(f"  {method:8}PSNR {value:5.2f}   distance {distance:6.1f}   power "
                      f"{top_bands({'power': power})}")
            print(f"  the first {first}: PSNR {of_first}; their draws' variance is "
                  f"{cell['spread']:.2f} of D + R's error")


def listed_psnr(cell: dict) -> str:
    pairs = zip(cell["methods"], cell["psnr"])
    return ", ".join(f"{method} {value:.2f}" for method, value in pairs)


def main():
    p, args = options()
    run(p, args, "restore", FIELDS, compute, table, {})


if __name__ == "__main__":
    main()
