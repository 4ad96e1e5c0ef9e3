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
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import augment, load, resident, shuffled, take
from degrade import AnyBNR, ConstantBNR, make_path, time_of
from fid import drawn_batches, frechet_distance, load_inception, statistics
from loss import disentangled_loss
from model import PARAMETERIZATIONS, SIGMA_DATA, build, start_from
from sample import generate
from util import (Parser, UserError, add_device_option, any_rank, atomic_write, full_float32,
                  locked, normalize, number, or_a_warning, peak_memory, process_group, rank,
                  rank_0_first, read_checkpoint, resumed_log, save_checkpoint, save_grid, say,
                  seed_for, signals_noted, to_uint8, warn, world_size)

# The defaults are the paper's for CIFAR-10 (EDM's DDPM++ recipe). A preset is what differs.
PRESETS = {
    "cifar10": {},
    "ffhq64": dict(resolution=64, mult=[1, 2, 2, 2], batch=256, lr=2e-4, dropout=0.05, augment=0.15,
                   sample_steps=40),
    "church128": dict(resolution=128, mult=[1, 1, 2, 2, 2], batch=256, lr=2e-4, dropout=0.1,
                      augment=0., sample_steps=40),
    "tiny": dict(resolution=16, channels=24, mult=[1, 2], blocks=1, attention=[8], batch=16,
                 lr=2e-3, dropout=0., augment=0., duration=60., warmup=1., ema=3., log_every=2.,
                 snapshot_every=20.),
}
MAY_CHANGE_ON_RESUMING = {"out", "duration", "lr", "batch_gpu", "device", "compile", "log_every",
                          "snapshot_every", "keep_every", "sample_steps", "fid_every", "fid_num",
                          "fid_weights"}


