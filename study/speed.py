"""How fast: training and sampling in images a second, beside the same network in a loop like EDM's.

    python -m study.speed                              # tiny on a CPU, the paper's network on a GPU
    python -m study.speed --channels 32 --blocks 2     # or any other options of train.py

The baseline is fp32 without TF32, eager, channels first, with Adam and the EMA looped over the
weights. Both run in turn, --runs times. Compilation and warm-up are left out.
"""
import copy
import math
import statistics
import tempfile
import time
from functools import partial

import torch

import train
from data import Images, augment
from loss import disentangled_loss
from sample import sample
from study.common import Cells, listed, loaded, machine, parser, precision, run
from util.checkpoint import load_model
from util.cli import add_device_option, number
from util.images import normalize
from util.run import make_config, make_network, named_schedule

FIELDS = [{"preset": str, "options": str, "device": str, "threads": int, "torch": str,
           "bf16": bool, "training": [[float, float]], "sampling": [[float, float]]}]


def options():
    p = parser("speed", "Training and sampling beside a loop like EDM's. Options that are not "
                        "named here are train.py's.")
    add_device_option(p)
    p.add_argument("--runs", type=number(int, 1), default=5,
                   help="pairs of ours and EDM's (default 5)")
    args, others = p.parse_known_args()
    args.options = " ".join(others)
    is_gpu = torch.device(args.device).type == "cuda"
    args.steps = 20 if is_gpu else 40                           # of training, between log lines
    args.images = 256 if is_gpu else 64                         # samples at a time
    if args.quick:
        args.runs = 1
        args.steps = 1
        args.images = 2
        others += ["--sample-steps", "1"]
    # augmented, as the paper's runs are, unless the others say otherwise
    preset = "cifar10" if is_gpu else "tiny"
    args.train = train.options(["--preset", preset, "--augment", "0.12", "--device", args.device,
                                *others])
    return p, args


def compute(args, cells: Cells) -> list:
    return [cells.compute(partial(measured, args), preset=args.train.preset, options=args.options,
                          runs=args.runs, steps=args.steps, device=machine(args.device),
                          threads=torch.get_num_threads())]


def measured(args) -> dict:
    """Rates in images a second, in pairs of ours and EDM's."""
    side = args.train.resolution or 32
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20_000, 3, side, side), dtype=torch.uint8, generator=generator)
    with tempfile.TemporaryDirectory() as out:
        training = training_rates(args, Images(images, name="random"), out)
        sampling = sampling_rates(args, f"{out}/ema.pt")
    return {"training": training, "sampling": sampling, "bf16": precision(args.device) == "bf16"}


def training_rates(args, data: Images, out: str) -> list:
    """train.py's own rates between log lines, at each of which a loop like EDM's runs as well."""
    run_args = copy.copy(args.train)
    run_args.out = out
    run_args.log_every = args.steps * run_args.batch / 1000
    run_args.duration = (args.runs + 1) * run_args.log_every
    run_args.snapshot_every = 0.
    edms_steps = edms_loop(run_args, data)
    pairs = []

    def on_log(line):
        if line["step"] <= args.steps:                          # ours has compiled meanwhile
            edms_steps(1)
            return
        theirs = rate(partial(edms_steps, math.ceil(args.steps / 4)), args.device)
        pairs.append([line["images_per_s"], theirs])
    train.train(run_args, data, on_log=on_log)
    return pairs


def edms_loop(args, data: Images):
    """A function that trains the same network with the same loss for n steps in a loop like EDM's,
    and returns the number of images."""
    schedule, name = named_schedule(args, None)
    net = make_network(args, data, make_config(args, data, schedule, name, None), None)
    net = net.to(args.device).train()
    ema = copy.deepcopy(net).eval()
    optimizer = torch.optim.Adam(net.parameters(), args.lr, (0.9, 0.999), 1e-8, foreach=False)
    micro = train.images_at_a_time(args)
    if torch.device(args.device).type == "cuda":
        micro = math.gcd(micro, 128)                            # fp32 needs the memory

    def edms_steps(n: int) -> int:
        for _ in range(n):
            for _ in range(args.batch // micro):
                index = torch.randint(len(data.images), (micro,))
                x0 = normalize(data.images[index].to(args.device))
                labels = None
                if args.augment:
                    x0, labels = augment(x0, args.augment)
                alpha, sigma = schedule.training_levels(micro, *x0.shape[2:], args.device)
                denoise, deblur = disentangled_loss(partial(net, augment=labels), x0, alpha, sigma,
                                                    torch.randn_like(x0), net.sigma_data)
                ((denoise + deblur).sum() * (x0[0].numel() / args.batch)).backward()
            for p in net.parameters():
                p.grad.nan_to_num_(0, 1e5, -1e5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for average, p in zip(ema.parameters(), net.parameters()):
                    average.copy_(p.lerp(average, 0.999))
        return n * args.batch
    return edms_steps


def sampling_rates(args, filename: str) -> list:
    """Of Heun's method with --sample-steps."""
    fast, checkpoint = loaded(filename, args.device)
    plain, _ = load_model(filename, args.device)
    plain = plain.to(memory_format=torch.contiguous_format)
    schedule, _ = named_schedule(args.train, None)
    mean_color = checkpoint["config"]["mean_color"]

    def samples(net) -> int:
        z = torch.randn(args.images, *checkpoint["data"]["shape"], device=args.device)
        sample(net, schedule, z, args.train.sample_steps, mean_color)
        return args.images
    samples(fast)                                               # compiles on a GPU
    samples(plain)
    pairs = []
    for _ in range(args.runs):
        ours = rate(partial(samples, fast), args.device)
        theirs = rate(partial(samples, plain), args.device)
        pairs.append([ours, theirs])
    return pairs


def rate(function, device) -> float:
    """function() returns a number of images."""
    is_gpu = torch.device(device).type == "cuda"
    if is_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    images = function()
    if is_gpu:
        torch.cuda.synchronize(device)
    return images / (time.perf_counter() - start)


def table(cells: list) -> None:
    for cell in cells:
        print("\n" + f"{cell['preset']} {cell['options']}".strip() + f", {cell['device']}, "
              f"{cell['threads']} threads, {'bf16' if cell['bf16'] else 'fp32'}, torch "
              f"{cell['torch']}\n{'images/s':12}{'ours':>10}{'EDM-like':>10}{'ratio':>8}   pairs")
        for name in ("training", "sampling"):
            ours, theirs = zip(*cell[name])
            ratios = [a / max(b, 1e-9) for a, b in zip(ours, theirs)]
            print(f"{name:12}{statistics.median(ours):10.1f}{statistics.median(theirs):10.1f}"
                  f"{statistics.median(ratios):8.2f}   {listed(ratios, '.2f', ' ')}")


def main():
    p, args = options()
    run(p, args, "speed", FIELDS, compute, table, {})


if __name__ == "__main__":
    main()
