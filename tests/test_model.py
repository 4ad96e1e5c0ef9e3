import math

import pytest
import torch
import torch.nn.functional as F

from degrade import BlurringPath, ColdPath, ConstantBNR, blur
from exact import gaussian_images, power_law
from model import (Attention, Block, Denoiser, NoiseDenoiser, UNet, X0Denoiser, build, load_model,
                   residual_std, sinusoids, start_from)
from util import UserError

SMALL = dict(channels=16, mult=(1, 2), blocks=1, attention=(8,), resolution=16)


def shaken(module):
    """Every parameter moved off its initial value, so that nothing is hidden behind a zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.eval()


# The trunk

def count(*args, **kw):
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(*args, **kw).parameters())


def test_parameter_counts_are_the_papers():
    assert count(3, 3, augment_dim=9) == 55_733_891
    assert count(3, 6, augment_dim=9) == 55_733_891 + 6_915
    assert count(3, 3, augment_dim=9, mult=(1, 2, 2, 2), resolution=64) == 61_805_571
    assert count(3, 6, ratio=True) == count(3, 6) + 128 ** 2    # one layer without bias


def resized(x, resample):
    if resample == "down":
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2) if resample == "up" else x


def conv_1x1(layer, x):
    return torch.einsum("bchw,dc->bdhw", x, layer.weight[:, :, 0, 0]) + layer.bias[:, None, None]


@pytest.mark.parametrize("resample, cin, cout",
                         [(None, 8, 8), (None, 8, 16), ("down", 8, 8), ("up", 8, 8)])
def test_block_by_hand(resample, cin, cout):
    torch.manual_seed(0)
    block = shaken(Block(cin, cout, 12, resample=resample))
    x, emb = torch.randn(2, cin, 6, 6), torch.randn(2, 12)
    y = x.reshape(2, min(32, cin // 4), -1)
    y = (y - y.mean(2, keepdim=True)) / (y.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
    y = y.reshape(x.shape) * block.norm1.weight[:, None, None] + block.norm1.bias[:, None, None]
    y = resized(y * torch.sigmoid(y), resample)
    y = F.conv2d(y, block.conv1.weight, block.conv1.bias, padding=1)
    y = y + (emb @ block.from_emb.weight.T + block.from_emb.bias)[..., None, None]
    y = F.group_norm(y, min(32, cout // 4), block.norm2.weight, block.norm2.bias, 1e-6)
    y = F.conv2d(y * torch.sigmoid(y), block.conv2.weight, block.conv2.bias, padding=1)
    assert (block.skip is None) == (resample is None and cin == cout)
    skip = resized(x, resample)
    skip = skip if block.skip is None else conv_1x1(block.skip, skip)
    expected = (skip + y) / math.sqrt(2)
    torch.testing.assert_close(block(x, emb), expected, rtol=1e-4, atol=1e-5)


def test_attention_by_hand():
    torch.manual_seed(0)
    attention, x = shaken(Attention(8)), torch.randn(2, 8, 3, 5)
    y = F.group_norm(x, 2, attention.norm.weight, attention.norm.bias, 1e-6)
    q, k, v = conv_1x1(attention.qkv, y).flatten(2).chunk(3, 1)                 # [B, C, H W] each
    p = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(8), 2)     # [B, queries, keys]
    y = conv_1x1(attention.out, torch.einsum("bnm,bcm->bcn", p, v).reshape(x.shape))
    expected = (x + y) / math.sqrt(2)
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_unet_by_hand():
    """The way through the blocks, which are checked above: embedding, skips, resampling, the last
    layers."""
    torch.manual_seed(0)
    unet = shaken(UNet(3, 6, **SMALL, augment_dim=9, classes=5, ratio=True))
    x, c_noise = torch.randn(2, 3, 16, 16), torch.tensor([0.3, -1.])
    augment, label, ratio = torch.randn(2, 9), torch.tensor([4, 1]), torch.tensor([0.7, 3.])
    silu = lambda x: x * torch.sigmoid(x)
    emb = sinusoids(c_noise, 16) + augment @ unet.from_augment.weight.T
    emb = emb + sinusoids(ratio, 16) @ unet.from_ratio.weight.T
    emb = emb + math.sqrt(5) * unet.from_label.weight.T[label] + unet.from_label.bias
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
    y = silu(F.group_norm(y, 4, unet.last_norm.weight, unet.last_norm.bias, 1e-6))
    y = F.conv2d(y, unet.last.weight, unet.last.bias, padding=1)
    ours = unet(x, c_noise, augment, label, ratio)
    torch.testing.assert_close(ours, y, rtol=1e-4, atol=1e-5)


def test_sinusoids():
    s = sinusoids(torch.tensor([0.7, -2.]), 128)
    for k in range(64):
        for i, c in enumerate((0.7, -2.)):
            phase = c * 10000 ** (-k / 63)
            assert s[i, k].item() == pytest.approx(math.sin(phase), abs=1e-6)
            assert s[i, 64 + k].item() == pytest.approx(math.cos(phase), abs=1e-6)


def test_initialisation_is_edms():
    unet = UNet(3, 6, augment_dim=9, ratio=True)
    middle = unet.middle[0].attention
    for layer, fan_in, fan_out, gain in ((unet.first, 27, 1152, 1), (unet.last, 2304, 54, 1e-5),
                                         (unet.encoder[0].conv2, 2304, 2304, 1e-5),
                                         (middle.qkv, 256, 768, math.sqrt(0.2)),
                                         (middle.out, 256, 256, 1e-5)):
        bound = math.sqrt(6 / (fan_in + fan_out)) * gain
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert layer.bias.abs().max() == 0
    for layer in (unet.embed[0], unet.embed[2], unet.encoder[0].from_emb, unet.from_augment,
                  unet.from_ratio):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert layer.bias is None or layer.bias.abs().max() == 0
    assert all(m.eps == 1e-6 for m in unet.modules() if isinstance(m, torch.nn.GroupNorm))


def test_attention_is_where_edm_has_it():
    with torch.device("meta"):
        unet = UNet(3, 6)
    where = lambda blocks: [b.attention is not None for b in blocks]
    assert where(unet.encoder) == [False] * 4 + [False] + [True] * 4 + [False] * 5
    assert where(unet.middle) == [True, False]
    assert where(unet.decoder) == [False] * 5 + [False] * 5 + [True] + [False] * 6


def test_dropout_only_in_training():
    torch.manual_seed(0)
    unet, x = shaken(UNet(3, 6, **SMALL, dropout=0.5)), torch.randn(1, 3, 16, 16)
    assert torch.equal(unet(x, torch.zeros(1)), unet(x, torch.zeros(1)))
    unet.train()
    assert not torch.equal(unet(x, torch.zeros(1)), unet(x, torch.zeros(1)))


def test_dropout_comes_before_the_second_convolution():
    block = shaken(Block(8, 8, 4, dropout=1 - 1e-6)).train()    # only its bias is left to add
    x = torch.randn(1, 8, 4, 4)
    expected = (x + block.conv2.bias[:, None, None]) * math.sqrt(0.5)
    torch.testing.assert_close(block(x, torch.randn(1, 4)), expected)


def test_augmentation_labels_reach_the_network_and_zero_means_none():
    torch.manual_seed(0)
    unet, x = shaken(UNet(3, 6, **SMALL, augment_dim=9)), torch.randn(1, 3, 16, 16)
    plain = unet(x, torch.zeros(1))
    assert torch.equal(unet(x, torch.zeros(1), torch.zeros(1, 9)), plain)
    assert not torch.equal(unet(x, torch.zeros(1), torch.ones(1, 9)), plain)


def embeddings(unet, *args, **kw):
    """What the unet adds up before its two layers of the level embedding."""
    got = []
    handle = unet.embed.register_forward_pre_hook(lambda module, x: got.append(x[0]))
    unet(*args, **kw)
    handle.remove()
    return got[0]


def test_the_class_is_one_embedding_added_to_the_levels():
    torch.manual_seed(0)
    unet, plain = UNet(3, 6, **SMALL, classes=5), UNet(3, 6, **SMALL)
    torch.nn.init.normal_(unet.from_label.bias)
    x, c_noise = torch.randn(5, 3, 8, 8), torch.full((5,), 0.3)
    label = torch.tensor([4, 1, 0, 1, 3])
    columns = [unet.from_label.weight[:, i] * math.sqrt(5) + unet.from_label.bias for i in label]
    expected = embeddings(plain, x, c_noise) + torch.stack(columns)
    torch.testing.assert_close(embeddings(unet, x, c_noise, label=label), expected)


# The heads

class Answer(torch.nn.Module):
    """A unet that answers a fixed image for each output channel, and keeps what it was asked."""

    def __init__(self, out_channels):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.f = torch.randn(out_channels, 8, 8, generator=g)

    def forward(self, x, c_noise, augment=None, label=None, **ratio):
        self.asked, self.ratio = (x, c_noise, augment, label), ratio
        return self.f.expand(len(x), -1, -1, -1)


@pytest.mark.parametrize("bnr, sd", [(0, 0.5), (0.5, 0.5), (2, 0.5), (2, 0.3)])
def test_preconditioning_by_hand(bnr, sd):
    net, x = Denoiser(Answer(6), sd), torch.randn(2, 3, 8, 8)
    for t in (1.5, torch.tensor(1.5), torch.tensor([0.02, 40.])):
        d, r = net(x, bnr * t, t)
        for i, s in enumerate(torch.as_tensor(t).expand(2).tolist()):
            total, f1, f2 = s ** 2 + sd ** 2, net.unet.f[:3], net.unet.f[3:]
            c_out, r_out = s * sd / math.sqrt(total), residual_std(bnr * s, x, sd)[0, 0].item()
            torch.testing.assert_close(d[i], sd ** 2 / total * x[i] + c_out * f1)
            torch.testing.assert_close(r[i], r_out * f2)
            asked, c_noise, _, _ = net.unet.asked
            torch.testing.assert_close(asked[i], x[i] / math.sqrt(total))
            assert c_noise[i].item() == pytest.approx(math.log(s) / 4, abs=1e-6)
    assert (r == 0).all() == (bnr == 0)


def test_r_out_is_the_residuals_std_on_images_of_power_1_over_lam():
    spectrum = power_law(16, 12)
    spectrum[0, 0] = 0
    x0 = gaussian_images(4000, 1, spectrum, torch.Generator().manual_seed(0))
    for sd in (0.5, 2.):
        for alpha in (0.3, 1., 5.):
            measured = sd * (x0 - blur(x0, alpha)).std() / x0.std()
            assert residual_std(alpha, x0, sd).item() == pytest.approx(measured.item(), rel=0.02)
    assert residual_std(0, x0, 0.5).item() == 0
    together = residual_std(torch.tensor([0.3, 1.]), x0[:2], 0.5)
    assert together.shape == (2, 1, 1, 1)
    alone = [residual_std(a, x0, 0.5).item() for a in (0.3, 1.)]
    assert together.flatten().tolist() == pytest.approx(alone)


@pytest.mark.parametrize("path", [ConstantBNR(0), ConstantBNR(0.5), BlurringPath()])
def test_the_x0_parameterization_by_hand(path):
    net, x = X0Denoiser(Answer(3)), torch.randn(2, 3, 8, 8)
    for s in (0.05, 3.):
        alpha, sigma = path.levels(s)
        d, r = net(x, alpha, sigma)
        total, r_out = s ** 2 + 0.25, residual_std(alpha, x, 0.5).item()
        scale = math.sqrt(s ** 2 * 0.25 / total + r_out ** 2)
        x0_hat = 0.25 / total * x + scale * net.unet.f
        torch.testing.assert_close(d + r, x0_hat)
        torch.testing.assert_close(d, blur(x0_hat, alpha))
        torch.testing.assert_close(net.unet.asked[0], x / math.sqrt(total))
    if path.levels(1.)[0] == 0:
        assert r.abs().max() < 1e-6                             # EDM itself


@pytest.mark.parametrize("path", [ConstantBNR(0.5), BlurringPath()])
def test_the_noise_parameterization_by_hand(path):
    net, x = NoiseDenoiser(Answer(6)), torch.randn(2, 3, 8, 8)
    alpha, sigma = path.levels(torch.tensor([0.05, 3.]))
    d, r = net(x, alpha, sigma)
    torch.testing.assert_close(d, x - sigma[:, None, None, None] * net.unet.f[:3])
    r_out = residual_std(alpha, x, 0.5).float()
    torch.testing.assert_close(r, r_out * net.unet.f[3:])


@pytest.mark.parametrize("kind", [Denoiser, X0Denoiser])
def test_a_cold_networks_blurry_image_is_what_it_got(kind):
    net, x, t = kind(Answer(3 * kind.heads)), torch.randn(2, 3, 8, 8), torch.tensor([0.3, 4.])
    d, r = net(x, *ColdPath().levels(t))
    assert torch.equal(d, x)
    torch.testing.assert_close(r, residual_std(t, x, 0.5).float() * net.unet.f[-3:])
    c_noise = net.unet.asked[1].tolist()
    assert c_noise == pytest.approx([math.log(0.3) / 4, math.log(4.) / 4])


@pytest.mark.parametrize("channels, h, w", [(1, 16, 16), (3, 8, 12), (4, 16, 8)])
def test_any_channels_and_images_that_are_not_square(channels, h, w):
    net = Denoiser(UNet(channels, 2 * channels, **SMALL))
    sigma = torch.tensor([0.1, 3.])
    d, r = net(torch.randn(2, channels, h, w, dtype=torch.float64), 0.5 * sigma, sigma)
    assert d.shape == r.shape == (2, channels, h, w) and d.dtype == r.dtype == torch.float32


def test_augmentation_and_class_are_passed_on():
    unet, augment, label = Answer(6), torch.ones(2, 9), torch.tensor([1, 0])
    unet.classes = 2
    Denoiser(unet)(torch.zeros(2, 3, 8, 8), 0.5, 1., augment, label)
    assert unet.asked[2] is augment and unet.asked[3] is label and not unet.ratio


def test_labels_are_for_networks_with_classes_and_only_for_them():
    x, label, unet = torch.zeros(2, 3, 8, 8), torch.tensor([1, 0]), Answer(6)
    with pytest.raises(UserError, match="has no classes, and it was called with labels"):
        Denoiser(unet)(x, 0.5, 1., label=label)
    unet.classes = 2
    with pytest.raises(UserError, match="has 2 classes, and it was called without labels"):
        Denoiser(unet)(x, 0.5, 1.)


class Fixed(torch.nn.Module):
    """A unet that answers this, whatever it is asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, c_noise, augment=None, label=None):
        return self.answer


