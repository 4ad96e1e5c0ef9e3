"""The Frechet Inception distance, as EDM and the original TensorFlow code compute it. README, "FID".

    python fid.py samples/ --ref cifar10                                  # pictures on disk against the training set
    python fid.py --ckpt run/ema.pt --ref cifar10 --num 50000             # sample and score, three draws, no files
    torchrun --nproc_per_node=8 -- fid.py --ckpt run/ema.pt --ref cifar10 # on eight GPUs
"""
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import (Options, UserError, bounded, decode, fetch, first_rank_first, joined, load, picture_files, rank, ranks, readable, to_uint8, within,
                  written_aside)
from sample import generate, load_model, no_tf32, sampler, sampler_options

WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d"
WIDTH = 2048                                                    # of the features
VERSION = 1                                                     # of how pictures are read and resized: another keeps its own statistics


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of two Gaussians: arrays [D] and [D, D], float64 inside.

    With C = B B^T from the eigenvalues of each, the last trace is the sum of the singular values of B1^T B2: no root is taken of a
    rounding error, so singular covariances are no trouble.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(a, dtype=torch.float64) for a in (mu1, cov1, mu2, cov2))

    def factor(cov):
        w, v = torch.linalg.eigh(cov)
        kept = w > w.max() * len(w) * torch.finfo(w.dtype).eps  # what is below is rounding
        return v[:, kept] * w[kept].sqrt()
    shared = torch.linalg.svdvals(factor(cov1).T @ factor(cov2)).sum()
    return ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * shared).item()


@torch.no_grad()
def features(pictures, net, batch=256):
    """Mean [D] and covariance [D, D] (float64 arrays) of net over an iterable of uint8 batches [B, C, H, W], in one pass.

    The features themselves are not kept. In a process group each process gives its share of the pictures and all get the result.
    """
    n, mean, outer = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for part in (p for chunk in pictures for p in chunk.split(batch)):
        with torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False):
            f = net(part).double()
        if n == 0:                                              # sums are taken around a point near the mean, or digits would cancel
            shift, total, outer = f.mean(0), torch.zeros_like(f[0]), f.new_zeros(f.shape[1], f.shape[1])
        f = f - shift
        n, total, outer = n + len(f), total + f.sum(0), outer + f.T @ f
    if n:
        mean, outer = shift + total / n, outer - torch.outer(total, total) / n
    if ranks() > 1:
        n, mean, outer = merged(n, mean, outer)
    if n == 0:
        raise UserError("there are no pictures to take statistics of")
    if n < 2:
        raise UserError("one picture has no covariance: give at least two")
    return mean.cpu().numpy(), (outer / (n - 1)).cpu().numpy()


def merged(n, mean, outer):
    """Counts, means and scatter matrices of every process -> those of all; a process may have had no pictures."""
    each = [None] * ranks()
    dist.all_gather_object(each, (n, mean.cpu(), outer.cpu()))
    each = [e for e in each if e[0]]
    if not each:
        return n, mean, outer
    n = sum(m for m, _, _ in each)
    mean = sum(m * mu for m, mu, _ in each) / n
    return n, mean, sum(o + m * torch.outer(mu - mean, mu - mean) for m, mu, o in each)


