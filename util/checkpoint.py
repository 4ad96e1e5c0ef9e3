"""Checkpoints: saved whole or not at all, read without running anything that they hold.

    net, checkpoint = load_model("run/ema.pt")

A checkpoint holds plain tensors and plain types. A model (ema.pt) has "weights"; a state (state.pt)
has what a run resumes from: "net", "ema" and "optimizer". Both have "config" (what the network is
built from), "data" (facts of the images), "options" (of train.py) and "seen" (images).
"""
import contextlib
import copy
import io
import math
import os
import tempfile
import zipfile

import torch

from model import Denoiser, UNet, build
from util.cli import UserError, reason, warn
from util.files import atomic_write, or_a_warning, refuse_special

RENAMED = {"path": "schedule", "colour": "mean_color", "levels": "sampling_levels",
           "trained": "training_range"}         # names in files of before December 2026


def save_checkpoint(filename: str, checkpoint: dict) -> bool:
    """True when saved, with weights that are made contiguous in place. Where the disk does not take
    it: False, a warning, and an old file stays."""
    for part in {"weights", "net", "ema"} & checkpoint.keys():
        for name, value in checkpoint[part].items():
            if torch.is_tensor(value):
                checkpoint[part][name] = value.contiguous()
    with or_a_warning(filename):
        buffer = io.BytesIO()                                   # torch.save hides a file's OSError
        torch.save(checkpoint, buffer)
        with atomic_write(filename) as f:
            f.write(buffer.getbuffer())
        return True
    return False


