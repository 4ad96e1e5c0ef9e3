import math

import pytest
import torch

from degrade import ColdSchedule, dct2, idct2
from exact import gaussian_heads, gaussian_images, m_of, power_law
from loss import disentangled_loss


@pytest.mark.parametrize("sigma_data", [0.3, 0.5, 1.])
def test_at_bnr_0_it_is_edms_loss(sigma_data):
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(6, 3, 8, 8, generator=g)
    noise = torch.randn(6, 3, 8, 8, generator=g)
    sigma = torch.rand(6, generator=g) * 3 + 0.1

    def net(x, alpha, sigma):
        return x.tanh(), torch.zeros_like(x)
    denoise, deblur = disentangled_loss(net, x0, 0 * sigma, sigma, noise, sigma_data)
    for i, s in enumerate(sigma.tolist()):
        error = (torch.tanh(x0[i] + s * noise[i]) - x0[i]).square().mean()
        edm = (s ** 2 + sigma_data ** 2) / (s * sigma_data) ** 2 * error
        assert denoise[i].item() == pytest.approx(edm.item(), rel=1e-4)
    assert deblur.abs().max() < 1e-12


@pytest.mark.parametrize("bnr", [0, 0.5, 2])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.])
def test_the_exact_heads_have_the_least_loss_and_it_is_the_closed_form(bnr, sigma):
    """Where either head is off by a tenth, its own term grows and the other stays."""
    h, w = 6, 10
    spectrum = power_law(h, w)
    g = torch.Generator().manual_seed(1)
    x0 = gaussian_images(4000, 1, spectrum, g)
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=g)
    exact = gaussian_heads(spectrum)

    def loss(factor_d, factor_r):
        def net(x, alpha, sigma):
            d, r = exact(x, alpha, sigma)
            return factor_d * d, factor_r * r
        return disentangled_loss(net, x0, bnr * sigma, sigma, noise, 0.5)
    denoise, deblur = loss(1, 1)
    m = m_of(bnr * sigma, h, w)
    posterior_variance = spectrum * sigma ** 2 / (m ** 2 * spectrum + sigma ** 2)
    weight = (sigma ** 2 + 0.25) / (0.5 * sigma) ** 2
    for value, share in ((denoise, m), (deblur, 1 - m)):
        least = weight * (share ** 2 * posterior_variance).mean()
        standard_error = value.std() / math.sqrt(len(value))
        assert (value.mean() - least).abs() <= 4 * standard_error + 1e-12
    for factor in (0.9, 1.1):
        worse, same = loss(factor, 1)
        assert worse.mean() > denoise.mean() and torch.equal(same, deblur)
        same, worse = loss(1, factor)
        assert torch.equal(same, denoise)
        assert bnr == 0 or worse.mean() > deblur.mean()


def test_the_cold_loss_is_one_where_nothing_is_learned():
    """On images of power 1 / lam and total variance sigma_data^2 the residual has the size that
    the loss divides by, at every level."""
    spectrum = power_law(8, 12)
    spectrum[0, 0] = 0
    spectrum = spectrum * 0.25 / spectrum.mean()
    x0 = gaussian_images(20_000, 1, spectrum, torch.Generator().manual_seed(0))
    noise = torch.zeros_like(x0)

    def nothing(x, alpha, sigma):
        return x, torch.zeros_like(x)

    def exact(x, alpha, sigma):
        m = m_of(alpha, 8, 12)
        return x, idct2((1 / m - 1) * dct2(x))                  # blur is invertible
    for t in (0.1, 1., 8., torch.tensor([0.1, 1.]).repeat(10_000)):
        denoise, deblur = disentangled_loss(nothing, x0, *ColdSchedule().levels(t), noise, 0.5)
        assert deblur.mean().item() == pytest.approx(1, rel=0.02)
        assert not denoise.any()
    assert disentangled_loss(exact, x0, 1., 0., noise, 0.5)[1].max() < 1e-12
