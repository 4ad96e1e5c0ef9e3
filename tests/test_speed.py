"""What is done for speed leaves the results alone: channels last, compilation and bf16 beside the
plain fp32 network."""
import os
import shutil
import subprocess
import sys

import pytest
import torch

from degrade import ConstantBNR, degrade
from loss import disentangled_loss
from model import Denoiser, UNet
from runs import ROOT
from sample import sample


def network():
    torch.manual_seed(0)
    net = Denoiser(UNet(3, 6, channels=16, mult=[1], blocks=0, attention=[], resolution=16))
    with torch.no_grad():
        for p in net.parameters():              # off its initial value: the heads are nearly 0
            p.add_(0.05 * torch.randn_like(p))
    return net


def outputs(net, bf16=False):
    """Both heads, the loss and every gradient, at fixed draws."""
    g = torch.Generator().manual_seed(1)
    x0 = torch.rand(8, 3, 16, 16, generator=g) * 2 - 1
    noise = torch.randn(8, 3, 16, 16, generator=g)
    schedule = ConstantBNR(0.5)
    alpha, sigma = schedule.levels(torch.logspace(-2, 1, 8))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        heads = net(degrade(x0, alpha, sigma, noise)[0], alpha, sigma)
        terms = disentangled_loss(net, x0, alpha, sigma, noise, net.sigma_data)
    net.zero_grad()
    sum(terms).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
    return [v.detach() for v in (*heads, *terms, gradient)]


def samples(net, bf16=False):
    z = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return sample(net, ConstantBNR(0.5), z, steps=4)


@pytest.mark.parametrize("how, tolerance", [
    ("channels last", 1e-5), ("compiled", 1e-4), ("bf16", 3e-2)])
def test_fast_ways_give_the_plain_networks_outputs(how, tolerance):
    if how == "compiled" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    plain = outputs(network())
    net = network().to(memory_format=torch.channels_last)
    if how == "compiled":
        net.unet.compile()
        assert net.state_dict().keys() == network().state_dict().keys()     # as it is saved
    fast = outputs(net, how == "bf16")
    if how == "bf16":
        plain.append(samples(network()))
        fast.append(samples(net, bf16=True))
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(fast, plain)]
    assert all(a.dtype == b.dtype for a, b in zip(fast, plain)) and max(errors) < tolerance, errors
    assert how != "bf16" or max(errors) > 1e-4, errors          # bf16 was really used


def test_without_a_compiler_compiling_is_a_wish_and_asked_for_one_line(tmp_path):
    program = """
import torch
from util.checkpoint import compile_or_warn
from util.cli import UserError
net = torch.nn.Linear(3, 3)
for asked in (None, True):
    try:
        compile_or_warn(net, asked)
        print(list(net(torch.ones(2, 3)).shape))
    except UserError as e:
        print(e)
"""
    env = {k: v for k, v in os.environ.items() if k != "CXX"}
    env.update(PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
               PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", program], env=env, text=True, capture_output=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stderr.startswith("not compiled, so slower: torch.compile does not work here (")
    eager, refused = done.stdout.splitlines()
    assert eager == "[2, 3]" and "install a C++ compiler, or leave --compile out" in refused
