"""How fast: training and sampling beside the same network run as EDM's loop runs it, and the shares
of a training step.

    python -m study.speed                              # tiny on a CPU, the paper's network on a GPU
    python -m study.speed --channels 32 --blocks 2     # or any other options of train.py

The baseline is fp32 without TF32, eager, channels first, with images loaded one by one through a
DataLoader, and Adam and the EMA looped over the weights. Both run in turn, --runs times, and the
ratio is the median of the pairs. Compilation and warm-up are left out.
"""
import copy
import math
import statistics
import time
from functools import partial
from types import SimpleNamespace

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Images, augment
from degrade import degrade
from loss import disentangled_loss
from sample import sample
from study.common import Cells, machine, parser, plotted
from util import add_device_option, normalize, number


def options():
    p = parser("speed", "Training and sampling beside a loop like EDM's. Options that are not "
                        "named here are train.py's.")
    add_device_option(p)
    p.add_argument("--preset", choices=train.PRESETS,
                   help="as for train.py (default: cifar10 on a GPU, tiny on a CPU)")
    p.add_argument("--runs", type=number(int, 1), default=5,
                   help="pairs of ours and EDM's (default 5)")
    args, others = p.parse_known_args()
    gpu = torch.device(args.device).type == "cuda"
    args.preset = args.preset or ("cifar10" if gpu else "tiny")
    args.options = " ".join(others)
    args.steps, args.images = (20, 256) if gpu else (40, 64)    # of a run; samples at a time
    # augmented, as the paper's runs are, unless the others say otherwise
    trained = train.options(["--augment", "0.12", "--device", args.device, "--preset", args.preset,
                             *others])
    if args.quick:
        args.runs, args.steps, args.images, trained.sample_steps = 1, 2, 2, 1
    return p, args, trained


def measured(args, trained):
    """The result, as plain types. Rates are images/s, in pairs of ours and EDM's."""
    size = trained.resolution or 32
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20_000, 3, size, size), dtype=torch.uint8, generator=g)
    run = prepared(trained, Images(images, name="random"))
    compiled = trained.compile or trained.compile is None and run.device.type == "cuda"
    if compiled:
        run.net.unet.compile()

    our_steps(run, 3)                                           # compiles
    memory = torch.cuda.max_memory_allocated() / 2 ** 30 if run.device.type == "cuda" else 0.
    loop = edms_loop(run, images)
    edms_steps(run, loop, 1)
    training = pairs(args.runs, partial(our_steps, run, args.steps),
                     partial(edms_steps, run, loop, math.ceil(args.steps / 4)), run.device)
    plain = plain_copy(run.ema)
    if compiled:
        run.ema.unet.compile()
    our_samples(run, args.images)
    sampling = pairs(args.runs, partial(our_samples, run, args.images),
                     partial(samples, run, plain, args.images), run.device)
    return {"training": training, "sampling": sampling, "batch": trained.batch,
            "sampling_batch": args.images, "sampling_nfe": 2 * trained.sample_steps - 1,
            "share": shares(run, 1 if args.quick else 10), "memory_gb": round(memory, 2),
            "parameters": sum(w.numel() for w in run.weights), "bf16": run.bf16,
            "compiled": bool(compiled), "forward_gflop": forward_flops(plain, run) / 1e9,
            "matrix_product_tflops": matrix_product_rate(run, args.quick) / 1e12}


def prepared(args, data):
    """The parts of a run, as train.train has them."""
    device = torch.device(args.device)
    path, net, config = train.parts(args, data, None, None)
    net = net.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=1e-8,
                                 fused=True)
    _, micro = train.shares_of_batch(args)
    return SimpleNamespace(
        args=args, device=device, path=path, net=net, seen=0, config=config,
        ema=copy.deepcopy(net).eval().requires_grad_(False), optimizer=optimizer,
        images=data.images, labels=data.labels, micro=micro,
        shape=list(data.images.shape[1:]), weights=list(net.parameters()),
        bf16=args.precision != "fp32" and device.type == "cuda"
        and torch.cuda.is_bf16_supported(including_emulation=False))


def pairs(n, ours, theirs, device):
    """n pairs of images/s, one after the other. ours, theirs: return a number of images."""
    return [[rate(ours, device), rate(theirs, device)] for _ in range(n)]