@pytest.mark.parametrize("kind, shape", [(Denoiser, (2, 3, 8, 8)), (X0Denoiser, (2, 6, 8, 8)),
                                         (Denoiser, (1, 6, 8, 8)), (Denoiser, (2, 6, 1, 8)),
                                         (X0Denoiser, (1, 3, 1, 1)), (Denoiser, (2, 6, 8, 9))])
def test_an_output_of_another_shape_is_refused(kind, shape):
    """Also one that would only broadcast."""
    words = rf"must be \[2, {3 * kind.heads}, 8, 8\], and not \[{', '.join(map(str, shape))}\]"
    with pytest.raises(UserError, match=words):
        kind(Fixed(torch.zeros(shape)))(torch.zeros(2, 3, 8, 8), 0.5, 1.)


def test_an_output_that_is_not_a_tensor_is_refused():
    with pytest.raises(UserError, match="must be .* not dict"):         # as diffusers' models do
        Denoiser(Fixed({"sample": torch.zeros(2, 6, 8, 8)}))(torch.zeros(2, 3, 8, 8), 0.5, 1.)


def test_images_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="15 x 16 do not divide by 2"):
        UNet(3, 6, **SMALL)(torch.zeros(1, 3, 15, 16), torch.zeros(1))


@pytest.mark.parametrize("kind, path", [(Denoiser, ConstantBNR(0.5)), (X0Denoiser, ColdPath()),
                                        (NoiseDenoiser, ConstantBNR(0))])
