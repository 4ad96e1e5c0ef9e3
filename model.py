"""The network: two levels in, two heads out, (7), on EDM's DDPM++ trunk."""
import copy
import math
import os
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from degrade import attenuation, blur, expand_level, frequencies, time_of
from util import UserError, compile_or_warn, read_checkpoint, reason

SIGMA_DATA = 0.5                                # the standard deviation of the images (EDM)


class Denoiser(nn.Module):
    """net(x, alpha, sigma) -> D, R: the estimates of the blurry image and of the residual that blur
    removed. Their sum estimates x0.

    x [B, C, H, W] of any float type; alpha, sigma: numbers, 0-d or [B], not both 0; augment [B, 9]
    and label [B] (int64) go to the unet. Returns float32 [B, C, H, W] twice.

    unet: any module (x, c_noise, augment, label) -> [B, heads C, H, W]. c_noise [B] is about -1.6
    to 1.2. A unet whose attribute `classes` is above 0 always gets a label, any other never. One
    that has `from_ratio` is told (14), which is 0 to 4, as its argument ratio [B].
    """
    heads = 2

    def __init__(self, unet, sigma_data=SIGMA_DATA):
        super().__init__()
        if not isinstance(sigma_data, (int, float)) or not 0 < sigma_data < 1e6:
            raise UserError(f"sigma_data must be a number above 0, not {sigma_data!r}")
        self.unet, self.sigma_data = unet, sigma_data
        self.classes = getattr(unet, "classes", 0)              # 0: not class-conditional
        self.told_ratio = getattr(unet, "from_ratio", None) is not None

    def forward(self, x, alpha, sigma, augment=None, label=None):
        if (label is None) == bool(self.classes):
            raise UserError(f"this network has {self.classes or 'no'} classes, and it was called "
                            f"with{'out' if label is None else ''} labels")
        x = x.float()
        alpha, sigma = (expand_level(v, x, torch.float64) for v in (alpha, sigma))
        s = scales(x, alpha, sigma, self.sigma_data)
        ratio = {"ratio": s.ratio.expand(len(x))} if self.told_ratio else {}
        f = self.unet(s.c_in * x, s.c_noise.expand(len(x)), augment, label, **ratio)
        needed = [len(x), self.heads * x.shape[1], *x.shape[2:]]
        given = list(f.shape) if torch.is_tensor(f) and f.is_floating_point() \
            else getattr(f, "dtype", type(f).__name__)
        if given != needed:                                     # what only broadcasts as well
            raise UserError(f"the network's output must be {needed}, and not {given}")
        return self.answers(x, f.float(), s)

    def answers(self, x, f, s):
        f1, f2 = f.chunk(2, dim=1)                              # [B, C, H, W] each
        return s.c_skip * x + s.c_out * f1, s.r_out * f2        # (7)


class X0Denoiser(Denoiser):
    """One head, the finished image. The parameterization `x0` of the study."""
    heads = 1

    def answers(self, x, f, s):
        x0_hat = s.c_skip * x + (s.c_out ** 2 + s.r_out ** 2).sqrt() * f        # (12)
        d = torch.where(s.sigma > 0, blur(x0_hat, s.alpha), x)                  # (12)
        return d, x0_hat - d


class NoiseDenoiser(Denoiser):
    """The first head is the noise itself. The parameterization `noise` of the study."""

    def answers(self, x, f, s):
        n_hat, f2 = f.chunk(2, dim=1)
        return x - s.sigma * n_hat, s.r_out * f2                # (13)


PARAMETERIZATIONS = {"residual": Denoiser, "x0": X0Denoiser, "noise": NoiseDenoiser}


def scales(x, alpha, sigma, sigma_data):
    """EDM's preconditioning, r_out and the levels themselves, computed in float64: float32, each
    0-d, [1, 1] or [B, 1, 1, 1], but c_noise and ratio [1] or [B]."""
    total = sigma ** 2 + sigma_data ** 2
    values = dict(alpha=alpha, sigma=sigma,
                  c_skip=sigma_data ** 2 / total,                               # (7)
                  c_out=sigma * sigma_data / total.sqrt(),                      # (7)
                  c_in=1 / total.sqrt(),                                        # (7)
                  c_noise=time_of(alpha, sigma).log().flatten() / 4,            # (7)
                  r_out=residual_std(alpha, x, sigma_data),                     # (8)
                  ratio=4 * (alpha / (alpha + sigma)).flatten())                # (14)
    return SimpleNamespace(**{name: value.float() for name, value in values.items()})


