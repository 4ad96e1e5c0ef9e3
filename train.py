"""Train a blur-noise mixture diffusion model. README, "The loss" and "The recipe".

    python train.py                                        # dead leaves of 16 x 16, minutes on a CPU
    python train.py --data cifar10 --bnr 0.5               # the paper's CIFAR-10 run
    python train.py --data my-pictures/ --preset ffhq64    # your own pictures
    torchrun --nproc_per_node=8 train.py --data cifar10    # the same on several GPUs
    python train.py --bnr inf --out run-cold               # the study: cold; or --path blurring, --param x0, --blind, --cond

The same command again goes on where it stopped.
"""
import argparse
import contextlib
import copy
import io
import json
import math
import os
import signal
import sys
import time
from functools import lru_cache, partial

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (Options, UserError, augment, device, first_rank_first, joined, load, normalize, rank, ranks, save_grid, to_uint8, within,
                  written_aside)
from loss import disentangled_loss, training_levels
from model import build
from sample import generate, no_tf32, read_checkpoint

# The options' defaults are the paper's for CIFAR-10 (EDM's DDPM++ recipe); a preset is what differs from them.
PRESETS = {
    "cifar10": {},
    "ffhq64": dict(resolution=64, mult=[1, 2, 2, 2], batch=256, lr=2e-4, dropout=0.05, augment=0.15, sample_steps=40),
    "church128": dict(resolution=128, mult=[1, 1, 2, 2, 2], batch=256, lr=2e-4, dropout=0.1, augment=0., sample_steps=40),
    "tiny": dict(resolution=16, channels=24, mult=[1, 2], blocks=1, attention=[8], batch=64, lr=2e-3, dropout=0., augment=0.,
                 duration=60., warmup=3., ema=3., log_every=2., snapshot_every=20.),
}
MAY_CHANGE = {"out", "duration", "batch_gpu", "device", "compile", "log_every", "snapshot_every", "sample_steps",
              "fid_every", "fid_num", "fid_weights"}      # on resuming


def options():
    p = Options(description="Train a blur-noise mixture diffusion model. The defaults named are the cifar10 preset's.")
    a = p.add_argument
    a("--data", default="leaves", help="leaves, cifar10, or a folder, zip or tar of pictures (default leaves)")
    path = p.add_mutually_exclusive_group().add_argument
    path("--bnr", type=bnr, default=0.5, help="blur-to-noise ratio, pixels of blur for a unit of noise; 0 is EDM, inf blur alone (default 0.5)")
    path("--path", choices=["blurring"], help="in place of one ratio, Hoogeboom & Salimans' schedule of blur over noise")
    a("--param", choices=["residual", "x0", "noise"], default="residual",
      help="what the network answers: the blurry picture and its residual; the picture; the noise and the residual (default residual)")
    a("--blind", action="store_true", help="tell the network no level; the sampler reads it from the answers")
    a("--cond", action="store_true", help="tell the network the class, the name of a picture's folder")
    a("--preset", choices=PRESETS, help="recipe (default: cifar10 for cifar10, else tiny)")
    a("--out", default="run", help="folder of checkpoints, log and grids; one that holds a run resumes it (default run)")
    a("--batch", type=within(int, 1), default=512, help="pictures a step, over all GPUs and accumulation (default 512)")
    a("--batch-gpu", type=within(int, 1), help="pictures at a time on each GPU, for less memory (default: all of its share)")
    a("--lr", type=within(float, 0, 1), default=1e-3, help="Adam's learning rate (default 1e-3)")
    a("--warmup", type=within(float, 0), default=10000., help="kimg in which it rises from 0 (default 10000)")
    a("--duration", type=within(float, 0, 1e9), default=200000., help="kimg (thousands of pictures seen) to train for (default 200000)")
    a("--ema", type=within(float, 0), default=500., help="half-life of the weights' average, kimg (default 500)")
    a("--dropout", type=within(float, 0, 0.99), default=0.13, help="dropout probability (default 0.13)")
    a("--augment", type=within(float, 0, 1), default=0.12, help="probability of each augmentation, 0 for none at all (default 0.12)")
    a("--resolution", type=within(int, 0, 4096), default=32, help="side pictures are cropped and resized to; 0: as they are (default 32)")
    a("--channels", type=within(int, 8, 4096), default=128, help="width of the network (default 128)")
    a("--mult", type=within(int, 1, 16), nargs="+", default=[2, 2, 2], help="width of each level, in channels (default 2 2 2)")
    a("--blocks", type=within(int, 1, 64), default=4, help="residual blocks a level (default 4)")
    a("--attention", type=within(int, 0), nargs="*", default=[16], help="sides of the levels with attention (default 16)")
    a("--seed", type=within(int, 0, 2 ** 31), default=0, help="of the weights, the noise and the order (default 0)")
    a("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu (default: cuda if there is one)")
    a("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of the network; auto: bf16 on a GPU that has it (default auto)")
    a("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the network, a minute or two (default: on a GPU)")
    a("--log-every", type=within(float, 0.001), default=50., help="kimg between lines of the log (default 50)")
    a("--snapshot-every", type=within(float, 0), default=2500., help="kimg between checkpoints, with a grid (default 2500)")
    a("--fid-every", type=within(float, 0), default=0., help="kimg between FIDs of the averaged weights, 0 for none (default 0)")
    a("--fid-num", type=within(int, 2), default=10000, help="pictures of such an FID, seeds from 0 (default 10000)")
    a("--fid-weights", help="the FID network's weights (default: fetched once into data/)")
    a("--sample-steps", type=within(int, 1, 1000), default=18, help="Heun steps of the grid (default 18)")
    given = p.parse_args()
    preset = given.preset or ("cifar10" if given.data == "cifar10" else "tiny")
    p.set_defaults(**PRESETS[preset], preset=preset)
    return p, p.parse_args()