def test_nothing_is_left_on_the_cpu(kind, path):
    """Forward and backward as on a GPU: torch's device "meta" has shapes without numbers, and
    refuses a tensor of another device."""
    with torch.device("meta"):
        net = kind(UNet(3, 3 * kind.heads, **SMALL, augment_dim=9, classes=5, ratio=True))
        x, augment, label = torch.zeros(2, 3, 16, 16), torch.zeros(2, 9), torch.zeros(2).long()
        t = torch.ones(2)
    for level in (t, 0.5):
        net.zero_grad()
        d, r = net(x, *path.levels(level), augment, label)
        (d.sum() + r.sum()).backward()
        assert d.is_meta and r.is_meta and all(p.grad.is_meta for p in net.parameters())


def test_bf16_autocast_leaves_the_preconditioning_alone():
    net, x = Denoiser(Answer(6)), torch.randn(2, 3, 8, 8)
    plain = net(x, 1.5, 3.)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(net(x, 1.5, 3.), plain))


# One network for every ratio

def test_a_network_for_every_ratio_is_told_it():
    """4 b with b = r / (1 + r), r = alpha / sigma: 0 without blur, 4 without noise."""
    unet = Answer(6)
    unet.from_ratio = torch.nn.Identity()
    net, x = Denoiser(unet), torch.randn(3, 3, 8, 8)
    for alpha, sigma in ((0.6, 2.), (torch.tensor(0.6), 2.),
                         (torch.tensor([0., 0.6, 5.]), torch.tensor([1., 2., 0.]))):
        net(x, alpha, sigma)
        pairs = zip(*(torch.as_tensor(v).expand(3).tolist() for v in (alpha, sigma)))
        expected = [4 * (a / s) / (1 + a / s) if s else 4. for a, s in pairs]
        assert unet.ratio["ratio"].tolist() == pytest.approx(expected)


