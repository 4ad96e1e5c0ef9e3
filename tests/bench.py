"""How fast: training and sampling beside the same network run as EDM's loop runs it, and where a step's time goes.

    python tests/bench.py                              # the tiny preset on a CPU, the paper's on a GPU
    python tests/bench.py --channels 32 --blocks 2     # or anything else of train.py's options

The baseline is fp32 with TF32 off, eager, channels first, pictures loaded one by one through a DataLoader, Adam and the average looped
over the weights. Both are measured in this one run; compilation and warm-up are left out of the rates.
"""
import argparse
import copy
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

import sample
import train
from data import Pictures, augment, normalize
from degrade import degrade
from loss import disentangled_loss, training_levels


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(f, device, repeat):
    """The least time of `repeat` calls, after one that does not count."""
    times = []
    for _ in range(repeat + 1):
        synchronize(device)
        start = time.perf_counter()
        f()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def options(*args):
    sys.argv = ["train.py", *map(str, args)]
    return train.options()[1]


def our_training(args, data, steps):
    """Pictures a second of train.py itself, from its own log: the second window, behind compilation and warm-up."""
    with tempfile.TemporaryDirectory() as out:
        args = copy.copy(args)
        window = steps * args.batch / 1000
        args.out, args.log_every, args.snapshot_every, args.duration = out, window, 0, 2 * window
        train.load, train.draw_grid = (lambda *a: data), (lambda *a: None)
        train.train(args, [])
        return [json.loads(l) for l in open(f"{out}/log.jsonl")][1]


class OneByOne(torch.utils.data.Dataset):
    def __init__(self, pictures):
        self.pictures = pictures.numpy()

    def __len__(self):
        return 1 << 30

    def __getitem__(self, i):
        return self.pictures[i % len(self.pictures)].copy()


