"""EDM's published networks (Karras et al., 2206.00364) as checkpoints of this project, of BNR 0.

    python -m study.edm edm-cifar10-32x32-uncond-vp.pkl --out edm.pt
    python sample.py --ckpt edm.pt

These files are pickles with EDM's source text in them, which EDM's loader executes. Here nothing
that a file names is imported or called. The deblurring head is zero, as r_out (8) is at BNR 0. The
nine augmentation inputs are zero in sampling; in training, data.augment makes them with EDM's own
meaning, order and signs. NCSN++ and ADM are refused.
"""
import io
import pickle
import struct
from math import prod
from pathlib import Path

import torch

from model import build
from util.checkpoint import save_checkpoint
from util.cli import Parser, UserError
from util.datasets import CIFAR10_CLASSES

# The settings of EDM's SongUNet: what DDPM++ has, and EDM's defaults of the others
DDPMPP = {"embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard",
          "channel_mult_noise": 1, "resample_filter": [1, 1], "channel_mult_emb": 4,
          "label_dropout": 0}
DEFAULTS = {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4,
            "attn_resolutions": [16], "dropout": 0.1, "augment_dim": 0, "label_dim": 0}

# The layers of a block, in EDM's names and in those of model.Block
BLOCK = {"norm0": "norm1", "conv0": "conv1", "affine": "from_emb", "norm1": "norm2",
         "conv1": "conv2", "skip": "skip", "norm2": "attention.norm", "qkv": "attention.qkv",
         "proj": "attention.out"}


# From EDM's network to a checkpoint


def convert(filename) -> dict:
    """A file of EDM's -> a checkpoint as train.py saves it. Raises UserError and OSError."""
    data = Path(filename).read_bytes()
    try:
        net = restricted_unpickle(data, KNOWN)["ema"]
        unet = unet_config(net)
        config = {"bnr": 0., "schedule": None, "sigma_data": float(net.sigma_data),
                  "param": "residual", "mean_color": None, "unet": unet}
        weights = convert_weights(config, tensors(net._modules["model"]), len(data))
        for name, value in weights.items():
            if not value.isfinite().all():
                raise UserError(f"its weights are not finite ({name})")
    except UserError as e:
        raise UserError(f"{filename}: {e}") from None
    except Exception as e:                                      # a pickle can raise nearly anything
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"{filename} is none of EDM's networks, or it is damaged ({reason})") \
            from None
    name = Path(filename).stem
    side = unet["resolution"]
    steps = 18 if side <= 32 else 40                            # EDM's
    return {"weights": weights, "config": config, "seen": 0,
            "data": {"name": name, "shape": [unet["in_channels"], side, side],
                     "classes": class_names(unet["classes"], side)},
            "options": {"data": name, "resolution": side, "seed": 0, "sample_steps": steps}}


def class_names(count: int, side: int) -> list:
    if count == 10 and side == 32:
        return CIFAR10_CLASSES
    return [str(i) for i in range(count)] or ["all"]


def unet_config(net) -> dict:
    """EDM's EDMPrecond, a Record -> the keywords of model.UNet. Raises UserError that names the
    setting which differs from DDPM++'s."""
    unet = net._modules["model"]
    for record, name in ((net, "EDMPrecond"), (unet, "SongUNet")):
        if record.class_name != name:
            raise UserError(f"the network is {shown(record.class_name)}, and not EDM's {name}")
    if unet._init_args:
        raise UserError("SongUNet has arguments without a name")
    settings = {**DDPMPP, **DEFAULTS, **unet._init_kwargs}
    sizes = {"img_resolution", "in_channels", "out_channels"}
    for name, value in settings.items():
        if name in DDPMPP and value != DDPMPP[name]:
            raise UserError(f"{name} is {shown(value)}, and DDPM++ has {DDPMPP[name]!r}")
        if name not in DDPMPP.keys() | DEFAULTS.keys() | sizes:
            raise UserError(f"{shown(name)} is {shown(value)}, a setting that DDPM++ does not have")
    if settings["in_channels"] != settings["out_channels"]:
        raise UserError("in_channels and out_channels differ")
    attention = list(settings["attn_resolutions"])
    if not all(type(v) is int for v in attention):
        raise TypeError("attn_resolutions are not integers")
    return {"in_channels": settings["in_channels"],
            "out_channels": 2 * settings["out_channels"],
            "channels": settings["model_channels"],
            "mult": list(settings["channel_mult"]),
            "blocks": settings["num_blocks"],
            "resolution": settings["img_resolution"],
            "attention": attention,
            "dropout": float(settings["dropout"]),
            "augment_dim": settings["augment_dim"],
            "classes": settings["label_dim"]}


