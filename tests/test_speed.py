"""What is done for speed leaves the results alone: channels last, compilation and bf16 beside the plain fp32 network."""
import shutil

import pytest
import torch

from degrade import BlurNoisePath
from loss import disentangled_loss
from model import Denoiser, UNet
from sample import load_model, sample


SMALL = dict(channels=16, mult=[1, 2], blocks=1, attention=[8], resolution=16)
SMALLER = dict(channels=16, mult=[1], blocks=0, attention=[])   # the middle's two blocks and one behind them: quick to compile


def network(size=SMALL):
    torch.manual_seed(0)
    net = Denoiser(UNet(3, 6, **size), BlurNoisePath(0.5))
    with torch.no_grad():
        for p in net.parameters():                              # off its initial value, where the last layers answer nearly 0
            p.add_(0.05 * torch.randn_like(p))
    return net


def answers(net, bf16=False):
    """Both heads, the loss and every gradient, at fixed draws."""
    g = torch.Generator().manual_seed(1)
    x0, noise, t = torch.rand(8, 3, 16, 16, generator=g) * 2 - 1, torch.randn(8, 3, 16, 16, generator=g), torch.logspace(-2, 1, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        heads = net(x0 + t[:, None, None, None] * noise, t)
        terms = disentangled_loss(net, x0, net.path, t, noise)
    net.zero_grad()
    sum(terms).sum().backward()
    return [*(h.detach() for h in heads), *(l.detach() for l in terms)], torch.cat([p.grad.flatten() for p in net.parameters()])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("how, tolerance", [("channels last", 1e-5), ("compiled", 1e-4), ("bf16", 3e-2)])
def test_fast_ways_give_the_plain_networks_answers(how, tolerance):
    if how == "compiled" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    size = SMALLER if how == "compiled" else SMALL
    plain, plain_grad = answers(network(size))
    net = network(size).to(memory_format=torch.channels_last)
    if how == "compiled":
        net.unet.compile()
        assert net.state_dict().keys() == network(size).state_dict().keys()                     # what is saved has no prefix of a compiler
    fast, fast_grad = answers(net, how == "bf16")
    assert all(a.dtype == torch.float32 for a in fast)
    errors = [relative(a, b) for a, b in zip(fast, plain)] + [relative(fast_grad, plain_grad)]
    assert max(errors) < tolerance and (how != "bf16" or max(errors) > 1e-4), errors            # and bf16 was really used


def test_sampling_in_bf16_is_near_and_keeps_its_state_in_float64(tmp_path):
    net = network()
    config = {"bnr": 0.5, "sigma_data": 0.5, "unet": dict(in_channels=3, out_channels=6, **SMALL)}
    torch.save({"weights": net.state_dict(), "config": config, "data": {"shape": [3, 16, 16], "classes": []},
                "options": {"sample_steps": 6, "resolution": 16, "data": "leaves"}}, tmp_path / "c.pt")
    latents = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    fp32, bf16 = (sample(load_model(tmp_path / "c.pt", precision=p)[0], net.path, latents, steps=6) for p in ("fp32", "bf16"))
    assert fp32.dtype == bf16.dtype == torch.float64
    assert 1e-5 < relative(bf16, fp32) < 3e-2
