"""The two heads, EDM's trunk where tests/test_edm.py does not see it, and checkpoints."""
import math

import pytest
import torch

from degrade import BlurringSchedule, ColdSchedule, ConstantBNR, blur
from exact import gaussian_images, power_law
from model import Block, Denoiser, NoiseDenoiser, UNet, X0Denoiser, residual_std
from util.checkpoint import load_model, start_from
from util.cli import UserError

SMALL = dict(channels=16, mult=(1, 2), blocks=1, attention=(8,), resolution=16)


def perturbed(module):
    """Every parameter moved off its initial value, so that nothing is hidden behind a zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.eval()


# The trunk. Its forward pass is compared with EDM's own answers in tests/test_edm.py.


def test_initialization_is_edms():
    unet = UNet(3, 6, augment_dim=9, ratio=True)
    attention = unet.middle[0].attention
    block = unet.encoder[0]
    for layer, fan_in, fan_out, scale in ((unet.first, 27, 1152, 1), (unet.last, 2304, 54, 1e-5),
                                          (block.conv2, 2304, 2304, 1e-5),
                                          (attention.qkv, 256, 768, math.sqrt(0.2)),
                                          (attention.out, 256, 256, 1e-5),
                                          (unet.embed[0], 128, 512, 1),
                                          (block.from_emb, 512, 256, 1),
                                          (unet.from_augment, 9, 128, 1),
                                          (unet.from_ratio, 128, 128, 1)):
        bound = math.sqrt(6 / (fan_in + fan_out)) * scale       # Xavier-uniform
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert layer.bias is None or not layer.bias.any()


def test_dropout_comes_before_the_second_convolution_and_in_training_only():
    block = perturbed(Block(8, 8, 4, dropout=1 - 1e-6))
    x = torch.randn(1, 8, 4, 4)
    emb = torch.randn(1, 4)
    only_its_bias = (x + block.conv2.bias[:, None, None]) * math.sqrt(0.5)
    assert not torch.allclose(block(x, emb), only_its_bias)
    torch.testing.assert_close(block.train()(x, emb), only_its_bias)


# The heads


class Fixed(torch.nn.Module):
    """A unet with a fixed output, which records its inputs."""

    def __init__(self, f, classes=0):
        super().__init__()
        self.f = f
        self.classes = classes

    def forward(self, x, c_noise, augment=None, label=None, **ratio):
        self.inputs = (x, c_noise, augment, label)
        self.ratio = ratio
        return self.f


def fixed(channels, **kw):
    return Fixed(torch.randn(2, channels, 8, 8), **kw)


@pytest.mark.parametrize("bnr, sigma_data", [(0, 0.5), (0.5, 0.5), (2, 0.3)])
@pytest.mark.parametrize("t", [1.5, torch.tensor(1.5), torch.tensor([0.02, 40.])])
def test_preconditioning_is_equation_7(bnr, sigma_data, t):
    net = Denoiser(fixed(6), sigma_data)
    x = torch.randn(2, 3, 8, 8)
    d, r = net(x, bnr * t, t)
    c_in_x, c_noise, _, _ = net.unet.inputs
    f1, f2 = net.unet.f.chunk(2, 1)
    for i, sigma in enumerate(torch.as_tensor(t).expand(2).tolist()):
        variance = sigma ** 2 + sigma_data ** 2
        c_out = sigma * sigma_data / math.sqrt(variance)
        r_out = residual_std(bnr * sigma, x, sigma_data).item()
        torch.testing.assert_close(d[i], sigma_data ** 2 / variance * x[i] + c_out * f1[i])
        torch.testing.assert_close(r[i], r_out * f2[i])
        torch.testing.assert_close(c_in_x[i], x[i] / math.sqrt(variance))
        assert c_noise[i].item() == pytest.approx(math.log(sigma) / 4, abs=1e-6)
    assert (r == 0).all() == (bnr == 0)


def test_r_out_is_the_residuals_std_on_images_of_power_1_over_lam():
    spectrum = power_law(16, 12)
    spectrum[0, 0] = 0
    x0 = gaussian_images(4000, 1, spectrum, torch.Generator().manual_seed(0))
    alphas = [0., 0.3, 1., 5.]
    for alpha in alphas:
        measured = 0.7 * (x0 - blur(x0, alpha)).std() / x0.std()
        assert residual_std(alpha, x0, 0.7).item() == pytest.approx(measured.item(), rel=0.02)
    together = residual_std(torch.tensor(alphas), x0, 0.7)      # [4, 1, 1, 1]
    for alpha, r_out in zip(alphas, together):
        torch.testing.assert_close(r_out, residual_std(alpha, x0, 0.7)[None])


@pytest.mark.parametrize("schedule", [ConstantBNR(0), ConstantBNR(0.5), BlurringSchedule()])
def test_the_x0_parameterization_is_equation_12(schedule):
    net = X0Denoiser(fixed(3))
    x = torch.randn(2, 3, 8, 8)
    for s in (0.05, 3.):
        alpha, sigma = schedule.levels(s)
        d, r = net(x, alpha, sigma)
        variance = s ** 2 + 0.25
        scale = math.sqrt(s ** 2 * 0.25 / variance + residual_std(alpha, x, 0.5).item() ** 2)
        x0_hat = 0.25 / variance * x + scale * net.unet.f
        torch.testing.assert_close(d + r, x0_hat)
        torch.testing.assert_close(d, blur(x0_hat, alpha))


def test_the_noise_parameterization_is_equation_13():
    net = NoiseDenoiser(fixed(6))
    x = torch.randn(2, 3, 8, 8)
    alpha, sigma = ConstantBNR(0.5).levels(torch.tensor([0.05, 3.]))
    d, r = net(x, alpha, sigma)
    n_hat, f2 = net.unet.f.chunk(2, 1)
    torch.testing.assert_close(d, x - sigma.float()[:, None, None, None] * n_hat)
    torch.testing.assert_close(r, residual_std(alpha, x, 0.5).float() * f2)


@pytest.mark.parametrize("kind", [Denoiser, X0Denoiser])
def test_a_cold_networks_blurry_image_is_its_input(kind):
    net = kind(fixed(3 * kind.heads))
    x = torch.randn(2, 3, 8, 8)
    t = torch.tensor([0.3, 4.])
    d, r = net(x, *ColdSchedule().levels(t))
    assert torch.equal(d, x)
    torch.testing.assert_close(r, residual_std(t, x, 0.5).float() * net.unet.f[:, -3:])
    torch.testing.assert_close(net.unet.inputs[1], t.log() / 4)


def test_augmentation_and_class_are_passed_on_and_a_label_too_many_or_too_few_is_refused():
    x = torch.zeros(2, 3, 8, 8)
    augment = torch.ones(2, 9)
    label = torch.tensor([1, 0])
    net = Denoiser(fixed(6, classes=2))
    net(x, 0.5, 1., augment, label)
    assert net.unet.inputs[2] is augment and net.unet.inputs[3] is label and not net.unet.ratio
    with pytest.raises(UserError, match="has 2 classes, and it was called without labels"):
        net(x, 0.5, 1.)
    with pytest.raises(UserError, match="has no classes, and it was called with labels"):
        Denoiser(fixed(6))(x, 0.5, 1., label=label)


@pytest.mark.parametrize("kind, output, words", [
    (Denoiser, torch.zeros(2, 3, 8, 8), r"must be \[2, 6, 8, 8\], and not \[2, 3, 8, 8\]"),
    (Denoiser, torch.zeros(2, 6, 1, 8), r"must be \[2, 6, 8, 8\], and not \[2, 6, 1, 8\]"),
    (X0Denoiser, torch.zeros(1, 3, 1, 1), r"must be \[2, 3, 8, 8\], and not \[1, 3, 1, 1\]"),
    (Denoiser, {"sample": torch.zeros(2, 6, 8, 8)}, "not dict"),               # as in diffusers
    (Denoiser, torch.zeros(2, 6, 8, 8).long(), "not torch.int64")])
def test_an_output_of_another_shape_or_type_is_refused(kind, output, words):
    """Also one that would only broadcast."""
    with pytest.raises(UserError, match=words):
        kind(Fixed(output))(torch.zeros(2, 3, 8, 8), 0.5, 1.)


def test_images_whose_sides_do_not_divide_are_refused():
    with pytest.raises(UserError, match="15 x 16 do not divide by 2"):
        Denoiser(UNet(3, 6, **SMALL))(torch.zeros(2, 3, 15, 16), 0.5, 1.)


# One network for every ratio


def test_a_network_for_every_ratio_is_conditioned_on_equation_14():
    """4 b with b = r / (1 + r), r = alpha / sigma: 0 without blur, 4 without noise."""
    unet = Fixed(torch.zeros(3, 6, 8, 8))
    unet.from_ratio = torch.nn.Identity()
    net = Denoiser(unet)
    x = torch.randn(3, 3, 8, 8)
    net(x, torch.tensor([0., 0.6, 5.]), torch.tensor([1., 2., 0.]))
    assert unet.ratio["ratio"].tolist() == pytest.approx([0, 4 * 0.3 / 1.3, 4])
    net(x, 0.6, 2.)
    assert unet.ratio["ratio"].tolist() == pytest.approx([4 * 0.3 / 1.3] * 3)


def test_at_bnr_0_a_network_for_every_ratio_is_edm_plus_one_constant_embedding():
    """Its output is that of the same network without a ratio, to whose embedding one vector is
    added, whatever the level: from_ratio of the sinusoids of 0."""
    unet = perturbed(UNet(3, 6, **SMALL, ratio=True))
    plain = UNet(3, 6, **SMALL).eval()
    missing, unexpected = plain.load_state_dict(unet.state_dict(), strict=False)
    assert missing == [] and unexpected == ["from_ratio.weight"]
    sines_and_cosines_of_0 = torch.cat([torch.zeros(8), torch.ones(8)])
    constant = unet.from_ratio.weight @ sines_and_cosines_of_0
    x = torch.randn(4, 3, 16, 16)
    sigma = torch.tensor([0.01, 0.3, 2., 60.])
    without, _ = Denoiser(plain)(x, 0, sigma)
    plain.embed.register_forward_pre_hook(lambda module, inputs: (inputs[0] + constant,))
    edm, _ = Denoiser(plain)(x, 0, sigma)
    d, r = Denoiser(unet)(x, 0, sigma)
    torch.testing.assert_close(d, edm)
    assert not r.any()
    blurred, _ = Denoiser(unet)(x, 0.5 * sigma, sigma)
    for other in (without, blurred):
        assert ((other - edm).abs().amax((1, 2, 3)) > 1e-3).all()


# Checkpoints

FACTS = {"name": "mine", "shape": [3, 16, 16], "classes": ["cat", "dog", "owl"]}


def save(file, net, unet, param="residual"):
    """A checkpoint of train.py. unet: the keywords of its UNet, or None for one of one's own."""
    config = {"bnr": 0.5, "param": param, "sigma_data": net.sigma_data, "unet": unet}
    torch.save({"weights": net.state_dict(), "config": config, "data": FACTS, "seen": 7,
                "options": {"sample_steps": 18}}, file)
    return file


