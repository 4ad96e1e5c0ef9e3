"""The network: EDM's DDPM++ trunk, and the preconditioner that makes of it a denoiser and a deblurrer. README, "The network".

    python model.py                        # prints the parameter counts of the paper's networks
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from degrade import BlurNoisePath, BlurringPath, attenuation, blur, frequencies, spread


class Denoiser(nn.Module):
    """net(x, t) -> blurry, residual: estimates of E[V M V^T x0 | x] and E[x0 - V M V^T x0 | x]; their sum estimates x0.

    unet has twice as many output as input channels; path gives alpha and sigma at t; sigma_data is the pictures' std.
    x [B, C, H, W] of any float type, t a number, 0-d or [B], above 0; label [B] int64, where the unet has classes; both results are
    float32 [B, C, H, W]. param: what the heads are, see `variant`; blind: the network is not told the level. colour: where a cold
    path starts, {"mean": [C], "cov": [C][C]} of the pictures' mean colours. Raises ValueError where these do not go together.
    """

    def __init__(self, unet, path, sigma_data=0.5, param="residual", blind=False, colour=None):
        super().__init__()
        heads, c = 1 if param == "x0" else 2, unet.in_channels
        if unet.out_channels != heads * c:
            raise ValueError(f"{heads} heads on {c} channels need {heads * c} outputs, not {unet.out_channels}")
        if param not in ("residual", "x0", "noise"):
            raise ValueError(f"param is residual, x0 or noise, not {param}")
        if path.cold and (blind or param == "noise"):
            raise ValueError("a cold path has no noise to estimate: neither blind nor param noise go with BNR inf")
        if blind and param != "residual":
            raise ValueError(f"a blind network has param residual, not {param}")
        if path.cold and (colour is None or colour.keys() != {"mean", "cov"} or not np.isfinite(colour["cov"]).all()
                          or (np.shape(colour["mean"]), np.shape(colour["cov"])) != ((c,), (c, c))):
            raise ValueError(f"a cold path starts from a colour: give the mean and covariance of {c} channels")
        self.unet, self.path, self.sigma_data, self.param, self.blind, self.colour = unet, path, sigma_data, param, blind, colour

    def forward(self, x, t, augment=None, label=None):
        x = x.float()
        t = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        alpha, sigma = self.path.levels(t)
        sigma, sd = spread(sigma, x.double()), self.sigma_data
        c_skip = sd ** 2 / (sigma ** 2 + sd ** 2)
        c_out = sigma * sd / (sigma ** 2 + sd ** 2).sqrt()
        c_in = 1 / (sigma ** 2 + sd ** 2).sqrt()
        c_noise = (t.log() / 4).float().expand(len(x))
        r_out = sd * residual_size(alpha, x)
        c_skip, c_out, c_in, r_out = (c.float() for c in (c_skip, c_out, c_in, r_out))

        if self.blind or self.param != "residual":
            return self.variant(x, alpha, sigma.float(), c_skip, c_out, c_in, r_out, c_noise, augment, label)
        f1, f2 = self.unet(c_in * x, c_noise, augment, label).float().chunk(2, dim=1)          # [B, C, H, W] each
        return c_skip * x + c_out * f1, r_out * f2

    def variant(self, x, alpha, sigma, c_skip, c_out, c_in, r_out, c_noise, augment, label):
        """The study's other heads. README, "The study"."""
        if self.blind:                                          # a scale of the picture's own, and one level for all
            rho = (x.square().mean((1, 2, 3), keepdim=True) + 1e-6).sqrt()
            f1, f2 = self.unet(x / rho, torch.zeros_like(c_noise), augment, label).float().chunk(2, dim=1)
            return x - rho * f1, self.sigma_data * f2
        f = self.unet(c_in * x, c_noise, augment, label).float()
        if self.param == "x0":                                  # one head, the finished picture
            x0_hat = c_skip * x + (c_out ** 2 + r_out ** 2).sqrt() * f
            d = x if self.path.cold else blur(x0_hat, alpha)
            return d, x0_hat - d
        n_hat, f2 = f.chunk(2, dim=1)                           # param "noise"
        return x - sigma * n_hat, r_out * f2


def residual_size(alpha, x):
    """The residual's std, as a share of the picture's, where power falls as 1 / lam: [1, 1] or [B, 1, 1, 1]. 0 at alpha = 0."""
    lam = frequencies(*x.shape[-2:], x.device)
    power = torch.where(lam > 0, 1 / lam, 0)                    # the mean is not blurred and has no part in it
    return ((1 - attenuation(alpha, x)) ** 2 * power / power.sum()).sum((-2, -1), keepdim=True).sqrt()