def residual_std(alpha, x, sigma_data):
    """r_out: the standard deviation of x0 - V M(alpha) V^T x0 for images of power 1 / lam and
    variance sigma_data^2; x gives H, W and the device. [1, 1] for one level, [B, 1, 1, 1] for [B].
    """
    lam = frequencies(*x.shape[-2:], x.device)
    power = torch.where(lam > 0, 1 / lam, 0)                    # blur does not change the mean
    removed = (1 - attenuation(alpha, x)) ** 2
    share = (removed * power / power.sum()).sum((-2, -1), keepdim=True)
    return sigma_data * share.sqrt()                                            # (8)


class UNet(nn.Module):
    """DDPM++ as EDM configures it: x [B, in, H, W], c_noise [B] -> [B, out, H, W].

    channels x mult: the width of each level; every level has half the height and width of the one
    before. blocks: residual blocks at each level. attention: the sizes of the levels that have it,
    when the input has `resolution` pixels a side. augment [B, augment_dim]: None means zeros; label
    [B] where there are classes; ratio [B] where `ratio` is set.
    """

    def __init__(self, in_channels, out_channels, channels=128, mult=(2, 2, 2), blocks=4,
                 attention=(16,), resolution=32, dropout=0., augment_dim=0, classes=0, ratio=False):
        super().__init__()
        self.channels, self.classes, self.divisor = channels, classes, 2 ** len(mult) // 2
        self.from_augment = linear(augment_dim, channels, bias=False) if augment_dim else None
        self.from_label = linear(classes, channels) if classes else None
        self.from_ratio = linear(channels, channels, bias=False) if ratio else None
        self.embed = nn.Sequential(linear(channels, 4 * channels), nn.SiLU(),
                                   linear(4 * channels, 4 * channels), nn.SiLU())
        block = partial(Block, emb=4 * channels, dropout=dropout)

        self.first = conv(in_channels, channels, 3)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        width, widths = channels, [channels]                    # of the activation; of the skips
        for level, m in enumerate(mult):
            attend = resolution >> level in attention
            if level:
                self.encoder.append(block(width, width, resample="down"))
                widths.append(width)
            for _ in range(blocks):
                self.encoder.append(block(width, channels * m, attention=attend))
                width = channels * m
                widths.append(width)
        self.middle = nn.ModuleList([block(width, width, attention=True), block(width, width)])
        for level, m in reversed(list(enumerate(mult))):
            attend = resolution >> level in attention
            if level < len(mult) - 1:
                self.decoder.append(block(width, width, resample="up"))
            for i in range(blocks + 1):
                last = attend and i == blocks
                self.decoder.append(block(width + widths.pop(), channels * m, attention=last))
                width = channels * m
        self.last_norm = group_norm(width)
        self.last = conv(width, out_channels, 3, scale=1e-5)

    def check(self, h, w):
        """Raises UserError where images of h x w do not fit this network."""
        if h % self.divisor or w % self.divisor:
            raise UserError(f"images of {h} x {w} do not divide by {self.divisor}: choose another "
                            "resolution or fewer levels (mult)")

    def forward(self, x, c_noise, augment=None, label=None, ratio=None):
        self.check(*x.shape[-2:])
        emb = sinusoids(c_noise, self.channels)                 # [B, channels]
        if self.from_ratio is not None:
            emb = emb + self.from_ratio(sinusoids(ratio, self.channels))        # (14)
        if self.classes:
            emb = emb + self.from_label(F.one_hot(label, self.classes) * math.sqrt(self.classes))
        if self.from_augment is not None and augment is not None:
            emb = emb + self.from_augment(augment)
        emb = self.embed(emb)                                   # [B, 4 channels]
        x = self.first(x)                                       # [B, channels, H, W]
        skips = [x]
        for block in self.encoder:
            x = block(x, emb)               # [B, channels mult[level], H / 2^level, W / 2^level]
            skips.append(x)
        for block in self.middle:
            x = block(x, emb)
        for block in self.decoder:
            if block.resample is None:
                x = torch.cat([x, skips.pop()], 1)
            x = block(x, emb)
        return self.last(F.silu(self.last_norm(x)))             # [B, out, H, W]