class InceptionV3(nn.Module):
    """The FID network: uint8 [B, 1 or 3, H, W] -> float32 features [B, 2048].

    resize "tf1" is the original's: to 299 x 299, bilinear, source = target * size / 299; "pytorch" is pytorch-fid's, with half-pixel
    centres. Parameters bear the names of the published port, pt_inception-2015-12-05.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = Conv(3, 32, 3, 2, 0), Conv(32, 32, 3, 1, 0), Conv(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80), Conv(80, 192, 3, 1, 0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = B()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(128), C(160), C(160), C(192)
        self.Mixed_7a = D()
        self.Mixed_7b, self.Mixed_7c = E(1280, average), E(2048, maximum)
        self.fc = nn.Linear(2048, 1008)                         # in the file; FID does not use it

    def forward(self, pictures, resize="tf1"):
        x = pictures.to(self.fc.weight.device).float()
        x = x.expand(-1, 3, -1, -1)
        if resize == "tf1":
            x = (stretch(stretch(x, 2), 3) - 128) / 128         # [B, 3, 299, 299]
        elif resize == "pytorch":
            x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) * (2 / 255) - 1
        else:
            raise ValueError(f"resize is tf1 or pytorch, not {resize}")
        with torch.autocast(x.device.type, enabled=False):
            x = x.contiguous(memory_format=torch.channels_last)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))                   # [B, 64, 147, 147]
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))                   # [B, 192, 71, 71]
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))              # [B, 288, 35, 35]
            x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))    # [B, 768, 17, 17]
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                                  # [B, 2048, 8, 8]
            return x.mean((2, 3))                               # [B, 2048]


def stretch(x, dim, size=299):
    """TensorFlow 1's bilinear resize along one dimension: no half-pixel centres, the right neighbour clamped."""
    n = x.shape[dim]
    source = torch.arange(size, device=x.device) * (n / size)
    left = source.long().clamp(max=n - 1)
    share = (source - left).reshape([size if d == dim else 1 for d in range(x.ndim)])
    return torch.lerp(x.index_select(dim, left), x.index_select(dim, (left + 1).clamp(max=n - 1)), share)


def average(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def maximum(x):
    return F.max_pool2d(x, 3, 1, 1)


class Conv(nn.Module):
    """Convolution, batch norm with its stored statistics, ReLU; size a number or (height, width)."""

    def __init__(self, cin, cout, size=1, stride=1, padding=None):
        super().__init__()
        h, w = (size, size) if isinstance(size, int) else size
        self.conv = nn.Conv2d(cin, cout, (h, w), stride, (h // 2, w // 2) if padding is None else padding, bias=False)
        self.bn = BatchNorm(cout)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class BatchNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(f"{prefix}num_batches_tracked", None)    # the published file counts batches, which nothing needs
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.001)


class A(nn.Module):
    def __init__(self, cin, pool):
        super().__init__()
        self.branch1x1 = Conv(cin, 64)
        self.branch5x5_1, self.branch5x5_2 = Conv(cin, 48), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = Conv(cin, 64), Conv(64, 96, 3), Conv(96, 96, 3)
        self.branch_pool = Conv(cin, pool)

    def forward(self, x):
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                          self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))), self.branch_pool(average(x))], 1)


class B(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch3x3 = Conv(288, 384, 3, 2, 0)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = Conv(288, 64), Conv(64, 96, 3), Conv(96, 96, 3, 2, 0)

    def forward(self, x):
        return torch.cat([self.branch3x3(x), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))), F.max_pool2d(x, 3, 2)], 1)


class C(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.branch1x1 = Conv(768, 192)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = Conv(768, c), Conv(c, c, (1, 7)), Conv(c, 192, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3 = Conv(768, c), Conv(c, c, (7, 1)), Conv(c, c, (1, 7))
        self.branch7x7dbl_4, self.branch7x7dbl_5 = Conv(c, c, (7, 1)), Conv(c, 192, (1, 7))
        self.branch_pool = Conv(768, 192)

    def forward(self, x):
        y = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                          self.branch7x7dbl_5(self.branch7x7dbl_4(y)), self.branch_pool(average(x))], 1)


class D(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192), Conv(192, 320, 3, 2, 0)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, 3, 2, 0)

    def forward(self, x):
        y = self.branch7x7x3_2(self.branch7x7x3_1(x))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(self.branch7x7x3_3(y)), F.max_pool2d(x, 3, 2)], 1)


class E(nn.Module):
    def __init__(self, cin, pool):
        super().__init__()
        self.pool = pool                                        # the original averages in Mixed_7b and takes the maximum in Mixed_7c
        self.branch1x1 = Conv(cin, 320)
        self.branch3x3_1, self.branch3x3_2a, self.branch3x3_2b = Conv(cin, 384), Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(cin, 448), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.branch_pool = Conv(cin, 192)

    def forward(self, x):
        y, z = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(y), self.branch3x3_2b(y), self.branch3x3dbl_3a(z), self.branch3x3dbl_3b(z),
                          self.branch_pool(self.pool(x))], 1)


