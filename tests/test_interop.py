"""The blocks of docs/interop.md, each where what it imports is installed, beside our results."""
import importlib
import os
import re
import warnings

import pytest
import torch

import train
from degrade import ConstantBNR
from runs import ROOT, indented_blocks, options, pictures, same
from sample import euler, heun, time_steps
from util.checkpoint import load_model

PAGE = (ROOT / "docs/interop.md").read_text()
BLOCKS = indented_blocks(PAGE)
HOT = ConstantBNR(0)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs the blocks with these words in a folder with a run in run/, and returns
    their variables. It skips where a module that they import is missing."""
    train.train(options(tmp_path / "run", "--bnr 0 --duration 0.032"), pictures())
    monkeypatch.chdir(tmp_path)

    def blocks_with(*words):
        code = BLOCKS[0]
        for word in words:
            block, = [block for block in BLOCKS if word in block]
            code += block
        for module in re.findall(r"(?m)^(?:from|import) ([\w.]+)", code):
            try:
                importlib.import_module(module)
            except ImportError:
                pytest.skip(f"{module} is not installed")
        torch.manual_seed(0)
        variables = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(code, variables)
        return variables
    return blocks_with


def heads(net):
    """What a network says of five images; hot, for the blocks that know nothing else."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, 8, 8, generator=generator)
    return torch.stack(net(x, torch.zeros(5), torch.linspace(0.1, 3, 5)))


def test_safetensors_and_back(run):
    variables = run("safetensors")
    net, checkpoint = load_model("ema-again.pt")
    assert same(net.state_dict(), variables["net"].state_dict())
    assert same(checkpoint, variables["checkpoint"])


def test_a_folder_for_the_hub(run):
    variables = run("PyTorchModelHubMixin")
    assert torch.allclose(heads(variables["hub_net"]), heads(variables["net"]), atol=1e-5)
    assert not variables["hub_net"].training and os.path.exists("hub-folder/model.safetensors")


def test_samplers_of_k_diffusion(run):
    variables = run("k_diffusion")
    ours = heun(variables["net"], HOT, variables["z"], time_steps(18))
    assert (variables["x"] - ours).abs().max() < 1e-4 * ours.abs().max()


def test_schedulers_of_diffusers(run):
    variables = run("diffusers")
    torch.manual_seed(0)
    z = torch.randn(4, 3, 8, 8) * variables["scheduler"].init_noise_sigma
    ours = euler(variables["net"], HOT, z, time_steps(18))
    assert (variables["x"] - ours).abs().max() < 1e-4 * ours.abs().max()


def test_torch_export(run):
    variables = run("torch.export.export")
    exported = heads(variables["program"].module())
    assert torch.allclose(exported, heads(variables["net"]), atol=1e-6)


def test_onnx(run):
    variables = run("torch.export.export", "torch.onnx")
    session = pytest.importorskip("onnxruntime").InferenceSession("net.onnx")

    def onnx_net(*inputs):
        named = dict(zip(("x", "alpha", "sigma"), (v.numpy() for v in inputs)))
        return [torch.from_numpy(v) for v in session.run(None, named)]
    assert torch.allclose(heads(onnx_net), heads(variables["net"]), atol=1e-5)


def test_tensorboard(run):
    run("tensorboard")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = events.EventAccumulator("run/tensorboard")
    log.Reload()
    assert {"denoise", "deblur", "lr", "images_per_s"} <= set(log.Tags()["scalars"])
    assert [event.step for event in log.Scalars("denoise")] == [4, 8]