class Block(nn.Module):
    """A residual block. resample: "down" or "up", before the first convolution. attention: at the
    end."""

    def __init__(self, cin, cout, emb, attention=False, resample=None, dropout=0.):
        super().__init__()
        self.resample, self.dropout = resample, dropout
        self.norm1, self.conv1 = group_norm(cin), conv(cin, cout, 3)
        self.from_emb = linear(emb, cout)
        self.norm2, self.conv2 = group_norm(cout), conv(cout, cout, 3, scale=1e-5)
        self.skip = conv(cin, cout, 1) if resample or cin != cout else None
        self.attention = Attention(cout) if attention else None

    def forward(self, x, emb):
        y = F.silu(self.norm1(x))
        if self.resample == "down":
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)       # [B, cin, H / 2, W / 2]
        if self.resample == "up":
            x, y = (F.interpolate(v, scale_factor=2) for v in (x, y))           # [B, cin, 2 H, 2 W]
        y = self.conv1(y) + self.from_emb(emb)[:, :, None, None]                # [B, cout, H, W]
        y = self.conv2(F.dropout(F.silu(self.norm2(y)), self.dropout, self.training))
        x = ((x if self.skip is None else self.skip(x)) + y) * math.sqrt(0.5)
        return x if self.attention is None else self.attention(x)


class Attention(nn.Module):
    """Every pixel attends to every other, one head."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = conv(channels, 3 * channels, 1, scale=math.sqrt(0.2))
        self.out = conv(channels, channels, 1, scale=1e-5)

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).flatten(2).mT.unsqueeze(1)                 # [B, 1, H W, 3 C]
        y = F.scaled_dot_product_attention(*qkv.chunk(3, dim=3))                # [B, 1, H W, C]
        y = y[:, 0].mT.reshape(x.shape)                         # [B, C, H, W]
        return (x + self.out(y)) * math.sqrt(0.5)


def sinusoids(v, n):
    """[B] -> [B, n]: the sines, then the cosines, of v times frequencies from 1 to 1 / 10000."""
    k = torch.arange(n // 2, dtype=torch.float32, device=v.device)
    phase = v[:, None] * 10000 ** -(k / (n // 2 - 1))
    return torch.cat([phase.sin(), phase.cos()], 1)


def group_norm(channels):
    groups = min(32, channels // 4)
    if channels % groups:
        raise UserError(f"a width of {channels} does not divide into {groups} groups: choose a "
                        "multiple of 4, and above 128 a multiple of 32")
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv(cin, cout, size, scale=1.):
    return initialized(nn.Conv2d(cin, cout, size, padding=size // 2), scale)


def linear(cin, cout, bias=True):
    return initialized(nn.Linear(cin, cout, bias), 1.)


def initialized(layer, scale):
    nn.init.xavier_uniform_(layer.weight, scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def build(config):
    """A checkpoint's config -> its Denoiser. An impossible one raises nearly anything."""
    unet, kind = config["unet"], PARAMETERIZATIONS[config.get("param", "residual")]
    if not 0 <= unet.get("dropout", 0) < 1 or unet["blocks"] > 64 or len(unet["mult"]) > 12:
        raise UserError("dropout, blocks or mult is out of range")
    return kind(UNet(**unet), config["sigma_data"])


