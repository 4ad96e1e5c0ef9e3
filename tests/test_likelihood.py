"""The bound of study/likelihood.py: with exact heads it is -log p, whatever the schedule."""
import math

import numpy as np
import pytest
import torch

from degrade import BlurringSchedule, ConstantBNR, append_dims, dct2, idct2
from exact import gaussian_heads, gaussian_images, m_of, power_law
from study.likelihood import bound, grid, measured, simpson, table

SCHEDULES = [ConstantBNR(0), ConstantBNR(0.5), ConstantBNR(2), BlurringSchedule()]
NAMES = ["hot", "0.5", "2", "blurring"]


def total(net, schedule, x0, levels=41):
    """The mean of the bound, nats an image."""
    ends, steps, _ = bound(net, schedule, x0, levels)
    return (ends + steps.sum(0)).sum((1, 2)).mean().item()


def normal_nats(u, mean, variance):
    """-log N(u; mean, variance), summed over all but the first dimension."""
    nats = ((u - mean) ** 2 / variance + (2 * math.pi * variance).log()) / 2
    return nats.sum((1, 2, 3))


class Mixture:
    """Gaussians of equal probability in the DCT domain, [K, 1, H, W] their means and variances."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        white = torch.full((8, 8), 0.001, dtype=torch.float64)
        spectra = [power_law(8, 8, 0.002), power_law(8, 8, 0.01), white]
        self.variances = torch.stack(spectra)[:, None]
        self.means = 0.2 * torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=generator)

    def images(self, n):
        generator = torch.Generator().manual_seed(2)
        kind = torch.randint(3, (n,), generator=generator)
        z = torch.randn(n, 1, 8, 8, dtype=torch.float64, generator=generator)
        return idct2(self.means[kind] + self.variances[kind].sqrt() * z)

    def nats(self, x0):
        of_kinds = [normal_nats(dct2(x0), m, v) for m, v in zip(self.means, self.variances)]
        return math.log(3) - torch.logsumexp(-torch.stack(of_kinds), 0)

    def heads(self, x, alpha, sigma):
        u = dct2(x)
        m = m_of(alpha, 8, 8)
        noise = append_dims(sigma, x, torch.float64) ** 2
        logits = []
        estimates = []
        for mean, variance in zip(self.means, self.variances):
            logits.append(-normal_nats(u, m * mean, m ** 2 * variance + noise))
            gain = m * variance / (m ** 2 * variance + noise)
            estimates.append(mean + gain * (u - m * mean))
        p = torch.softmax(torch.stack(logits), 0)
        x0_hat = (p[:, :, None, None, None] * torch.stack(estimates)).sum(0)
        return idct2(m * x0_hat), idct2((1 - m) * x0_hat)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_of_gaussian_images_it_is_minus_log_p(schedule):
    spectrum = power_law(8, 8, 0.05)
    x0 = gaussian_images(400, 1, spectrum, torch.Generator().manual_seed(0))
    truth = normal_nats(dct2(x0), 0, spectrum).mean().item()
    assert abs(truth) > 30                                      # so 0.2 % of it is little
    assert total(gaussian_heads(spectrum), schedule, x0) == pytest.approx(truth, rel=0.002)


def test_of_a_mixture_it_is_minus_log_p_whatever_the_schedule():
    mixture = Mixture()
    x0 = mixture.images(300)
    truth = mixture.nats(x0).mean().item()
    u = dct2(x0)
    of_one_gaussian = normal_nats(u, u.mean(0), u.var(0)).mean().item()
    assert of_one_gaussian > truth + 50                         # the heads are far from linear
    totals = [total(mixture.heads, schedule, x0, levels=41) for schedule in SCHEDULES]
    assert totals == pytest.approx([truth] * 4, rel=0.01)
    assert max(totals) - min(totals) < 0.005 * abs(truth)       # the noise is common to them


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_of_wrong_heads_it_is_higher_by_their_error(schedule):
    """An estimate 10 % above the posterior mean: a hundredth of that one's power more, which is
    S^2 SNR / (1 + S SNR), integrated over SNR."""
    spectrum = power_law(8, 8, 0.05)
    x0 = gaussian_images(400, 1, spectrum, torch.Generator().manual_seed(0))
    exact = gaussian_heads(spectrum)

    def too_large(x, alpha, sigma):
        d, r = exact(x, alpha, sigma)
        return 1.1 * d, 1.1 * r
    snr = snr_of(schedule, torch.tensor([0.002, 80.], dtype=torch.float64))
    logarithm = ((1 + spectrum * snr[0]) / (1 + spectrum * snr[1])).log()
    integral = spectrum * (snr[0] - snr[1]) - logarithm
    higher = total(too_large, schedule, x0) - total(exact, schedule, x0)
    assert higher == pytest.approx(0.01 * integral.sum().item() / 2, rel=0.02)


def snr_of(schedule, sigma):
    """[L, 8, 8], float64."""
    alpha, _ = schedule.levels(sigma)
    return m_of(alpha, 8, 8)[:, 0] ** 2 / sigma[:, None, None] ** 2


def test_the_integral_is_exact_for_gaussian_images_and_close_for_others():
    """The first error of x0_hat is that of Gaussian images, S / (1 + S SNR), at five levels; the
    second is S / (1 + S SNR)^2, on which trapezoids are 0.5 % off."""
    s = power_law(8, 8, 0.05)
    snr = snr_of(ConstantBNR(0.5), grid(0.002, 80., 5))
    integral = (simpson(snr, s) * s / (1 + s * snr)).sum(0)
    torch.testing.assert_close(integral, ((1 + s * snr[0]) / (1 + s * snr[-1])).log())
    snr = snr_of(ConstantBNR(0.5), grid(0.002, 80., 41))
    integral = (simpson(snr, s) * s / (1 + s * snr) ** 2).sum(0)
    truth = 1 / (1 + s * snr[-1]) - 1 / (1 + s * snr[0])
    torch.testing.assert_close(integral, truth, rtol=2e-4, atol=0)


def cell(bnr, trained, seed, checkpoint, nats):
    """A cell of two images and two levels."""
    n = len(nats)
    return {"bnr": bnr, "network": {"preset": "tiny", "bnr": trained}, "seed": seed, "kimg": 60,
            "images": "i", "levels": 2, "checkpoint": checkpoint, "nats": nats,
            "by_level": [[1.] * 4] * n, "by_band": [[2.] * 3] * n,
            "grid": {"sigma": [0.1, 1.], "nats": [1., 2.]}}


def test_networks_for_every_ratio_are_compared_with_themselves_and_others_by_seed(capsys):
    cells = [cell(0, "any", 0, "a", [10., 20.]), cell(1, "any", 0, "a", [11., 23.]),
             cell(0, "any", 0, "b", [50., 50.])]
    for seed in range(2):
        cells.append(cell(0, 0, seed, f"hot{seed}", [30., 40.]))
        cells.append(cell(0.5, 0.5, seed, f"warm{seed}", [32. + seed, 42. + seed]))
    table(cells)
    rows = capsys.readouterr().out.strip().splitlines()[2:]
    assert len(rows) == 2
    # images of one pair: +1 and +3; t of one degree of freedom is 12.7
    assert rows[0].startswith("| BNR any | 1 | 60 | 1 | 15.0 | +2.00 +- 12.71 | +0.00 +- 0.00 |")
    # seeds: +2 and +3
    assert rows[1].startswith("| BNR 0.5 | 0.5 | 60 | 2 | 35.0 | +2.50 +- 6.35 | +0.00 +- 0.00 |")


def test_levels_and_bands_add_up_to_the_total():
    spectrum = power_law(16, 16, 0.05)
    x0 = gaussian_images(6, 3, spectrum, torch.Generator().manual_seed(0))
    schedule = ConstantBNR(0.5)
    held = measured(gaussian_heads(spectrum), schedule, x0, 21, "cpu")
    ends, steps, sigmas = bound(gaussian_heads(spectrum), schedule, x0, 21)
    assert held["grid"]["sigma"] == pytest.approx(sigmas.tolist(), abs=1e-4)
    assert (sigmas[0], sigmas[-1]) == (0.002, 80)
    assert np.sum(held["by_band"], 1) == pytest.approx(np.array(held["nats"]), abs=0.05)
    integral = np.array(held["nats"]) - ends.sum((1, 2)).numpy()
    assert np.sum(held["by_level"], 1) == pytest.approx(integral, abs=0.05)
    assert sum(held["grid"]["nats"]) == pytest.approx(integral.mean(), abs=0.05)
    below = sum(nats for sigma, nats in zip(*held["grid"].values()) if sigma < 0.1)
    assert np.mean(held["by_level"], 0)[0] == pytest.approx(below, abs=0.05)
