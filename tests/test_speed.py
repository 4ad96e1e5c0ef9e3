"""What is done for speed leaves the results alone: channels last, compilation and bf16 beside the
plain fp32 network."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from degrade import ConstantBNR, degrade
from loss import disentangled_loss
from model import Denoiser, UNet, load_model
from sample import sample

PATH = ConstantBNR(0.5)
SMALL = dict(channels=16, mult=[1, 2], blocks=1, attention=[8], resolution=16)
SMALLER = dict(channels=16, mult=[1], blocks=0, attention=[])   # three blocks: quick to compile


def network(size=SMALL):
    torch.manual_seed(0)
    net = Denoiser(UNet(3, 6, **size))
    with torch.no_grad():
        for p in net.parameters():          # off its initial value, where the heads are nearly 0
            p.add_(0.05 * torch.randn_like(p))
    return net


def answers(net, bf16=False):
    """Both heads, the loss and every gradient, at fixed draws."""
    g = torch.Generator().manual_seed(1)
    x0 = torch.rand(8, 3, 16, 16, generator=g) * 2 - 1
    noise = torch.randn(8, 3, 16, 16, generator=g)
    alpha, sigma = PATH.levels(torch.logspace(-2, 1, 8))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        heads = net(degrade(x0, alpha, sigma, noise)[0], alpha, sigma)
        terms = disentangled_loss(net, x0, alpha, sigma, noise, net.sigma_data)
    net.zero_grad()
    sum(terms).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
    return [v.detach() for v in (*heads, *terms)], gradient


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("how, tolerance", [
    ("channels last", 1e-5), ("compiled", 1e-4), ("bf16", 3e-2)])
def test_fast_ways_give_the_plain_networks_answers(how, tolerance):
    if how == "compiled" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    size = SMALLER if how == "compiled" else SMALL
    plain, plain_grad = answers(network(size))
    net = network(size).to(memory_format=torch.channels_last)
    if how == "compiled":
        net.unet.compile()
        names = network(size).state_dict().keys()
        assert net.state_dict().keys() == names                 # saved without a compiler's prefix
    fast, fast_grad = answers(net, how == "bf16")
    assert all(a.dtype == torch.float32 for a in fast)
    errors = [relative(a, b) for a, b in zip(fast, plain)] + [relative(fast_grad, plain_grad)]
    assert max(errors) < tolerance, errors
    assert how != "bf16" or max(errors) > 1e-4, errors          # bf16 was really used


WITHOUT_A_COMPILER = """
import torch
from util import UserError, compile_or_warn
net = torch.nn.Linear(3, 3)
for asked in (None, True):
    try:
        compile_or_warn(net, asked)
        print(list(net(torch.ones(2, 3)).shape))
    except UserError as e:
        print(e)
"""


def test_without_a_compiler_compiling_is_a_wish_and_asked_for_one_line(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "CXX"}
    env.update(PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
               PYTHONPATH=str(Path(__file__).parent.parent))
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_COMPILER], env=env, text=True,
                          capture_output=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stderr.startswith("not compiled, so slower: torch.compile does not work here (")
    eager, refused = done.stdout.splitlines()
    assert eager == "[2, 3]" and "install a C++ compiler, or leave --compile out" in refused


def test_sampling_in_bf16_is_near_and_keeps_its_state_in_float64(tmp_path):
    unet = dict(in_channels=3, out_channels=6, **SMALL)
    torch.save({"weights": network().state_dict(),
                "config": {"bnr": 0.5, "sigma_data": 0.5, "unet": unet},
                "data": {"shape": [3, 16, 16], "classes": []},
                "options": {"sample_steps": 6, "resolution": 16, "data": "leaves"}},
               tmp_path / "c.pt")
    latents = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    fp32, bf16 = (sample(load_model(tmp_path / "c.pt", precision=p)[0], PATH, latents, steps=6)
                  for p in ("fp32", "bf16"))
    assert fp32.dtype == bf16.dtype == torch.float64
    assert 1e-5 < relative(bf16, fp32) < 3e-2
