"""Every block of Python in docs/own-parts.md, as it stands on the page."""
import math
import re
from types import SimpleNamespace

import pytest
import torch

from degrade import ConstantBNR
from loss import disentangled_loss
from runs import ROOT, command_line, log_of, same_run, save_model, words
from sample import sample, time_steps
from util.checkpoint import load_model, read_checkpoint
from util.images import read_image, save_image

PAGE = (ROOT / "docs/own-parts.md").read_text()


def blocks(title) -> list:
    """The blocks of the section with this title."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall("```python\n(.*?)```", section, flags=re.DOTALL)


INTRODUCTION = re.findall("```python\n(.*?)```", PAGE.split("\n## ")[0], flags=re.DOTALL)


def script(section, out, images, text="") -> dict:
    """Runs the page's first block and those of a section as a script with a command line. Returns
    its names."""
    names = {}

    def main():
        exec("\n".join([*INTRODUCTION, *blocks(section)]), names)
    command_line(main, *words(out, f"--duration 0.016 --sample-steps 2 --log-every 0.004 {text}",
                              data=images))
    return names


def config_of(out) -> dict:
    return read_checkpoint(f"{out}/ema.pt")["config"]


# Training


def test_images(tmp_path, images):
    script("Images", tmp_path / "run", images, "--cond --attention 8")
    facts = read_checkpoint(tmp_path / "run/ema.pt")["data"]
    assert facts["count"] == 100 and facts["classes"] == ["cats", "dogs"]
    assert facts["name"] == "mine" and facts["shape"] == [3, 16, 16]


def test_a_schedule(tmp_path, images):
    script("A schedule", tmp_path / "run", images)
    config = config_of(tmp_path / "run")
    (_, low), (_, high) = config["training_range"]
    assert config["schedule"] == "Bent"
    assert config["sampling_levels"][-1][1] == pytest.approx(60)
    assert math.log(low * high) / 2 == pytest.approx(-1, abs=0.15)              # P_mean


def test_a_network(tmp_path, images):
    names = script("A network", tmp_path / "run", images)
    assert config_of(tmp_path / "run")["unet"] is None

    def stand_in(x, steps, label):
        assert steps.abs().max() > 100
        return SimpleNamespace(sample=x.repeat(1, 2, 1, 1))
    net = names["Denoiser"](names["FromDiffusers"](stand_in))
    d, r = net(torch.ones(2, 3, 8, 8), 0.2, 0.5)
    assert d.shape == r.shape == (2, 3, 8, 8)


def test_a_loss(tmp_path, images):
    names = script("A loss", tmp_path / "run", images)
    assert config_of(tmp_path / "run")["loss"] == "min_snr"
    x0 = torch.rand(3, 3, 8, 8)
    sigma = torch.tensor([0.05, 0.5, 5.])

    def zeros(x, alpha, sigma):
        return torch.zeros_like(x), torch.zeros_like(x)
    denoise, deblur = names["min_snr"](zeros, x0, 0. * sigma, sigma, x0, 0.5)
    expected = torch.tensor([5, 1, 0.01]) * x0.square().mean((1, 2, 3))
    assert torch.allclose(denoise, expected) and not deblur.any()
    assert not torch.allclose(denoise, disentangled_loss(zeros, x0, 0., sigma, x0, 0.5)[0])


def test_an_optimizer(tmp_path, images):
    """AdamW's rate falls as a cosine, its gradients are clipped, and a stopped run resumes."""
    names = script("An optimizer", tmp_path / "run", images, "--lr 1e-3")
    rates = [line["lr"] for line in log_of(tmp_path / "run")]
    expected = [1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx(expected)

    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 1e6)
    names["adamw"]([weight]).step()
    assert weight.grad.norm() == pytest.approx(1000)

    names["args"].out = str(tmp_path / "stopped")
    names["train"].train(names["args"], optimizer=names["adamw"], signals=[15])
    assert len(log_of(tmp_path / "stopped")) == 1
    names["train"].train(names["args"], optimizer=names["adamw"])
    assert same_run(tmp_path / "run", tmp_path / "stopped")


def test_a_log_line(tmp_path, images):
    pytest.importorskip("tensorboard", reason="study/requirements.txt has tensorboard")
    names = script("What happens at a log line", tmp_path / "run", images)
    names["writer"].close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    log = log_of(tmp_path / "run")
    for name in ("denoise", "deblur", "lr"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(line["step"], pytest.approx(line[name], rel=1e-5)) for line in log]


# With a trained network


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The names after the blocks about a trained network, and the folder that they ran in."""
    folder = tmp_path_factory.mktemp("trained")
    save_model(folder / "run/ema.pt")
    save_model(folder / "run-cond/ema.pt", classes=2)
    for name in ("y", "a", "b"):
        generator = torch.Generator().manual_seed(ord(name))
        pixels = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=generator)
        save_image(pixels, folder / f"{name}.png")
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks("With a trained network"):
            exec(block, names)
    return folder, names


def test_restoring(trained):
    folder, names = trained
    assert names["draws"].shape == (8, 3, 8, 8) and names["draws"].var(0).min() > 0
    d, r = load_model(folder / "run/ema.pt")[0](names["y"], 1., 0.1)
    assert torch.equal(names["mean"], d + r)
    assert read_image(folder / "restored.png", 3, 66, 660).any()


def test_encoding_and_interpolation(trained):
    folder, names = trained
    assert names["again"].shape == (2, 3, 8, 8)
    assert torch.allclose(names["between"][[0, -1]], names["z"])
    sizes = names["between"].flatten(1).norm(dim=1)
    ends = names["z"].flatten(1).norm(dim=1)
    assert ends.min() * 0.99 < sizes.min() and sizes.max() < ends.max() * 1.01
    for name in ("again", "between"):
        assert (folder / f"{name}.png").exists()


def test_guidance(trained):
    """Scale 1 is the network itself, and 0 the weak one."""
    folder, names = trained
    net, _ = load_model(folder / "run-cond/ema.pt")
    weak, _ = load_model(folder / "run/ema.pt")
    x = torch.ones(2, 3, 8, 8)
    label = torch.tensor([0, 1])
    for scale, expected in ((1, net(x, 0.5, 1., label=label)), (0, weak(x, 0.5, 1.))):
        guided = names["guided"](x, 0.5, 1., label, scale)
        assert torch.allclose(torch.stack(guided), torch.stack(expected), atol=1e-6)
    assert names["images"].shape == (8, 3, 8, 8)


def test_a_denoiser_at_bnr_0(trained):
    """A sampler that takes denoise(x, sigma), Euler's as k-diffusion has it, beside ours."""
    _, names = trained
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    levels = time_steps(6)
    x = 80 * z
    for t, s in zip(levels[:-1], levels[1:]):
        denoised = names["denoise"](x, t * x.new_ones(2))
        x = x + (x - denoised) / t * (s - t)
    ours = sample(names["net"], ConstantBNR(0), z, 6, solver="euler")
    assert torch.allclose(x, ours, atol=1e-5)


def test_every_block_of_the_page_is_run():
    sections = ["Images", "A schedule", "A network", "A loss", "An optimizer",
                "What happens at a log line", "With a trained network"]
    run = len(INTRODUCTION) + sum(len(blocks(title)) for title in sections)
    assert PAGE.count("```python") == run
