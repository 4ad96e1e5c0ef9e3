"""Train a blur-noise mixture diffusion model with the loss (9).

    python train.py                                        # dead leaves, minutes on a CPU
    python train.py --data cifar10 --bnr 0.5               # the paper's CIFAR-10 run
    python train.py --data cifar10 --bnr any               # one network for every ratio
    python train.py --data my-images/ --preset ffhq64      # your own images
    torchrun --nproc_per_node=8 train.py --data cifar10    # the same on several GPUs
    python train.py --resume run --duration 120            # a run in its folder, with its options

The same command again resumes the run, too.
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
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from data import Images, augment, load, shuffled, take
from degrade import check_path, levels_of, make_path, time_of
from loss import disentangled_loss
from model import PARAMETERIZATIONS, SIGMA_DATA, Denoiser, build, start_from, try_out
from sample import generate
from util import (Parser, UserError, add_device_option, any_rank, atomic_write, compile_or_warn,
                  join_processes, locked, normalize, number, or_a_warning, rank, read_checkpoint,
                  reason, save_checkpoints, save_grid, say, seed_for, signals_noted, to_uint8, warn,
                  world_size)

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
    p = Parser(description="Train a diffusion model of blur and noise. A kimg: 1,000 images seen. "
                           "Defaults are --preset cifar10's; data other than cifar10 take tiny.")

    def a(name, default, text, **kw):
        text += "" if default is None or default is False else f" (default {default})"
        p.add_argument(name, default=default, help=text, **kw)
    a("--data", "leaves", "leaves, cifar10, or a folder, zip, tar, .npy or .npz of images")
    a("--bnr", None, "blur-to-noise ratio, pixels of blur for a unit of noise; 0 is EDM, inf is "
      "blur alone, any is one network for all from 0 to 10 (default 0.5)",
      type=lambda text: text if text == "any" else number(float, 0)(text))
    a("--path", None, "instead of one ratio, Hoogeboom & Salimans' schedule", choices=["blurring"])
    a("--param", "residual", "what the network predicts: residual, the blurry image and what blur "
      "removed; x0, the image; noise, the noise and what blur removed", choices=PARAMETERIZATIONS)
    a("--cond", False, "class-conditional; a class is a folder of images", action="store_true")
    a("--preset", None, "recipe (default: cifar10 for cifar10, else tiny)", choices=PRESETS)
    a("--out", "run", "folder of checkpoints, log and grids; one that holds a run resumes it")
    a("--resume", None, "go on with the run in this folder, and its options but for those given",
      metavar="RUN")
    a("--batch", 512, "images per step, over all GPUs and accumulation", type=number(int, 1))
    a("--batch-gpu", None, "images at a time on a GPU (default: its share)", type=number(int, 1))
    a("--lr", 1e-3, "Adam's learning rate", type=number(float, 0, 1))
    a("--warmup", 10000., "kimg in which the learning rate rises from 0", type=number(float, 0))
    a("--duration", 200000., "kimg to train for", type=number(float, 0.001, 1e9))
    a("--ema", 500., "half-life of the EMA, kimg", type=number(float, 0))
    a("--dropout", 0.13, "probability", type=number(float, 0, 0.99))
    a("--augment", 0.12, "probability of each kind; 0: none, no flip", type=number(float, 0, 1))
    a("--resolution", 32, "side to crop and resize to; 0: as they are", type=number(int, 0, 4096))
    a("--channels", 128, "network width", type=number(int, 8, 4096))
    a("--mult", [2, 2, 2], "levels' widths, times --channels", type=number(int, 1, 16), nargs="+")
    a("--blocks", 4, "residual blocks a level", type=number(int, 1, 64))
    a("--attention", None, "sides of the levels with attention (default: 16, where a level below "
      "the first has it, else the last level)", type=number(int, 0), nargs="*")
    a("--seed", 0, "of the weights, the order and the noise", type=number(int, 0, 2 ** 31))
    a("--init-from", None, "start from the weights of this checkpoint, of any BNR", metavar="CKPT")
    add_device_option(p)
    a("--precision", "auto", "auto: bf16 on a GPU that has it", choices=["auto", "bf16", "fp32"])
    a("--compile", None, "torch.compile the network, a minute or two (default: on a GPU)",
      action=argparse.BooleanOptionalAction)
    a("--log-every", 50., "kimg between log lines", type=number(float, 0.001))
    a("--snapshot-every", 2500., "kimg between checkpoints and grids", type=number(float, 0, 1e9))
    a("--keep-every", 0., "kimg between kept copies of ema.pt; 0: none", type=number(float, 0, 1e9))
    a("--sample-steps", 18, "Heun steps of sample.py on this model", type=number(int, 1, 1000))
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
    """The options that a run has written, as defaults, but for the device: that of this machine."""
    try:
        stored = json.loads(Path(given.resume, "options.json").read_text())
        stored.update(out=given.resume, bnr=None if stored["path"] else stored["bnr"])
        PRESETS[stored["preset"]]                               # a KeyError for one that has gone
        return {k: v for k, v in stored.items() if k in vars(given) and k != "device"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        parser.error(f"--resume {given.resume}: it holds no run (a readable options.json)")


def main():
    args = options()
    with Parser().one_line_errors(), signals_noted() as signals:
        train(args, signals=signals)
        if rank() == 0 and not signals:
            say(f"python sample.py --ckpt {shlex.quote(f'{args.out}/ema.pt')}")
    if signals:
        sys.exit(128 + signals[0])


def train(args, data=None, path=None, net=None, signals=()):
    """The whole run, one of them in each process of torchrun. Returns the EMA of the network.

    args: of options(). To swap a part, give data (data.Images), path (degrade.Path) or net
    (model.Denoiser); docs/own-parts.md says what they have to be. signals: a list; the run saves
    and ends after the step in which it is filled. Raises UserError.
    """
    for part, kind in ((data, Images), (net, Denoiser)):
        if not isinstance(part, (kind, type(None))):
            raise UserError(f"give a {kind.__module__}.{kind.__name__}, not {type(part).__name__}: "
                            "docs/own-parts.md says how to make one")
    torch.backends.cudnn.benchmark = True
    join_processes()
    with contextlib.nullcontext() if rank() else locked(args.out):
        if data is not None:                                    # its images are not resized
            args = argparse.Namespace(**{**vars(args), "data": data.name, "resolution": 0})
        shares_of_batch(args)                                   # complains before the data load
        state = resumable(args)
        if data is None:
            if rank() > 0:
                dist.barrier()                                  # rank 0 fetches or makes it for all
            data = load(args.data, args.resolution or None)
            if rank() == 0 and world_size() > 1:
                dist.barrier()
        path, net, config = parts(args, data, path, net)
        if args.init_from and not state:
            start_from(net, args.init_from, data.classes)
        layout = torch.channels_last if config["unet"] else torch.contiguous_format
        net = net.to(args.device, memory_format=layout).train() # one's own may not run in the other
        ema = copy.deepcopy(net).eval().requires_grad_(False)
        optimizer = torch.optim.Adam(net.parameters(), args.lr, (0.9, 0.999), 1e-8, fused=True)
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
    if args.compile or args.compile is None and device.type == "cuda":
        compile_or_warn(net.unet, args.compile)
    own = run["config"]["unet"] is None                         # which may leave out a parameter
    shared = DistributedDataParallel(net, find_unused_parameters=own) if world_size() > 1 else net
    if rank() == 0:
        begin(args, run, data, net, seen, bf16)
    bar = tqdm(total=total, initial=seen, unit="img", unit_scale=True, disable=rank() > 0,
               delay=0.1)                   # it writes nothing before the first step
    history, since, stopping = [], time.time(), False
    while seen < total and not stopping:
        for group in optimizer.param_groups:                    # a linear warm-up, then constant
            group["lr"] = args.lr * min(1, (seen + args.batch) / max(args.warmup * 1000, 1))
        batch = draw_batch(args, path, data.images, data.labels, seen, device)
        history.append(backward(args, shared, batch, seen, bf16))
        check_finite(net, history[-1], seen // args.batch + 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += args.batch
        update_ema(args, ema, net, seen)
        with contextlib.suppress(OSError):
            bar.update(args.batch)
        stopping = any_rank(signals)                            # asked once: a signal may come now
        last, passed = seen >= total or stopping, partial(crossed, args, seen)
        snapshot = last or passed(args.snapshot_every, args.keep_every)
        if snapshot or passed(args.log_every):
            line = summary(args, seen, history, group["lr"], since)
            bar.set_postfix({k: line[k] for k in ("denoise", "deblur")}, refresh=False)
            if rank() == 0:
                with or_a_warning("a log line"), open(f"{args.out}/log.jsonl", "a") as log:
                    print(json.dumps(line), file=log)
            if snapshot and rank() == 0:
                kimg = f"{seen / 1000:010.3f}".removesuffix(".000")             # 000060, 000060.016
                save(args, run, net, ema, optimizer, seen, kimg, must=last)
                if not stopping and not data.latents:
                    draw_grid(f"{args.out}/grid-{kimg}.png", run, path, ema)
            history, since = [], time.time()                    # without the time of writing
    with contextlib.suppress(OSError):
        bar.close()
    if stopping and rank() == 0:
        warn(f"stopped and saved at {seen / 1000:g} kimg; the same command resumes it")
    return ema


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
    """Raises UserError before the optimizer spoils the weights. The CPU waits for a GPU here."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    if not (norm + records[1:].sum()).isfinite():
        raise UserError(f"the loss or its gradient is not finite at step {step}, before which the "
                        f"run stops: try a lower --lr, or --precision fp32. Losses by quartile of "
                        f"t: {by_level(records.cpu())}")


