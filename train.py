"""Train a blur-noise mixture diffusion model with the loss (9).

    python train.py                                        # dead leaves, minutes on a CPU
    python train.py --data cifar10 --bnr 0.5               # the paper's CIFAR-10 run
    python train.py --data cifar10 --bnr any               # one network for every ratio
    python train.py --data my-images/ --preset ffhq64      # your own images
    torchrun --nproc_per_node=8 train.py --data cifar10    # the same on several GPUs
    python train.py --resume run --duration 120            # a run in its folder, with its options

The same command again resumes the run, too. Equation numbers are those of the README.
"""
import argparse
import contextlib
import copy
import json
import math
import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import augment, load, shuffled, take
from degrade import AnyBNR, ConstantBNR, check_path, make_path, time_of
from loss import disentangled_loss
from model import PARAMETERIZATIONS, SIGMA_DATA, build, start_from
from sample import fast_solver, generate
from util import (Parser, UserError, add_device_option, any_rank, atomic_write, compile_or_warn,
                  full_float32, locked, normalize, number, or_a_warning, process_group, rank,
                  rank_0_first, read_checkpoint, reason, save_checkpoints, save_grid, say,
                  seed_for, shown, signals_noted, to_uint8, warn, world_size)

# The defaults are the paper's for CIFAR-10 (EDM's DDPM++ recipe). A preset is what differs.
PRESETS = {
    "cifar10": {},
    "ffhq64": dict(resolution=64, mult=[1, 2, 2, 2], batch=256, lr=2e-4, dropout=0.05, augment=0.15,
                   sample_steps=40),
    "church128": dict(resolution=128, mult=[1, 1, 2, 2, 2], batch=256, lr=2e-4, dropout=0.1,
                      augment=0., sample_steps=40),
    "tiny": dict(resolution=16, channels=24, mult=[1, 2], blocks=1, batch=16, lr=2e-3, dropout=0.,
                 augment=0., duration=60., warmup=1., ema=3., log_every=2., snapshot_every=20.),
}
MAY_CHANGE_ON_RESUMING = {"out", "data", "preset", "duration", "lr", "batch_gpu", "device",
                          "precision", "compile", "log_every", "snapshot_every", "keep_every",
                          "sample_steps", "attention"}          # which the config has


