"""Train a blur-noise mixture diffusion model with the loss (9).

    python train.py                                        # dead leaves, minutes on a CPU
    python train.py --data cifar10 --bnr 0.5               # the paper's CIFAR-10 run
    python train.py --data cifar10 --bnr any               # one network for every ratio
    python train.py --data my-images/ --preset ffhq64      # your own images
    torchrun --nproc_per_node=8 train.py --data cifar10    # the same on several GPUs
    python train.py --resume run --duration 120            # a run in its folder, with its options
    python train.py --resume run --from 60 --lr 5e-4       # back to a state of --keep-every

The same command again resumes the run, too.
"""
import argparse
import contextlib
import copy
import json
import math
import shlex
import sys
import time
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data import Images, augment, gather, load, seed_for, shuffled
from degrade import Schedule, level_to_t
from loss import disentangled_loss
from model import PARAMETERIZATIONS, Denoiser
from util.checkpoint import compile_or_warn, in_its_layout, start_from
from util.cli import (Parser, UserError, add_device_option, is_out_of_memory, number, progress,
                      say, warn)
from util.distributed import (any_rank, join_processes, largest, one_after_another, rank,
                              signals_noted, world_size)
from util.images import normalize
from util.run import (check_parts, describe, draw_grid, locked, make_config, make_network,
                      named_schedule, read_state, restore, rounded, save_snapshot, stored_options,
                      trim_log, write_log, write_options)

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


def options(argv=None) -> argparse.Namespace:
    """The options of a command line, with those of the preset."""
    argv = sys.argv[1:] if argv is None else argv
    first_pass = Parser(add_help=False)         # --help waits until the preset is known
    add_options(first_pass)
    given, _ = first_pass.parse_known_args(argv)
    if given.resume:
        if given.preset:
            first_pass.error("--preset is for a new run: give the options that change")
        argv = [*options_of_run(first_pass, given), *argv]
        given, _ = first_pass.parse_known_args(argv)
    preset = given.preset or default_preset(given.data)
    p = Parser(description="Train a diffusion model of blur and noise. A kimg: 1,000 images seen. "
                           f"The defaults below are those of --preset {preset}: --data cifar10 "
                           "takes cifar10, other data tiny.")
    add_options(p)
    p.set_defaults(**PRESETS[preset], preset=preset)
    args = p.parse_args(argv)
    if args.resume not in (None, args.out):
        p.error("--resume and --out name two folders: give one of them")
    if args.schedule and args.bnr is not None:
        p.error("--bnr and --schedule are two ways to choose a schedule: give one of them")
    if args.bnr is None:
        args.bnr = 0.5
    if args.bnr == math.inf and (args.P_mean, args.P_std) != (-1.2, 1.2):
        p.error("--P-mean and --P-std are of ln sigma, and --bnr inf has no noise")
    del args.resume
    return args


def add_options(p: Parser) -> None:
    def a(name, default, text, **kw):
        if default is not None and default is not False:
            text += " (default %(default)s)"
        p.add_argument(name, default=default, help=text, **kw)

    a("--data", "leaves", "leaves, cifar10, or a folder, zip, tar, .npy or .npz of images")
    a("--bnr", None, "blur-to-noise ratio, pixels of blur for a unit of noise; 0 is EDM, inf is "
      "blur alone, any is one network for all from 0 to 10 (default 0.5)", type=ratio)
    a("--schedule", None, "instead of one ratio, Hoogeboom & Salimans' schedule",
      choices=["blurring"])
    a("--param", "residual", "what the network predicts: residual, the blurry image and what blur "
      "removed; x0, the image; noise, the noise and what blur removed", choices=PARAMETERIZATIONS)
    a("--P-mean", -1.2, "mean of ln sigma in training", type=number(float, -20, 20))
    a("--P-std", 1.2, "its standard deviation", type=number(float, 0.001, 20))
    a("--cond", False, "condition on classes: folders", action=argparse.BooleanOptionalAction)
    a("--preset", None, "recipe: the defaults of the options that follow", choices=PRESETS)
    a("--out", "run", "folder of checkpoints, log and grids; one that holds a run resumes it")
    a("--resume", None, "go on with the run in this folder, and its options but for those given",
      metavar="RUN")
    a("--from", None, "go back to the state kept at this kimg, and drop what came after it",
      type=number(float, 0, 1e9), metavar="KIMG", dest="kept")
    a("--batch", 512, "images per step, over all GPUs and accumulation", type=number(int, 1))
    a("--batch-gpu", None, "images at a time on a GPU (default: its share)", type=number(int, 1))
    a("--lr", 1e-3, "Adam's learning rate", type=number(float, 0, 1))
    a("--warmup", 10000., "kimg while the learning rate rises from 0", type=number(float, 0, 1e9))
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
    a("--snapshot-minutes", 0., "minutes between them, whichever comes first; 0: kimg alone",
      type=number(float, 0))
    a("--keep-every", 0., "kimg between copies of both; 0: none", type=number(float, 0, 1e9))
    a("--sample-steps", 18, "Heun steps of sample.py on this model", type=number(int, 1, 1000))