def test_at_bnr_0_a_network_for_every_ratio_is_edm_plus_one_constant_embedding():
    """Its answer is that of the same network without a ratio, to whose embedding one vector is
    added, whatever the level: from_ratio of the sinusoids of 0."""
    torch.manual_seed(0)
    unet = shaken(UNet(3, 6, **SMALL, ratio=True))
    plain = UNet(3, 6, **SMALL).eval()
    left = plain.load_state_dict(unet.state_dict(), strict=False)
    assert (left.missing_keys, left.unexpected_keys) == ([], ["from_ratio.weight"])
    sines, cosines = torch.zeros(8), torch.ones(8)
    constant = unet.from_ratio.weight @ torch.cat([sines, cosines])
    x, sigma = torch.randn(4, 3, 16, 16), torch.tensor([0.01, 0.3, 2., 60.])
    without = Denoiser(plain)(x, 0 * sigma, sigma)[0]
    plain.embed.register_forward_pre_hook(lambda module, args: (args[0] + constant,))
    edm, nothing = Denoiser(plain)(x, 0 * sigma, sigma)
    d, r = Denoiser(unet)(x, 0 * sigma, sigma)
    torch.testing.assert_close(d, edm)
    assert not r.any() and not nothing.any()
    assert ((without - edm).abs().amax((1, 2, 3)) > 1e-3).all()                 # it is not nothing
    blurred = Denoiser(unet)(x, 0.5 * sigma, sigma)[0]
    assert ((blurred - edm).abs().amax((1, 2, 3)) > 1e-3).all()


