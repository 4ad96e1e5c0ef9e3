"""The network: two levels in, two heads out, (7), on EDM's DDPM++ trunk.

    net = Denoiser(UNet(3, 6, resolution=32))
    d, r = net(x, alpha, sigma)                 # d + r estimates x0

The preconditioning (7), its other forms (12) and (13), and r_out (8) come first, then the trunk.
"""
import math
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from degrade import append_dims, attenuation, blur, frequencies, level_to_t
from util.cli import UserError

SIGMA_DATA = 0.5                                # the standard deviation of the images (EDM)


class Denoiser(nn.Module):
    """net(x, alpha, sigma) -> D, R: the estimates of the blurry image and of the residual that blur
    removed. Their sum estimates x0.

    x [B, C, H, W] of any float type; alpha, sigma: numbers, 0-d or [B], not both 0; augment [B, 9]
    and label [B] (int64) go to the unet. Returns float32 [B, C, H, W] twice. UserError for a label
    too many or too few, and for an output of the unet of another shape.

    unet: any module (x, c_noise, augment, label) -> [B, heads C, H, W]. c_noise [B] is about -1.6
    to 1.2. A unet whose attribute `classes` is above 0 always gets a label, any other never. One
    that has `from_ratio` is conditioned on (14), which is 0 to 4, as its argument ratio [B].
    """
    heads = 2

    def __init__(self, unet: nn.Module, sigma_data: float = SIGMA_DATA):
        super().__init__()
        if not isinstance(sigma_data, (int, float)) or not 0 < sigma_data < 1e6:
            raise UserError(f"sigma_data must be a number above 0, not {sigma_data!r}")
        self.unet = unet
        self.sigma_data = sigma_data
        self.classes = getattr(unet, "classes", 0)              # 0: not class-conditional
        self.has_ratio = getattr(unet, "from_ratio", None) is not None

    def forward(self, x: torch.Tensor, alpha, sigma, augment=None, label=None):
        self.check_label(label)
        x = x.float()
        alpha = append_dims(alpha, x, torch.float64)
        sigma = append_dims(sigma, x, torch.float64)
        s = preconditioning(x, alpha, sigma, self.sigma_data)
        b = x.shape[0]
        inputs = {"ratio": s.ratio.expand(b)} if self.has_ratio else {}
        f = self.unet(s.c_in * x, s.c_noise.expand(b), augment, label, **inputs)
        self.check_output(f, x)
        return self.precondition(x, f.float(), s)

    def precondition(self, x, f, s):
        """The unet's output f [B, 2 C, H, W] -> D, R. s: see preconditioning."""
        f1, f2 = f.chunk(2, dim=1)                              # [B, C, H, W] each
        d = s.c_skip * x + s.c_out * f1                         # (7)
        r = s.r_out * f2                                        # (7)
        return d, r

    def check_label(self, label):
        if self.classes and label is None:
            raise UserError(f"this network has {self.classes} classes, and it was called without "
                            "labels")
        if not self.classes and label is not None:
            raise UserError("this network has no classes, and it was called with labels")

    def check_output(self, f, x):
        needed = [x.shape[0], self.heads * x.shape[1], *x.shape[2:]]
        if not torch.is_tensor(f) or not f.is_floating_point():
            kind = getattr(f, "dtype", type(f).__name__)
            raise UserError(f"the network's output must be {needed}, and not {kind}")
        if list(f.shape) != needed:                             # what only broadcasts as well
            raise UserError(f"the network's output must be {needed}, and not {list(f.shape)}")


class X0Denoiser(Denoiser):
    """One head, the finished image. The parameterization `x0` of the study."""
    heads = 1

    def precondition(self, x, f, s):
        x0_hat = s.c_skip * x + (s.c_out ** 2 + s.r_out ** 2).sqrt() * f        # (12)
        d = torch.where(s.sigma > 0, blur(x0_hat, s.alpha), x)                  # (12)
        return d, x0_hat - d


class NoiseDenoiser(Denoiser):
    """The first head is the noise itself. The parameterization `noise` of the study."""

    def precondition(self, x, f, s):
        n_hat, f2 = f.chunk(2, dim=1)                           # [B, C, H, W] each
        d = x - s.sigma * n_hat                                 # (13)
        r = s.r_out * f2                                        # (13)
        return d, r


PARAMETERIZATIONS = {"residual": Denoiser, "x0": X0Denoiser, "noise": NoiseDenoiser}


def preconditioning(x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, sigma_data: float):
    """EDM's preconditioning, r_out and the levels themselves, computed in float64.

    x [B, C, H, W]; alpha, sigma: 0-d or [B, 1, 1, 1]. The values are float32, each 0-d, [1, 1] or
    [B, 1, 1, 1], but c_noise and ratio [1] or [B].
    """
    variance = sigma ** 2 + sigma_data ** 2
    t = level_to_t(alpha, sigma)
    values = {
        "alpha": alpha,
        "sigma": sigma,
        "c_skip": sigma_data ** 2 / variance,                                   # (7)
        "c_out": sigma * sigma_data / variance.sqrt(),                          # (7)
        "c_in": 1 / variance.sqrt(),                                            # (7)
        "c_noise": t.log().flatten() / 4,                                       # (7)
        "r_out": residual_std(alpha, x, sigma_data),                            # (8)
        "ratio": 4 * (alpha / (alpha + sigma)).flatten(),                       # (14)
    }
    return SimpleNamespace(**{name: value.float() for name, value in values.items()})