def options(argv=None):
    """The options of a command line, with those of the preset: argparse.Namespace."""
    p = Parser(description="Train a blur-noise mixture diffusion model. A kimg is 1,000 images "
                           "seen. The defaults named here are those of --preset cifar10; data other"
                           " than cifar10 take --preset tiny.")
    a = p.add_argument
    a("--data", default="leaves",
      help="leaves, cifar10, or a folder, zip, tar, .npy or .npz of images (default leaves)")
    path = p.add_mutually_exclusive_group().add_argument
    path("--bnr", type=bnr,
         help="blur-to-noise ratio, pixels of blur for a unit of noise; 0 is EDM, inf is blur "
              "alone, any is one network for all from 0 to 10 (default 0.5)")
    path("--path", choices=["blurring"],
         help="instead of one ratio, Hoogeboom & Salimans' schedule of blur over noise")
    a("--param", choices=PARAMETERIZATIONS, default="residual",
      help="what the network predicts: residual, the blurry image and what blur removed; x0, the "
           "image; noise, the noise and what blur removed (default residual)")
    a("--cond", action="store_true", help="class-conditional; a class is a folder of images")
    a("--preset", choices=PRESETS, help="recipe (default: cifar10 for cifar10, else tiny)")
    a("--out", default="run",
      help="folder of checkpoints, log and grids; one that holds a run resumes it (default run)")
    a("--resume", metavar="RUN",
      help="continue the run in this folder with its own options, but for what is given here")
    a("--batch", type=number(int, 1), default=512,
      help="images per step, over all GPUs and accumulation (default 512)")
    a("--batch-gpu", type=number(int, 1),
      help="images at a time on each GPU, to save memory (default: all of its share)")
    a("--lr", type=number(float, 0, 1), default=1e-3, help="Adam's learning rate (default 1e-3)")
    a("--warmup", type=number(float, 0), default=10000.,
      help="kimg in which the learning rate rises from 0 (default 10000)")
    a("--duration", type=number(float, 0.001, 1e9), default=200000.,
      help="kimg to train for (default 200000)")
    a("--ema", type=number(float, 0), default=500., help="half-life of the EMA, kimg (default 500)")
    a("--dropout", type=number(float, 0, 0.99), default=0.13, help="probability (default 0.13)")
    a("--augment", type=number(float, 0, 1), default=0.12,
      help="probability of each augmentation; 0: none, no flip either (default 0.12)")
    a("--resolution", type=number(int, 0, 4096), default=32,
      help="side that images are cropped and resized to; 0: as they are (default 32)")
    a("--channels", type=number(int, 8, 4096), default=128, help="network width (default 128)")
    a("--mult", type=number(int, 1, 16), nargs="+", default=[2, 2, 2],
      help="width of each level, times --channels (default 2 2 2)")
    a("--blocks", type=number(int, 1, 64), default=4, help="residual blocks a level (default 4)")
    a("--attention", type=number(int, 0), nargs="*",
      help="sides of the levels with attention (default: 16, where a level below the first has it, "
           "else the last level)")
    a("--seed", type=number(int, 0, 2 ** 31), default=0,
      help="of the weights, the order and the noise (default 0)")
    a("--init-from", metavar="CKPT",
      help="start from the weights of this checkpoint, of any BNR, instead of random ones")
    add_device_option(p)
    a("--precision", choices=["auto", "bf16", "fp32"], default="auto",
      help="of the network; auto: bf16 on a GPU that has it (default auto)")
    a("--compile", action=argparse.BooleanOptionalAction,
      help="torch.compile the network, a minute or two (default: on a GPU)")
    a("--log-every", type=number(float, 0.001), default=50.,
      help="kimg between log lines (default 50)")
    a("--snapshot-every", type=number(float, 0, 1e9), default=2500.,
      help="kimg between checkpoints, each with a grid of samples (default 2500)")
    a("--keep-every", type=number(float, 0, 1e9), default=0.,
      help="kimg between copies of ema.pt to keep, ema-KIMG.pt; 0: none (default 0)")
    a("--sample-steps", type=number(int, 1, 1000), default=18,
      help="Heun steps of sample.py on this model (default 18)")
    given = p.parse_args(argv)
    stored = options_of_run(p, given) if given.resume else {}
    preset = given.preset or stored.get("preset") or \
        ("cifar10" if given.data == "cifar10" else "tiny")
    p.set_defaults(**{**PRESETS[preset], **stored, "preset": preset})
    args = p.parse_args(argv)
    if args.resume not in (None, args.out):
        p.error("--resume and --out name two folders: give one of them")
    if args.path and args.bnr is not None:
        p.error("--bnr and --path are two ways to choose the path: give one of them")
    args.bnr = 0.5 if args.bnr is None else args.bnr
    del args.resume
    return args


def options_of_run(parser, given):
    """The options that a run has written, as defaults: text, which is checked like a command line.
    The device is this machine's."""
    def default(name, v):
        if isinstance(getattr(given, name), list) or isinstance(v, list):
            return [int(n) for n in v]
        return v if v is None or isinstance(v, bool) else str(v)
    try:
        stored = json.loads(Path(given.resume, "options.json").read_text())
        known = stored.keys() & vars(given).keys() - {"device", "out", "resume"}
        known -= {"bnr"} if stored.get("path") else set()       # which then is no option of its own
        if stored["preset"] in PRESETS:
            return {"out": given.resume, **{name: default(name, stored[name]) for name in known}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    parser.error(f"--resume {given.resume}: it holds no run (a readable options.json)")


def bnr(text):
    """An argparse type: a ratio of at least 0, inf, or any."""
    with contextlib.suppress(ValueError):
        if text == "any" or 0 <= float(text) <= 1e6 or float(text) == math.inf:
            return text if text == "any" else float(text)
    raise argparse.ArgumentTypeError(f"must be a number of at least 0, inf or any, not {text!r}")


def main():
    args = options()
    with process_group(), Parser().one_line_errors(), signals_noted() as signals:
        train(args, signals=signals)
        if rank() == 0 and not signals:
            ckpt = shlex.quote(f"{args.out}/ema.pt")
            say(f"python sample.py --ckpt {ckpt}")
            say(f"python fid.py --ckpt {ckpt} --ref {shlex.quote(args.data)}")
    if signals:
        sys.exit(128 + signals[0])


def train(args, data=None, path=None, net=None, signals=()):
    """The whole run, one of them in each process of torchrun. Returns the EMA of the network.

    args: of options(). To swap a part, give data (data.Images), path (degrade.Path) or net
    (model.Denoiser); docs/own-parts.md says what they have to be. signals: a list; the run saves
    and ends after the step in which it is filled. Raises UserError.
    """
    full_float32()
    torch.backends.cudnn.benchmark = True
    with process_group(), locked(args.out):
        if data is not None:                                    # its images are not resized
            args = argparse.Namespace(**{**vars(args), "data": data.name, "resolution": 0})
        shares_of_batch(args)                                   # complains before the data load
        state = resumable(args)
        if data is None:
            with rank_0_first():
                data = load(args.data, args.resolution or None)
        path, net, config = parts(args, data, path, net)
        if args.init_from and not state:
            start_from(net, args.init_from, data.classes)
        net = net.to(args.device, memory_format=torch.channels_last).train()
        ema = copy.deepcopy(net).eval().requires_grad_(False)
        optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=1e-8,
                                     fused=True)
        run = {"config": config, "data": data.facts(), "options": vars(args)}   # in each checkpoint
        seen = restore(args.out, state, run, net, ema, optimizer) if state else 0
        del state                                               # frees its tensors
        return loop(args, run, data, path, net, ema, optimizer, seen,
                    [] if signals == () else signals)


