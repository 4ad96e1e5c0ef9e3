"""The arms of docs/claim.md in study/controls: each does what its plan says."""
import argparse
import importlib
import json
import re
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
from study import compare
from study.common import digest
from study.controls import blurred_input, reweighted, split_targets
from study.controls.__main__ import ARMS, HOT, LOWER_WARM, RATES, WARM, table, verdict
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


def test_the_input_of_blurred_input_has_a_variance_of_one():
    """For Gaussian images of power 1 / lam, without a mean."""
    inputs = []
    net = blurred_input.network((1, 16, 16), 0).eval()
    net.unet.first.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    spectrum = power_law(16, 16)
    spectrum[0, 0] = 0
    spectrum *= 0.5 ** 2 / spectrum.mean()                      # the variance of a pixel
    x0 = gaussian_images(500, 1, spectrum, torch.Generator().manual_seed(0))
    for sigma in (0.02, 0.5, 2., 10.):
        with torch.no_grad():
            net(x0 + sigma * normals(500, 1, 16, 16, seed=1), 0., sigma)
        assert inputs.pop().square().mean().item() == pytest.approx(1, rel=0.05)


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


@pytest.mark.parametrize("name", ["reweighted", "blurred_input", "split_targets"])
def test_each_arm_trains_resumes_and_samples(name, tmp_path):
    module = importlib.import_module(f"study.controls.{name}")
    for duration in ("0.032", "0.064"):
        args = train.options(["--bnr", "0", "--out", str(tmp_path / "run"), "--warmup", "0",
                              "--duration", duration, "--device", "cpu", "--sample-steps", "2"])
        net = None
        if hasattr(module, "network"):
            net = module.network((3, 16, 16), 0)
        loss = getattr(module, "loss", disentangled_loss)
        train.train(args, noise_images(), net=net, loss=loss)
    net, checkpoint = load_model(str(tmp_path / "run/ema.pt"), net=net)
    assert checkpoint["seen"] == 64
    assert isinstance(net, Denoiser)
    samples = list(generate(net, ConstantBNR(0), (3, 16, 16), range(2), steps=3))
    assert samples[0].isfinite().all()


def noise_images() -> Images:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Images(x, name="noise")


def test_arms_have_the_names_that_their_commands_give_them():
    """The commands of study/README.md, as study.compare reads them."""
    commands = re.findall(r"\$arm --vary (.*)", (ROOT / "study/README.md").read_text())
    networks = []
    for command in commands:
        variation, *others = command.split()
        parsed = argparse.Namespace(vary=compare.variation(variation), parts="none", data=None)
        networks += [variant.options for variant in compare.variants_of(parsed, others)]
    assert len(commands) == 7
    for network in (HOT, WARM, LOWER_WARM, *ARMS.values(), *RATES.values()):
        assert network in networks


def test_the_verdicts_are_those_of_the_rule():
    whole = [-11., -9., -10., -10., -11., -9.]
    none = [1., -1., 0.5, -0.5, 0.2, -0.2]
    half = [-5., -5.5, -4.5, -5., -5., -5.]
    wide = [-20., 11., -25., 12., -15., 8.]
    ahead = [2., 3., 2.5, 2., 3., 2.5]
    assert verdict(none, whole, whole) == "does not explain it"
    assert verdict(whole, none, whole) == "explains it"
    assert verdict(half, half, whole) == "explains a part, 50%"
    assert verdict(wide, wide, whole) == "undecided"
    assert verdict(whole, ahead, whole) == "better than warm"
    assert verdict(ahead, whole, whole) == "worse than hot"
    assert verdict(none, none, none) == "nothing to explain"
    assert verdict(whole[:5], none[:5], whole) == "none before 6 pairs"


def cell_of(network, seed, distance):
    code = None
    if "parts" in network:
        code = digest(ROOT / f"study/controls/{network['parts']}.py")
    return {"kind": "samples", "network": network, "code": code, "kimg": 120, "seed": seed,
            "solver": "multistep", "nfe": 18, "samples": 5000, "distance": distance}


def test_the_table_pairs_the_cells_of_one_seed(capsys):
    cells = []
    for seed in range(6):
        for network, distance in ((HOT, 130.), (WARM, 120.), (ARMS["reweighted"], 121.)):
            noise = 10 * seed + (seed % 3) * 0.1 * len(network)     # a seed's share drops out
            cells.append(cell_of(network, seed, distance + noise))
        cells.append(cell_of(ARMS["lower levels"], seed, 125.))
        cells.append(cell_of(LOWER_WARM, seed, 122. + seed % 2))
        older = {**cell_of(ARMS["blurred input"], seed, 100.), "code": "0123456789ab"}
        cells.append(older)
    table(cells)
    printed = capsys.readouterr().out
    assert "| reweighted | 6 | -8.9 +- 0.1 | 0.0312 | -1.1 +- 0.1 | 0.0312 | explains" in printed
    assert "warm - hot: -10.0 +- 0.0, p 0.0312, 6 pairs; means: hot 155.2, warm 145.2" in printed
    assert "warm - hot at P_mean -1.5: -2.5 +- 0.6, p 0.0312, 6 pairs" in printed
    assert "blurred input" not in printed                       # the file has changed since
    assert "higher levels" not in printed                       # which has no cells


def test_of_the_learning_rates_the_best_is_the_arm(capsys):
    cells = []
    distances = {"2e-3": 130., "1e-3": 127., "4e-3": 140.}
    for seed in range(6):
        cells.append(cell_of(WARM, seed, 120. + seed % 2))
        cells += [cell_of(RATES[rate], seed, d + seed) for rate, d in distances.items()]
    table(cells)
    printed = capsys.readouterr().out
    assert "| learning rate 1e-3 | 6 | -3.0 +- 0.0 |" in printed
    assert "4e-3" not in printed
    table([cell for cell in cells if cell["network"].get("lr") != 0.004])
    assert "learning rate" not in capsys.readouterr().out       # before all three are measured
