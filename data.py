"""Data sets as tensors, the batches of training, EDM's augmentation, and dead leaves.

    python -c "import data; print(data.load('my-images/').facts())"

What is read, and what a class is, format by format: docs/data.md; the reading itself:
util/datasets.py.
"""
import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from degrade import dct2, idct2
from util.cli import warn
from util.datasets import (BUILT_IN, cached, check_images, check_labels, fetch_cifar10,
                           read_or_cached, refuse_ambiguous, split_array_name)


@dataclass
class Images:
    """A data set, checked as it enters: UserError says what is wrong with it. facts() and
    mean_color() describe uint8 images as normalize() makes them, in [-1, 1], and latents as
    they are."""
    images: torch.Tensor                        # [N, C, H, W], uint8; latents: finite floats
    labels: torch.Tensor | None = None          # int64 [N], places in classes; None: all 0
    classes: tuple | list = ("all",)            # the names of the classes
    name: str = "mine"
    latents: bool = False                       # the images are floats, meant as they are
    why_unlabeled: str = ""                     # why there is one class only, for --cond

    def __post_init__(self):
        self.name = str(self.name)
        self.classes = [str(name) for name in self.classes]
        check_images(self.name, self.images, self.latents)
        self.images = self.images.detach().cpu()
        if self.labels is None and len(self.classes) == 1:
            self.labels = torch.zeros(len(self.images), dtype=torch.long)
        check_labels(self.name, self.labels, self.classes, len(self.images))

    def facts(self) -> dict:
        """What a checkpoint stores of its data, as plain types. mean and std: per channel."""
        n, c, h, w = self.images.shape
        digest = hashlib.sha256()
        total = 0
        squares = 0
        for part in self.images.split(256):                     # all as floats may not fit
            digest.update(part.contiguous().view(torch.uint8).numpy())
            x = self.in_network_units(part.double())
            total = total + x.sum((0, 2, 3))                                    # [C]
            squares = squares + x.square().sum((0, 2, 3))
        digest.update(self.labels.contiguous().numpy())
        mean = total / (n * h * w)
        variance = (squares / (n * h * w) - mean ** 2).clamp(min=0)
        # Rounded, for the last digits of float64 differ between machines.
        return {"name": self.name, "count": n, "shape": [c, h, w], "classes": self.classes,
                "latents": self.latents, "digest": digest.hexdigest()[:16],
                "mean": [round(v, 9) for v in mean.tolist()],
                "std": [round(v, 9) for v in variance.sqrt().tolist()]}

    def mean_color(self) -> dict:
        """The Gaussian of the images' mean colors, as lists: {"mean": [C], "cov": [C][C]}."""
        colors = torch.cat([part.double().mean((2, 3)) for part in self.images.split(256)])
        colors = self.in_network_units(colors)                                  # [N, C]
        covariance = torch.atleast_2d(colors.T.cov(correction=0))
        return {"mean": colors.mean(0).tolist(), "cov": covariance.tolist()}

    def in_network_units(self, x: torch.Tensor) -> torch.Tensor:
        """Float64 of 0 to 255 -> [-1, 1]; latents stay as they are."""
        return x if self.latents else x / 127.5 - 1


def load(spec, resolution: int | None = None, folder="data", keep: bool = True) -> Images:
    """The data set that spec names, as uint8 Images. Raises UserError.

    spec: "leaves" (made here), "cifar10" (the 50,000 training images, fetched once into
    folder), the path of a folder, zip, tar or .npy of images, or "a.npz:x" for the array x in
    a.npz.
    resolution: center-crop and resize to this many pixels a side; None: keep the size.
    keep: many images are decoded once, cached in folder until their files change, and mapped
    into memory: the processes of a machine share them.
    """
    if spec in BUILT_IN:
        refuse_ambiguous(spec)
    if spec == "leaves":
        side = resolution or 16
        return Images(**cached(Path(folder, f"leaves-{side}.pt"), partial(leaves_set, side)),
                      name=spec)
    if spec == "cifar10":
        path = fetch_cifar10(folder)
        array = spec
        name = spec
    else:
        path, array = split_array_name(spec)
        name = path.resolve().name
        if array:
            name += f":{array}"
    decoded = read_or_cached(path, array, resolution, folder if keep else None)
    for message in decoded.pop("messages"):
        warn(f"{path}: {message}")
    return Images(**decoded, name=name)


# The batches of training


def shuffled(start: int, count: int, n: int, seed: int) -> torch.Tensor:
    """Places start to start + count in an endless series of shuffles of n images: indices,
    int64 [count]. An epoch shows each image once."""
    place = torch.arange(start, start + count)
    first_epoch = start // n
    last_epoch = (start + count - 1) // n
    pieces = []
    for e in range(first_epoch, last_epoch + 1):
        in_epoch = place // n == e
        pieces.append(epoch(e, n, seed)[place[in_epoch] % n])
    return torch.cat(pieces)


@lru_cache(maxsize=2)                           # a batch may lie in two
def epoch(e: int, n: int, seed: int) -> torch.Tensor:
    """The order of the n images in epoch e, int64 [n]."""
    generator = torch.Generator().manual_seed(seed_for("epoch", seed, e))
    return torch.randperm(n, generator=generator)