def ratio(text: str):
    """An argparse type: a number of at least 0, inf or any."""
    if text == "any":
        return text
    try:
        return number(float, 0)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, inf or any, not "
                                         f"{text!r}") from None


def default_preset(data: str) -> str:
    return "cifar10" if data == "cifar10" else "tiny"


def options_of_run(p: Parser, given) -> list:
    """The options that a run has written, but for the device, as words of a command line: they are
    parsed again, for a person may have edited them."""
    try:
        stored = {**stored_options(given.resume), "out": given.resume, "device": None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        p.error(f"--resume {given.resume}: it holds no run (a readable options.json)")
    words = []
    for name, value in stored.items():
        if value is None or name not in vars(given):
            continue
        option = name.replace("_", "-")
        if value is True:
            words.append(f"--{option}")
        elif value is False:
            words.append(f"--no-{option}")
        elif isinstance(value, list):
            words += [f"--{option}", *map(str, value)]
        else:
            words.append(f"--{option}={value}")                 # it may start with -
    return words


def main():
    args = options()
    with Parser().one_line_errors(), signals_noted() as signals:
        train(args, signals=signals)
        if rank() == 0 and not signals:
            ema = shlex.quote(f"{args.out}/ema.pt")
            samples = shlex.quote(f"{args.out}/samples")
            say(f"To draw images: python sample.py --ckpt {ema} --out {samples}")
    if signals:
        sys.exit(128 + signals[0])


def adam(parameters, lr: float) -> torch.optim.Optimizer:
    """EDM's optimizer."""
    return torch.optim.Adam(parameters, lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def train(args, data: Images | None = None, schedule: Schedule | None = None,
          net: Denoiser | None = None, loss=disentangled_loss, optimizer=None, on_log=None,
          signals: list | None = None) -> Denoiser:
    """The whole run, one of them in each process of torchrun. Returns the EMA of the network.

    args: of options(). To swap a part, give data, schedule, net, loss (called as disentangled_loss
    is), optimizer (parameters -> a torch optimizer) or on_log (called in the first process with the
    dict of each log line); docs/own-parts.md says what they have to be. signals: a list; the run
    saves and ends after the step in which it is filled. Raises UserError.
    """
    check_type(data, Images)
    check_type(net, Denoiser)
    torch.backends.cudnn.benchmark = True
    join_processes()
    args = argparse.Namespace(**json.loads(json.dumps(vars(args), default=str)))  # plain types
    kept = vars(args).pop("kept", None)
    lock = locked(args.out) if rank() == 0 else contextlib.nullcontext()
    with lock, torch.random.fork_rng(range(torch.cuda.device_count())), torch.enable_grad():
        if data is not None:                                    # its images are not resized
            vars(args).update(data=data.name, resolution=0)
        images_at_a_time(args)                                  # complains before the data load
        state = read_state(args, kept)
        if data is None:
            data = load_in_turn(args)

        schedule, schedule_name = named_schedule(args, schedule)
        check_parts(args, data, schedule, net)
        config = make_config(args, data, schedule, schedule_name, net)
        config["loss"] = getattr(loss, "__qualname__", type(loss).__name__)
        net = make_network(args, data, config, net)
        if args.init_from and state is None:
            start_from(net, args.init_from, data.classes)
        net = in_its_layout(net, args.device).train()
        ema = copy.deepcopy(net).eval().requires_grad_(False)
        for p in ema.parameters():                  # the steps of an average vanish in 16 bits
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
        if optimizer is None:
            optimizer = partial(adam, lr=args.lr)
        optimizer = optimizer(net.parameters())
        for group in optimizer.param_groups:
            group["initial_lr"] = float(group["lr"])
        config["optimizer"] = type(optimizer).__qualname__

        run = {"config": config, "data": data.facts(), "options": vars(args)}   # in each checkpoint
        seen = 0
        if state is not None:
            seen = restore(args.out, state, run, net, ema, optimizer)
            del state                                           # frees its tensors
        if kept is not None and rank() == 0:
            save_snapshot(args.out, run, net, ema, optimizer, seen, keep=False, must=True)
        if signals is None:
            signals = []
        try:
            return loop(args, run, data, schedule, net, ema, loss, optimizer, on_log, seen, signals)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"out of memory: {advice_on_memory(args)}") from None


def check_type(part, kind: type) -> None:
    """Raises UserError for a part of one's own that is something else."""
    if part is not None and not isinstance(part, kind):
        raise UserError(f"give a {kind.__module__}.{kind.__name__}, not {type(part).__name__}: "
                        "docs/own-parts.md says how to make one")


def load_in_turn(args) -> Images:
    """The data set. The first process fetches and decodes it for the others, which wait."""
    with one_after_another():
        return load(args.data, args.resolution or None)


def advice_on_memory(args) -> str:
    """What to do where a step does not fit in memory: half of the images at a time, or the next
    number below it that divides."""
    share = args.batch // world_size()
    smaller = [n for n in range(1, images_at_a_time(args) // 2 + 1) if share % n == 0]
    if not smaller:
        return "take a smaller --resolution or --channels"
    return f"give --batch-gpu {smaller[-1]}"


def loop(args, run: dict, data: Images, schedule: Schedule, net: Denoiser, ema: Denoiser, loss,
         optimizer, on_log, seen: int, signals: list) -> Denoiser:
    """The steps after the first `seen` images, up to --duration, and what they write."""
    device = torch.device(args.device)
    bf16 = uses_bf16(args.precision, device)
    total = math.ceil(round(args.duration * 1000, 6) / args.batch) * args.batch
    if seen >= total and rank() == 0:
        say(f"{args.out} is complete at {seen / 1000:g} kimg: a longer --duration trains on")
    if args.compile or args.compile is None and device.type == "cuda":
        compile_or_warn(net.unet, args.compile)
    shared = net
    if world_size() > 1:
        is_custom = run["config"]["unet"] is None               # it may leave out a parameter
        shared = DistributedDataParallel(net, find_unused_parameters=is_custom)
    before = None                           # the last line of the log
    if rank() == 0:
        write_options(args)
        before = trim_log(args.out, seen)
        describe(args, run, data, net, seen, bf16, images_at_a_time(args))
    bar = progress(total=total, initial=seen, unit="img", unit_scale=True, disable=rank() > 0,
                   delay=0.1)               # it writes nothing before the first step
    finite = FiniteCheck(net, optimizer, device)
    records = []
    since = time.time()
    saved_at = since
    stopping = False
    while seen < total and not stopping:
        # learning rate: a linear warm-up, then constant
        warmth = min(1, (seen + args.batch) / max(args.warmup * 1000, 1))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * warmth

        # batch, loss and backward
        batch = draw_batch(args, schedule, data.images, data.labels, seen, device)
        record = backward(args, shared, loss, batch, seen, bf16)
        records.append(record)

        # step
        finite.check(record, seen // args.batch + 1)
        optimizer.step()
        lr = optimizer.param_groups[0]["lr"]                    # a step hook may have changed it
        optimizer.zero_grad(set_to_none=True)
        seen += args.batch

        # EMA
        update_ema(args, ema, net, seen)
        with contextlib.suppress(OSError):
            bar.update(args.batch)

        # log and checkpoint
        stopping = any_rank(signals)                            # asked once: a signal may come now
        last = seen >= total or stopping
        snapshot = last or crossed(args, seen, args.snapshot_every, args.keep_every) \
            or minutes_over(args, saved_at)
        if not snapshot and not crossed(args, seen, args.log_every):
            continue
        finite.read()
        line = log_line(args, seen, records, lr, since)
        bar.set_postfix({"denoise": line["denoise"], "deblur": line["deblur"]}, refresh=False)
        if rank() == 0:
            write_log(args.out, line, before)
            before = line
            if on_log is not None:
                on_log(line)
        if rank() == 0 and snapshot:
            keep = crossed(args, seen, args.keep_every)
            save_snapshot(args.out, run, net, ema, optimizer, seen, keep, must=last)
            if not stopping and not data.latents:
                draw_grid(args.out, run, schedule, in_types_of(net, ema), seen)
        records = []
        since = time.time()                                     # without the time of writing
        if snapshot:
            saved_at = since
    with contextlib.suppress(OSError):
        bar.close()
    if stopping and rank() == 0:
        warn(f"stopped and saved at {seen / 1000:g} kimg; the same command less --from resumes it")
    return in_types_of(net, ema)


def uses_bf16(precision: str, device: torch.device) -> bool:
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


def draw_batch(args, schedule: Schedule, images, labels, seen: int, device) -> dict:
    """This process's share of the batch after the first `seen` images: a dict of tensors.

    Everything is drawn for the whole batch and then cut, so that it does not depend on the number
    of processes or on --batch-gpu; and from the seed and `seen` alone, so that resuming needs no
    random state.
    """
    share = args.batch // world_size()
    part = slice(rank() * share, (rank() + 1) * share)
    torch.manual_seed(seed_for("step", args.seed, seen))
    index = shuffled(seen, args.batch, len(images), args.seed)[part]
    x0 = normalize(gather(images, index, device))               # [B, C, H, W]
    augment_labels = None
    if args.augment:
        x0, augment_labels = augment(x0, args.augment, args.batch, part)
    label = None
    if args.cond:
        label = gather(labels, index, device)
    _, c, h, w = x0.shape
    alpha, sigma = schedule.training_levels(args.batch, h, w, device)
    noise = torch.randn(args.batch, c, h, w, device=device)
    return {"x0": x0, "augment": augment_labels, "label": label, "alpha": alpha[part],
            "sigma": sigma[part], "noise": noise[part]}


def backward(args, net, loss, batch: dict, seen: int, bf16: bool) -> torch.Tensor:
    """The gradients of the loss, summed over pixels and averaged over the batch, in parts of
    --batch-gpu images. With the last part, torch's DDP averages them over the processes.
    Returns t and both loss terms of each image, [3, B]."""
    share = args.batch // world_size()
    micro = images_at_a_time(args)
    sigma_data = getattr(net, "module", net).sigma_data         # DDP wraps the network
    if world_size() > 1:
        torch.manual_seed(seed_for(f"dropout of process {rank()}", args.seed, seen))
    records = []
    for i in range(0, share, micro):
        part = {name: None if v is None else v[i:i + micro] for name, v in batch.items()}
        x0 = part["x0"]
        alpha = part["alpha"]
        sigma = part["sigma"]
        heads = partial(net, augment=part["augment"], label=part["label"])
        is_last = i + micro >= share
        with contextlib.nullcontext() if is_last or world_size() == 1 else net.no_sync():
            with torch.autocast(x0.device.type, torch.bfloat16, enabled=bf16):
                denoise, deblur = loss(heads, x0, alpha, sigma, part["noise"], sigma_data)
            pixels = x0[0].numel()
            ((denoise + deblur).sum() * (pixels / share)).backward()
        records.append(torch.stack([level_to_t(alpha, sigma), denoise, deblur]).detach())
    return torch.cat(records, 1)


class FiniteCheck:
    """Raises UserError where a loss or gradient is not finite, before it spoils the weights.

    On a CPU the first such step ends the run. On a GPU, looking at each step would synchronize
    with it. So a fused optimizer skips such a step by a flag on the GPU (found_inf, as torch's
    GradScaler does), the flag is read a step later, and the third such step in a row ends the run.
    """

    def __init__(self, net, optimizer, device: torch.device):
        self.net = net
        self.optimizer = optimizer
        can_skip = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.deferred = can_skip and device.type != "cpu"
        self.unread = None                      # the last step, its record and its flag
        self.in_a_row = 0

    def check(self, record: torch.Tensor, step: int) -> None:
        """Before optimizer.step(). record: of backward()."""
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        is_bad = ~(norm + record[1:].sum()).isfinite()
        if not self.deferred:
            if is_bad:
                self.stop(record, step)
            return
        self.read()
        is_bad = is_bad.float()
        if world_size() > 1:                    # gradients are equal by now, and losses are not
            dist.all_reduce(is_bad, dist.ReduceOp.MAX)
        self.optimizer.found_inf = is_bad
        flag = is_bad.to("cpu", non_blocking=True)
        copied = None
        if is_bad.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self.unread = (step, record, flag, copied)

    def read(self) -> None:
        """Reads the flag of the last step, where there is one to read."""
        if self.unread is None:
            return
        step, record, flag, copied = self.unread
        self.unread = None
        if copied is not None:
            copied.synchronize()
        if not flag:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.in_a_row == 3:
            self.stop(record, step)
        if rank() == 0:
            warn(f"step {step} is skipped: its loss or gradient is not finite (the third such step "
                 "in a row ends the run)")

    def stop(self, record: torch.Tensor, step: int) -> None:
        raise UserError(f"the loss or its gradient is not finite at step {step}, before which the "
                        f"run stops: try a lower --lr, or --precision fp32. Losses by quartile of "
                        f"t: {by_level(record.cpu())}")


def in_types_of(net: Denoiser, ema: Denoiser) -> Denoiser:
    """The EMA as a network that can be called: one of 16 bits may not run with float32 weights."""
    model = copy.deepcopy(ema)
    for p, current in zip(model.parameters(), net.parameters()):
        p.data = p.data.to(current.dtype)
    return model


def update_ema(args, ema, net, seen: int) -> None:
    """ema = decay ema + (1 - decay) net; its half-life is --ema, or 1/20 of the images seen."""
    half_life = min(args.ema * 1000, seen * 0.05)               # images; EDM's ramp-up
    decay = 0.5 ** (args.batch / max(half_life, 1e-8))
    averages = list(ema.parameters())
    current = [p.to(average.dtype) for p, average in zip(net.parameters(), averages)]
    get_ema_multi_avg_fn(decay)(averages, current, None)
    for averaged, current in zip(ema.buffers(), net.buffers()):  # custom networks may have some
        averaged.copy_(current)


def images_at_a_time(args) -> int:
    """The images of a process that go through the network together. UserError where --batch does
    not divide."""
    share = args.batch // world_size()
    micro = min(args.batch_gpu or share, share)
    if args.batch % world_size() or share % micro:
        raise UserError(f"--batch {args.batch} does not divide into {world_size()} processes of "
                        f"--batch-gpu {micro}: take a multiple of {world_size() * micro}")
    return micro


def crossed(args, seen: int, *intervals: float) -> bool:
    """Whether the last batch passed a multiple of one of the intervals, in kimg. 0 has none."""
    for kimg in intervals:
        if kimg:
            images = max(1, round(kimg * 1000, 6))              # 4.03 * 1000 > 4030
            if seen // images > (seen - args.batch) // images:
                return True
    return False


def minutes_over(args, saved_at: float) -> bool:
    """Whether --snapshot-minutes have passed, in any process."""
    if not args.snapshot_minutes:
        return False
    is_over = time.time() - saved_at >= 60 * args.snapshot_minutes
    return bool(largest(int(is_over)))


def log_line(args, seen: int, records: list, lr: float, since: float) -> dict:
    """Both loss terms of all processes since the last line, and how fast it went."""
    record = torch.cat(records, 1)                              # [3, images of this process]
    of_processes = [record]
    if world_size() > 1:
        of_processes = [torch.empty_like(record) for _ in range(world_size())]
        dist.all_gather(of_processes, record)
    record = torch.cat(of_processes, 1).cpu()
    record = record[:, record.isfinite().all(0)]                # without those of skipped steps
    seconds = max(time.time() - since, 1e-3)                    # a clock may stand still
    line = {"kimg": seen / 1000, "step": seen // args.batch}
    line.update(by_level(record))
    line["lr"] = lr
    line["images_per_s"] = round(args.batch * len(records) / seconds, 1)
    return line


def by_level(record: torch.Tensor) -> dict:
    """[3, n]: t and both terms -> the mean of each term, whole and by quartile of t."""
    t, denoise, deblur = record
    quarters = [index.sort().values for index in t.argsort().tensor_split(4)]
    line = {}
    for name, losses in (("denoise", denoise), ("deblur", deblur)):
        line[name] = mean_or_none(losses)
        line[f"{name}_by_level"] = [mean_or_none(losses[index]) for index in quarters]
    return line


def mean_or_none(losses: torch.Tensor) -> float | None:
    return rounded(losses.mean().item(), 6) if len(losses) else None


if __name__ == "__main__":
    main()
