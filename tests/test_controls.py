"""The arms of docs/claim.md in study/controls: each does what its plan says."""
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import Images, seed_for
from degrade import ConstantBNR, dct2, idct2
from exact import gaussian_images, m_of, normals, power_law
from loss import disentangled_loss
from model import Denoiser
from sample import generate
from study.controls import blurred_input, higher_levels, reweighted, split_targets
from util.checkpoint import load_model

ROOT = Path(__file__).parent.parent
OWN_NETWORKS = {"blurred_input": blurred_input, "split_targets": split_targets}


def zero_heads(x, alpha, sigma):
    return torch.zeros_like(x), torch.zeros_like(x)


def trained_network(module):
    """Its network, whose last layer no longer answers almost zero."""
    torch.manual_seed(0)
    net = module.network((3, 16, 16), 0)
    torch.nn.init.normal_(net.unet.last.weight, std=0.1)
    return net.eval()


def test_reweighted_is_the_hot_loss_times_the_table():
    x0 = normals(20, 3, 8, 8).float()
    noise = normals(20, 3, 8, 8, seed=1).float()
    sigma = torch.tensor(reweighted.SIGMA)
    hot, _ = disentangled_loss(zero_heads, x0, 0 * sigma, sigma, noise, 0.5)
    denoise, deblur = reweighted.loss(zero_heads, x0, 0 * sigma, sigma, noise, 0.5)
    torch.testing.assert_close(denoise / hot, torch.tensor(reweighted.RATIO))
    assert not deblur.any()


def test_the_table_of_reweighted_is_that_of_the_results():
    lines = (ROOT / "study/results/claim.jsonl").read_text().splitlines()
    totals = {0: [], 0.5: []}
    for cell in map(json.loads, lines):
        if cell["kind"] == "loss" and cell["kimg"] == 120:
            assert cell["sigma"] == reweighted.SIGMA
            totals[cell["bnr"]].append(np.add(cell["denoise"], cell["deblur"]))
    assert len(totals[0]) == len(totals[0.5]) == 6
    ratio = np.mean(totals[0.5], 0) / np.mean(totals[0], 0)
    assert ratio == pytest.approx(reweighted.RATIO, abs=5.1e-5)


def test_higher_levels_is_hot_with_its_training_levels_moved():
    alpha, sigma = higher_levels.schedule.training_levels(20000, 16, 16)
    assert not alpha.any()
    assert sigma.log().mean().item() == pytest.approx(-0.9, abs=0.03)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=0.03)


def test_blurred_input_sees_no_high_frequency_of_its_state():
    net = trained_network(blurred_input)
    x = normals(1, 3, 16, 16).float()
    u = torch.zeros(1, 3, 16, 16)
    u[..., 15, 15] = 10.
    stripes = idct2(u)
    with torch.no_grad():
        for sigma, is_seen in ((0.05, True), (4., False)):      # M is 0.99, then e^-35
            d, r = net(x, 0., sigma)
            d_other, _ = net(x + stripes, 0., sigma)
            change = (d_other - d).abs().max()
            assert change > 0.1 if is_seen else change < 1e-4
            assert not r.any()                                  # the process is hot


def test_split_targets_gives_a_sampler_the_sum_and_the_loss_both_heads():
    net = trained_network(split_targets)
    x = normals(2, 3, 16, 16).float()
    sigma = torch.tensor([0.3, 3.])
    with torch.no_grad():
        d, r = net(x, 0.5 * sigma, sigma)
        total, nothing = net(x, 0 * sigma, sigma)
    assert r.abs().min(0).values.max() > 0.01
    torch.testing.assert_close(total, d + r)
    assert not nothing.any()


def test_the_minimum_of_split_targets_is_that_of_a_hot_process_with_two_targets():
    """With exact heads for Gaussian images: the mean over frequencies of (M^2 + (1 - M)^2) times
    the posterior variance of the hot process."""
    spectrum = power_law(8, 8)
    x0 = gaussian_images(4000, 1, spectrum, torch.Generator().manual_seed(0))
    noise = normals(4000, 1, 8, 8, seed=1)
    sigma = 0.7
    m = m_of(0.5 * sigma, 8, 8)
    gain = spectrum / (spectrum + sigma ** 2)

    def heads(x, alpha, sigma):
        u = dct2(x)
        return idct2(m * gain * u), idct2((1 - m) * gain * u)
    denoise, deblur = split_targets.loss(heads, x0, 0., sigma, noise, 0.5)
    weight = (sigma ** 2 + 0.25) / (sigma * 0.5) ** 2
    variance = weight * sigma ** 2 * gain                       # the posterior's, weighted
    assert denoise.mean().item() == pytest.approx((m ** 2 * variance).mean().item(), rel=0.02)
    assert deblur.mean().item() == pytest.approx(((1 - m) ** 2 * variance).mean().item(), rel=0.03)


@pytest.mark.parametrize("name", OWN_NETWORKS)
def test_networks_start_from_the_weights_of_the_preset(name, tmp_path):
    args = train.options(["--bnr", "0", "--out", str(tmp_path / "run"), "--seed", "3",
                          "--duration", "0.001", "--lr", "0", "--device", "cpu",
                          "--sample-steps", "2"])
    own = train.train(args, noise_images())
    torch.manual_seed(seed_for("weights", 3))
    net = OWN_NETWORKS[name].network((3, 16, 16), 0)
    assert own.state_dict().keys() == net.state_dict().keys()
    for weights, others in zip(own.state_dict().values(), net.state_dict().values()):
        assert torch.equal(weights, others)


@pytest.mark.parametrize("name", ["reweighted", "higher_levels", "blurred_input", "split_targets"])
def test_each_arm_trains_resumes_and_samples(name, tmp_path):
    module = importlib.import_module(f"study.controls.{name}")
    for duration in ("0.032", "0.064"):
        args = train.options(["--bnr", "0", "--out", str(tmp_path / "run"), "--warmup", "0",
                              "--duration", duration, "--device", "cpu", "--sample-steps", "2"])
        net = None
        if hasattr(module, "network"):
            net = module.network((3, 16, 16), 0)
        parts = {part: getattr(module, part) for part in ("schedule", "loss")
                 if hasattr(module, part)}
        train.train(args, noise_images(), net=net, **parts)
    net, checkpoint = load_model(str(tmp_path / "run/ema.pt"), net=net)
    assert checkpoint["seen"] == 64
    assert isinstance(net, Denoiser)
    samples = list(generate(net, ConstantBNR(0), (3, 16, 16), range(2), steps=3))
    assert samples[0].isfinite().all()


def noise_images() -> Images:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Images(x, name="noise")