def load_inception(weights=None, device="cpu", folder="data"):
    """The network with the published weights, fetched once into folder, or with those of a file of that layout; and their SHA-256."""
    path = Path(weights) if weights else Path(folder) / WEIGHTS_URL.rsplit("/", 1)[1]
    if not weights:
        fetch(WEIGHTS_URL, path, "sha256", WEIGHTS_SHA256, "or name a file with --weights")
    net = InceptionV3()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as e:                                      # zip, pickle and torch each have errors of their own
        raise UserError(f"{path} is not of the published port's layout: {' '.join(str(e).split())[:200]}") from None
    net = net.to(device, memory_format=torch.channels_last).requires_grad_(False)
    return net, hashlib.sha256(path.read_bytes()).hexdigest()


def statistics(batches, net, resize, digest, source, batch=256):
    """Uint8 batches -> mu, sigma and what they are of, in the layout that EDM and pytorch-fid keep reference statistics in."""
    count = torch.zeros(1, dtype=torch.float64, device=net.fc.weight.device)

    def counted():
        for pictures in batches:
            count.add_(len(pictures))
            yield pictures
    mu, sigma = features(counted(), lambda p: net(p, resize), batch)
    if dist.is_initialized():
        dist.all_reduce(count)
    return {"mu": mu, "sigma": sigma, "num": int(count.item()), "source": source, "resize": resize, "weights": digest}


def entries(spec):
    """(name, function that gives a uint8 array [H, W], [H, W, 1] or [H, W, 3]) of every picture; a list, but for a tar."""
    path = Path(spec)
    if spec in ("cifar10", "leaves") or path.suffix in (".npy", ".npz"):
        pictures = read_array(path) if path.suffix else load(spec).pictures.permute(0, 2, 3, 1).numpy()
        return [(f"picture {i}", lambda i=i: pictures[i]) for i in range(len(pictures))]
    found = picture_files(path)
    decoded = ((name, lambda read=read: decode(read(), None)) for name, read in found)
    return list(decoded) if isinstance(found, list) else decoded


def count_of(found):
    return len(found) if isinstance(found, list) else sum(1 for _ in found)


def read_array(path):
    """A .npy or .npz of uint8 pictures, channels last or first -> [N, H, W, C] (or [N, H, W])."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix == ".npz":
            bounded(path, sum(i.file_size for i in array.zip.infolist()))
            array = array[array.files[0]]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as e:                                      # zip, zlib and NumPy each have errors of their own
        raise UserError(f"{path} cannot be read: {e}") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} holds several arrays: end it in .npz")
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or 0 in array.shape[1:] or array.ndim == 4 and 3 not in (array.shape[1], array.shape[3]) \
            and 1 not in (array.shape[1], array.shape[3]):
        raise UserError(f"{path} holds {array.dtype} {list(array.shape)}, not uint8 pictures [N, H, W, 3]")
    return array if array.ndim == 3 or array.shape[3] in (1, 3) else array.transpose(0, 2, 3, 1)


def read_batches(spec, num=None, batch=256):
    """Uint8 batches [B, 3, H, W] of a folder, zip, tar, .npy, .npz, cifar10 or leaves: num by a fixed draw, or all; this rank's share."""
    with readable(spec):
        yield from read_share(spec, num, batch)