def update_ema(args, ema, net, seen):
    half_life = min(args.ema * 1000, seen * 0.05)               # images; EDM's ramp-up
    decay = 0.5 ** (args.batch / max(half_life, 1e-8))          # ema = decay ema + (1 - decay) net
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(net.parameters()), None)
    for kept, current in zip(ema.buffers(), net.buffers()):     # your network may have some
        kept.copy_(current)


def shares_of_batch(args):
    """The images of a step in this process, and how many of them at a time."""
    share = args.batch // world_size()
    micro = min(args.batch_gpu or share, share)
    if args.batch % world_size() or share % micro:
        raise UserError(f"--batch {args.batch} does not divide into {world_size()} processes of "
                        f"--batch-gpu {micro}")
    return share, micro


def crossed(args, seen, *intervals):
    """Whether the last batch passed a multiple of one of the intervals, in kimg. 0 has none."""
    images = [max(1, round(k * 1000, 6)) for k in intervals if k]               # 4.03 * 1000 > 4030
    return any(seen // n > (seen - args.batch) // n for n in images)


def parts(args, data, path, net):
    """The path, the network and what a checkpoint remembers of them, as plain types. Raises
    UserError where they do not fit together."""
    _, c, h, w = data.images.shape
    classes = len(data.classes) if args.cond else 0
    if args.cond and classes < 2:
        raise UserError(f"--cond needs images of at least two classes, and {data.name} has one: "
                        f"{data.no_classes or 'all'}")
    if args.bnr == math.inf and args.param == "noise":
        raise UserError("--param noise needs noise to predict, and --bnr inf has none")
    if net and not any(p.requires_grad for p in net.parameters()):
        raise UserError("every parameter of the network is frozen, as load_model leaves them: "
                        "net.requires_grad_(True)")
    if net and net.classes != classes:
        raise UserError(f"the network has {net.classes} classes and the run {classes}: a network's "
                        "attribute `classes` and --cond go together")
    name, path = type(path).__name__ if path else args.path, path or make_path(args.bnr, args.path)
    torch.manual_seed(0)                                        # of the levels that are drawn here
    drawn = check_path(path, h, w).double()
    trained = drawn.quantile(torch.tensor([0.05, 0.95]).double(), dim=1).tolist()   # nine in ten
    levels = torch.stack(levels_of(path, np.geomspace(*path.t_range(h, w), 5)), 1).tolist()
    config = {"bnr": args.bnr, "path": name, "sigma_data": net.sigma_data if net else SIGMA_DATA,
              "param": args.param, "unet": None if net else unet_config(args, c, h, w, classes),
              "colour": data.colour() if levels[-1][1] == 0 else None,          # without noise
              "levels": [[float(f"{v:.6g}") for v in pair] for pair in levels],
              "trained": [[float(f"{v:.3g}") for v in pair] for pair in trained]}
    torch.manual_seed(seed_for("weights", args.seed))
    if net is None:
        net = build(config)
        net.unet.check(h, w)
    else:
        try_out(net, torch.randn(2, c, h, w, device=args.device), *levels[2], args.augment > 0)
    config["answers"] = f"{type(net).__name__}, {net.answers.__qualname__}"
    return path, net, config


def unet_config(args, channels, h, w, classes):
    sides, attention = [max(h, w) >> level for level in range(len(args.mult))], args.attention
    if attention is None:
        attention = [16] if 16 in sides[1:] else sides[-1:]
    for side in set(attention) - set(sides):
        raise UserError(f"--attention {side}: the levels have sides of "
                        f"{', '.join(map(str, sides))}; choose among them, or none")
    unet = dict(in_channels=channels, out_channels=channels * PARAMETERIZATIONS[args.param].heads,
                channels=args.channels, mult=args.mult, blocks=args.blocks, resolution=max(h, w),
                attention=attention, dropout=args.dropout, augment_dim=9 if args.augment else 0,
                classes=classes)
    return {**unet, "ratio": True} if args.bnr == "any" else unet


def begin(args, run, data, net, seen, bf16):
    """Writes the options, drops the log's lines after the checkpoint, and says what is trained."""
    with atomic_write(f"{args.out}/options.json", "w") as f:
        json.dump({k: "inf" if v == math.inf else v for k, v in vars(args).items()}, f, indent=1)
    kept, log = [], Path(args.out, "log.jsonl")
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):              # a damaged line
            kept += [line + "\n"] if json.loads(line)["kimg"] <= seen / 1000 else []
    with atomic_write(log, "w") as f:
        f.writelines(kept)
    facts, images, (_, micro) = run["data"], data.images, shares_of_batch(args)
    mean, std = (", ".join(f"{v:.3g}" for v in facts[k]) for k in ("mean", "std"))
    say(f"{facts['name']}: {facts['count']} images of {' x '.join(map(str, facts['shape']))}, "
        f"{str(images.dtype)[6:]} from {images.min():.4g} to {images.max():.4g}; the network sees "
        f"mean {mean}, standard deviation {std}; {net.classes or 'no'} classes")
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    say(f"{sum(p.numel() for p in net.parameters()):,} parameters, {frozen:,} of them frozen; "
        f"{'bf16' if bf16 else 'fp32'}; batch {args.batch} as {args.batch // micro} x {micro} on "
        f"{world_size()} x {args.device}; from {seen / 1000:g} to {args.duration:g} kimg")
    (blur, noise), (blurs, noises) = trained = run["config"]["trained"]
    say(f"{run['config']['path'] or 'BNR ' + str(args.bnr)}: blur of {blur:g} to {blurs:g} pixels "
        f"and noise of {noise:g} to {noises:g} for nine images in ten")
    levels = run["config"]["levels"]                            # of sampling, from the lowest
    i = int(levels[-1][1] > 0)                                  # of noise or, without it, of blur
    if not levels[0][i] <= trained[0][i] < trained[1][i] <= levels[-1][i] < 1e4 * trained[1][i]:
        warn(f"warning: sampling goes from {levels[-1]} to {levels[0]} (blur, noise), which does "
             "not fit these levels: is the path's t_range right?")
    spread = max(facts["std"])
    if data.latents and not max(map(abs, facts["mean"])) < spread < 2 * net.sigma_data < 4 * spread:
        warn(f"warning: the network expects mean 0, standard deviation {net.sigma_data:g}: scale "
             "the latents, or give Denoiser another sigma_data")