def residual_std(alpha, x: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """r_out: the standard deviation of x0 - V M(alpha) V^T x0 for images of power 1 / lam and
    variance sigma_data^2; x gives H, W and the device. [1, 1] for one level, [B, 1, 1, 1] for [B].
    """
    h, w = x.shape[-2:]
    lam = frequencies(h, w, x.device)
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

    def __init__(self, in_channels: int, out_channels: int, channels: int = 128, mult=(2, 2, 2),
                 blocks: int = 4, attention=(16,), resolution: int = 32, dropout: float = 0.,
                 augment_dim: int = 0, classes: int = 0, ratio: bool = False):
        super().__init__()
        self.channels = channels
        self.classes = classes
        self.divisor = 2 ** len(mult) // 2
        self.from_augment = None
        self.from_label = None
        self.from_ratio = None
        if augment_dim:
            self.from_augment = linear(augment_dim, channels, bias=False)
        if classes:
            self.from_label = linear(classes, channels)
        if ratio:
            self.from_ratio = linear(channels, channels, bias=False)
        self.embed = nn.Sequential(linear(channels, 4 * channels), nn.SiLU(),
                                   linear(4 * channels, 4 * channels), nn.SiLU())
        block = partial(Block, emb=4 * channels, dropout=dropout)

        self.first = conv(in_channels, channels, 3)
        self.encoder = nn.ModuleList()
        self.decoder = nn.ModuleList()
        width = channels                                        # of the activation
        widths = [channels]                                     # of the skips
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

    def check(self, h: int, w: int) -> None:
        """Raises UserError where images of h x w do not fit this network."""
        if h % self.divisor or w % self.divisor:
            raise UserError(f"images of {h} x {w} do not divide by {self.divisor}: choose another "
                            "resolution or fewer levels (mult)")

    def forward(self, x, c_noise, augment=None, label=None, ratio=None):
        h, w = x.shape[-2:]
        self.check(h, w)
        emb = sinusoids(c_noise, self.channels)                 # [B, channels]
        if self.from_ratio is not None:
            emb = emb + self.from_ratio(sinusoids(ratio, self.channels))        # (14)
        if self.classes:
            one_hot = F.one_hot(label, self.classes)            # [B, classes]
            emb = emb + self.from_label(one_hot * math.sqrt(self.classes))
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

    def __init__(self, cin: int, cout: int, emb: int, attention: bool = False,
                 resample: str | None = None, dropout: float = 0.):
        super().__init__()
        self.resample = resample
        self.dropout = dropout
        self.norm1 = group_norm(cin)
        self.conv1 = conv(cin, cout, 3)
        self.from_emb = linear(emb, cout)
        self.norm2 = group_norm(cout)
        self.conv2 = conv(cout, cout, 3, scale=1e-5)
        self.skip = None
        if resample or cin != cout:
            self.skip = conv(cin, cout, 1)
        self.attention = Attention(cout) if attention else None

    def forward(self, x, emb):
        y = F.silu(self.norm1(x))
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)                              # [B, cin, H / 2, W / 2]
            y = F.avg_pool2d(y, 2)
        if self.resample == "up":
            x = F.interpolate(x, scale_factor=2)                # [B, cin, 2 H, 2 W]
            y = F.interpolate(y, scale_factor=2)
        y = self.conv1(y) + self.from_emb(emb)[:, :, None, None]                # [B, cout, H, W]
        y = F.dropout(F.silu(self.norm2(y)), self.dropout, self.training)
        y = self.conv2(y)
        if self.skip is not None:
            x = self.skip(x)                                    # [B, cout, H, W]
        x = (x + y) * math.sqrt(0.5)
        if self.attention is not None:
            x = self.attention(x)
        return x


class Attention(nn.Module):
    """Every pixel attends to every other, one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = conv(channels, 3 * channels, 1, scale=math.sqrt(0.2))
        self.out = conv(channels, channels, 1, scale=1e-5)

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).flatten(2).mT.unsqueeze(1)                 # [B, 1, H W, 3 C]
        q, k, v = qkv.chunk(3, dim=3)                           # [B, 1, H W, C] each
        y = F.scaled_dot_product_attention(q, k, v)             # [B, 1, H W, C]
        y = y[:, 0].mT.reshape(x.shape)                         # [B, C, H, W]
        return (x + self.out(y)) * math.sqrt(0.5)


def sinusoids(v: torch.Tensor, n: int) -> torch.Tensor:
    """[B] -> [B, n]: the sines, then the cosines, of v times frequencies from 1 to 1 / 10000."""
    k = torch.arange(n // 2, dtype=torch.float32, device=v.device)
    phase = v[:, None] * 10000 ** -(k / (n // 2 - 1))
    return torch.cat([phase.sin(), phase.cos()], 1)


def group_norm(channels: int) -> nn.GroupNorm:
    groups = min(32, channels // 4)
    if channels % groups:
        raise UserError(f"a width of {channels} does not divide into {groups} groups: choose a "
                        "multiple of 4, and above 128 a multiple of 32")
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv(cin: int, cout: int, size: int, scale: float = 1.) -> nn.Conv2d:
    return initialized(nn.Conv2d(cin, cout, size, padding=size // 2), scale)


def linear(cin: int, cout: int, bias: bool = True) -> nn.Linear:
    return initialized(nn.Linear(cin, cout, bias), 1.)


def initialized(layer, scale):
    """Xavier-uniform weights times scale, zero biases."""
    nn.init.xavier_uniform_(layer.weight, scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def build(config: dict) -> Denoiser:
    """A checkpoint's config -> its Denoiser. An impossible one raises nearly anything."""
    kind = PARAMETERIZATIONS[config.get("param", "residual")]
    return kind(UNet(**config["unet"]), config["sigma_data"])
