"""The network: two levels in, two heads out, (7), on EDM's DDPM++ trunk.

    python model.py                      # prints the parameter counts of the paper's networks

Equation numbers are those of the README.
"""
import math
import os
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from degrade import ConstantBNR, attenuation, blur, expand_level, frequencies, time_of
from util import UserError, check_facts, read_checkpoint

SIGMA_DATA = 0.5                                # the standard deviation of the images (EDM)


class Denoiser(nn.Module):
    """net(x, alpha, sigma) -> D, R: the estimates of the blurry image and of the residual that blur
    removed. Their sum estimates x0.

    x [B, C, H, W] of any float type; alpha, sigma: numbers, 0-d or [B], not both 0; augment [B, 9]
    and label [B] (int64) go to the unet. Returns float32 [B, C, H, W] twice.
    unet: any module (x, c_noise [B], augment, label) with `heads` times as many output channels as
    input channels. One that has `from_ratio` is told (14) as well, as its argument ratio.
    """
    heads = 2

    def __init__(self, unet, sigma_data=SIGMA_DATA):
        super().__init__()
        self.unet, self.sigma_data = unet, sigma_data
        self.classes = getattr(unet, "classes", 0)              # 0: not class-conditional
        self.told_ratio = getattr(unet, "from_ratio", None) is not None

    def forward(self, x, alpha, sigma, augment=None, label=None):
        x = x.float()
        alpha, sigma = (expand_level(v, x, torch.float64) for v in (alpha, sigma))
        s = scales(x, alpha, sigma, self.sigma_data)
        ratio = {"ratio": s.ratio.expand(len(x))} if self.told_ratio else {}
        f = self.unet(s.c_in * x, s.c_noise.expand(len(x)), augment, label, **ratio).float()
        if f.shape[1] != self.heads * x.shape[1]:
            raise ValueError(f"{self.heads} heads on {x.shape[1]} channels need "
                             f"{self.heads * x.shape[1]} output channels, not {f.shape[1]}")
        return self.answers(x, f, s)

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
    """r_out: the standard deviation of x0 - V M(alpha) V^T x0 for images whose power falls as
    1 / lam, of total variance sigma_data^2. x gives H, W and the device.

    [1, 1] for one level, [B, 1, 1, 1] for [B]; 0 at alpha = 0.
    """
    lam = frequencies(*x.shape[-2:], x.device)
    power = torch.where(lam > 0, 1 / lam, 0)                    # blur does not change the mean
    removed = (1 - attenuation(alpha, x)) ** 2
    share = (removed * power / power.sum()).sum((-2, -1), keepdim=True)
    return sigma_data * share.sqrt()                                            # (8)


class UNet(nn.Module):
    """DDPM++ as EDM configures it. unet(x [B, in, H, W], c_noise [B], augment, label, ratio)
    -> [B, out, H, W].

    channels x mult: the width of each level; every level has half the height and width of the one
    before. blocks: residual blocks at each level. attention: the sizes of the levels that have it,
    when the input has `resolution` pixels a side. augment [B, augment_dim] or None means zeros;
    label [B] is needed where there are classes; ratio [B] where `ratio` is set.
    H and W must be multiples of 2^(levels - 1).
    """

    def __init__(self, in_channels, out_channels, channels=128, mult=(2, 2, 2), blocks=4,
                 attention=(16,), resolution=32, dropout=0., augment_dim=0, classes=0, ratio=False):
        super().__init__()
        self.in_channels, self.out_channels, self.classes = in_channels, out_channels, classes
        self.channels, self.levels = channels, len(mult)
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
        """Raises ValueError where images of h x w do not fit this network."""
        divisor = 2 ** (self.levels - 1)
        if h % divisor or w % divisor:
            raise ValueError(f"images of {h} x {w} do not divide by {divisor}, as a network of "
                             f"{self.levels} levels needs: choose another resolution or fewer "
                             "levels (mult)")

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
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).mT.unsqueeze(1)                 # [B, 1, H W, 3 C]
        y = F.scaled_dot_product_attention(*qkv.chunk(3, dim=3))                # [B, 1, H W, C]
        y = y[:, 0].mT.reshape(b, c, h, w)         # [B, C, H, W]
        return (x + self.out(y)) * math.sqrt(0.5)


def build(config):
    """A checkpoint's config, which has plain types only -> its Denoiser. Raises ValueError and the
    like for an impossible config, before anything is allocated."""
    u = config["unet"]
    limits = {"in_channels": (1, 4096), "out_channels": (1, 8192), "channels": (4, 4096),
              "blocks": (1, 64), "resolution": (1, 4096), "augment_dim": (0, 9),
              "classes": (0, 2 ** 20)}
    values = [(k, u[k], *limits[k]) for k in limits if k in u]
    values += [("mult", m, 1, 16) for m in u["mult"]] + [("len(mult)", len(u["mult"]), 1, 12)]
    for name, value, low, high in values:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name} must be an integer from {low} to {high}")
    if not 0 < config["sigma_data"] < 1e6 or not 0 <= u.get("dropout", 0) < 1:
        raise ValueError("sigma_data or dropout is out of range")
    kind = PARAMETERIZATIONS[config.get("param", "residual")]
    if u["out_channels"] != kind.heads * u["in_channels"]:
        raise ValueError(f"out_channels must be {kind.heads} times in_channels")
    if config.get("blind"):
        raise ValueError("it is a blind model, which this version does not have")
    return kind(UNet(**u), config["sigma_data"])