def summary(args, seen, history, lr, since):
    """A log line: both loss terms of all processes since the last line, and how fast it went."""
    mine = torch.cat(history, 1)                                # [3, images of this process]
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine) if world_size() > 1 else parts[0].copy_(mine)
    seconds = max(time.time() - since, 1e-3)                    # a clock may stand still
    return {"kimg": seen / 1000, "step": seen // args.batch,
            **by_level(torch.cat(parts, 1).cpu()), "lr": lr,
            "images_per_s": round(args.batch * len(history) / seconds, 1)}


def by_level(records):
    """[3, n]: t and both terms -> the mean of each term, whole and by quartile of t."""
    quarters, line = [i.sort().values for i in records[0].argsort().tensor_split(4)], {}
    for name, losses in zip(("denoise", "deblur"), records[1:]):
        line[name] = round(losses.mean().item(), 5)
        line[f"{name}_by_level"] = [round(losses[i].mean().item(), 5) if len(i) else None
                                    for i in quarters]
    return line


def save(args, run, net, ema, optimizer, seen, kimg, must):
    """state.pt and ema.pt. Where they cannot be saved, UserError if they must, else a warning."""
    run = {**run, "seen": seen}
    model = {"weights": ema.state_dict(), **run}
    state = {"net": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
             **run}
    if crossed(args, seen, args.keep_every):
        save_checkpoints({f"{args.out}/ema-{kimg}.pt": model})
    saved = save_checkpoints({f"{args.out}/state.pt": state, f"{args.out}/ema.pt": model})
    if must and not saved:
        raise UserError(f"{args.out}: the last checkpoint could not be saved: make room and start "
                        "the same command again")