# From a config

CONFIG = {"bnr": 2., "sigma_data": 0.3,
          "unet": dict(in_channels=1, out_channels=2, **SMALL, dropout=0.2)}


def test_a_config_builds_what_it_says():
    net = build(CONFIG)
    assert type(net) is Denoiser and net.sigma_data == 0.3 and net.classes == 0
    assert (net.unet.last.out_channels, net.unet.encoder[0].dropout) == (2, 0.2)
    assert not net.told_ratio
    more = {"ratio": True, "classes": 3, "out_channels": 1}
    net = build({**CONFIG, "param": "x0", "unet": {**CONFIG["unet"], **more}})
    assert type(net) is X0Denoiser and net.told_ratio and net.classes == 3
    assert type(build({**CONFIG, "param": "noise"})) is NoiseDenoiser


def test_a_config_that_makes_no_sense_is_refused():
    unet = CONFIG["unet"]
    for config, error, words in (({**CONFIG, "sigma_data": 0}, UserError, "sigma_data"),
                                 ({**CONFIG, "param": "score"}, KeyError, "score"),
                                 ({**CONFIG, "unet": {**unet, "blocks": 99}}, UserError, "blocks"),
                                 ({**CONFIG, "unet": {**unet, "mult": [1] * 13}}, UserError,
                                  "mult")):
        with pytest.raises(error, match=words):
            build(config)