def loop(args, run, data, path, net, ema, optimizer, seen, signals):
    """The steps after the first `seen` images, up to --duration, and what they write."""
    device = torch.device(args.device)
    bf16 = args.precision == "bf16" or args.precision == "auto" and device.type == "cuda" \
        and torch.cuda.is_bf16_supported(including_emulation=False)
    total = math.ceil(round(args.duration * 1000, 6) / args.batch) * args.batch
    images = data.images
    if args.compile or args.compile is None and device.type == "cuda":
        compile_or_warn(net.unet, args.compile)
    shared = DistributedDataParallel(net) if world_size() > 1 else net
    log = begin(args, seen) if rank() == 0 else None
    if rank() == 0:
        with shown(signals):
            header(args, run, data, net, seen, bf16)
    bar = tqdm(total=total, initial=seen, unit="img", unit_scale=True, disable=rank() > 0,
               delay=0.1)                   # it writes nothing before the first step
    history, since, stopping = [], time.time(), False
    while seen < total and not stopping:
        for group in optimizer.param_groups:                    # a linear warm-up, then constant
            group["lr"] = args.lr * min(1, (seen + args.batch) / max(args.warmup * 1000, 1))
        batch = draw_batch(args, path, images, data.labels, seen, device)
        history.append(backward(args, shared, batch, seen, bf16))
        check_finite(net, history[-1], seen // args.batch + 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += args.batch
        update_ema(args, ema, net, seen)

        with shown(signals):
            bar.update(args.batch)
        stopping = any_rank(signals)                            # asked once: a signal may come now
        last, passed = seen >= total or stopping, partial(crossed, args, seen)
        snapshot = last or passed(args.snapshot_every, args.keep_every)
        if snapshot or passed(args.log_every):
            line = summary(args, seen, gathered(history), group["lr"], since)
            with shown(signals):
                bar.set_postfix({k: f"{line[k]:.4f}" for k in ("denoise", "deblur")})
            if rank() == 0:
                with or_a_warning("a log line"):
                    print(json.dumps(line), file=log, flush=True)
            history = []
        if snapshot and rank() == 0:
            save(args, run, net, ema, optimizer, seen, must=last)
            if not stopping and not data.latents:
                draw_grid(args, run, path, ema, seen)
        if not history:
            since = time.time()             # what was just written does not count as training time
    with shown(signals):
        bar.close()
    if stopping and rank() == 0:
        warn(f"stopped and saved at {seen / 1000:g} kimg; the same command resumes it")
    return ema


# A step

def draw_batch(args, path, images, labels, seen, device):
    """This process's share of the batch after the first `seen` images: a dict of tensors.

    Everything is drawn for the whole batch and then cut, so that it does not depend on the number
    of processes or on --batch-gpu; and from the seed and `seen` alone, so that resuming needs no
    random state.
    """
    share, _ = shares_of_batch(args)
    part = slice(rank() * share, (rank() + 1) * share)
    torch.manual_seed(seed_for("step", args.seed, seen))
    index = shuffled(seen, args.batch, len(images), args.seed)[part]
    x0, augmented = normalize(take(images, index, device)), None                # [B, C, H, W]
    if args.augment:
        x0, augmented = augment(x0, args.augment, args.batch, part)
    label = take(labels, index, device) if args.cond else None
    alpha, sigma = path.training_levels(args.batch, *x0.shape[2:], device)
    noise = torch.randn(args.batch, *x0.shape[1:], device=device)
    return {"x0": x0, "augment": augmented, "label": label, "alpha": alpha[part],
            "sigma": sigma[part], "noise": noise[part]}


def backward(args, net, batch, seen, bf16):
    """The gradients of the loss, summed over pixels and averaged over the batch, in parts of
    --batch-gpu images. With the last part, torch's DDP averages them over the processes.
    Returns t and both loss terms of each image, [3, B]."""
    share, micro = shares_of_batch(args)
    sigma_data = getattr(net, "module", net).sigma_data         # DDP wraps the network
    if world_size() > 1:
        torch.manual_seed(seed_for(f"dropout of process {rank()}", args.seed, seen))
    records = []
    for i in range(0, share, micro):
        part = {k: None if v is None else v[i:i + micro] for k, v in batch.items()}
        x0, alpha, sigma = part["x0"], part["alpha"], part["sigma"]
        heads = partial(net, augment=part["augment"], label=part["label"])
        waits = world_size() > 1 and i + micro < share
        with net.no_sync() if waits else contextlib.nullcontext():
            with torch.autocast(x0.device.type, torch.bfloat16, enabled=bf16):
                terms = disentangled_loss(heads, x0, alpha, sigma, part["noise"], sigma_data)
            (sum(terms).sum() * (x0[0].numel() / share)).backward()
        records.append(torch.stack([time_of(alpha, sigma), *terms]).detach())
    return torch.cat(records, 1)


def check_finite(net, records, step):
    """Raises UserError before the optimizer spoils the weights. The CPU waits here for the device,
    so a GPU is idle while the next step is prepared: little, beside a step."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    losses = records[1:]
    if not (norm + losses.sum()).isfinite():
        what = "gradient" if losses.isfinite().all() else "loss"
        line = by_level(records.cpu())
        raise UserError(
            f"the {what} is not finite at step {step}; from low to high levels, denoise is "
            f"{line['denoise_by_level']} and deblur {line['deblur_by_level']}. The run stops "
            "before this step: try a lower --lr, or --precision fp32")


@torch.no_grad()
def update_ema(args, ema, net, seen):
    half_life = min(args.ema * 1000, seen * 0.05)               # images; EDM's ramp-up
    share = 1 - 0.5 ** (args.batch / max(half_life, 1e-8))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), share)
    for kept, current in zip(ema.buffers(), net.buffers()):     # your network may have some
        kept.copy_(current)


def shares_of_batch(args):
    """The images of a step in this process, and how many of them at a time."""
    share = args.batch // world_size()
    micro = min(args.batch_gpu or share, share)
    if args.batch % world_size() or share % micro:
        raise UserError(f"--batch {args.batch} does not divide into {world_size()} processes of "
                        f"whole --batch-gpu {micro}")
    return share, micro


def kimg_name(args, seen):
    """000060, or 000000.016 between whole kimg."""
    return f"{seen // 1000:06d}" if seen % 1000 < args.batch else f"{seen / 1000:010.3f}"


def crossed(args, seen, *intervals):
    """Whether the last batch passed a multiple of one of the intervals, in kimg. 0 has none."""
    images = [max(1, round(k * 1000, 6)) for k in intervals if k]               # 4.03 * 1000 > 4030
    return any(seen // n > (seen - args.batch) // n for n in images)


# The parts of a run

def parts(args, data, path, net):
    """The path, the network and what a checkpoint remembers of them, as plain types. Raises
    UserError where they do not fit together."""
    _, c, h, w = data.images.shape
    classes = len(data.classes) if args.cond else 0
    if args.cond and classes < 2:
        raise UserError(f"--cond needs images of at least two classes, and {data.name} has one"
                        + (f": {data.no_classes}" if data.no_classes else ""))
    if args.bnr == math.inf and args.param == "noise":
        raise UserError("--param noise needs noise to predict, and --bnr inf has none")
    if net and not any(p.requires_grad for p in net.parameters()):
        raise UserError("every parameter of the network is frozen, as load_model leaves them: "
                        "net.requires_grad_(True)")
    if net and net.classes != classes:
        raise UserError(f"the network has {net.classes} classes and the run {classes}: a network's "
                        "attribute `classes` and --cond go together")
    name, path = type(path).__name__ if path else args.path, path or make_path(args.bnr, args.path)
    sampling = sampled_along(path)
    check_path(sampling, h, w)
    levels = [sampling.levels(t) for t in np.geomspace(*sampling.t_range(h, w), 5).tolist()]
    config = {"bnr": args.bnr, "path": name, "sigma_data": net.sigma_data if net else SIGMA_DATA,
              "param": args.param, "unet": None if net else unet_config(args, c, h, w, classes),
              "colour": data.colour() if levels[-1][1] == 0 else None,          # without noise
              "levels": [[float(f"{float(v):.6g}") for v in pair] for pair in levels]}
    torch.manual_seed(seed_for("weights", args.seed))
    try:
        if net is None:
            net = build(config)
            net.unet.check(h, w)
        else:                               # its output is looked at before anything is written
            where = next(net.parameters()).device
            with torch.no_grad(), torch.device(where):
                net.eval()(normalize(data.images[:1]).to(where), *levels[2],
                           torch.zeros(1, 9) if args.augment else None,
                           torch.zeros(1, dtype=torch.long) if classes else None)
    except ValueError as e:
        raise UserError(e) from None
    config["answers"] = f"{type(net).__name__}, {net.answers.__qualname__}"
    return path, net, config


def sampled_along(path):
    """The path itself; 0.5 for a network of every ratio, which has none."""
    return ConstantBNR(0.5) if isinstance(path, AnyBNR) else path


def unet_config(args, channels, h, w, classes):
    sides, attention = [max(h, w) >> level for level in range(len(args.mult))], args.attention
    if attention is None:
        attention = [16] if 16 in sides[1:] else sides[-1:]
    missing = [side for side in attention if side not in sides]
    if missing:
        raise UserError(f"--attention {' '.join(map(str, missing))}: the levels have sides of "
                        f"{', '.join(map(str, sides))}; choose among them, or none")
    unet = dict(in_channels=channels, out_channels=channels * PARAMETERIZATIONS[args.param].heads,
                channels=args.channels, mult=args.mult, blocks=args.blocks, resolution=max(h, w),
                attention=attention, dropout=args.dropout, augment_dim=9 if args.augment else 0,
                classes=classes)
    return {**unet, "ratio": True} if args.bnr == "any" else unet


# What a run writes

def begin(args, seen):
    """Writes the options and returns the log. Its lines after the checkpoint are dropped: they will
    be written again."""
    with atomic_write(f"{args.out}/options.json", "w") as f:
        json.dump({k: "inf" if v == math.inf else v for k, v in vars(args).items()}, f, indent=1)
    kept, log = [], Path(args.out, "log.jsonl")
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):              # a damaged line
            kept += [line + "\n"] if json.loads(line)["kimg"] <= seen / 1000 else []
    with atomic_write(log, "w") as f:
        f.writelines(kept)
    return open(log, "a")


def header(args, run, data, net, seen, bf16):
    """Says what is trained on what."""
    facts, images, (_, micro) = run["data"], data.images, shares_of_batch(args)
    mean, std = (", ".join(f"{v:.3g}" for v in facts[k]) for k in ("mean", "std"))
    say(f"{facts['name']}: {facts['count']} images of {' x '.join(map(str, facts['shape']))}, "
        f"{str(images.dtype)[6:]} from {images.min():.4g} to {images.max():.4g}; the network sees "
        f"mean {mean}, standard deviation {std}")
    if args.cond:
        names = [f"{name} {n}" for name, n in zip(facts["classes"], facts["counts"])]
        say(f"{len(names)} classes: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}")
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    say(f"{sum(p.numel() for p in net.parameters()):,} parameters"
        f"{f', {frozen:,} of them frozen' if frozen else ''}; "
        f"{run['config']['path'] or 'BNR ' + str(run['config']['bnr'])}; "
        f"{args.device}, {'bf16' if bf16 else 'fp32'}; batch {args.batch} as "
        f"{args.batch // micro} x {micro} in {world_size()} process{'es' * (world_size() > 1)}"
        f"{f'; resuming at {seen / 1000:g} of {args.duration:g} kimg' if seen else ''}")


def gathered(history):
    """t and the losses of all processes since the last log line: [3, images] on the CPU."""
    mine = torch.stack(history)                                 # [steps, 3, share]
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine) if world_size() > 1 else parts[0].copy_(mine)
    return torch.cat(parts, 2).transpose(0, 1).flatten(1).cpu()


def summary(args, seen, records, lr, since):
    """A log line: both loss terms since the last line, and how fast it went."""
    seconds = max(time.time() - since, 1e-3)                    # a clock may stand still
    line = {"kimg": seen / 1000, "step": seen // args.batch, **by_level(records), "lr": lr,
            "images_per_s": round(records.shape[1] / seconds, 1)}
    if torch.device(args.device).type == "cuda":
        line["memory_gb"] = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
    return line


def by_level(records):
    """[3, n]: t and both terms -> the mean of each term, whole and by quartile of t."""
    t, *losses = records
    limits = np.quantile(t.numpy(), [0.25, 0.5, 0.75])
    quartile = torch.from_numpy(np.searchsorted(limits, t.numpy()))
    line = {}
    for name, values in zip(("denoise", "deblur"), losses):
        line[name] = round(values.mean().item(), 5)
        line[f"{name}_by_level"] = [round(values[quartile == q].mean().item(), 5)
                                    if (quartile == q).any() else None for q in range(4)]
    return line


def save(args, run, net, ema, optimizer, seen, must):
    """state.pt and ema.pt. Where they cannot be saved, UserError if they must, else a warning."""
    model = {"weights": ema.state_dict(), **run, "seen": seen}
    state = {"net": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
             **run, "seen": seen}
    if crossed(args, seen, args.keep_every):
        save_checkpoints({f"{args.out}/ema-{kimg_name(args, seen)}.pt": model})
    saved = save_checkpoints({f"{args.out}/state.pt": state, f"{args.out}/ema.pt": model})
    if must and not saved:
        raise UserError(f"{args.out}: the last checkpoint could not be saved: make room and start "
                        "the same command again")


def draw_grid(args, run, path, ema, seen):
    path = sampled_along(path)
    states = generate(ema, path, run["data"]["shape"], range(64), colour=run["config"]["colour"],
                      **fast_solver(path))
    with or_a_warning("a grid"):
        save_grid(torch.cat([to_uint8(x).cpu() for x in states]),
                  f"{args.out}/grid-{kimg_name(args, seen)}.png")


# What a run resumes from

def resumable(args):
    """The state to resume from, or None for a new run. UserError where --out holds another."""
    filename = f"{args.out}/state.pt"
    if not os.path.exists(filename):
        if os.path.exists(f"{args.out}/ema.pt"):
            raise UserError(f"{args.out} holds a model, but no state.pt to resume from: choose "
                            "another --out")
        return None
    state = read_checkpoint(filename)
    if not all(isinstance(state.get(k), dict) for k in ("options", "config", "data", "optimizer")):
        raise UserError(f"{filename} is not a state of train.py: choose another --out")
    before = state["options"]                                   # an old one may lack an option
    differ = [f"--{k.replace('_', '-')} {before[k]}, not {v}" for k, v in vars(args).items()
              if k in before and before[k] != v and k not in MAY_CHANGE_ON_RESUMING]
    if differ:
        raise UserError(f"{args.out} holds a run with {'; '.join(differ)}: choose another --out, "
                        "or repeat its options")
    return state


def restore(out, state, run, net, ema, optimizer):
    """Puts a saved state into the new parts -> the images seen. UserError where it does not fit."""
    old, new = state["data"], run["data"]
    known = {"digest"} if "digest" in old else old.keys() & new.keys() - {"name"}
    if any(old[k] != new[k] for k in known):
        raise UserError(f"{out} was trained on other images: {old}, and these are {new}")
    old, new = state["config"], run["config"]
    differ = [f"{k} {old[k]}, not {new[k]}" for k in new
              if k in old and old[k] != new[k] and k != "colour"]
    if differ:                              # only a path or network that the caller has given
        raise UserError(f"{out} holds a run with {'; '.join(differ)}: choose another --out")
    try:
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        for p, moments in optimizer.state.items():              # a fused Adam checks none of this
            for k, like in (("exp_avg", p), ("exp_avg_sq", p), ("step", torch.zeros(()))):
                v = moments[k]
                if (v.shape, v.layout) != (like.shape, torch.strided):
                    raise ValueError("the optimizer's moments do not have the weights' shapes")
                moments[k] = torch.empty_like(like, device=v.device).copy_(v)   # the same strides
        if type(state["seen"]) is not int or state["seen"] < 0:
            raise ValueError("the number of images seen is not a number")
        return state["seen"]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{out}/state.pt does not fit this network: {reason(e)}") from None


if __name__ == "__main__":
    main()