def draw_grid(filename, run, path, ema):
    states = generate(ema, path, run["data"]["shape"], range(64), colour=run["config"]["colour"],
                      solver="heun" if run["config"]["colour"] else "multistep")
    with or_a_warning("a grid"):
        save_grid(torch.cat([to_uint8(x).cpu() for x in states]), filename)


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
    refuse_other(args.out, state["options"],
                 {k: v for k, v in vars(args).items() if k not in MAY_CHANGE_ON_RESUMING}, "--")
    return state


def refuse_other(out, old, new, of=""):
    """Raises UserError where a run had other values than now. An old run may lack some."""
    differ = [f"{of}{k} {old[k]}, not {v}" for k, v in new.items() if k in old and old[k] != v]
    if differ:
        raise UserError(f"{out} holds a run with {'; '.join(differ)}: choose another --out, or "
                        "repeat its options")


def restore(out, state, run, net, ema, optimizer):
    """Puts a saved state into the new parts -> the images seen. UserError where it does not fit."""
    refuse_other(out, state["data"], {k: run["data"][k] for k in ("digest", "classes")}, "images' ")
    refuse_other(out, state["config"], {k: v for k, v in run["config"].items() if k != "colour"})
    try:
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        for p, moments in optimizer.state.items():              # a fused Adam checks no shape and
            for k in ("exp_avg", "exp_avg_sq"):                 # goes by the weights' strides
                moments[k] = torch.empty_like(p).copy_(moments[k].reshape(p.shape))
        if type(state["seen"]) is not int or state["seen"] < 0:
            raise ValueError("the number of images seen is not a number")
        return state["seen"]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{out}/state.pt does not fit this network: {reason(e)}") from None


if __name__ == "__main__":
    main()