def read_checkpoint(filename: str) -> dict:
    """A file of torch.save with plain tensors and types only -> dict. Raises UserError."""
    refuse_special(filename)
    try:
        with zipfile.ZipFile(filename) as z:                    # torch.save does not compress, so
            unpacked = sum(info.file_size for info in z.infolist())
        if unpacked > os.path.getsize(filename):                # this would be a decompression bomb
            raise ValueError
        checkpoint = dict(torch.load(filename, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"{filename} does not exist: train.py makes such files") from None
    except IsADirectoryError:
        raise UserError(f"{filename} is a folder: give the ema.pt of a run") from None
    except Exception:                                           # zip, pickle and torch differ
        raise UserError(f"{filename} is not a checkpoint of this project, or it is damaged") \
            from None
    with_todays_names(checkpoint)
    return checkpoint


def with_todays_names(checkpoint: dict) -> None:
    """Renames, in place, what older versions of train.py have named otherwise."""
    for part in ("config", "options"):
        names = checkpoint.get(part)
        if isinstance(names, dict):
            for old, new in RENAMED.items():
                if old in names:
                    names[new] = names.pop(old)
    config = checkpoint.get("config")
    if isinstance(config, dict) and isinstance(config.get("answers"), str):
        kind, _, method = config.pop("answers").partition(", ")
        config["denoiser"] = kind
        config["precondition"] = method.replace(".answers", ".precondition")


def load_model(filename: str, device="cpu", precision: str = "fp32", compiled: bool = False,
               net: Denoiser | None = None):
    """A checkpoint of train.py -> its Denoiser in eval mode, without gradients, and the rest of the
    checkpoint: config, data, options, seen. Raises UserError.

    net: for a network of your own, a Denoiser like the one that was trained. It is filled, and
    keeps its types and memory format. precision: "fp32", "tf32" or "bf16"; the last two differ from
    it in speed and in rounding.
    """
    checkpoint = read_checkpoint(filename)
    if "net" in checkpoint:
        raise UserError(f"{filename} is what a run resumes from: take the ema.pt beside it")
    try:
        net = fill(net, checkpoint, checkpoint.pop("weights"))
        net = in_its_layout(net, device).eval().requires_grad_(False)
    except Exception as e:                                      # the file may hold anything
        raise UserError(f"{filename} is not a model that can be loaded here: {reason(e)}") from None
    if precision == "bf16":
        net.forward = torch.autocast(torch.device(device).type, torch.bfloat16)(net.forward)
    if precision == "tf32":
        net.forward = tf32()(net.forward)
    if compiled:
        compile_or_warn(net.unet, asked=True)
    return net, checkpoint


@contextlib.contextmanager
def tf32():
    """A context, or a decorator, in which a GPU may use TF32 for products of float32."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for backend in backends:
        backend.allow_tf32 = True
    try:
        yield
    finally:
        for backend in backends:
            backend.allow_tf32 = False


def fill(net: Denoiser | None, checkpoint: dict, weights: dict) -> Denoiser:
    """The network of a checkpoint with its weights: net, or the one that the config builds. It
    raises nearly anything."""
    config = checkpoint["config"]
    if config["unet"] is None and net is None:
        raise UserError("it is of a network of your own: give load_model its Denoiser as net")
    if net is not None and not isinstance(net, Denoiser):
        raise UserError(f"net must be a Denoiser, not {type(net).__name__}")
    if net is None:
        with torch.device("meta"):          # allocates nothing before the shapes are known to fit
            net = build(config)
        _, h, w = checkpoint["data"]["shape"]
        net.unet.check(h, w)
    precondition = net.precondition.__qualname__
    if config.get("precondition", precondition) != precondition:                # old ones lack it
        raise UserError(f"it is of another kind, {config['precondition']}")
    # Assigned tensors would not be tied any more, and would have the checkpoint's types.
    net.load_state_dict(weights, assign=any(p.is_meta for p in net.parameters()))
    for name, value in net.named_parameters():                  # a buffer may hold -inf, as a mask
        if not value.isfinite().all():
            raise UserError(f"its weights are not finite ({name})")
    net.sigma_data = config["sigma_data"]
    return net


def in_its_layout(net: Denoiser, device) -> Denoiser:
    """The network on the device. Custom networks may not support channels_last: they stay as they
    are."""
    layout = torch.channels_last if type(net.unet) is UNet else torch.preserve_format
    return net.to(device, memory_format=layout)


def start_from(net: Denoiser, filename: str, classes=()) -> None:
    """Puts the weights of a checkpoint into a new Denoiser, to train it further. Raises UserError.

    Both are of this project's network. Layers for ratios, augmentation and classes that the old one
    lacks start at zero. classes: their names; each starts as the old class of its name, else as the
    mean of all.
    """
    old, checkpoint = load_model(filename)
    if old.precondition.__qualname__ != net.precondition.__qualname__ \
            or old.sigma_data != net.sigma_data or old.has_ratio > net.has_ratio:
        raise UserError(f"{filename} does not fit this network: its --param, --bnr or sigma_data")
    weights = old.state_dict()
    for name, value in net.state_dict().items():
        if "unet.from_" in name and name not in weights:
            weights[name] = torch.zeros_like(value)
    if old.classes and net.classes:
        label = "unet.from_label.weight"                        # [embedding, classes]
        known = dict(zip(checkpoint["data"]["classes"], weights[label].T))
        columns = [known.get(name, weights[label].mean(1)) for name in classes]
        # the one-hot label is multiplied by sqrt(classes)
        weights[label] = torch.stack(columns, 1) * math.sqrt(old.classes / net.classes)
    if net.unet.from_augment is None:                           # it adds 0 to other images
        weights.pop("unet.from_augment.weight", None)
    try:
        net.load_state_dict(weights)
    except RuntimeError as e:
        raise UserError(f"{filename} does not fit this network: {reason(e)}") from None


def try_out(net: Denoiser, x: torch.Tensor, levels: list, augmented: bool, config: dict) -> None:
    """Images x [B, C, H, W] at levels [alpha, sigma] through a copy of a network of one's own,
    forward and back; then the copy is saved and loaded as its checkpoints are. So a mistake is one
    line before a run writes anything. Raises UserError."""
    augment = None
    if augmented:
        augment = x.new_zeros(len(x), 9)
    label = None
    if net.classes:
        label = x.new_full((len(x),), net.classes - 1, dtype=torch.long)
    try:
        [p.shape for p in net.parameters()]                     # lazy modules have none yet
        trial = copy.deepcopy(net).to(x.device).train()
        alpha, sigma = x.new_tensor(levels).expand(len(x), 2).T                 # [B] each
        x0_hat = sum(trial(x, alpha, sigma, augment, label))
        if not x0_hat.requires_grad or not x0_hat.isfinite().all():
            raise UserError("its output has no gradient, or is not finite")
        x0_hat.sum().backward()

        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(f"{folder}/ema.pt", {"weights": trial.state_dict(), "config": config})
            loaded, _ = load_model(f"{folder}/ema.pt", x.device, net=copy.deepcopy(net))
        outputs = []
        for network in (trial.eval().requires_grad_(False), loaded):
            torch.manual_seed(0)
            outputs.append(torch.cat(network(x, *levels, None, label)))
        if not torch.allclose(*outputs, rtol=1e-3, atol=1e-3):
            raise UserError("its output is another one when it is loaded")
    except Exception as e:                                      # the network is the user's
        message = " ".join(str(e).split())[:200]
        raise UserError(f"the network fails on x of {list(x.shape)}, called as unet(x, c_noise, "
                        f"augment, label), or saved and loaded: {message}") from None


def compile_or_warn(module: torch.nn.Module, asked: bool) -> None:
    """torch.compile(module) in place, where one line compiles here. Else a warning and the module
    as it is, or UserError where the user has asked for it."""
    device = next(module.parameters()).device
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as e:                  # the class depends on torch and on its disk cache
        failed = f"torch.compile does not work here ({reason(e)}): install a C++ compiler"
        if device.type == "cuda":
            failed += " and Triton"
        if asked:
            raise UserError(f"{failed}, or leave --compile out") from None
        warn(f"not compiled, so slower: {failed}")
    else:
        module.compile()                                        # weights keep their names
