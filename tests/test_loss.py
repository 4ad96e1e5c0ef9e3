import math

import pytest
import torch

from degrade import BlurNoisePath, blur, degrade
from exact import gaussian_heads, gaussian_pictures, m_of, power_law
from loss import disentangled_loss, training_levels, weight


def test_bnr_0_is_edms_loss():
    g = torch.Generator().manual_seed(0)
    x0, noise, sigma = torch.randn(6, 3, 8, 8, generator=g), torch.randn(6, 3, 8, 8, generator=g), torch.rand(6, generator=g) * 3 + 0.1
    net = lambda x, t: (x.tanh(), torch.zeros_like(x))
    denoise, deblur = disentangled_loss(net, x0, BlurNoisePath(0), sigma, noise)
    for i, s in enumerate(sigma.tolist()):
        edm = (s ** 2 + 0.25) / (s * 0.5) ** 2 * (torch.tanh(x0[i] + s * noise[i]) - x0[i]).square().mean()
        assert denoise[i].item() == pytest.approx(edm.item(), rel=1e-4)
    assert deblur.abs().max() < 1e-12


@pytest.mark.parametrize("bnr", [0, 0.5, 2])
def test_the_exact_heads_have_the_least_loss_and_it_is_the_closed_form(bnr):
    h, w = 6, 10
    spectrum, path, g = power_law(h, w), BlurNoisePath(bnr), torch.Generator().manual_seed(1)
    x0 = gaussian_pictures(4000, 1, spectrum, g)
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=g)
    exact = gaussian_heads(spectrum, path)
    for sigma in (0.1, 0.5, 2.):
        m = m_of(bnr * sigma, h, w)
        left = spectrum * sigma ** 2 / (m ** 2 * spectrum + sigma ** 2)
        scale = (sigma ** 2 + 0.25) / (0.5 * sigma) ** 2
        least = [scale * (m ** 2 * left).mean(), scale * ((1 - m) ** 2 * left).mean()]
        losses = disentangled_loss(exact, x0, path, sigma, noise)
        for value, closed in zip(losses, least):
            assert (value.mean() - closed).abs() <= 4 * value.std() / math.sqrt(len(value)) + 1e-12
        for factor in (0.9, 1.1):                               # each head off by a tenth, and only its own term grows
            worse = disentangled_loss(lambda x, t: (factor * exact(x, t)[0], exact(x, t)[1]), x0, path, sigma, noise)
            assert worse[0].mean() > losses[0].mean() and torch.equal(worse[1], losses[1])
            worse = disentangled_loss(lambda x, t: (exact(x, t)[0], factor * exact(x, t)[1]), x0, path, sigma, noise)
            assert torch.equal(worse[0], losses[0]) and (bnr == 0 or worse[1].mean() > losses[1].mean())


def test_the_terms_are_each_pictures_own():
    x0, noise, path = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), BlurNoisePath(2)
    t = torch.tensor([0.1, 1., 10.])
    net = lambda x, t: (0.5 * x, 0.1 * x)
    together = disentangled_loss(net, x0, path, t, noise)
    for i in range(3):
        alone = disentangled_loss(net, x0[i:i + 1], path, t[i:i + 1], noise[i:i + 1])
        for a, b in zip(together, alone):
            torch.testing.assert_close(a[i:i + 1], b)
    x, blurry = degrade(x0, t, path, noise)
    torch.testing.assert_close(together[1], weight(t) * (0.1 * x - (x0 - blurry)).square().mean((1, 2, 3)))
    torch.testing.assert_close(blurry[1:2], blur(x0[1:2], 2.))


def test_training_levels_are_log_normal():
    torch.manual_seed(0)
    z = training_levels((100_000, 1, 1, 1), BlurNoisePath(0.5)).log()
    assert z.mean().item() == pytest.approx(-1.2, abs=0.02) and z.std().item() == pytest.approx(1.2, abs=0.02)


def test_sigma_data_is_the_weights():
    x0, noise, net = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), lambda x, t: (x, x)
    one, half = (disentangled_loss(net, x0, BlurNoisePath(1), 0.7, noise, sigma_data=sd)[0] for sd in (1., 0.5))
    torch.testing.assert_close(one / half, torch.full((2,), (0.49 + 1) / 0.49 / ((0.49 + 0.25) / (0.7 * 0.5) ** 2)))


def test_levels_are_the_training_levels_unless_given():
    asked = []
    torch.manual_seed(1)
    disentangled_loss(lambda x, t: (asked.append(t), x, x)[1:], torch.zeros(5, 1, 4, 4), BlurNoisePath(0.5))
    torch.manual_seed(1)
    assert torch.equal(asked[0], training_levels((5, 1, 4, 4), BlurNoisePath(0.5)))


def test_defaults_draw_from_torchs_global_generator():
    x0, net = torch.randn(4, 3, 8, 8), lambda x, t: (x, x)
    torch.manual_seed(3)
    a = disentangled_loss(net, x0, BlurNoisePath(0.5))
    torch.manual_seed(3)
    b = disentangled_loss(net, x0, BlurNoisePath(0.5))
    assert all(torch.equal(u, v) for u, v in zip(a, b)) and a[0].shape == (4,)