def seed_for(purpose: str, seed: int, i: int = 0) -> int:
    """A seed of its own for each purpose, seed of a run, and place i in the run; below 2^63.
    """
    digest = hashlib.sha256(f"{purpose}, {seed}, {i}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def gather(images: torch.Tensor, index: torch.Tensor, device: torch.device) -> torch.Tensor:
    """images[index] on the device. A copy to a GPU goes through pinned memory, so that it does
    not synchronize with the GPU."""
    batch = images[index]
    if device.type == "cpu":
        return batch
    return batch.pin_memory().to(device, non_blocking=True)


# EDM's augmentation


def augment(x: torch.Tensor, p: float, batch: int | None = None, part: slice = slice(None)):
    """EDM's non-leaky augmentation: x [B, C, H, W] -> augmented images and labels [B, 9].

    Each kind has probability p, but the x-flip 1/2 and the y-flip p / 2. x may be a slice,
    `part`, of a batch of `batch` images: the result does not depend on how the batch is split.
    The labels go to the network. They are 0 where nothing was done, as in sampling: x-flip,
    y-flip, scale, rotation (cos - 1, sin), stretch (s cos d, s sin d), shift in x and in y. As
    in EDM, a stretch s along direction d has the label of the opposite one, -s along d + pi.
    """
    b = batch or len(x)
    h, w = x.shape[-2:]

    def draw(random, *shape):
        whole_batch = random(b, *shape, device=x.device)
        return whole_batch[part]

    flip_x = draw(torch.rand) < 0.5
    flip_y = (draw(torch.rand) < p) & (draw(torch.rand) < 0.5)
    scale = (draw(torch.rand) < p) * draw(torch.randn)
    angle = (draw(torch.rand) < p) * math.pi * (2 * draw(torch.rand) - 1)
    stretch = (draw(torch.rand) < p) * draw(torch.randn)
    direction = (draw(torch.rand) < 0.5) * math.pi * (2 * draw(torch.rand) - 1)
    shift = (draw(torch.rand) < p)[:, None] * draw(torch.randn, 2)              # [B, 2]
    labels = torch.stack([flip_x, flip_y, scale, angle.cos() - 1, angle.sin(),
                          stretch * direction.cos(), stretch * direction.sin(),
                          shift[:, 0], shift[:, 1]], 1)                         # [B, 9]

    x = torch.where(flip_x[:, None, None, None], x.flip(-1), x)
    x = torch.where(flip_y[:, None, None, None], x.flip(-2), x)

    # EDM's matrix: from a point of the result to its source, in pixels from the center, y down
    stretch_axes = torch.stack([-stretch, stretch], 1)                          # [B, 2]
    axes = torch.diag_embed((0.2 * stretch_axes).exp2())                        # [B, 2, 2]
    shrink = (-0.2 * scale).exp2()[:, None, None]                               # [B, 1, 1]
    matrix = shrink * rotation(angle) @ rotation(-direction) @ axes @ rotation(direction)
    matrix[:, 0, 1] *= h / w                    # affine_grid's unit is half a side, so that
    matrix[:, 1, 0] *= w / h                    # a shift of 1/8 of a side is 0.25
    offset = -matrix @ (0.25 * shift)[:, :, None]                               # [B, 2, 1]
    moved = warp(x, torch.cat([matrix, offset], 2)).to(x.dtype)
    only_flipped = (labels[:, 2:] == 0).all(1)                  # these stay exact
    return torch.where(only_flipped[:, None, None, None], x, moved), labels


def rotation(angle: torch.Tensor) -> torch.Tensor:
    """Angles [B] -> [[cos, -sin], [sin, cos]], [B, 2, 2]."""
    cos = angle.cos()
    sin = angle.sin()
    return torch.stack([cos, -sin, sin, cos], -1).reshape(-1, 2, 2)


def warp(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Resample x [B, C, H, W] with the matrices theta [B, 2, 3] of affine_grid, at twice the
    resolution; the DCT resamples up and down without aliasing. Beyond the borders x is
    reflected."""
    h, w = x.shape[-2:]
    fine = idct2(F.pad(dct2(x), (0, w, 0, h))) * 2              # [B, C, 2H, 2W]
    grid = F.affine_grid(theta.to(fine.dtype), fine.shape, align_corners=False)
    fine = F.grid_sample(fine, grid, mode="bicubic", padding_mode="reflection",
                         align_corners=False)
    return idct2(dct2(fine)[..., :h, :w]) / 2                   # [B, C, H, W]


# Dead leaves


def leaves(n: int, resolution: int = 16, seed: int = 0, discs: int = 96) -> torch.Tensor:
    """The dead-leaves model of natural scenes: uint8 [n, 3, resolution, resolution].

    Opaque discs of random colors overlap; they are drawn from front to back. Radii have a
    density of r^-3 from 1/4 of the side to the whole side. Centers are uniform over all places
    from which a disc can reach the image.
    """
    generator = torch.Generator().manual_seed(seed)
    pixel = (torch.arange(resolution) + 0.5) / resolution       # in units of the side
    chunks = []
    for start in range(0, n, 1024):
        b = min(1024, n - start)
        image = torch.zeros(b, 3, resolution, resolution)
        uncovered = torch.ones(b, 1, resolution, resolution)    # the share of each pixel
        for _ in range(discs):
            u, x, y = torch.rand(3, b, 1, 1, 1, generator=generator)        # [b, 1, 1, 1] each
            radius = (16 - 15 * u) ** -0.5
            center_x = 3 * x - 1                                # the image is from 0 to 1
            center_y = 3 * y - 1
            distance = torch.hypot(pixel - center_x, pixel[:, None] - center_y)
            disc = ((radius - distance) * resolution + 0.5).clamp(0, 1)     # soft over a pixel
            color = torch.rand(b, 3, 1, 1, generator=generator)
            image += uncovered * disc * color
            uncovered *= 1 - disc
        background = torch.rand(b, 3, 1, 1, generator=generator)
        image += uncovered * background
        chunks.append((image * 255).round().byte())
    return torch.cat(chunks)


def leaves_set(resolution: int) -> dict:
    """The built-in set of dead leaves, as a dict of Images' fields."""
    return {"images": leaves(16384, resolution)}
