import math

import pytest
import torch
import torch.nn.functional as F

from degrade import BlurNoisePath, blur, idct2
from exact import power_law
from model import Attention, Block, Denoiser, UNet, build, residual_size, sinusoids

SMALL = dict(channels=16, mult=(1, 2), blocks=1, attention=(8,), resolution=16)


def count(*args, **kw):
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(*args, **kw).parameters())


def test_parameter_counts_are_the_papers():
    assert count(3, 3, augment_dim=9) == 55_733_891
    assert count(3, 6, augment_dim=9) == 55_733_891 + 6_915
    assert count(3, 3, augment_dim=9, mult=(1, 2, 2, 2), resolution=64) == 61_805_571


def shaken(module):
    """Every parameter moved off its initial value, so that nothing is hidden behind a zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.eval()


@pytest.mark.parametrize("resample, cin, cout", [(None, 8, 8), (None, 8, 16), ("down", 8, 8), ("up", 8, 8)])
def test_block_by_hand(resample, cin, cout):
    torch.manual_seed(0)
    block, x, emb = shaken(Block(cin, cout, 12, resample=resample)), torch.randn(2, cin, 6, 6), torch.randn(2, 12)
    groups = min(32, cin // 4)
    y = x.reshape(2, groups, -1)
    y = ((y - y.mean(2, keepdim=True)) / (y.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
    y = y * block.norm1.weight[:, None, None] + block.norm1.bias[:, None, None]
    y = y * torch.sigmoid(y)

    def resized(x):
        if resample == "down":
            return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2) if resample == "up" else x
    y = F.conv2d(resized(y), block.conv1.weight, block.conv1.bias, padding=1) + (emb @ block.from_emb.weight.T + block.from_emb.bias)[..., None, None]
    y = F.group_norm(y, min(32, cout // 4), block.norm2.weight, block.norm2.bias, 1e-6)
    y = F.conv2d(y * torch.sigmoid(y), block.conv2.weight, block.conv2.bias, padding=1)
    skip = resized(x) if block.skip is None else torch.einsum("bchw,dc->bdhw", resized(x), block.skip.weight[:, :, 0, 0]) + block.skip.bias[:, None, None]
    assert (block.skip is None) == (resample is None and cin == cout)
    torch.testing.assert_close(block(x, emb), (skip + y) / math.sqrt(2), rtol=1e-4, atol=1e-5)


def test_attention_by_hand():
    torch.manual_seed(0)
    attention, x = shaken(Attention(8)), torch.randn(2, 8, 3, 5)
    y = F.group_norm(x, 2, attention.norm.weight, attention.norm.bias, 1e-6).flatten(2)        # [B, C, H W]
    q, k, v = (torch.einsum("dc,bcn->bdn", w[:, :, 0, 0], y) + b[:, None] for w, b in zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)))
    p = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(8), 2)                     # [B, queries, keys]
    y = torch.einsum("bnm,bcm->bcn", p, v)
    y = torch.einsum("dc,bcn->bdn", attention.out.weight[:, :, 0, 0], y) + attention.out.bias[:, None]
    torch.testing.assert_close(attention(x), (x + y.reshape(x.shape)) / math.sqrt(2), rtol=1e-4, atol=1e-5)


def test_unet_by_hand():
    """The way through the blocks, each of them checked above: embedding, skips, resampling, the last layers."""
    torch.manual_seed(0)
    unet, x, c_noise, augment = shaken(UNet(3, 6, **SMALL, augment_dim=9)), torch.randn(2, 3, 16, 16), torch.tensor([0.3, -1.]), torch.randn(2, 9)
    silu = lambda x: x * torch.sigmoid(x)
    emb = sinusoids(c_noise, 16) + augment @ unet.from_augment.weight.T
    for layer in (unet.embed[0], unet.embed[2]):
        emb = silu(emb @ layer.weight.T + layer.bias)
    block = lambda b, *x: b(torch.cat(x, 1), emb)
    e, d, m = unet.encoder, unet.decoder, unet.middle
    a = unet.first(x)
    b = block(e[0], a)
    c = block(e[1], b)                                          # to 8 x 8
    f = block(e[2], c)
    y = block(m[1], block(m[0], f))
    y = block(d[1], block(d[0], y, f), c)
    y = block(d[2], y)                                          # back to 16 x 16
    y = block(d[4], block(d[3], y, b), a)
    y = F.conv2d(silu(F.group_norm(y, 4, unet.last_norm.weight, unet.last_norm.bias, 1e-6)), unet.last.weight, unet.last.bias, padding=1)
    torch.testing.assert_close(unet(x, c_noise, augment), y, rtol=1e-4, atol=1e-5)


def test_sinusoids():
    s = sinusoids(torch.tensor([0.7, -2.]), 128)
    for k in range(64):
        for i, c in enumerate((0.7, -2.)):
            assert s[i, k].item() == pytest.approx(math.sin(c * 10000 ** (-k / 63)), abs=1e-6)
            assert s[i, 64 + k].item() == pytest.approx(math.cos(c * 10000 ** (-k / 63)), abs=1e-6)


def test_initialisation_is_edms():
    unet = UNet(3, 6, augment_dim=9)
    bound = lambda layer, fan_in, fan_out, gain: math.sqrt(6 / (fan_in + fan_out)) * gain
    for layer, fan_in, fan_out, gain in ((unet.first, 27, 1152, 1), (unet.last, 2304, 54, 1e-5), (unet.encoder[0].conv2, 2304, 2304, 1e-5),
                                         (unet.middle[0].attention.qkv, 256, 768, math.sqrt(0.2)), (unet.middle[0].attention.out, 256, 256, 1e-5)):
        assert layer.weight.abs().max().item() == pytest.approx(bound(layer, fan_in, fan_out, gain), rel=0.02)
        assert layer.bias.abs().max() == 0
    for layer in (unet.embed[0], unet.embed[2], unet.encoder[0].from_emb, unet.from_augment):
        assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(6 / sum(layer.weight.shape)), rel=0.02)
        assert layer.bias is None or layer.bias.abs().max() == 0
    assert all(m.eps == 1e-6 for m in unet.modules() if isinstance(m, torch.nn.GroupNorm))


def test_attention_is_where_edm_has_it():
    with torch.device("meta"):
        unet = UNet(3, 6)
    assert [b.attention is not None for b in unet.encoder] == [False] * 4 + [False] + [True] * 4 + [False] * 5
    assert [b.attention is not None for b in unet.middle] == [True, False]
    assert [b.attention is not None for b in unet.decoder] == [False] * 5 + [False] * 5 + [True] + [False] * 6


@pytest.mark.parametrize("channels, h, w", [(1, 16, 16), (3, 8, 12)])
def test_grey_colour_and_non_square(channels, h, w):
    net = Denoiser(UNet(channels, 2 * channels, **SMALL), BlurNoisePath(0.5))
    d, r = net(torch.randn(2, channels, h, w, dtype=torch.float64), torch.tensor([0.1, 3.]))
    assert d.shape == r.shape == (2, channels, h, w) and d.dtype == r.dtype == torch.float32


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="15 x 16 do not divide by 2"):
        UNet(3, 6, **SMALL)(torch.zeros(1, 3, 15, 16), torch.zeros(1))
    with pytest.raises(ValueError, match="need 6 outputs, not 3"):
        Denoiser(UNet(3, 3, **SMALL), BlurNoisePath(0.5))


def test_dropout_only_in_training():
    torch.manual_seed(0)
    unet, x = shaken(UNet(3, 6, **SMALL, dropout=0.5)), torch.randn(1, 3, 16, 16)
    assert torch.equal(unet(x, torch.zeros(1)), unet(x, torch.zeros(1)))
    unet.train()
    assert not torch.equal(unet(x, torch.zeros(1)), unet(x, torch.zeros(1)))


def test_dropout_comes_before_the_second_convolution():
    block = shaken(Block(8, 8, 4, dropout=1 - 1e-6)).train()    # which then has nothing but its bias to add
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(block(x, torch.randn(1, 4)), (x + block.conv2.bias[:, None, None]) * math.sqrt(0.5))


def test_a_config_builds_what_it_says():
    config = {"bnr": 2., "sigma_data": 0.3, "unet": dict(in_channels=1, out_channels=2, **SMALL, dropout=0.2)}
    net = build({**config, "unet": dict(config["unet"])})
    assert (net.path.bnr, net.sigma_data, net.unet.out_channels, net.unet.encoder[0].dropout) == (2, 0.3, 2, 0.2)


def test_augmentation_labels_reach_the_network_and_zero_means_none():
    torch.manual_seed(0)
    unet, x = shaken(UNet(3, 6, **SMALL, augment_dim=9)), torch.randn(1, 3, 16, 16)
    plain = unet(x, torch.zeros(1))
    assert torch.equal(unet(x, torch.zeros(1), torch.zeros(1, 9)), plain)
    assert not torch.equal(unet(x, torch.zeros(1), torch.ones(1, 9)), plain)


class Constant(torch.nn.Module):
    """A network whose heads answer 1 and 2, and that remembers what it was asked."""
    in_channels, out_channels = 3, 6

    def forward(self, x, c_noise, augment=None, label=None):
        self.asked = x, c_noise
        return torch.cat([torch.full_like(x, 1.), torch.full_like(x, 2.)], 1)


@pytest.mark.parametrize("bnr, sd", [(0, 0.5), (0.5, 0.5), (2, 0.5), (2, 0.3)])
def test_preconditioning_by_hand(bnr, sd):
    net, x = Denoiser(Constant(), BlurNoisePath(bnr), sd), torch.randn(2, 3, 8, 8)
    for t in (1.5, torch.tensor([0.02, 40.])):
        d, r = net(x, t)
        for i, s in enumerate(torch.as_tensor(t).expand(2).tolist()):
            total = s ** 2 + sd ** 2
            torch.testing.assert_close(d[i], sd ** 2 / total * x[i] + s * sd / math.sqrt(total))
            torch.testing.assert_close(r[i], 2 * sd * residual_size(bnr * s, x).float().expand_as(r[i]))
            torch.testing.assert_close(net.unet.asked[0][i], x[i] / math.sqrt(total))
            assert net.unet.asked[1][i].item() == pytest.approx(math.log(s) / 4, abs=1e-6)
    assert (r == 0).all() == (bnr == 0)


def test_residual_size_is_the_residuals_std_on_pictures_of_power_1_over_lam():
    spectrum = power_law(16, 12)
    spectrum[0, 0] = 0
    g = torch.Generator().manual_seed(0)
    x0 = idct2(spectrum.sqrt() * torch.randn(4000, 1, 16, 12, dtype=torch.float64, generator=g))
    for alpha in (0.3, 1., 5.):
        measured = (x0 - blur(x0, alpha)).std() / x0.std()
        assert residual_size(alpha, x0).item() == pytest.approx(measured.item(), rel=0.02)
    assert residual_size(0, x0).item() == 0
    assert residual_size(torch.tensor([0.3, 1.]), x0[:2]).flatten().tolist() == pytest.approx([residual_size(a, x0).item() for a in (0.3, 1.)])


def test_bf16_autocast_leaves_the_preconditioning_alone():
    net, x = Denoiser(Constant(), BlurNoisePath(0.5)), torch.randn(2, 3, 8, 8)
    plain = net(x, 3.)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(net(x, 3.), plain))
