import math

import pytest
import torch

from degrade import ColdPath, blur, dct2, degrade, idct2
from exact import gaussian_heads, gaussian_images, m_of, power_law
from loss import disentangled_loss, weights
from model import Denoiser


def test_bnr_0_is_edms_loss():
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 6, 3, 8, 8, generator=g)
    sigma = torch.rand(6, generator=g) * 3 + 0.1
    net = lambda x, alpha, sigma: (x.tanh(), torch.zeros_like(x))
    denoise, deblur = disentangled_loss(net, x0, 0 * sigma, sigma, noise, 0.5)
    for i, s in enumerate(sigma.tolist()):
        error = (torch.tanh(x0[i] + s * noise[i]) - x0[i]).square().mean()
        edm = (s ** 2 + 0.25) / (s * 0.5) ** 2 * error
        assert denoise[i].item() == pytest.approx(edm.item(), rel=1e-4)
    assert deblur.abs().max() < 1e-12


@pytest.mark.parametrize("bnr", [0, 0.5, 2])
def test_the_exact_heads_have_the_least_loss_and_it_is_the_closed_form(bnr):
    h, w = 6, 10
    spectrum, g = power_law(h, w), torch.Generator().manual_seed(1)
    x0 = gaussian_images(4000, 1, spectrum, g)
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=g)
    exact = gaussian_heads(spectrum)
    for sigma in (0.1, 0.5, 2.):
        m = m_of(bnr * sigma, h, w)
        left = spectrum * sigma ** 2 / (m ** 2 * spectrum + sigma ** 2)
        scale = (sigma ** 2 + 0.25) / (0.5 * sigma) ** 2
        least = [scale * (m ** 2 * left).mean(), scale * ((1 - m) ** 2 * left).mean()]
        loss = lambda net: disentangled_loss(net, x0, bnr * sigma, sigma, noise, 0.5)
        losses = loss(exact)
        for value, closed in zip(losses, least):
            error = value.std() / math.sqrt(len(value))
            assert (value.mean() - closed).abs() <= 4 * error + 1e-12
        for factor in (0.9, 1.1):       # each head off by a tenth, and only its own term grows
            worse = loss(lambda *a: (factor * exact(*a)[0], exact(*a)[1]))
            assert worse[0].mean() > losses[0].mean() and torch.equal(worse[1], losses[1])
            worse = loss(lambda *a: (exact(*a)[0], factor * exact(*a)[1]))
            assert torch.equal(worse[0], losses[0])
            assert bnr == 0 or worse[1].mean() > losses[1].mean()


def test_the_terms_are_each_images_own():
    x0, noise = torch.randn(2, 3, 1, 4, 4)
    t = torch.tensor([0.1, 1., 10.])
    net = lambda x, alpha, sigma: (0.5 * x, 0.1 * x)
    together = disentangled_loss(net, x0, 2 * t, t, noise, 0.5)
    for i in range(3):
        some = slice(i, i + 1)
        alone = disentangled_loss(net, x0[some], 2 * t[some], t[some], noise[some], 0.5)
        for a, b in zip(together, alone):
            torch.testing.assert_close(a[some], b)
    x, blurry = degrade(x0, 2 * t, t, noise)
    w = (t ** 2 + 0.25) / (0.5 * t) ** 2
    expected = w * (0.1 * x - (x0 - blurry)).square().mean((1, 2, 3))
    torch.testing.assert_close(together[1], expected)
    torch.testing.assert_close(blurry[1:2], blur(x0[1:2], 2.))


def test_each_image_may_have_a_ratio_of_its_own():
    x0, noise = torch.randn(2, 2, 1, 8, 8)
    alpha, sigma = torch.tensor([0., 3.]), torch.tensor([1., 0.3])
    net = lambda x, alpha, sigma: (0.5 * x, 0.1 * x)
    together = disentangled_loss(net, x0, alpha, sigma, noise, 0.5)
    for i in range(2):
        alone = disentangled_loss(net, x0[i:i + 1], alpha[i].item(), sigma[i].item(),
                                  noise[i:i + 1], 0.5)
        torch.testing.assert_close(torch.stack(together)[:, i:i + 1], torch.stack(alone))


def test_the_network_is_told_the_levels_of_its_image():
    told = []
    net = lambda *a: told.append(a) or (a[0], a[0])
    x0, noise, alpha, sigma = *torch.randn(2, 3, 1, 4, 4), torch.rand(3), torch.rand(3)
    disentangled_loss(net, x0, alpha, sigma, noise, 0.5)
    assert torch.equal(told[0][1], alpha) and torch.equal(told[0][2], sigma)
    assert torch.equal(told[0][0], degrade(x0, alpha, sigma, noise)[0])


class Ones(torch.nn.Module):
    """A unet whose two answers are 1 everywhere."""

    def forward(self, x, c_noise, augment=None, label=None):
        return torch.ones_like(x).repeat(1, 2, 1, 1)


@pytest.mark.parametrize("sd", [0.3, 0.5, 1.])
def test_sigma_data_is_the_preconditionings_and_the_weights(sd):
    """w = 1 / c_out^2, so that the first head's target has unit size: EDM's rule."""
    x0, sigma = torch.zeros(1, 1, 8, 8), 0.7
    net = Denoiser(Ones(), sigma_data=sd)
    d, _ = net(x0, 0., sigma)                                   # x = 0, so D is c_out
    w, _ = weights(x0, 0., sigma, net.sigma_data)
    assert w.item() == pytest.approx(d[0, 0, 0, 0].item() ** -2, rel=1e-5)


def test_the_cold_loss_is_one_where_nothing_is_learned():
    """On images of power 1 / lam and total variance sd^2 the residual has the size that the loss
    divides by, at every level."""
    s, g = power_law(8, 12), torch.Generator().manual_seed(0)
    s[0, 0] = 0
    s = s * 0.25 / s.mean()
    x0 = gaussian_images(20_000, 1, s, g)
    noise, nothing = torch.zeros_like(x0), lambda x, *a: (x, 0 * x)
    for t in (0.1, 1., 8.):
        denoise, deblur = disentangled_loss(nothing, x0, *ColdPath().levels(t), noise, 0.5)
        assert deblur.mean().item() == pytest.approx(1, rel=0.02) and not denoise.any()
    undo = lambda x, *a: (x, idct2((1 / m_of(1., 8, 12) - 1) * dct2(x)))        # blur is invertible
    assert disentangled_loss(undo, x0, 1., 0., noise, 0.5)[1].max() < 1e-12
    t = torch.tensor([0.1, 1.]).repeat(10_000)
    deblur = disentangled_loss(nothing, x0, *ColdPath().levels(t), noise, 0.5)[1]
    assert deblur.mean().item() == pytest.approx(1, rel=0.02)