class UNet(nn.Module):
    """DDPM++ as EDM configures it. unet(x [B, in, H, W], c_noise [B], augment [B, augment_dim] or None, label [B]) -> [B, out, H, W].

    With classes, each picture needs its label. channels x mult gives the width of each level, each half the size of the one above;
    blocks residual blocks a level; attention at the levels of those sizes when the input is `resolution` pixels a side. H and W must divide by 2^(levels - 1).
    """

    def __init__(self, in_channels, out_channels, channels=128, mult=(2, 2, 2), blocks=4, attention=(16,), resolution=32, dropout=0.,
                 augment_dim=0, classes=0):
        super().__init__()
        self.in_channels, self.out_channels, self.channels, self.levels, self.classes = in_channels, out_channels, channels, len(mult), classes
        self.from_augment = linear(augment_dim, channels, bias=False) if augment_dim else None
        self.from_label = linear(classes, channels) if classes else None
        self.embed = nn.Sequential(linear(channels, 4 * channels), nn.SiLU(), linear(4 * channels, 4 * channels), nn.SiLU())

        def block(cin, cout, **kw):
            return Block(cin, cout, 4 * channels, dropout=dropout, **kw)

        self.first = conv(in_channels, channels, 3)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        width, widths = channels, [channels]                    # of the running activation; of the skips
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
                self.decoder.append(block(width + widths.pop(), channels * m, attention=attend and i == blocks))
                width = channels * m
        self.last_norm = group_norm(width)
        self.last = conv(width, out_channels, 3, scale=1e-5)

    def check(self, h, w):
        """Raises ValueError where pictures of h x w do not fit this network."""
        divisor = 2 ** (self.levels - 1)
        if h % divisor or w % divisor:
            raise ValueError(f"pictures of {h} x {w} do not divide by {divisor}, as a network of {self.levels} levels needs: "
                             "take another resolution or fewer levels (mult)")

    def forward(self, x, c_noise, augment=None, label=None):
        self.check(*x.shape[-2:])
        emb = sinusoids(c_noise, self.channels)                 # [B, channels]
        if self.classes:
            emb = emb + self.from_label(F.one_hot(label, self.classes) * math.sqrt(self.classes))
        if self.from_augment is not None and augment is not None:
            emb = emb + self.from_augment(augment)
        emb = self.embed(emb)                                   # [B, 4 channels]
        x = self.first(x)                                       # [B, channels, H, W]
        skips = [x]
        for block in self.encoder:
            x = block(x, emb)                                   # [B, channels mult[level], H / 2^level, W / 2^level]
            skips.append(x)
        for block in self.middle:
            x = block(x, emb)
        for block in self.decoder:
            if block.resample is None:
                x = torch.cat([x, skips.pop()], 1)
            x = block(x, emb)
        return self.last(F.silu(self.last_norm(x)))             # [B, out, H, W]


class Block(nn.Module):
    """A residual block, with resampling before its first convolution and attention behind it where asked."""

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
            x, y = F.interpolate(x, scale_factor=2), F.interpolate(y, scale_factor=2)           # [B, cin, 2 H, 2 W]
        y = self.conv1(y) + self.from_emb(emb)[:, :, None, None]                                # [B, cout, H, W]
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
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)                   # [B, 1, H W, 3 C]
        y = F.scaled_dot_product_attention(*qkv.chunk(3, dim=3))                                # [B, 1, H W, C]
        y = y[:, 0].transpose(1, 2).reshape(b, c, h, w)         # [B, C, H, W]
        return (x + self.out(y)) * math.sqrt(0.5)


def build(config):
    """A checkpoint's config, plain types, -> its Denoiser. Raises ValueError and the like for what cannot be one, before it is built."""
    u = config["unet"]
    limits = {"in_channels": (1, 3), "out_channels": (1, 6), "channels": (4, 4096), "blocks": (1, 64), "resolution": (1, 4096), "augment_dim": (0, 9),
              "classes": (0, 2 ** 20)}
    for k, v, (low, high) in [(k, u[k], limits[k]) for k in limits if k in u] + [("a mult", m, (1, 16)) for m in u["mult"]] + \
            [("the number of mult", len(u["mult"]), (1, 12))]:
        if type(v) is not int or not low <= v <= high:
            raise ValueError(f"{k} is no whole number from {low} to {high}")
    if config.get("path") not in (None, "blurring") or not (0 <= config["bnr"] <= 1e6 or config["bnr"] == math.inf) \
            or not 0 < config["sigma_data"] < 1e6 or not 0 <= u.get("dropout", 0) < 1:
        raise ValueError("its path, sigma_data or dropout is none of this project's")
    path = BlurringPath() if config.get("path") else BlurNoisePath(config["bnr"])
    return Denoiser(UNet(**config["unet"]), path, config["sigma_data"], **{k: config[k] for k in ("param", "blind", "colour") if k in config})


def sinusoids(c_noise, n):
    """[B] -> [B, n]: sines, then cosines, of frequencies 1 to 1 / 10000."""
    frequency = 10000 ** -(torch.arange(n // 2, dtype=torch.float32, device=c_noise.device) / (n // 2 - 1))
    phase = c_noise[:, None] * frequency
    return torch.cat([phase.sin(), phase.cos()], 1)


def group_norm(channels):
    groups = min(32, channels // 4)
    if channels % groups:
        raise ValueError(f"a width of {channels} does not divide into {groups} groups: take a multiple of 4, and of 32 above 128")
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
    for name, kw in {"CIFAR-10": dict(mult=(2, 2, 2), resolution=32), "FFHQ": dict(mult=(1, 2, 2, 2), resolution=64),
                     "church": dict(mult=(1, 1, 2, 2, 2), resolution=128)}.items():
        with torch.device("meta"):                              # shapes without memory
            one, two = (sum(p.numel() for p in UNet(3, out, augment_dim=9, **kw).parameters()) for out in (3, 6))
        print(f"{name:9} {kw['resolution']:3} x {kw['resolution']:<3}  {one:11,} parameters with one head, {two:11,} with two")


if __name__ == "__main__":
    main()