def saved(folder, **changes):
    """A small network with these changes of SMALL, and its file."""
    unet = {"in_channels": 3, "out_channels": 6, **SMALL, **changes}
    net = perturbed(Denoiser(UNet(**unet)))
    return net, save(folder / "ema.pt", net, unet)


class Own(torch.nn.Conv2d):
    """A network of one's own."""

    def forward(self, x, c_noise, augment=None, label=None):
        return super().forward(x)


def test_a_network_of_ones_own_loads(tmp_path):
    old = Denoiser(Own(3, 6, 3, padding=1), sigma_data=0.3)
    x = torch.randn(2, 3, 16, 16)
    file = save(tmp_path / "ema.pt", old, None)
    given = Denoiser(Own(3, 6, 3, padding=1))                   # whose sigma_data is another
    net, _ = load_model(file, net=given)
    assert net is given and not net.training
    torch.testing.assert_close(net(x, 0.5, 1.), old(x, 0.5, 1.))
    with pytest.raises(UserError, match="a network of your own: .* as net"):
        load_model(file)
    with pytest.raises(UserError, match="can be loaded here: .*size mismatch"):
        load_model(file, net=Denoiser(Own(3, 6, 1)))
    with pytest.raises(UserError, match="of your own: give load_model its Denoiser"):
        start_from(Denoiser(Own(3, 6, 3), sigma_data=0.3), file)

    checkpoint = torch.load(file, weights_only=True)
    checkpoint["config"]["precondition"] = "NoiseDenoiser.precondition"
    torch.save(checkpoint, file)
    load_model(file, net=NoiseDenoiser(Own(3, 6, 3, padding=1)))
    with pytest.raises(UserError, match="of another kind, NoiseDenoiser"):
        load_model(file, net=given)


