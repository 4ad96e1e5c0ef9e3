"""The folder of a run: what is checked before it starts, what it resumes from, what it writes.

    run/ema.pt          the model: the EMA of the weights
    run/state.pt        what resuming needs
    run/options.json    the options of train.py
    run/log.jsonl       a line of losses at each interval
    run/grid-KIMG.png   samples at each checkpoint
"""
import contextlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch

from data import Images, seed_for
from degrade import Schedule, check_schedule, make_schedule
from model import PARAMETERIZATIONS, SIGMA_DATA, Denoiser, build
from sample import generate
from util.checkpoint import read_checkpoint, save_checkpoint, try_out
from util.cli import UserError, reason, say, warn
from util.distributed import world_size
from util.files import atomic_write, or_a_warning
from util.images import save_grid, to_uint8

MAY_CHANGE_ON_RESUMING = {"out", "data", "preset", "duration", "lr", "warmup", "ema", "batch_gpu",
                          "device", "precision", "compile", "log_every", "snapshot_every",
                          "snapshot_minutes", "keep_every", "sample_steps",
                          "attention"}                          # which the config has


@contextlib.contextmanager
def locked(folder: str):
    """Within, the folder exists and no other run can have it. UserError where another has it. The
    lock ends with the process, however that ends. A folder that stays empty is removed."""
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/.lock", "w") as f:
        try:
            import fcntl                                        # Windows has none
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for part in Path(folder).glob("*.????????.part"):   # a killed run has left it
                part.unlink()
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another run: choose another --out, or wait for "
                            "its end") from None
        except (ImportError, OSError) as e:                     # some network disks have no locks
            warn(f"{folder} cannot be locked ({reason(e)}): start no second run in it")
        try:
            yield
        finally:
            if os.listdir(folder) == [".lock"]:
                os.remove(f.name)
                os.rmdir(folder)


# Before a run: its parts


def check_parts(args, data: Images, schedule: Schedule, net: Denoiser | None) -> None:
    """Raises UserError where data, schedule and network do not fit together."""
    _, _, h, w = data.images.shape
    check_schedule(schedule, h, w)
    classes = class_count(args, data)
    if args.cond and classes < 2:
        raise UserError(f"--cond needs images of at least two classes, and {data.name} has one: "
                        f"{data.why_unlabeled or 'all'}")
    if args.bnr == math.inf and args.param == "noise":
        raise UserError("--param noise needs noise to predict, and --bnr inf has none")
    if net is None:
        return
    if not any(p.requires_grad for p in net.parameters()):
        raise UserError("every parameter of the network is frozen, as load_model leaves them: "
                        "net.requires_grad_(True)")
    if net.classes != classes:
        raise UserError(f"the network has {net.classes} classes and the run {classes}: a network's "
                        "attribute `classes` and --cond go together")


def class_count(args, data: Images) -> int:
    return len(data.classes) if args.cond else 0


def make_config(args, data: Images, schedule: Schedule, schedule_name: str | None,
                net: Denoiser | None) -> dict:
    """What a checkpoint remembers of the schedule and the network, as plain types."""
    _, c, h, w = data.images.shape
    sampling_levels = levels_of_sampling(schedule, h, w)
    has_noise = sampling_levels[-1][1] > 0
    config = {"bnr": args.bnr, "schedule": schedule_name, "param": args.param}
    config["sampling_levels"] = [[rounded(v, 6) for v in pair] for pair in sampling_levels]
    config["training_range"] = training_range(schedule, h, w)
    config["mean_color"] = None if has_noise else data.mean_color()
    if net is None:
        config["sigma_data"] = SIGMA_DATA
        config["unet"] = unet_config(args, c, h, w, class_count(args, data))
        kind = PARAMETERIZATIONS[args.param]
    else:
        config["sigma_data"] = net.sigma_data
        config["unet"] = None
        kind = type(net)
    config["denoiser"] = kind.__name__
    config["precondition"] = kind.precondition.__qualname__
    return config