# Checkpoints

def saved(file, net, param="residual", own=False, sigma_data=0.5, **unet):
    """A checkpoint of the network with these keywords, as train.py saved them at first."""
    config = {"bnr": 0.5, "param": param, "sigma_data": sigma_data,
              "unet": None if own else {"in_channels": 3, **SMALL, **unet}}
    facts = {"name": "mine", "shape": [3, 16, 16], "classes": ["cat", "dog", "owl"]}
    torch.save({"weights": net.state_dict(), "config": config, "data": facts, "seen": 7,
                "options": {"data": "mine", "resolution": 0, "sample_steps": 18}}, file)
    return file


def test_a_checkpoint_loads_as_its_network(tmp_path):
    torch.manual_seed(0)
    old = shaken(X0Denoiser(UNet(3, 3, **SMALL, dropout=0.5, classes=3), sigma_data=0.3))
    file = saved(tmp_path / "ema.pt", old, "x0", out_channels=3, dropout=0.5, classes=3,
                 sigma_data=0.3)
    net, checkpoint = load_model(file)
    x, label = torch.randn(2, 3, 16, 16), torch.tensor([2, 0])
    torch.testing.assert_close(net(x, 0.5, 1., label=label), old(x, 0.5, 1., label=label))
    assert type(net) is X0Denoiser and checkpoint["seen"] == 7 and net.sigma_data == 0.3
    assert not any(p.requires_grad for p in net.parameters())


class Own(torch.nn.Module):
    """Somebody's own network. It counts in an integer, and its dropout must be off in sampling."""

    def __init__(self, width=4):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, width, 1), torch.nn.BatchNorm2d(width),
                                          torch.nn.Dropout(0.5), torch.nn.Conv2d(width, 6, 1))

    def forward(self, x, c_noise, augment=None, label=None):
        return self.layers(x)