def edms_training(args, net, data, steps, device):
    """Pictures a second of the same network and loss in a loop like EDM's."""
    net, ema = copy.deepcopy(net).train(), copy.deepcopy(net).eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    micro = args.batch if device.type == "cpu" else min(args.batch, 128)                        # fp32 needs the memory
    loader = iter(torch.utils.data.DataLoader(OneByOne(data.pictures), micro, num_workers=1, prefetch_factor=2, pin_memory=device.type == "cuda"))
    for i in range(steps + 1):
        if i == 1:
            synchronize(device)
            start = time.perf_counter()
        for _ in range(args.batch // micro):
            x0, labels = normalize(next(loader).to(device)), None
            if args.augment:
                x0, labels = augment(x0, args.augment)
            terms = disentangled_loss(lambda x, t: net(x, t, labels), x0, net.path)
            (sum(terms).sum() * (x0[0].numel() / args.batch)).backward()
        for p in net.parameters():
            p.grad.nan_to_num_(0, 1e5, -1e5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for a, b in zip(ema.parameters(), net.parameters()):
                a.copy_(b.detach().lerp(a, 0.999))
    synchronize(device)
    return steps * (args.batch // micro * micro) / (time.perf_counter() - start)


def shares(args, net, data, device, bf16, repeat):
    """Seconds of each part of our step, one after the other with the device idle between them."""
    pictures = train.resident(data.pictures, device)
    index = lambda: train.shuffled(0, args.batch, len(pictures), 0).to(pictures.device)
    x0 = normalize(pictures[index()].to(device))
    t, noise = training_levels(x0.shape, net.path, device), torch.randn_like(x0)
    labels = augment(x0, args.augment)[1] if args.augment else None
    optimizer = torch.optim.Adam(net.parameters(), lr=0., fused=True)
    ema = copy.deepcopy(net).requires_grad_(False)
    kept = {}

    def forward():
        kept.clear()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            kept["loss"] = sum(disentangled_loss(lambda x, t: net(x, t, labels), x0, net.path, t, noise)).sum()

    def both():
        forward()
        kept["loss"].backward()

    @torch.no_grad()
    def lerp():
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 0.01)
    parts = {"data": lambda: normalize(pictures[index()].to(device)), "augmentation": lambda: args.augment and augment(x0, args.augment),
             "blur and noise": lambda: degrade(x0, t, net.path, noise), "forward": forward, "backward": both, "optimizer": optimizer.step,
             "average": lerp}
    result = {name: seconds(f, device, repeat) for name, f in parts.items()}
    result["backward"] -= result["forward"]
    result["forward"] -= result["blur and noise"]
    return result


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--preset", choices=train.PRESETS, help="default: cifar10 on a GPU, tiny on a CPU")
    p.add_argument("--augment", type=float, default=0.12, help="augmentation, on in every preset here (default 0.12)")
    a, others = p.parse_known_args()
    device = torch.device(a.device)
    gpu = device.type == "cuda"
    args = options("--preset", a.preset or ("cifar10" if gpu else "tiny"), "--augment", a.augment, "--device", a.device, *others)
    steps = 20
    size = args.resolution
    data = Pictures(torch.randint(0, 256, (20_000, 3, size, size), dtype=torch.uint8), torch.zeros(20_000, dtype=torch.long), [""], "random")
    bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)

    ours = our_training(args, data, steps)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    config = {"bnr": args.bnr, "sigma_data": 0.5, "unet": dict(
        in_channels=3, out_channels=6, channels=args.channels, mult=args.mult, blocks=args.blocks, resolution=size, attention=args.attention,
        dropout=args.dropout, augment_dim=9 if args.augment else 0)}
    plain = train.network(config, size, size).to(device)
    baseline = edms_training(args, plain, data, 4 if gpu else 10, device)

    fast = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    if gpu:
        fast.unet.compile()
    parts = shares(args, fast, data, device, bf16, 10)

    batch = 512 if gpu else 64
    latents = torch.randn(batch, 3, size, size, device=device)
    plain.eval()
    fast.eval()

    def draw(net, low):
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            sample.sample(net, net.path, latents, args.sample_steps)
    our_sampling, plain_sampling = (batch / seconds(lambda: draw(net, low), device, 1) for net, low in ((fast, bf16), (plain, False)))

    with FlopCounterMode(display=False) as counter:
        plain.unet(latents[:1], torch.zeros(1, device=device))
    flops = counter.get_total_flops()
    n = 8192 if gpu else 1024
    m = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    ceiling = 2 * n ** 3 / seconds(lambda: m @ m, device, 10)

    name = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"\n{name}; torch {torch.__version__}; preset {args.preset}, {sum(p.numel() for p in plain.parameters()):,} parameters, batch {args.batch}, "
          f"{'bf16 compiled' if gpu else 'fp32'}, augmentation {args.augment}")
    print(f"{'':24}{'ours':>10}{'EDM-like':>10}{'ratio':>8}")
    print(f"{'training, pictures/s':24}{ours['images_per_s']:10.1f}{baseline:10.1f}{ours['images_per_s'] / baseline:8.2f}")
    print(f"{'sampling, pictures/s':24}{our_sampling:10.2f}{plain_sampling:10.2f}{our_sampling / plain_sampling:8.2f}    NFE {2 * args.sample_steps - 1}, batch {batch}")
    whole = sum(parts.values())
    print("share of a step: " + ", ".join(f"{k} {100 * v / whole:.1f} %" for k, v in parts.items()))
    achieved = 3 * flops * ours["images_per_s"]
    print(f"{flops / 1e9:.2f} GFLOP forward a picture; training at {achieved / 1e12:.3g} TFLOP/s, {100 * achieved / ceiling:.0f} % of the {ceiling / 1e12:.3g} "
          f"that a {n} x {n} {'bf16' if bf16 else 'fp32'} matrix product reaches; peak memory of training {ours['memory_gb']:.2f} GiB")


if __name__ == "__main__":
    main()