def bnr(text):
    try:
        return math.inf if text == "inf" else within(float, 0, 1e6)(text)
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(f"{e}, or inf") from None


def main():
    p, args = options()
    with joined(), p.one_line_errors(), interrupts() as stop:
        train(args, stop)
    if stop:
        sys.exit(128 + stop[0])


def train(args, stop):
    """The whole run, one of them in each process of torchrun; it ends behind the step in which a signal's number comes into `stop`."""
    device = torch.device(args.device)
    bf16 = args.precision == "bf16" or args.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    local = args.batch // ranks()                               # this process's share of a step
    micro = min(args.batch_gpu or local, local)
    if args.batch % ranks() or local % micro:
        raise UserError(f"--batch {args.batch} does not divide into {ranks()} processes of whole --batch-gpu {micro}")
    ema_path, state_path = f"{args.out}/ema.pt", f"{args.out}/state.pt"
    state = resumable(args, state_path, ema_path)

    with first_rank_first() if args.data in ("leaves", "cifar10") else contextlib.nullcontext():
        data = load(args.data, args.resolution or None)
    facts = data.facts()
    n, (c, h, w) = len(data.pictures), facts["shape"]
    if args.cond and len(data.classes) < 2:
        raise UserError(f"--cond needs pictures of two classes or more, in folders of their own; {facts['name']} has {data.classes}")
    config = {"bnr": args.bnr, "path": args.path, "sigma_data": 0.5, "param": args.param, "blind": args.blind,
              "colour": data.colour() if args.bnr == math.inf else None,
              "unet": dict(in_channels=c, out_channels=c if args.param == "x0" else 2 * c, channels=args.channels, mult=args.mult,
                           blocks=args.blocks, resolution=max(h, w), attention=args.attention, dropout=args.dropout,
                           augment_dim=9 if args.augment else 0, classes=len(data.classes) if args.cond else 0)}
    torch.manual_seed(args.seed)
    net = network(config, h, w).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    seen = 0                                                    # pictures, the one measure of progress
    if state:
        if state["data"] != facts:
            raise UserError(f"{args.out} was trained on other pictures: {state['data']}, and these are {facts}")
        try:
            net.load_state_dict(state["net"])
            ema.load_state_dict(state["ema"])
            optimizer.load_state_dict({**state["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]})
            for p, s in optimizer.state.items():                # what fused Adam does not look at
                if not {(v.shape, v.dtype, v.layout) for v in (s["exp_avg"], s["exp_avg_sq"])} == {(p.shape, p.dtype, p.layout)}:
                    raise ValueError("the optimizer's moments have other shapes than the weights")
            if type(state["seen"]) is not int or state["seen"] < 0:
                raise TypeError("it has seen no number of pictures")
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{state_path} does not fit this network: {' '.join(str(e).split())[:200]}") from None
        seen = state["seen"]
    if args.compile or args.compile is None and device.type == "cuda":
        net.unet.compile()                                      # in place: the names of its weights stay the raw module's
    no_tf32()
    torch.backends.cudnn.benchmark = True                       # the fastest convolutions
    if rank() == 0:
        os.makedirs(args.out, exist_ok=True)
        write_options(args, f"{args.out}/options.json")
        log = resumed_log(f"{args.out}/log.jsonl", seen)
    shared = DistributedDataParallel(net) if ranks() > 1 else net                               # averages the gradients of all
    pictures = resident(data.pictures, device)
    fid = scorer(args, pictures, facts, device, bf16) if args.fid_every else None

    total = math.ceil(args.duration * 1000 / args.batch) * args.batch
    say = print if rank() == 0 else lambda text: None
    say(f"{facts['name']}: {n} pictures of {c} x {h} x {w}; {sum(p.numel() for p in net.parameters()):,} parameters, {args.path or f'BNR {args.bnr:g}'}; "
        f"{device.type}, {'bf16' if bf16 else 'fp32'}, batch {args.batch} as {args.batch // micro} x {micro}"
        + (f" in {ranks()} processes" if ranks() > 1 else "") + (f"; resuming at {seen / 1000:g} kimg" if seen else ""))
    if seen >= total:
        say(f"{args.out} has its {seen / 1000:g} kimg already; a longer --duration goes on from there")
    bar = tqdm(total=total, initial=seen, unit="img", unit_scale=True, disable=rank() > 0)
    mine = slice(rank() * local, (rank() + 1) * local)

    def draw(part):
        """A part of this step's batch: pictures, what augmentation did, classes, levels, noise."""
        # drawn for the whole batch, then sliced, so as not to depend on --batch-gpu and the number of processes; from the seed and the
        # step alone, so that a resumed run needs no random state
        torch.manual_seed(args.seed * 1_000_003 + seen)
        index = shuffled(seen, args.batch, n, args.seed)[part]
        x0, augmented = normalize(take(pictures, index, device)), None                          # [B, C, H, W]
        if args.augment:
            x0, augmented = augment(x0, args.augment, args.batch, part)
        label = take(data.labels, index, device) if args.cond else None
        t, noise = training_levels((args.batch, c, h, w), net.path, device), torch.randn(args.batch, c, h, w, device=device)
        return x0, augmented, label, t[part], noise[part]

    def losses(model, x0, augmented, label, t, noise):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return disentangled_loss(partial(model, augment=augmented, label=label), x0, net.path, t, noise)

    history, since = [], time.time()
    broken = torch.zeros((), device=device)                     # 1 from the first gradient on that is not finite
    while seen < total:
        lr = args.lr * min(1, (seen + args.batch) / max(args.warmup * 1000, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr

        batch = draw(mine)
        if ranks() > 1:
            torch.manual_seed(args.seed * 1_000_003 + seen + (rank() + 1 << 52))                # each process its own dropout
        records = []
        for i in range(0, local, micro):
            some = [None if v is None else v[i:i + micro] for v in batch]
            with shared.no_sync() if ranks() > 1 and i + micro < local else contextlib.nullcontext():
                terms = losses(shared, *some)
                (sum(terms).sum() * (c * h * w / local)).backward()                             # sum over pixels, mean over the batch
            records.append(torch.stack([some[3], *terms]).detach())                             # [3, micro]
        norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
        optimizer.found_inf = broken = torch.maximum(broken, 1 - norm.isfinite().float())       # at 1 a fused Adam stands still
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += args.batch

        halflife = min(args.ema * 1000, seen * 0.05)            # EDM's ramp-up: early averages are short
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - 0.5 ** (args.batch / max(halflife, 1e-8)))

        history.append((torch.cat(records, 1), norm))
        bar.update(args.batch)
        stopping = agreed(stop)                                 # asked once, for a signal may come any time
        last = seen >= total or stopping
        snapshot = crossed(seen, args.batch, args.snapshot_every) or last
        scored = crossed(seen, args.batch, args.fid_every)
        if snapshot or scored or crossed(seen, args.batch, args.log_every):
            line = summary(seen, gathered(history), lr, since, device)                         # stops the run at a loss that is not finite
            if broken:
                good = [bool(norm.isfinite()) for _, norm in history].index(False)
                seen -= (len(history) - good) * args.batch      # back to before that step: the weights have not moved since
                raise UserError(f"the gradient is not finite at step {seen // args.batch + 1}, {blame(net, losses, draw(slice(None)))}; "
                                "stopped, the last checkpoint stays: try a lower --lr, or --precision fp32")
            if scored:
                line |= {"fid": round(fid(ema), 4), "fid_num": args.fid_num}
            if rank() == 0:
                log.write(json.dumps(line) + "\n")
                log.flush()
            bar.set_postfix(denoise=f"{line['denoise']:.4f}", deblur=f"{line['deblur']:.4f}")
            history = []
        if snapshot and rank() == 0:
            common = {"config": config, "data": facts, "options": vars(args), "seen": seen}
            saved = save({"weights": ema.state_dict(), **common}, ema_path) and save(
                {"net": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), **common}, state_path)
            if last and not saved:
                raise UserError(f"{args.out}: the last checkpoint could not be saved; the one before stays")
            if not stopping:
                draw_grid(ema, facts["shape"], device, args.sample_steps, f"{args.out}/grid-{seen // 1000:06d}.png")
        if stopping:
            break
        if not history:
            since = time.time()
    bar.close()
    if stop and rank() == 0:
        print(f"stopped and saved at {seen / 1000:g} kimg; the same command goes on from there", file=sys.stderr)


@contextlib.contextmanager
def interrupts():
    """A list that Ctrl-C or SIGTERM adds its number to, once; a second one ends the process at once.

    But not under torchrun, which passes on a Ctrl-C that all of them have got already, and kills who takes long by itself.
    """
    got = []

    def note(number, frame):
        got.append(number)
        if ranks() == 1:
            signal.signal(number, signal.SIG_DFL)
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def network(config, h, w):
    try:
        net = build(config)
        net.unet.check(h, w)
    except ValueError as e:
        raise UserError(e) from None
    sizes = [max(h, w) >> level for level in range(len(config["unet"]["mult"]))]
    if not set(config["unet"]["attention"]) <= set(sizes):
        raise UserError(f"--attention {config['unet']['attention']} is at none of the levels' sizes, {sizes}: choose among them, or none")
    return net


def shuffled(start, count, n, seed):
    """Places start to start + count of an endless stream of shuffles of n pictures: each is seen once an epoch. int64 [count]"""
    place = torch.arange(start, start + count)
    return torch.cat([epoch(e, n, seed)[place[place // n == e] % n] for e in range(start // n, (start + count - 1) // n + 1)])


@lru_cache(maxsize=2)
def epoch(e, n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + e))


def resident(pictures, device):
    """The uint8 set on the training device if it takes less than half of what is free there, else where it is."""
    return pictures.to(device) if device.type == "cpu" or pictures.numel() < torch.cuda.mem_get_info(device)[0] / 2 else pictures


def take(pictures, index, device):
    """pictures[index] on the device; from the host by pinned memory, which a GPU need not be waited for."""
    if device.type == "cpu":
        return pictures[index]
    if pictures.device.type == "cpu":
        return pictures[index].pin_memory().to(device, non_blocking=True)
    return pictures[index.pin_memory().to(device, non_blocking=True)]


def crossed(seen, batch, kimg):
    return kimg > 0 and seen // (kimg * 1000) > (seen - batch) // (kimg * 1000)


def gathered(history):
    """The levels and losses of all processes, step by step: [steps, 3, batch] on the CPU."""
    mine = torch.stack([record for record, _ in history])
    parts = [torch.empty_like(mine) for _ in range(ranks())]
    dist.all_gather(parts, mine) if ranks() > 1 else parts[0].copy_(mine)
    return torch.cat(parts, 2).cpu()


def agreed(stop):
    """Whether any process got a signal: then all have it in `stop`, in the same step."""
    if ranks() > 1:
        number = torch.tensor(stop[0] if stop else 0)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        stop += [int(number)] if number and not stop else []
    return bool(stop)


def blame(net, losses, batch):
    """Which level and term of a batch have a gradient that is not finite."""
    for i, t in enumerate(batch[3].tolist()):
        for k, term in enumerate(("denoise", "deblur")):
            net.zero_grad()
            loss = losses(net, *[None if v is None else v[i:i + 1] for v in batch])[k].sum()
            if loss.requires_grad:                              # on a cold path there is nothing to denoise
                loss.backward()
            if not all(p.grad is None or p.grad.isfinite().all() for p in net.parameters()):
                return f"level {t:.4g}, term {term}"
    return "of no picture alone"


def summary(seen, records, lr, since, device):
    """A log line of the steps since the last: both terms, whole and by quartile of the levels drawn, lowest first."""
    steps, _, batch = records.shape
    t, *losses = records.transpose(0, 1).flatten(1)             # [steps * batch] each
    losses = torch.stack(losses)
    seconds = time.time() - since                               # behind the copies, which wait for the device
    bad = (~losses.isfinite()).any(0).nonzero().flatten()
    if len(bad):
        i = bad[0].item()
        raise UserError(f"the loss is not finite at step {seen // batch - steps + 1 + i // batch}, level {t[i]:.4g} (denoise {losses[0, i]:g}, "
                        f"deblur {losses[1, i]:g}); stopped, the last checkpoint stays: try a lower --lr, or --precision fp32")
    quartile = torch.from_numpy(np.searchsorted(np.quantile(t.numpy(), [0.25, 0.5, 0.75]), t.numpy()))
    by_level = [[round(l[quartile == q].mean().item(), 5) if (quartile == q).any() else None for q in range(4)] for l in losses]
    return {"kimg": seen / 1000, "step": seen // batch, "denoise": round(losses[0].mean().item(), 5),
            "deblur": round(losses[1].mean().item(), 5), "denoise_by_level": by_level[0], "deblur_by_level": by_level[1], "lr": lr,
            "images_per_s": round(losses.shape[1] / seconds, 1), "memory_gb": round(peak_memory(device), 2)}


def peak_memory(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource                                         # not on Windows
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)
    except ImportError:
        return 0.


def draw_grid(ema, shape, device, steps, path):
    pictures = torch.cat([to_uint8(x).cpu() for x in generate(ema, shape, range(64), device, steps=steps)])
    save_grid(pictures, path)


def scorer(args, pictures, facts, device, bf16):
    """A function that gives the FID of a model's samples against the training pictures, as fid.py computes it."""
    from fid import drawn_batches, frechet_distance, load_inception, statistics
    with first_rank_first():
        net, digest = load_inception(args.fid_weights, device)
    ref = statistics(tqdm(pictures[rank()::ranks()].split(256), "reference statistics", unit=" batches", disable=rank() > 0), net, "tf1", digest,
                     facts["name"])

    def fid(ema):
        batches = drawn_batches(ema, facts["shape"], 0, args.fid_num, device, 256, steps=args.sample_steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):                         # InceptionV3 stays in fp32
            drawn = statistics(batches, net, "tf1", digest, "samples")
        return frechet_distance(drawn["mu"], drawn["sigma"], ref["mu"], ref["sigma"])
    return fid


def save(checkpoint, path):
    """False, and the old file stays, where the disk would not take the new one."""
    whole = io.BytesIO()
    torch.save(checkpoint, whole)
    try:
        with written_aside(path) as f:
            f.write(whole.getbuffer())
        return True
    except OSError as e:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.part")
        tqdm.write(f"{path} could not be saved ({e.strerror}): the one before stays, and training goes on", file=sys.stderr)
        return False


def resumable(args, state_path, ema_path):
    """The state to resume from, or None for a new run. Raises UserError where --out holds something else."""
    if not os.path.exists(state_path):
        if os.path.exists(ema_path):
            raise UserError(f"{args.out} holds a model, but no state.pt to resume from: choose another --out")
        return None
    state = read_checkpoint(state_path)
    if not state.keys() >= {"net", "ema", "optimizer", "options", "data", "seen"} or not isinstance(state["options"], dict):
        raise UserError(f"{state_path} is no state of train.py: choose another --out")
    ours, theirs = vars(args), state["options"]
    differ = [f"--{k.replace('_', '-')} {theirs.get(k)}, not {v}" for k, v in ours.items() if k not in MAY_CHANGE and theirs.get(k) != v]
    if differ:
        raise UserError(f"{args.out} holds a run with {'; '.join(differ)}: choose another --out, or repeat its options")
    return state


def resumed_log(path, seen):
    """The log, open to go on behind the line of the checkpoint: what a stopped run wrote after that comes again."""
    kept = []
    if os.path.exists(path):
        for line in open(path):
            with contextlib.suppress(ValueError):               # a last line may be torn
                kept += [line] if json.loads(line)["kimg"] <= seen / 1000 else []
    with written_aside(path, "w") as f:
        f.writelines(kept)
    return open(path, "a")


def write_options(args, path):
    with open(path, "w") as f:
        json.dump({k: "inf" if v == math.inf else v for k, v in vars(args).items()}, f, indent=1)


if __name__ == "__main__":
    main()