def test_a_network_of_ones_own_loads(tmp_path):
    old, x = Denoiser(Own(), sigma_data=0.3), torch.randn(2, 3, 16, 16)
    old.train()(x, 0.5, 1.)                                     # moves the buffers
    expected = old.eval()(x, 0.5, 1.)
    file = saved(tmp_path / "ema.pt", old, own=True, sigma_data=0.3)
    with pytest.raises(UserError, match="a network of your own: .* as net"):
        load_model(file)
    given = Denoiser(Own())                                     # whose sigma_data is another
    net, _ = load_model(file, net=given)
    assert net is given and not net.training and net.unet.layers[1].num_batches_tracked == 1
    torch.testing.assert_close(net(x, 0.5, 1.), expected)
    with pytest.raises(UserError, match="do not fit its network: .*size mismatch"):
        load_model(file, net=Denoiser(Own(5)))
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["config"]["answers"] = "NoiseDenoiser, NoiseDenoiser.answers"
    torch.save(checkpoint, tmp_path / "other.pt")
    with pytest.raises(UserError, match="of another kind, NoiseDenoiser"):
        load_model(tmp_path / "other.pt", net=given)
    load_model(tmp_path / "other.pt", net=NoiseDenoiser(Own()))
    with pytest.raises(UserError, match="of your own: give load_model its Denoiser"):
        start_from(Denoiser(Own(), sigma_data=0.3), file)


def test_layers_that_are_new_add_nothing_at_first(tmp_path):
    torch.manual_seed(0)
    old = shaken(Denoiser(UNet(3, 6, **SMALL)))
    file = saved(tmp_path / "ema.pt", old, out_channels=6)
    net = shaken(Denoiser(UNet(3, 6, **SMALL, augment_dim=9, classes=2, ratio=True)))
    start_from(net, file, ["cat", "fox"])
    x, augment, label = torch.randn(2, 3, 16, 16), torch.randn(2, 9), torch.tensor([0, 1])
    torch.testing.assert_close(net(x, 2., 1., augment, label), old(x, 2., 1.))


def test_a_layer_for_augmentation_may_be_left_out(tmp_path):
    torch.manual_seed(0)
    old, net = shaken(Denoiser(UNet(3, 6, **SMALL, augment_dim=9))), Denoiser(UNet(3, 6, **SMALL))
    start_from(net, saved(tmp_path / "ema.pt", old, out_channels=6, augment_dim=9))
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(net(x, 2., 1.), old(x, 2., 1.))


def test_classes_start_by_name_and_a_new_one_as_the_mean(tmp_path):
    torch.manual_seed(0)
    old = shaken(Denoiser(UNet(3, 6, **SMALL, classes=3)))
    file = saved(tmp_path / "ema.pt", old, out_channels=6, classes=3)
    net = Denoiser(UNet(3, 6, **SMALL, classes=4))
    start_from(net, file, ["owl", "fox", "cat", "dog"])
    x, c_noise = torch.randn(4, 3, 8, 8), torch.zeros(4)
    cat, dog, owl = embeddings(old.unet, x[:3], c_noise[:3], label=torch.arange(3))
    expected = torch.stack([owl, (cat + dog + owl) / 3, cat, dog])
    torch.testing.assert_close(embeddings(net.unet, x, c_noise, label=torch.arange(4)), expected)


@pytest.mark.parametrize("old, new, words", [
    ({}, {"channels": 24}, "size mismatch"), ({}, {"blocks": 2}, "Missing key"),
    ({"ratio": True}, {}, "unet.from_ratio"), ({"classes": 3}, {}, "unet.from_label")])
def test_what_does_not_fit_is_named(tmp_path, old, new, words):
    file = saved(tmp_path / "ema.pt", Denoiser(UNet(3, 6, **{**SMALL, **old})), out_channels=6,
                 **old)
    nets = {words: Denoiser(UNet(3, 6, **{**SMALL, **new})),
            "--param or sigma_data": NoiseDenoiser(UNet(3, 6, **SMALL)),
            "sigma_data differs": Denoiser(UNet(3, 6, **SMALL), sigma_data=0.3)}
    for reason, net in nets.items():
        with pytest.raises(UserError, match=f"ema.pt does not fit this network: .*{reason}"):
            start_from(net, file)