def load_model(filename, device="cpu", precision="fp32", compiled=False):
    """A checkpoint of train.py -> its Denoiser in eval mode, and the rest of the checkpoint:
    config, data, options, seen. Raises UserError."""
    checkpoint = read_checkpoint(filename)
    if "net" in checkpoint:
        raise UserError(f"{filename} is what a run resumes from: take the ema.pt beside it")
    try:
        weights = checkpoint.pop("weights")
        check_facts(checkpoint, weights, os.path.getsize(filename))
        with torch.device("meta"):          # allocates nothing before the shapes are known to fit
            net = build(checkpoint["config"])
        net.load_state_dict(weights, assign=True)
        c, h, w = checkpoint["data"]["shape"]
        net.unet.check(h, w)
        if c != net.unet.in_channels or len(checkpoint["data"]["classes"]) < net.classes:
            raise ValueError("its data have other channels or classes than its network")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{filename} is not a model of this project, or its weights do not fit its "
                        f"config: {reason}") from None
    net = net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if precision == "bf16":
        net.forward = torch.autocast(torch.device(device).type, torch.bfloat16)(net.forward)
    if compiled:
        net.unet.compile()
    return net, checkpoint


MAY_BE_NEW = ("unet.from_ratio.", "unet.from_augment.", "unet.from_label.")


def start_from(net, filename, classes=(), path=ConstantBNR(0.5)):
    """Puts the weights of a checkpoint of this project into a new Denoiser, to train it further.

    Layers in MAY_BE_NEW that only the new network has start at zero. Those that only the checkpoint
    has become a constant in a bias: the ratio of path at t = 0.3, near the median of training, and
    the mean over the classes. Each class starts from that mean where their number differs. The
    deblurring head starts at zero where the checkpoint is of BNR 0, which has not trained it.
    Raises UserError that names what does not fit.
    """
    old, checkpoint = load_model(filename)
    theirs, ours, config = old.state_dict(), net.state_dict(), checkpoint["config"]

    def misfit(reason):
        sizes = [f"{k} {config['unet'].get(k)}"
                 for k in ("channels", "mult", "blocks", "attention")]
        return UserError(f"{filename} does not fit this network: {reason}; it has "
                         f"{', '.join(sizes)}, at {checkpoint['data']['shape'][2]} pixels a side")
    if type(old).answers is not type(net).answers or old.sigma_data != net.sigma_data:
        raise misfit(f"its --param is {config.get('param', 'residual')} and its sigma_data "
                     f"{old.sigma_data:g}")
    for name in sorted(theirs.keys() ^ ours.keys()):
        if not name.startswith(MAY_BE_NEW):
            raise misfit(f"only one of them has {name}")
    for name, value in ours.items():
        if name in theirs and theirs[name].shape == value.shape:
            value.copy_(theirs[name])
        elif name == "unet.from_label.weight" and old.classes and len(theirs[name]) == len(value):
            # other classes: the mean of the old ones
            value.copy_(theirs[name].mean(1, keepdim=True) * math.sqrt(old.classes / net.classes))
        elif name.startswith(MAY_BE_NEW):
            value.zero_()
        else:
            raise misfit(f"{name} is {list(theirs[name].shape)} there and {list(value.shape)} here")
    told = torch.zeros(old.unet.channels)
    if old.told_ratio and not net.told_ratio:
        alpha, sigma = (torch.tensor([float(v)]) for v in path.levels(0.3))
        told = old.unet.from_ratio(sinusoids(4 * alpha / (alpha + sigma), old.unet.channels))[0]
    if old.classes and not net.classes:
        label = old.unet.from_label
        told = told + label.bias + label.weight.mean(1) * math.sqrt(old.classes)
    ours["unet.embed.0.bias"].add_(ours["unet.embed.0.weight"] @ told)
    if config["bnr"] == 0 and net.heads == 2:
        for value in (ours["unet.last.weight"], ours["unet.last.bias"]):
            value.chunk(2)[1].zero_()


def sinusoids(v, n):
    """[B] -> [B, n]: the sines, then the cosines, of v times frequencies from 1 to 1 / 10000."""
    k = torch.arange(n // 2, dtype=torch.float32, device=v.device)
    phase = v[:, None] * 10000 ** -(k / (n // 2 - 1))
    return torch.cat([phase.sin(), phase.cos()], 1)


def group_norm(channels):
    groups = min(32, channels // 4)
    if channels % groups:
        raise ValueError(f"a width of {channels} does not divide into {groups} groups: choose a "
                         "multiple of 4, and above 128 a multiple of 32")
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv(cin, cout, size, scale=1.):
    return initialized(nn.Conv2d(cin, cout, size, padding=size // 2), scale)


def linear(cin, cout, bias=True):
    return initialized(nn.Linear(cin, cout, bias=bias), 1.)


def initialized(layer, scale):
    nn.init.xavier_uniform_(layer.weight, gain=scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def main():
    sizes = {"CIFAR-10": dict(mult=(2, 2, 2), resolution=32),
             "FFHQ": dict(mult=(1, 2, 2, 2), resolution=64),
             "church": dict(mult=(1, 1, 2, 2, 2), resolution=128)}
    for name, kw in sizes.items():
        with torch.device("meta"):                              # shapes without memory
            one, two = (sum(p.numel() for p in UNet(3, out, augment_dim=9, **kw).parameters())
                        for out in (3, 6))
        size = f"{kw['resolution']} x {kw['resolution']}"
        print(f"{name:9} {size:>9}  {one:11,} parameters with one head, {two:11,} with two")


if __name__ == "__main__":
    main()