def rate(f, device):
    synchronize(device)
    start = time.perf_counter()
    images = f()
    synchronize(device)
    return images / (time.perf_counter() - start)


def seconds(f, device, repeat):
    """The least time of `repeat` calls, after one that does not count."""
    def once():
        f()
        return 1
    once()
    return min(1 / rate(once, device) for _ in range(repeat))


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Training

def our_steps(run, n):
    """n steps as in train.loop, without its log."""
    for _ in range(n):
        records = train.backward(run.args, run.net, drawn(run, run.seen), run.seen, run.bf16)
        train.check_finite(run.net, records, run.seen // run.args.batch + 1)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.seen += run.args.batch
        train.update_ema(run.args, run.ema, run.net, run.seen)
    return n * run.args.batch


def drawn(run, seen):
    return train.draw_batch(run.args, run.path, run.images, run.labels, seen, run.device)


class OneByOne(Dataset):
    """An endless data set of images [N, C, H, W], as numpy arrays."""

    def __init__(self, images):
        self.images = images.numpy()

    def __len__(self):
        return 1 << 30

    def __getitem__(self, i):
        return self.images[i % len(self.images)].copy()


def edms_loop(run, images):
    """What EDM's loop has between its steps: network, EMA, optimizer, batches and their size."""
    net = plain_copy(run.ema).train().requires_grad_(True)
    optimizer = torch.optim.Adam(net.parameters(), lr=run.args.lr, betas=(0.9, 0.999), eps=1e-8,
                                 foreach=False)
    gpu = run.device.type == "cuda"
    micro = math.gcd(run.micro, 128) if gpu else run.micro      # fp32 needs the memory
    batches = DataLoader(OneByOne(images), micro, num_workers=1, prefetch_factor=2, pin_memory=gpu)
    return net, copy.deepcopy(net).eval(), optimizer, iter(batches), micro


def edms_steps(run, loop, n):
    """n steps of the same network with the same loss in a loop like EDM's."""
    net, ema, optimizer, batches, micro = loop
    for _ in range(n):
        for _ in range(run.args.batch // micro):
            x0, augmented = normalize(next(batches).to(run.device)), None
            if run.args.augment:
                x0, augmented = augment(x0, run.args.augment)
            alpha, sigma = run.path.training_levels(micro, *x0.shape[2:], run.device)
            terms = disentangled_loss(partial(net, augment=augmented), x0, alpha, sigma,
                                      torch.randn_like(x0), net.sigma_data)
            (sum(terms).sum() * (x0[0].numel() / run.args.batch)).backward()
        for p in net.parameters():
            p.grad.nan_to_num_(0, 1e5, -1e5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for average, p in zip(ema.parameters(), net.parameters()):
                average.copy_(p.lerp(average, 0.999))
    return n * run.args.batch


def plain_copy(net):
    """Eager and channels first."""
    return copy.deepcopy(net).to(memory_format=torch.contiguous_format)


def shares(run, repeat):
    """Seconds of each part of our step, each alone with the device idle before and after."""
    batch, micro = drawn(run, 0), run.micro
    parts = run.args.batch // micro
    part = {k: None if v is None else v[:micro] for k, v in batch.items()}
    levels = part["x0"], part["alpha"], part["sigma"], part["noise"]
    heads = partial(run.net, augment=part["augment"])
    train.backward(run.args, run.net, batch, 0, run.bf16)

    def forward():
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            disentangled_loss(heads, *levels, run.net.sigma_data)

    def optimizer():
        torch.nn.utils.get_total_norm([w.grad for w in run.weights]).isfinite().item()
        run.optimizer.step()

    functions = {"data and noise": lambda: drawn(run, 0),
                 "augmentation": lambda: augment(batch["x0"], run.args.augment),
                 "blur": lambda: degrade(*levels),
                 "forward": forward,
                 "backward": lambda: train.backward(run.args, run.net, batch, 0, run.bf16),
                 "optimizer": optimizer,
                 "EMA": lambda: train.update_ema(run.args, run.ema, run.net, run.args.batch)}
    if not run.args.augment:
        del functions["augmentation"]
    found = {name: seconds(f, run.device, repeat) for name, f in functions.items()}
    found["data and noise"] -= found.get("augmentation", 0)     # each of these contains the other
    found["blur"] *= parts
    found["backward"] -= found["forward"] * parts
    found["forward"] = found["forward"] * parts - found["blur"]
    return found


# Sampling, and what the device can do

def samples(run, net, n):
    c, h, w = run.shape
    latents = torch.randn(n, c, h, w, device=run.device)
    sample(net, run.path, latents, run.args.sample_steps, run.config["colour"])
    return n


def our_samples(run, n):
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
        return samples(run, run.ema, n)


@torch.no_grad()
def forward_flops(net, run):
    """Operations of a forward pass of one image; a multiply-add is two."""
    x = torch.zeros(1, *run.shape, device=run.device)
    with FlopCounterMode(display=False) as counter:
        net(x, 1., 1.)
    return counter.get_total_flops()


def matrix_product_rate(run, quick):
    """Operations per second of a large matrix product in the precision of training."""
    n = 64 if quick else 8192 if run.device.type == "cuda" else 1024
    m = torch.randn(n, n, device=run.device, dtype=torch.bfloat16 if run.bf16 else torch.float32)
    return 2 * n ** 3 / seconds(lambda: m @ m, run.device, 10)


# Results

def median_ratio(rates):
    return statistics.median(ours / theirs for ours, theirs in rates)


def title(cell):
    precision = "bf16" if cell["bf16"] else "fp32"
    return (f"{cell['preset']} {cell['options']}".strip() + f", {cell['device']}, "
            f"{cell['threads']} threads, {precision}{', compiled' if cell['compiled'] else ''}")


def table(cell):
    print(f"\n{title(cell)}; {cell['parameters']:,} parameters, batch {cell['batch']}, torch "
          f"{cell['torch']}\n{'images/s':12}{'ours':>10}{'EDM-like':>10}{'ratio':>8}   pairs")
    for name in ("training", "sampling"):
        rates = cell[name]
        ours, theirs = (statistics.median(column) for column in zip(*rates))
        ratios = " ".join(f"{a / b:.2f}" for a, b in rates)
        print(f"{name:12}{ours:10.1f}{theirs:10.1f}{median_ratio(rates):8.2f}   {ratios}")
    print(f"sampling: Heun, NFE {cell['sampling_nfe']}, batch {cell['sampling_batch']}")
    whole = sum(cell["share"].values())
    print("share of a step: "
          + ", ".join(f"{name} {100 * s / whole:.1f} %" for name, s in cell["share"].items()))
    images_per_s = statistics.median(ours for ours, _ in cell["training"])
    achieved = 3 * cell["forward_gflop"] * images_per_s / 1000
    print(f"{cell['forward_gflop']:.3g} GFLOP forward an image; training at {achieved:.3g} "
          f"TFLOP/s, {100 * achieved / cell['matrix_product_tflops']:.0f} % of a large matrix "
          f"product's; peak memory of training {cell['memory_gb']:.2f} GiB")


def draw_plot(cells):
    """A bar for each cell: the shares of its step."""
    def draw(plt):
        figure, axes = plt.subplots(figsize=(10, 1.5 + 0.7 * len(cells.cells)))
        colours = {}
        for i, cell in enumerate(cells.cells):
            whole, left = sum(cell["share"].values()), 0
            for name, s in cell["share"].items():
                label = None if name in colours else name
                colours.setdefault(name, f"C{len(colours)}")
                axes.barh(i, 100 * s / whole, left=left, color=colours[name], label=label)
                left += 100 * s / whole
        axes.set_yticks(range(len(cells.cells)), [
            f"{title(c)}\ntraining {median_ratio(c['training']):.2f} x, sampling "
            f"{median_ratio(c['sampling']):.2f} x" for c in cells.cells], fontsize="small")
        axes.set(xlabel="share of a training step, %")
        axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
        return figure
    plotted(cells.png, draw)


def main():
    p, args, trained = options()
    with p.one_line_errors():
        cells = Cells(args, "speed")
        key = dict(preset=args.preset, options=args.options, runs=args.runs,
                   device=machine(args.device), threads=torch.get_num_threads())
        shown = cells.cells if args.plot_only else [
            cells.compute(key, lambda: measured(args, trained))]
        for cell in shown:
            table(cell)
        draw_plot(cells)


if __name__ == "__main__":
    main()