def read_share(spec, num, batch):
    found = entries(spec)
    total = count_of(found)
    chosen = np.random.RandomState(0).permutation(total)[:num]
    wanted = set(np.sort(chosen)[rank()::ranks()].tolist())
    bar, waiting = tqdm(desc=str(spec), total=len(wanted), unit=" pictures", disable=rank() > 0), []
    for i, (name, read) in enumerate(found if isinstance(found, list) else entries(spec)):
        if i not in wanted:
            continue
        bar.update()
        try:
            picture = torch.from_numpy(np.array(read()))
        except Exception as e:                                  # Pillow's decoders raise nearly anything for a broken file
            tqdm.write(f"skipped {name}: {e}", file=sys.stderr)
            continue
        picture = (picture[:, :, None] if picture.ndim == 2 else picture).permute(2, 0, 1).expand(3, -1, -1)    # [3, H, W]
        if waiting and (len(waiting) == batch or waiting[0].shape != picture.shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(picture)
    bar.close()
    if waiting:
        yield torch.stack(waiting)


def known(spec, net, resize, digest, batch, num=None, keep=None):
    """The statistics of pictures or of a statistics file. keep: a folder in which those of a reference are kept and reused."""
    path = Path(spec)
    if path.suffix == ".npz" and path.exists():
        saved = read_statistics(path)
        if saved:
            for what, now in (("resize", resize), ("weights", digest)):
                if saved.get(what, now) != now:
                    raise UserError(f"{spec} was made with {what} {saved[what]}, not {now}: they do not compare")
            return saved
    key = repr((VERSION, fingerprint(spec), resize, digest))
    kept = keep and Path(keep) / f"fid-{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"
    if kept and kept.exists():
        return read_statistics(kept)
    source = "cifar10, training split" if spec == "cifar10" else str(spec)
    stats = statistics(read_batches(spec, num, batch), net, resize, digest, source, batch)
    if kept and rank() == 0 and stats["num"] == count_of(entries(spec)):                        # or a file could not be read this time
        kept.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(kept) as f:
            np.savez(f, **stats)
        tqdm.write(f"statistics kept as {kept}", file=sys.stderr)
    return stats


def read_statistics(path):
    """An .npz of mu [2048] and sigma [2048, 2048] -> dict; None where it holds pictures."""
    try:
        with np.load(path, allow_pickle=False) as z:
            if not {"mu", "sigma"} <= set(z.files):
                return None
            bounded(path, sum(i.file_size for i in z.zip.infolist()))
            saved = {k: z[k] if k in ("mu", "sigma") else z[k].item() for k in z.files if k in ("mu", "sigma", "num", "source", "resize", "weights")}
    except Exception as e:                                      # zip, zlib and NumPy each have errors of their own
        raise UserError(f"{path} cannot be read: {e}") from None
    if not isinstance(saved.get("num", 0), int) or not all(isinstance(saved.get(k, ""), str) for k in ("source", "resize", "weights")):
        raise UserError(f"{path} holds statistics with facts of no known type")
    if saved["mu"].shape != (WIDTH,) or saved["sigma"].shape != (WIDTH, WIDTH) or not all(
            np.issubdtype(saved[k].dtype, np.floating) and np.isfinite(saved[k]).all() for k in ("mu", "sigma")):
        raise UserError(f"{path} holds mu {list(saved['mu'].shape)} and sigma {list(saved['sigma'].shape)}, not finite [{WIDTH}] and [{WIDTH}, {WIDTH}]")
    return {"num": None, "source": str(path), **saved}


def fingerprint(spec):
    """What a kept statistic is of: the path and the names, sizes and times of its files."""
    if spec in ("cifar10", "leaves"):
        return spec
    path = Path(spec).resolve()
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    return str(path), [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def drawn_batches(net, shape, first, num, device, batch, **options):
    """Uint8 batches of the pictures of seeds first to first + num; this rank's share."""
    seeds = range(first + rank(), first + num, ranks())
    with tqdm(desc=f"seeds {first}-{first + num - 1}", total=len(seeds), unit=" pictures", disable=rank() > 0) as bar:
        for x in generate(net, shape, seeds, device, batch, **options):
            yield to_uint8(x)
            bar.update(len(x))


def main():
    p = Options(description="The Frechet Inception distance of pictures on disk, or of a model's, to a reference.")
    p.add_argument("samples", nargs="?", help="a folder, zip, tar, .npy or .npz of pictures, cifar10, or saved statistics (.npz)")
    p.add_argument("--ref", required=True, help="the reference, likewise, or leaves; its statistics are kept in data/ and reused")
    p.add_argument("--ckpt", help="in place of samples: draw them from this model, ema.pt of train.py")
    p.add_argument("--num", type=within(int, 2), default=50000, help="pictures to score, at most (default 50000)")
    p.add_argument("--draws", type=within(int, 1), default=3, help="with --ckpt: how many times, each from seeds of its own (default 3)")
    sampler_options(p)
    p.add_argument("--batch", type=within(int, 1), default=256, help="pictures at a time (default 256)")
    p.add_argument("--weights", help="the network's weights, a file of the published port's layout (default: fetched once into data/)")
    p.add_argument("--resize", choices=["tf1", "pytorch"], default="tf1", help="tf1: the original's and EDM's; pytorch: pytorch-fid's (default tf1)")
    p.add_argument("--json", action="store_true", help="print JSON")
    args = p.parse_args()
    if (args.samples is None) == (args.ckpt is None):
        p.error("give either samples or --ckpt")
    with joined(), p.one_line_errors():
        report(score(args), args.json)


def score(args):
    no_tf32()
    with first_rank_first():
        net, digest = load_inception(args.weights, args.device)
        for spec in {args.samples, args.ref} & {"cifar10", "leaves"} if ranks() > 1 else ():
            load(spec)
    model = args.ckpt and load_model(args.ckpt, args.device, args.precision, args.compile)
    options, nfe = sampler(args, *model) if model else ({}, 0)
    ref = known(args.ref, net, args.resize, digest, args.batch, keep="data")
    if model:
        draws = []
        for i in range(args.draws):
            batches = drawn_batches(model[0], model[1]["data"]["shape"], i * args.num, args.num, args.device, args.batch, **options)
            draws.append(statistics(batches, net, args.resize, digest, args.ckpt, args.batch))
    else:
        draws = [known(args.samples, net, args.resize, digest, args.batch, args.num)]
    fids = [frechet_distance(d["mu"], d["sigma"], ref["mu"], ref["sigma"]) for d in draws]
    if rank() == 0 and any("resize" not in d for d in (ref, *draws)):
        print("warning: a statistics file does not say by which resize rule and weights it was made", file=sys.stderr)
    result = {"fid": min(fids), "samples": draws[0]["source"], "generated": draws[0]["num"], "reference": ref["source"],
              "reference_num": ref["num"], "resize": args.resize, "weights_sha256": digest}
    if model:
        result.update(draws=fids, mean=float(np.mean(fids)), std=float(np.std(fids, ddof=1)) if len(fids) > 1 else None, nfe=nfe,
                      precision=args.precision, **{k: v for k, v in options.items() if v != math.inf})
    return result


def report(r, as_json):
    if rank() > 0:
        return
    for name, n in (("generated", r["generated"]), ("reference", r["reference_num"])):
        if n is not None and n < 2048:
            print(f"warning: {n} {name} pictures make a singular covariance; the FID of so few is no measure", file=sys.stderr)
    if r["generated"] is not None and r["generated"] < 50000:
        print("warning: FIDs of under 50,000 generated pictures are higher, and compare only at the same number", file=sys.stderr)
    if as_json:
        print(json.dumps(r))
        return
    count = lambda n: "an unknown number of" if n is None else f"{n:,}"
    if "draws" in r:
        spread = f" +- {r['std']:.4f}" if r["std"] is not None else ""
        print(f"draws {', '.join(f'{f:.4f}' for f in r['draws'])}; lowest {r['fid']:.4f} (the paper's convention), mean {r['mean']:.4f}{spread}")
        churn = f"churn {r['churn']:g} from {r['s_min']:g} to {r.get('s_max', math.inf):g}" if r["churn"] else "no churn"
        print(f"sampler {r['solver']}" + (f", class {r['label']}" if "label" in r else "") + f", {r['steps']} steps, NFE {r['nfe']}, {churn}, {r['precision']}")
    print(f"FID {r['fid']:.4f}   {count(r['generated'])} pictures of {r['samples']} against {count(r['reference_num'])} of {r['reference']}; "
          f"resize {r['resize']}, weights {r['weights_sha256'][:8]}")


if __name__ == "__main__":
    main()