def test_training_starts_from_a_checkpoint_and_new_layers_add_nothing_at_first(tmp_path):
    old, file = saved(tmp_path)
    net = perturbed(Denoiser(UNet(3, 6, **SMALL, augment_dim=9, classes=2, ratio=True)))
    start_from(net, file, ["cat", "fox"])
    x = torch.randn(2, 3, 16, 16)
    augment = torch.randn(2, 9)
    torch.testing.assert_close(net(x, 2., 1., augment, torch.tensor([0, 1])), old(x, 2., 1.))

    old, file = saved(tmp_path, augment_dim=9)                  # this layer may be left out
    net = Denoiser(UNet(3, 6, **SMALL))
    start_from(net, file)
    torch.testing.assert_close(net(x, 2., 1.), old(x, 2., 1.))


def test_classes_start_by_name_and_a_new_one_as_the_mean(tmp_path):
    old, file = saved(tmp_path, classes=3)
    net = Denoiser(UNet(3, 6, **SMALL, classes=4))
    start_from(net, file, ["owl", "fox", "cat", "dog"])

    def class_embeddings(unet):
        one_hot = torch.eye(unet.classes) * math.sqrt(unet.classes)
        return unet.from_label(one_hot)                         # [classes, embedding]
    cat, dog, owl = class_embeddings(old.unet)
    expected = torch.stack([owl, (cat + dog + owl) / 3, cat, dog])
    torch.testing.assert_close(class_embeddings(net.unet), expected)


@pytest.mark.parametrize("old, new, words", [
    ({}, {"channels": 24}, "size mismatch"), ({}, {"blocks": 2}, "Missing key"),
    ({"ratio": True}, {}, "--bnr or sigma_data"), ({"classes": 3}, {}, "unet.from_label")])
def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path, old, new, words):
    _, file = saved(tmp_path, **old)
    unet = UNet(3, 6, **{**SMALL, **new})
    differs = "--param, --bnr or sigma_data"
    for net, reason in ((Denoiser(unet), words), (NoiseDenoiser(unet), differs),
                        (Denoiser(unet, sigma_data=0.3), differs)):
        with pytest.raises(UserError, match=f"ema.pt does not fit this network: .*{reason}"):
            start_from(net, file)