def shown(value) -> str:
    return repr(value)[:80]


def convert_weights(config: dict, theirs: dict, size: int) -> dict:
    """EDM's tensors by name -> the state dict of model.Denoiser. size: of the file, in bytes."""
    with torch.device("meta"):              # allocates nothing before the shapes are known to fit
        net = build(config)
    side = config["unet"]["resolution"]
    net.unet.check(side, side)
    ours = net.unet.state_dict()
    numbers = sum(v.numel() for name, v in ours.items() if not name.startswith("last."))
    if numbers * 4 > size:
        raise ValueError("its settings are of a network larger than the file")
    names = layer_names(config["unet"])
    weights = {}
    for name, value in ours.items():
        layer, leaf = name.rsplit(".", 1)
        shape = list(value.shape)
        if layer == "last":
            shape[0] //= 2
        w = theirs.pop(f"{names[layer]}.{leaf}").read(shape)
        if layer.endswith(".qkv"):          # [channel][q, k, v] -> [q, k, v][channel]
            w = w.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        if layer == "last":
            w = torch.cat([w, torch.zeros_like(w)])             # the deblurring head
        weights[f"unet.{name}"] = w.contiguous()
    if theirs:
        raise ValueError(f"it has {sorted(theirs)[0]} besides DDPM++'s weights")
    return weights


def layer_names(unet: dict) -> dict:
    """The layers of model.UNet with these keywords: {their name: their name in EDM's SongUNet}."""
    levels = range(len(unet["mult"]))
    sizes = []
    for level in levels:
        side = unet["resolution"] >> level
        sizes.append(f"{side}x{side}")
    encoder = []
    for level in levels:
        if level:
            encoder.append(f"enc.{sizes[level]}_down")
        encoder += [f"enc.{sizes[level]}_block{i}" for i in range(unet["blocks"])]
    decoder = []
    for level in reversed(levels):
        if level < len(sizes) - 1:
            decoder.append(f"dec.{sizes[level]}_up")
        decoder += [f"dec.{sizes[level]}_block{i}" for i in range(unet["blocks"] + 1)]
    middle = [f"dec.{sizes[-1]}_in0", f"dec.{sizes[-1]}_in1"]
    names = {"from_augment": "map_augment", "from_label": "map_label", "embed.0": "map_layer0",
             "embed.2": "map_layer1", "first": f"enc.{sizes[0]}_conv",
             "last_norm": f"dec.{sizes[0]}_aux_norm", "last": f"dec.{sizes[0]}_aux_conv"}
    for part, blocks in (("encoder", encoder), ("middle", middle), ("decoder", decoder)):
        for i, block in enumerate(blocks):
            for their, our in BLOCK.items():
                names[f"{part}.{i}.{our}"] = f"{block}.{their}"
    return names


# Reading the pickle without executing anything


def restricted_unpickle(data, allowed: dict):
    """What is pickled in data: bytes, or an open file, which is read to the end of one pickle.

    allowed: {(module, name): what stands for it}. Nothing else is imported or called: UserError for
    another name. Damaged data raise nearly anything.
    """
    def find_class(module, name):
        if (module, name) not in allowed:
            raise UserError(f"it names {f'{module}.{name}'[:80]!r}, which is not needed; nothing "
                            "of it was executed")
        return allowed[module, name]

    file = io.BytesIO(data) if isinstance(data, bytes) else data
    # the one in C allocates whatever the data claim; this one does so for a bytearray alone
    reader = pickle._Unpickler(file)
    reader.dispatch = {k: v for k, v in reader.dispatch.items() if k != pickle.BYTEARRAY8[0]}
    reader.find_class = find_class
    reader.persistent_load = lambda pid: pid
    return reader.load()