def load_model(filename, device="cpu", precision="fp32", compiled=False, net=None):
    """A checkpoint of train.py -> its Denoiser in eval mode, without gradients, and the rest of the
    checkpoint: config, data, options, seen. Raises UserError.

    net: for a network of your own, a Denoiser like the one that was trained. It is filled.
    """
    checkpoint = read_checkpoint(filename)
    if "net" in checkpoint:
        raise UserError(f"{filename} is what a run resumes from: take the ema.pt beside it")
    try:
        weights, config = checkpoint.pop("weights"), checkpoint["config"]
        check_facts(checkpoint, weights, os.path.getsize(filename))
        if not isinstance(net, Denoiser) and (net is not None or config["unet"] is None):
            raise UserError("it is of a network of your own: give load_model its Denoiser as net")
        if net is None:
            with torch.device("meta"):      # allocates nothing before the shapes are known to fit
                net = build(config)
            net.unet.check(*checkpoint["data"]["shape"][1:])
        answers = net.answers.__qualname__
        if config.get("answers", answers).split(", ")[-1] != answers:           # old ones lack it
            raise UserError(f"it is of another kind, {config['answers']}")
        net.load_state_dict(weights, assign=True)
        net.sigma_data = config["sigma_data"]
    except Exception as e:                                      # the file may hold anything
        raise UserError(f"{filename} is not a model of this project, or its weights do not fit its "
                        f"network: {reason(e)}") from None
    net = net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if precision == "bf16":
        net.forward = torch.autocast(torch.device(device).type, torch.bfloat16)(net.forward)
    if compiled:
        compile_or_warn(net.unet, asked=True)
    return net, checkpoint


def try_out(net, x, alpha, sigma, augmented):
    """Images x [B, C, H, W] through a copy of a network of one's own, forward and back, so that a
    mistake is one line before a run writes anything. Raises UserError."""
    augment = x.new_zeros(len(x), 9) if augmented else None
    label = x.new_full((len(x),), net.classes - 1, dtype=torch.long) if net.classes else None
    try:
        x0_hat = sum(copy.deepcopy(net).to(x.device).eval()(x, alpha, sigma, augment, label))
        if not (x0_hat.requires_grad and x0_hat.isfinite().all()):
            raise UserError("its output has no gradient, or is not finite")
        x0_hat.sum().backward()
    except Exception as e:                                      # the network is the user's
        raise UserError(f"the network fails on x of {list(x.shape)}, called as unet(x, c_noise, "
                        f"augment, label): {' '.join(str(e).split())[:200]}") from None


def check_facts(checkpoint, weights, size):
    """Raises UserError and the like for what train.py never saves. size: the file's, in bytes."""
    data, unet = checkpoint["data"], checkpoint["config"]["unet"] or {}
    if sum(v.numel() * v.element_size() for v in weights.values()) > size or not all(
            v.isfinite().all() and (not unet or v.dtype == torch.float32)
            for v in weights.values()):
        raise UserError("its weights are larger than the file, or not finite float32 numbers")
    c, h, w = data["shape"]
    if not all(type(n) is int and 0 < n <= 10000
               for n in (c, h, w, checkpoint["options"]["sample_steps"])) \
            or unet.get("in_channels", c) != c or len(data["classes"]) < unet.get("classes", 0):
        raise UserError("its shape, sample_steps or classes are impossible")


def start_from(net, filename, classes=()):
    """Puts the weights of a checkpoint into a new Denoiser, to train it further. Raises UserError.

    Both are of this project's network. Layers for ratios, augmentation and classes that the old one
    lacks start at zero. classes: their names; each starts as the old class of its name, else as the
    mean of all.
    """
    label = "unet.from_label.weight"                            # [embedding, classes]
    old, checkpoint = load_model(filename)
    new = {k: torch.zeros_like(v) for k, v in net.state_dict().items() if "unet.from_" in k}
    weights = {**new, **old.state_dict()}
    if old.classes and net.classes:
        known = dict(zip(checkpoint["data"]["classes"], weights[label].T))
        columns = [known.get(name, weights[label].mean(1)) for name in classes]
        weights[label] = torch.stack(columns, 1) * math.sqrt(old.classes / net.classes)
    if "unet.from_augment.weight" not in new:                   # it adds 0 to other images
        weights.pop("unet.from_augment.weight", None)
    if type(old).answers is not type(net).answers or old.sigma_data != net.sigma_data:
        raise UserError(f"{filename} does not fit this network: its --param or sigma_data differs")
    try:
        net.load_state_dict(weights)
    except RuntimeError as e:
        raise UserError(f"{filename} does not fit this network: {reason(e)}") from None