def options(argv=None):
    """The options of a command line, with those of the preset: argparse.Namespace."""
    p = Parser(description="Train a blur-noise mixture diffusion model. A kimg is 1,000 images "
                           "seen. The defaults named here are those of --preset cifar10; data other"
                           " than cifar10 take --preset tiny.")
    a = p.add_argument
    a("--data", default="leaves",
      help="leaves, cifar10, or a folder, zip or tar of images (default leaves)")
    path = p.add_mutually_exclusive_group().add_argument
    path("--bnr", type=bnr, default=0.5,
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
    a("--attention", type=number(int, 0), nargs="*", default=[16],
      help="sides of the levels with attention (default 16)")
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
    a("--snapshot-every", type=interval, default=2500.,
      help="kimg between checkpoints, each with a grid of samples (default 2500)")
    a("--keep-every", type=interval, default=0.,
      help="kimg between copies of ema.pt to keep, ema-KIMG.pt; 0: none (default 0)")
    a("--sample-steps", type=number(int, 1, 1000), default=18,
      help="Heun steps of the grid (default 18)")
    a("--fid-every", type=interval, default=0.,
      help="kimg between FIDs of the EMA; 0: none (default 0)")
    a("--fid-num", type=number(int, 2), default=10000,
      help="images of such an FID, seeds from 0 (default 10000)")
    a("--fid-weights", help="the FID network's weights (default: fetched once into data/)")
    argv = sys.argv[1:] if argv is None else argv
    given = p.parse_args(argv)
    if given.resume:
        argv = [*options_of_run(p, given.resume), "--out", given.resume, *argv]
        given = p.parse_args(argv)
    preset = given.preset or ("cifar10" if given.data == "cifar10" else "tiny")
    p.set_defaults(**PRESETS[preset], preset=preset)
    args = p.parse_args(argv)
    if args.resume not in (None, args.out):
        p.error("--resume and --out name two folders: give one of them")
    del args.resume
    return args


def options_of_run(parser, folder):
    """What write_options has written, as words of a command line. The device is this machine's."""
    try:
        with open(f"{folder}/options.json") as f:
            stored = json.load(f)
        if stored["path"]:
            del stored["bnr"]
        words = [f"--preset={stored['preset']}"]
        for action in parser._actions:
            value, flag = stored.get(action.dest), action.option_strings[0]
            if action.dest in ("device", "out") or value is None:
                continue
            if isinstance(value, bool):
                words += [flag] if value else ["--no-compile"] if flag == "--compile" else []
            elif isinstance(value, list):
                words += [flag, *map(str, value)]
            else:
                words.append(f"{flag}={value}")
        return words
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        parser.error(f"--resume {folder}: it holds no run (a readable options.json)")


def interval(text):
    """An argparse type: kimg between two events, 0 for none. A smaller one has no exact images."""
    value = number(float, 0, 1e9)(text)
    if 0 < value < 0.001:
        raise argparse.ArgumentTypeError(f"must be 0 or at least 0.001, not {text!r}")
    return value


def bnr(text):
    """An argparse type: a ratio of at least 0, inf, or any."""
    if text in ("inf", "any"):
        return math.inf if text == "inf" else "any"
    try:
        return number(float, 0, 1e6)(text)
    except argparse.ArgumentTypeError:
        message = f"must be a number of at least 0, inf or any, not {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def main():
    args = options()
    with process_group(), Parser().one_line_errors(), locked(args.out), signals_noted() as signals:
        train(args, signals=signals)
        if rank() == 0 and not signals:
            say_what_is_left(args)
    if signals:
        sys.exit(128 + signals[0])


def say_what_is_left(args):
    """The files of a finished run, its last losses, and the two commands that come next."""
    names = sorted(name for name in os.listdir(args.out) if not name.startswith("."))
    say(f"{args.out} holds {', '.join(names[:10])}"
        + (f" and {len(names) - 10} more files" if len(names) > 10 else ""))
    with open(f"{args.out}/log.jsonl") as f:
        for last in f.readlines()[-1:]:
            last = json.loads(last)
            say(f"at {last['kimg']:g} kimg: denoise {last['denoise']}, deblur {last['deblur']}")
    ckpt, ref = shlex.quote(f"{args.out}/ema.pt"), shlex.quote(args.data)
    say(f"python sample.py --ckpt {ckpt}")
    say(f"python fid.py --ckpt {ckpt} --ref {ref}")


def train(args, data=None, path=None, net=None, signals=()):
    """The whole run, one of them in each process of torchrun. Returns the EMA of the network.

    args: of options(). To swap a part, give data (data.Images), path (degrade.Path) or net
    (model.Denoiser). signals: a list; the run saves and ends after the step in which it is filled.
    Raises UserError.
    """
    run = prepare(args, data, path, net)
    run.since = time.time()
    bar = tqdm(total=run.total, initial=run.seen, unit="img", unit_scale=True, disable=rank() > 0)
    while run.seen < run.total:
        set_learning_rate(run)
        batch = draw_batch(run, run.seen, run.mine)
        backward(run, batch)
        update(run)
        update_ema(run)
        bar.update(args.batch)

        stopping = any_rank(signals)                            # asked once: a signal may come now
        last = run.seen >= run.total or stopping
        snapshot = last or crossed(run, args.snapshot_every, args.keep_every)
        if snapshot or crossed(run, args.log_every, args.fid_every):
            line = log(run, stopping)
            bar.set_postfix(denoise=f"{line['denoise']:.4f}", deblur=f"{line['deblur']:.4f}")
        if snapshot and rank() == 0:
            save(run, must=last)
            if not stopping:
                draw_grid(run)
        if not run.history:
            run.since = time.time()         # what was just written does not count as training time
        if stopping:
            break
    bar.close()
    if signals and rank() == 0:
        warn(f"stopped and saved at {run.seen / 1000:g} kimg; the same command resumes it")
    return run.ema


def set_learning_rate(run):
    """A linear warm-up, then constant."""
    warm = (run.seen + run.args.batch) / max(run.args.warmup * 1000, 1)
    for group in run.optimizer.param_groups:
        group["lr"] = run.args.lr * min(1, warm)


def draw_batch(run, seen, part):
    """The slice `part` of the batch that follows the first `seen` images: a dict of tensors.

    Everything is drawn for the whole batch and then cut, so that it does not depend on the number
    of processes or on --batch-gpu; and from the seed and `seen` alone, so that resuming needs no
    random state.
    """
    args = run.args
    torch.manual_seed(seed_for("step", args.seed, seen))
    index = shuffled(seen, args.batch, len(run.images), args.seed)[part]
    x0, augmented = normalize(take(run.images, index, run.device)), None        # [B, C, H, W]
    if args.augment:
        x0, augmented = augment(x0, args.augment, args.batch, part)
    label = take(run.labels, index, run.device) if args.cond else None
    alpha, sigma = run.path.training_levels(args.batch, *x0.shape[2:], run.device)
    noise = torch.randn(args.batch, *x0.shape[1:], device=run.device)
    return {"x0": x0, "augment": augmented, "label": label, "alpha": alpha[part],
            "sigma": sigma[part], "noise": noise[part]}


def backward(run, batch):
    """The gradients of the loss, summed over pixels and averaged over the batch, in parts of
    --batch-gpu images. With the last part, torch's DDP averages them over the processes."""
    pixels, parts = batch["x0"][0].numel(), run.local // run.micro
    if world_size() > 1:
        torch.manual_seed(seed_for(f"dropout of process {rank()}", run.args.seed, run.seen))
    records = []
    for i in range(parts):
        part = cut(batch, slice(i * run.micro, (i + 1) * run.micro))
        waits = world_size() > 1 and i < parts - 1
        with run.shared.no_sync() if waits else contextlib.nullcontext():
            terms = loss_terms(run, run.shared, part)
            (sum(terms).sum() * (pixels / run.local)).backward()
        records.append(torch.stack([time_of(part["alpha"], part["sigma"]), *terms]).detach())
    run.history.append(torch.cat(records, 1))                   # [3, local]


def cut(batch, part):
    return {k: None if v is None else v[part] for k, v in batch.items()}


def loss_terms(run, net, batch):
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
        heads = partial(net, augment=batch["augment"], label=batch["label"])
        return disentangled_loss(heads, batch["x0"], batch["alpha"], batch["sigma"],
                                 batch["noise"], run.net.sigma_data)


def update(run):
    """Adam's step. From the first gradient on that is not finite, no weight moves any more."""
    given = [p.grad for p in run.weights if p.grad is not None]         # yours may have frozen ones
    norm = torch.nn.utils.get_total_norm(given)
    run.norms.append(norm)
    run.broken = torch.maximum(run.broken, 1 - norm.isfinite().float())
    run.optimizer.found_inf = run.broken                        # at 1, a fused Adam does nothing
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.seen += run.args.batch


@torch.no_grad()
def update_ema(run):
    half_life = min(run.args.ema * 1000, run.seen * 0.05)       # images; EDM's ramp-up
    share = 1 - 0.5 ** (run.args.batch / max(half_life, 1e-8))
    torch._foreach_lerp_(run.averages, run.weights, share)
    for kept, current in zip(run.ema.buffers(), run.net.buffers()):     # your network may have some
        kept.copy_(current)


def crossed(run, *intervals):
    """Whether the last batch passed a multiple of one of the intervals, in kimg. 0 has none."""
    before = run.seen - run.args.batch
    return any(run.seen // images_of(k) > before // images_of(k) for k in intervals if k)


def images_of(kimg):
    """1,000 times as many; 4.03 * 1000 alone is above 4030."""
    return round(kimg * 1000, 6)


def kimg_name(run):
    """The kimg seen, to the digit that the intervals need: 000020, or 000000.032. At the end of a
    run, which may lie between two of them, all digits."""
    intervals = (run.args.snapshot_every, run.args.keep_every)
    digits = max(len(f"{k:.3f}".rstrip("0").split(".")[1]) for k in intervals)
    kimg, rest = divmod(run.seen, 1000)
    rest = f"{rest:03d}"[:digits] if crossed(run, *intervals) else f"{rest:03d}".rstrip("0")
    return f"{kimg:06d}.{rest}".rstrip(".")


def log(run, stopping):
    """Writes and returns a line about the steps since the last. UserError where one went wrong."""
    line = summary(run.seen, gathered(run.history), run.optimizer.param_groups[0]["lr"], run.since,
                   run.device)
    if run.broken:
        raise UserError(broken_gradient(run))
    if crossed(run, run.args.fid_every) and not stopping:       # it may take minutes
        line.update(run.fid(run.ema))
    if rank() == 0:
        with or_a_warning("a log line"):
            run.log.write(json.dumps(line) + "\n")
            run.log.flush()
    run.history, run.norms = [], []
    return line


def save(run, must):
    """ema.pt and state.pt. Where they cannot be saved, UserError if they must, else a warning."""
    common = {"config": run.config, "data": run.facts, "options": vars(run.args), "seen": run.seen}
    state = {"net": run.net.state_dict(), "ema": run.ema.state_dict(),
             "optimizer": run.optimizer.state_dict(), **common}
    ema, out = {"weights": run.ema.state_dict(), **common}, run.args.out
    if crossed(run, run.args.keep_every):
        save_checkpoint(ema, f"{out}/ema-{kimg_name(run)}.pt")
    saved = save_checkpoint(ema, f"{out}/ema.pt") and save_checkpoint(state, f"{out}/state.pt")
    if must and not saved:
        raise UserError(f"{out}: the last checkpoint could not be saved; the previous one stays")


def draw_grid(run):
    states = generate(run.ema, run.sampling, run.facts["shape"], range(64), run.device,
                      steps=run.args.sample_steps, colour=run.config["colour"])
    images = torch.cat([to_uint8(x).cpu() for x in states])
    with or_a_warning("a grid"):
        save_grid(images, f"{run.args.out}/grid-{kimg_name(run)}.png")


def prepare(args, data, path, net):
    """Everything that the loop needs, as a namespace: parts, progress and what the log collects."""
    device = torch.device(args.device)
    run = SimpleNamespace(args=args, device=device, history=[], norms=[], seen=0,
                          total=math.ceil(images_of(args.duration) / args.batch) * args.batch,
                          broken=torch.zeros((), device=device))
    run.bf16 = args.precision == "bf16" or args.precision == "auto" and device.type == "cuda" \
        and torch.cuda.is_bf16_supported(including_emulation=False)
    run.local, run.micro = shares_of_batch(args)
    run.mine = slice(rank() * run.local, (rank() + 1) * run.local)
    if data is not None:                                        # which is not resized
        args = run.args = argparse.Namespace(**{**vars(args), "resolution": 0})
    state = resumable(args)

    if data is None:
        with rank_0_first():
            data = load(args.data, args.resolution or None)
    run.facts, run.images, run.labels = data.facts(), resident(data.images, device), data.labels
    run.config = model_config(args, data)
    if path is not None:
        run.config["path"] = type(path).__name__
    if net is not None:
        run.config["unet"] = None           # load its weights yourself, with util.read_checkpoint
        run.config["sigma_data"] = net.sigma_data
    run.path = path or make_path(args.bnr, args.path)
    run.sampling = ConstantBNR(0.5) if isinstance(run.path, AnyBNR) else run.path
    shape = run.facts["shape"][1:]
    if run.sampling.levels(run.sampling.t_range(*shape)[1])[1] == 0:            # it has no noise
        run.config["colour"] = data.colour()

    torch.manual_seed(seed_for("weights", args.seed))
    net = net or checked_build(run.config, *shape)
    if args.init_from and not state:
        start_from(net, args.init_from, data.classes)
    run.net = net.to(device, memory_format=torch.channels_last)
    run.ema = copy.deepcopy(net).eval().requires_grad_(False)
    run.weights, run.averages = list(run.net.parameters()), list(run.ema.parameters())
    run.optimizer = torch.optim.Adam(run.weights, lr=args.lr, betas=(0.9, 0.999), eps=1e-8,
                                     fused=True)
    if state:
        restore(run, state)
        del state                                               # frees its tensors
    if args.compile or args.compile is None and device.type == "cuda":
        run.net.unet.compile()                                  # in place: weights keep their names
    run.shared = DistributedDataParallel(run.net) if world_size() > 1 else run.net
    full_float32()
    torch.backends.cudnn.benchmark = True
    run.fid = scorer(run) if args.fid_every else None

    if rank() == 0:
        os.makedirs(args.out, exist_ok=True)
        write_options(args)
        run.log = resumed_log(f"{args.out}/log.jsonl", run.seen)
        say(header(run))
    return run


def header(run):
    c, h, w = run.facts["shape"]
    parts = [f"{run.facts['name']}: {run.facts['count']} images of {c} x {h} x {w}",
             f"{sum(p.numel() for p in run.weights):,} parameters, "
             f"{run.config['path'] or 'BNR ' + str(run.config['bnr'])}",
             f"{run.device.type}, {'bf16' if run.bf16 else 'fp32'}, batch {run.args.batch} as "
             f"{run.args.batch // run.micro} x {run.micro}"
             + (f" in {world_size()} processes" if world_size() > 1 else "")]
    if run.args.init_from and not run.seen:
        parts.append(f"from the weights of {run.args.init_from}")
    if run.seen:
        parts.append(f"resuming at {run.seen / 1000:g} kimg")
    if run.seen >= run.total:
        parts.append("which is its --duration already: a longer one continues")
    return "; ".join(parts)


def shares_of_batch(args):
    """The images of a step in this process, and how many of them at a time."""
    local = args.batch // world_size()
    micro = min(args.batch_gpu or local, local)
    if args.batch % world_size() or local % micro:
        raise UserError(f"--batch {args.batch} does not divide into {world_size()} processes of "
                        f"whole --batch-gpu {micro}")
    return local, micro


def model_config(args, data):
    """What a checkpoint remembers of its network and path, as plain types."""
    _, c, h, w = data.images.shape
    if args.cond and len(data.classes) < 2:
        raise UserError("--cond needs images of at least two classes, each in a folder of its own; "
                        f"{data.name} has {data.classes}")
    if args.bnr == math.inf and args.param == "noise":
        raise UserError("--param noise needs noise to predict, and --bnr inf has none")
    unet = dict(in_channels=c, out_channels=c * PARAMETERIZATIONS[args.param].heads,
                channels=args.channels, mult=args.mult, blocks=args.blocks, resolution=max(h, w),
                attention=args.attention, dropout=args.dropout,
                augment_dim=9 if args.augment else 0,
                classes=len(data.classes) if args.cond else 0)
    if args.bnr == "any":
        unet["ratio"] = True
    return {"bnr": args.bnr, "path": args.path, "sigma_data": SIGMA_DATA, "param": args.param,
            "colour": None, "unet": unet}


def checked_build(config, h, w):
    try:
        net = build(config)
        net.unet.check(h, w)
    except ValueError as e:
        raise UserError(e) from None
    sizes = [max(h, w) >> level for level in range(len(config["unet"]["mult"]))]
    missing = [side for side in config["unet"]["attention"] if side not in sizes]
    if missing:
        raise UserError(f"--attention {' '.join(map(str, missing))}: the levels have sides of "
                        f"{', '.join(map(str, sizes))}; choose among them, or none")
    return net


def gathered(history):
    """The levels and losses of all processes: [steps, 3, batch] on the CPU."""
    mine = torch.stack(history)
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine) if world_size() > 1 else parts[0].copy_(mine)
    return torch.cat(parts, 2).cpu()


def summary(seen, records, lr, since, device):
    """A log line: both loss terms since the last line, whole and by quartile of t, lowest first.
    Raises UserError at a loss that is not finite."""
    steps, _, batch = records.shape
    t, *losses = records.transpose(0, 1).flatten(1)             # [steps * batch] each
    losses = torch.stack(losses)
    seconds = time.time() - since           # the copies to the CPU have waited for the device
    bad = (~losses.isfinite()).any(0).nonzero().flatten()
    if len(bad):
        i = bad[0].item()
        raise UserError(
            f"the loss is not finite at step {seen // batch - steps + 1 + i // batch}, level "
            f"{t[i]:.4g} (denoise {losses[0, i]:g}, deblur {losses[1, i]:g}); the run stops and "
            "the last checkpoint stays: try a lower --lr, or --precision fp32")
    limits = np.quantile(t.numpy(), [0.25, 0.5, 0.75])
    quartile = torch.from_numpy(np.searchsorted(limits, t.numpy()))
    line = {"kimg": seen / 1000, "step": seen // batch}
    for name, values in zip(("denoise", "deblur"), losses):
        line[name] = round(values.mean().item(), 5)
        line[f"{name}_by_level"] = [round(values[quartile == q].mean().item(), 5)
                                    if (quartile == q).any() else None for q in range(4)]
    return {**line, "lr": lr, "images_per_s": round(losses.shape[1] / seconds, 1),
            "memory_gb": round(peak_memory(device), 2)}


def broken_gradient(run):
    """The error message for a gradient that is not finite. The weights have not moved since that
    step, so its batch is drawn again."""
    first = [bool(norm.isfinite()) for norm in run.norms].index(False)
    seen = run.seen - (len(run.norms) - first) * run.args.batch
    blame = broken_term(run, draw_batch(run, seen, slice(None)))
    return (f"the gradient is not finite at step {seen // run.args.batch + 1}, {blame}; the run "
            "stops and the last checkpoint stays: try a lower --lr, or --precision fp32")


def broken_term(run, batch):
    """The first image and term of a batch whose gradient is not finite on its own, in words."""
    for i in range(run.args.batch):
        part = cut(batch, slice(i, i + 1))
        for k, name in enumerate(("denoise", "deblur")):
            run.net.zero_grad()
            term = loss_terms(run, run.net, part)[k].sum()
            if term.requires_grad:                              # cold paths have nothing to denoise
                term.backward()
            if not all(p.grad is None or p.grad.isfinite().all() for p in run.weights):
                t = time_of(part["alpha"], part["sigma"]).item()
                return f"level {t:.4g}, term {name}"
    return "of no image alone"


def scorer(run):
    """A function that returns a model's FID and how it was made, for the log."""
    args = run.args
    with rank_0_first():
        net, digest = load_inception(args.fid_weights, run.device)
    batches = tqdm(run.images[rank()::world_size()].split(256), "reference statistics",
                   unit=" batches", disable=rank() > 0)
    ref = statistics(batches, net, "tf1", digest, run.facts["name"])

    def fid(ema):
        samples = drawn_batches(ema, run.sampling, run.facts["shape"], 0, args.fid_num, run.device,
                                256, steps=args.sample_steps, colour=run.config["colour"])
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16): # not of Inception
            drawn = statistics(samples, net, "tf1", digest, "samples")
        value = frechet_distance(drawn["mu"], drawn["sigma"], ref["mu"], ref["sigma"])
        return {"fid": round(value, 4), "fid_num": args.fid_num, "fid_resize": "tf1",
                "fid_precision": "bf16" if run.bf16 else "fp32", "fid_weights_sha256": digest}
    return fid


def resumable(args):
    """The state to resume from, or None for a new run. UserError where --out holds another."""
    filename = f"{args.out}/state.pt"
    if not os.path.exists(filename):
        if os.path.exists(f"{args.out}/ema.pt"):
            raise UserError(f"{args.out} holds a model, but no state.pt to resume from: choose "
                            "another --out")
        return None
    state = read_checkpoint(filename)
    needed = {"net", "ema", "optimizer", "options", "data", "seen", "config"}
    if not state.keys() >= needed or not all(
            isinstance(state[k], dict) for k in ("options", "config")):
        raise UserError(f"{filename} is not a state of train.py: choose another --out")
    differ = [f"--{k.replace('_', '-')} {state['options'].get(k)}, not {v}"
              for k, v in vars(args).items()
              if k not in MAY_CHANGE_ON_RESUMING and state["options"].get(k) != v
              and not (k == "data" and moved(state["options"].get(k), v))]
    if differ:
        raise UserError(f"{args.out} holds a run with {'; '.join(differ)}: choose another --out, "
                        "or repeat its options")
    return state


def moved(before, now):
    """Whether two names of data may be the same images in another folder. restore() compares what
    they are."""
    return isinstance(before, str) and os.path.basename(os.path.abspath(before)) == \
        os.path.basename(os.path.abspath(now))


def restore(run, state):
    """Puts a saved state into the run. UserError where it does not fit."""
    out = run.args.out
    if state["data"] != run.facts:
        raise UserError(f"{out} was trained on other images: {state['data']}, and these are "
                        f"{run.facts}")
    differ = [f"{k} {state['config'].get(k)}, not {run.config[k]}" for k in run.config
              if k != "colour" and state["config"].get(k) != run.config[k]]
    if differ:                              # only a path or network that the caller has given
        raise UserError(f"{out} holds a run with {'; '.join(differ)}: choose another --out")
    try:
        run.net.load_state_dict(state["net"])
        run.ema.load_state_dict(state["ema"])
        groups = run.optimizer.state_dict()["param_groups"]
        run.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        for p, s in run.optimizer.state.items():                # which a fused Adam does not check
            moments = {(m.shape, m.dtype, m.layout) for m in (s["exp_avg"], s["exp_avg_sq"])}
            if moments != {(p.shape, p.dtype, p.layout)}:
                raise ValueError("the optimizer's moments do not have the weights' shapes")
        if type(state["seen"]) is not int or state["seen"] < 0:
            raise TypeError("the number of images seen is not a number")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{out}/state.pt does not fit this network: {reason}") from None
    run.seen = state["seen"]


def write_options(args):
    values = {k: "inf" if v == math.inf else v for k, v in vars(args).items()}
    with atomic_write(f"{args.out}/options.json", "w") as f:
        json.dump(values, f, indent=1)


if __name__ == "__main__":
    main()