class Record:
    """An object of the file: attributes and nothing else."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


def persistent_object(meta):
    """One of EDM's objects, without the source text that stands beside it."""
    record = Record()
    record.__setstate__({**meta["state"], "class_name": meta["class_name"]})
    return record


class Tensor:
    """A float32 tensor whose numbers stay where the file has them until they are read."""

    def __init__(self, storage, offset, size, stride, *rest):
        self.storage = storage
        self.offset = offset
        self.size = size
        self.stride = stride

    def read(self, shape: list) -> torch.Tensor:
        """A copy. ValueError where this is not its shape, RuntimeError beyond the storage."""
        if list(self.size) != shape or prod(shape) * 4 > len(self.storage):
            raise ValueError(f"a weight is {shown(self.size)} instead of {shape}")
        numbers = torch.frombuffer(bytearray(self.storage), dtype=torch.float32)
        return torch.as_strided(numbers, self.size, self.stride, self.offset).clone()


def storage(data):
    """The bytes of the numbers in a storage that torch.save wrote in its old format: four pickles,
    in the last of which an identifier stands for the storage, its key, the count, the numbers.
    torch.load would allocate what the identifier claims."""
    file = io.BytesIO(data)
    pickles = [restricted_unpickle(file, KNOWN) for _ in range(5)]
    kind, dtype, _, _, count, view = pickles[3]
    start = file.tell() + 8
    if (kind, dtype, view) == ("storage", "float32", None):
        is_counted = struct.pack("<q", count) == data[start - 8:start]
        if is_counted and len(data) - start == 4 * count:
            return memoryview(data)[start:]
    raise ValueError("a storage is not as torch.save writes float32 numbers")


# What a file may name. The network's own parts come first; the rest is read and not used.
KNOWN = {("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent_object,
         ("torch._utils", "_rebuild_parameter"): lambda tensor, requires_grad, hooks: tensor,
         ("torch._utils", "_rebuild_tensor_v2"): Tensor,
         ("torch.storage", "_load_from_bytes"): storage,
         ("torch", "FloatStorage"): "float32",
         ("torch.nn.modules.container", "ModuleDict"): Record,
         ("collections", "OrderedDict"): lambda: {},
         ("numpy._core.multiarray", "scalar"): Record,
         ("numpy.core.multiarray", "scalar"): Record,
         ("numpy", "dtype"): Record}


def tensors(root) -> dict:
    """{name: Tensor} of a Record of a module and those within it."""
    by_name = {}
    seen = set()
    waiting = [("", root)]
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen:
            raise ValueError("a module is part of itself, or there twice")
        seen.add(id(module))
        for name, value in module._parameters.items():
            if value is not None:
                by_name[prefix + name] = value
        for name, inner in module._modules.items():
            if inner is not None:
                waiting.append((f"{prefix}{name}.", inner))
    return by_name


def main():
    p = Parser(prog="python -m study.edm",
               description="Convert one of EDM's published DDPM++ networks into a checkpoint of "
                           "BNR 0. Its license, CC BY-NC-SA 4.0, goes with the weights.")
    p.add_argument("file", help="for example edm-cifar10-32x32-uncond-vp.pkl")
    p.add_argument("--out", default="edm.pt", help="the checkpoint (default edm.pt)")
    args = p.parse_args()
    with p.one_line_errors():
        checkpoint = convert(args.file)
        if not save_checkpoint(args.out, checkpoint):
            raise UserError(f"{args.out} could not be saved")
        c, h, w = checkpoint["data"]["shape"]
        classes = checkpoint["config"]["unet"]["classes"] or "no"
        parameters = sum(v.numel() for v in checkpoint["weights"].values())
        print(f"{args.out}: {c} x {h} x {w}, {classes} classes, {parameters:,} parameters, BNR 0. "
              "The license of EDM's weights, CC BY-NC-SA 4.0, stays theirs.")


if __name__ == "__main__":
    main()
