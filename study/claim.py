"""The paper's claim, with power: is BNR 0.5 better than hot, by how much, and when?

    python -m study.claim --data c10/train                    # everything that is missing
    python -m study.claim --data c10/train --seeds 0          # one seed, beside another program
    python -m study.claim --table                             # from what results/ has

The plan, written before any network was trained, is docs/claim.md.
"""
import os

import torch

import train
from data import Images
from study.common import load_once
from util import seed_for

HELD_OUT = 10                                   # one image in so many is not trained on
KIMGS = (60, 120, 180, 240)


def split(data, resolution=16):
    """The data set without its held-out images, and those: two Images. The held-out ones are the
    first tenth of one shuffle."""
    whole = load_once(data, resolution)
    g = torch.Generator().manual_seed(seed_for("held out", 0))
    order = torch.randperm(len(whole.images), generator=g)
    n = len(order) // HELD_OUT
    return [Images(whole.images[part], whole.labels[part], whole.classes, f"{whole.name}, {name}")
            for name, part in (("training part", order[n:].sort().values),
                               ("held out", order[:n].sort().values))]


def train_network(data, runs, bnr, seed, kimg=KIMGS[-1]):
    """The folder of a network that is trained, or trained on, to kimg."""
    out = f"{runs}/claim-{bnr:g}-{seed}"
    if not os.path.exists(f"{out}/ema-{kimg:06d}.pt"):
        argv = ["--data", data, "--preset", "tiny", "--bnr", bnr, "--seed", seed, "--out", out,
                "--duration", kimg, "--keep-every", KIMGS[0], "--snapshot-every", KIMGS[0],
                "--log-every", 10]
        train.train(train.options(list(map(str, argv))), split(data)[0])
    return out