def make_network(args, data: Images, config: dict, net: Denoiser | None) -> Denoiser:
    """The network of the config with its first weights; one's own is tried out. Raises UserError.
    """
    _, c, h, w = data.images.shape
    torch.manual_seed(seed_for("weights", args.seed))
    if net is None:
        net = build(config)
        net.unet.check(h, w)
    else:
        device = next(net.parameters()).device                  # where its owner has put it
        x = torch.randn(min(2, args.batch_gpu or args.batch), c, h, w, device=device)
        try_out(net, x, config["sampling_levels"][2], args.augment > 0, config)
    return net


def levels_of_sampling(schedule: Schedule, h: int, w: int) -> list:
    """[alpha, sigma] at five levels of sampling, from the lowest up."""
    low, high = schedule.sigma_range(h, w)
    alpha, sigma = schedule.levels(np.geomspace(low, high, 5))
    return torch.stack([alpha, sigma], 1).tolist()


def training_range(schedule: Schedule, h: int, w: int) -> list:
    """[alpha, sigma] twice: between these lie the levels of nine training images in ten."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        levels = torch.stack(schedule.training_levels(1000, h, w, "cpu")).double()  # [2, 1000]
    ends = levels.quantile(torch.tensor([0.05, 0.95]).double(), dim=1).tolist()
    return [[rounded(v, 3) for v in pair] for pair in ends]


def rounded(value: float, digits: int) -> float:
    """The value with so many significant digits."""
    return float(f"{value:.{digits}g}")


def unet_config(args, channels: int, h: int, w: int, classes: int) -> dict:
    """The keywords of UNet. Raises UserError for an attention where there is no level."""
    sides = [max(h, w) >> level for level in range(len(args.mult))]
    attention = args.attention
    if attention is None:
        attention = [16] if 16 in sides[1:] else sides[-1:]
    for side in attention:
        if side not in sides:
            raise UserError(f"--attention {side}: the levels have sides of "
                            f"{', '.join(map(str, sides))}; choose among them, or none")
    unet = {
        "in_channels": channels,
        "out_channels": channels * PARAMETERIZATIONS[args.param].heads,
        "channels": args.channels,
        "mult": args.mult,
        "blocks": args.blocks,
        "resolution": max(h, w),
        "attention": attention,
        "dropout": args.dropout,
        "augment_dim": 9 if args.augment else 0,
        "classes": classes,
    }
    if args.bnr == "any":
        unet["ratio"] = True
    return unet


def named_schedule(args, schedule: Schedule | None):
    """The schedule of the options, or one's own, and the name that a checkpoint has for it: None
    for a ratio."""
    if schedule is not None:
        return schedule, type(schedule).__name__
    schedule = make_schedule(args.bnr, args.schedule)
    schedule.P_mean = args.P_mean
    schedule.P_std = args.P_std
    return schedule, args.schedule


# Resuming


def stored_options(folder: str) -> dict:
    """The options that a run has written. Raises OSError, ValueError and the like where it has not.
    """
    stored = json.loads(Path(folder, "options.json").read_text())
    if "path" in stored:                                        # its name before December 2026
        stored["schedule"] = stored.pop("path")
    if stored["schedule"]:
        stored["bnr"] = None
    return stored


def read_state(args, kimg: float | None = None) -> dict | None:
    """The state to resume from, or None for a new run. kimg: go back to the state kept there.
    UserError where --out holds another run, or has kept no such state."""
    filename = f"{args.out}/state.pt"
    if kimg is not None:
        filename = f"{args.out}/state-{kimg_name(round(kimg * 1000))}.pt"
    elif not os.path.exists(filename):
        if os.path.exists(f"{args.out}/ema.pt"):
            raise UserError(f"{args.out} holds a model, but no state.pt to resume from: choose "
                            "another --out")
        return None
    state = read_checkpoint(filename)
    for part in ("options", "config", "data", "optimizer"):
        if not isinstance(state.get(part), dict):
            raise UserError(f"{filename} is not a state of train.py: choose another --out")
    fixed = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE_ON_RESUMING}
    refuse_other(args.out, state["options"], fixed, "--")
    return state


def refuse_other(out: str, old: dict, new: dict, of: str = "") -> None:
    """Raises UserError where a run had other values than now. An old run may lack some."""
    differ = []
    for name, value in new.items():
        if name in old and old[name] != value:
            differ.append(f"{of}{name} {old[name]}, not {value}")
    if differ:
        raise UserError(f"{out} holds a run with {'; '.join(differ)}, on which it depends: repeat "
                        f"its options, or give another --out and --init-from {out}/ema.pt")


def restore(out: str, state: dict, run: dict, net, ema, optimizer) -> int:
    """Puts a saved state into the new parts -> the images seen. UserError where it does not fit."""
    images = {name: run["data"][name] for name in ("digest", "count", "classes")}
    config = {k: v for k, v in run["config"].items() if k != "mean_color"}
    refuse_other(out, state["data"], images, "images' ")
    refuse_other(out, state["config"], config)
    try:
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        rates = [group["initial_lr"] for group in optimizer.param_groups]       # may be new
        optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(optimizer.param_groups, rates):
            group.update(lr=rate, initial_lr=rate)
        is_fused = any(group.get("fused") for group in optimizer.param_groups)
        for p, moments in optimizer.state.items():              # a fused one checks no shape, and
            for name, v in moments.items():                     # goes by the weights' strides
                if torch.is_tensor(v) and (v.shape == p.shape or is_fused and v.ndim):
                    moments[name] = torch.empty_like(p, dtype=v.dtype).copy_(v.reshape(p.shape))
        seen = state["seen"]
        if type(seen) is not int or seen < 0:
            raise ValueError("the number of images seen is not a number")
        return seen
    except Exception as e:                                      # optimizers raise anything
        raise UserError(f"{out}/state.pt does not fit this network: {reason(e)}") from None


# What a run writes


def write_options(args) -> None:
    stored = {name: "inf" if value == math.inf else value for name, value in vars(args).items()}
    with atomic_write(f"{args.out}/options.json", "w") as f:
        json.dump(stored, f, indent=1)


def trim_log(out: str, seen: int) -> dict | None:
    """Drops the log's lines after the checkpoint, and a damaged one. Returns the last that stays.
    """
    log = Path(out, "log.jsonl")
    lines = []
    if log.exists():
        lines = log.read_text(errors="replace").splitlines()
    valid = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):              # a damaged line
            if json.loads(line)["kimg"] <= seen / 1000:
                valid.append(line + "\n")
    with atomic_write(log, "w") as f:
        f.writelines(valid)
    return json.loads(valid[-1]) if valid else None


def write_log(out: str, line: dict, before: dict | None) -> None:
    """Appends a line to the log, and warns where the loss is far above that of the line before."""
    with or_a_warning("a log line"), open(f"{out}/log.jsonl", "a") as log:
        print(json.dumps(line), file=log)
    with contextlib.suppress(LookupError, TypeError):           # where one line has no loss
        old, new = [of["denoise"] + of["deblur"] for of in (before, line)]
        if new > 10 * old:
            warn(f"warning: the loss rose from {old:.3g} to {new:.3g}: docs/long-runs.md says more")


def save_snapshot(out: str, run: dict, net, ema, optimizer, seen: int, keep: bool,
                  must: bool) -> None:
    """state.pt and ema.pt, and copies of both to keep. Where they cannot be saved, UserError if
    they must, else a warning."""
    run = {**run, "seen": seen}
    model = {"weights": ema.state_dict(), **run}
    state = {"net": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
             **run}
    if keep:
        save_checkpoint(f"{out}/state-{kimg_name(seen)}.pt", state)
        save_checkpoint(f"{out}/ema-{kimg_name(seen)}.pt", model)
    saved_state = save_checkpoint(f"{out}/state.pt", state)
    saved_model = save_checkpoint(f"{out}/ema.pt", model)
    if must and not (saved_state and saved_model):
        raise UserError(f"{out}: the last checkpoint could not be saved: make room and start the "
                        "same command again")


def kimg_name(seen: int) -> str:
    """The kimg in the name of a file: 000060, or 000060.016."""
    return f"{seen / 1000:010.3f}".removesuffix(".000")


def draw_grid(out: str, run: dict, schedule: Schedule, ema, seen: int) -> None:
    """A grid of 64 samples at this checkpoint."""
    mean_color = run["config"]["mean_color"]
    solver = "heun" if mean_color else "multistep"
    batches = generate(ema, schedule, run["data"]["shape"], range(64), mean_color=mean_color,
                       solver=solver)
    images = [to_uint8(x).cpu() for x in batches]
    with or_a_warning("a grid"):
        save_grid(torch.cat(images), f"{out}/grid-{kimg_name(seen)}.png")


# What a run says at its start


def describe(args, run: dict, data: Images, net: Denoiser, seen: int, bf16: bool,
             micro: int) -> None:
    """Says, in three lines and perhaps a warning, what is trained on what and at which levels."""
    facts = run["data"]
    images = data.images
    shape = " x ".join(map(str, facts["shape"]))
    dtype = str(images.dtype).removeprefix("torch.")
    say(f"{facts['name']}: {facts['count']} images of {shape}, {dtype} from {images.min():.4g} to "
        f"{images.max():.4g}; the network sees mean {listed(facts['mean'])}, standard deviation "
        f"{listed(facts['std'])}; {net.classes or 'no'} classes")
    count = sum(p.numel() for p in net.parameters())
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    parameters = f"{count:,} parameters"
    if frozen:
        parameters += f", {frozen:,} of them frozen"
    batch = f"batch {args.batch}"
    if micro * world_size() < args.batch:
        batch += f", {micro} at a time"
    precision = "bf16" if bf16 else "fp32"
    say(f"preset {args.preset}: {parameters}; {batch}, on {world_size()} x {args.device} in "
        f"{precision}; from {seen / 1000:g} to {args.duration:g} kimg")
    (alpha_min, sigma_min), (alpha_max, sigma_max) = run["config"]["training_range"]
    say(f"{run['config']['schedule'] or 'BNR ' + str(args.bnr)}: nine of ten images are trained at "
        f"a blur of {alpha_min:g} to {alpha_max:g} pixels and noise of {sigma_min:g} to "
        f"{sigma_max:g}")
    warn_of_range(run["config"])
    if data.latents:
        warn_of_scale(facts, net.sigma_data)


def listed(values) -> str:
    return ", ".join(f"{v:.3g}" for v in values)


def warn_of_range(config: dict) -> None:
    """A warning where sampling needs levels that training does not draw."""
    lowest = config["sampling_levels"][0]
    highest = config["sampling_levels"][-1]
    which = 1 if highest[1] > 0 else 0                          # noise or, without it, blur
    low, high = (pair[which] for pair in config["training_range"])
    if not lowest[which] <= low < high <= highest[which] < 1e4 * high:
        warn(f"warning: sampling goes from {highest} to {lowest} (blur, noise), which does not fit "
             "these levels: is the schedule's sigma_range right?")


def warn_of_scale(facts: dict, sigma_data: float) -> None:
    """A warning where latents have another scale than the network expects."""
    mean = max(map(abs, facts["mean"]))
    spread = max(facts["std"])
    if not mean < spread or not sigma_data / 2 < spread < 2 * sigma_data:
        warn(f"warning: the network expects mean 0, standard deviation {sigma_data:g}: scale the "
             "latents, or give Denoiser another sigma_data")
