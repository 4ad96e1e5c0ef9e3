"""EDM's published networks (Karras et al., 2206.00364) as checkpoints of this project, of BNR 0.

    python -m study.edm edm-cifar10-32x32-uncond-vp.pkl --out edm.pt
    python sample.py --ckpt edm.pt

These files are pickles with EDM's source text in them, which EDM's loader executes. Here nothing
that a file names is imported or called. The deblurring head is zero, as r_out (8) is at BNR 0. The
nine augmentation inputs are zero in sampling; in training, data.augment makes them with EDM's own
meaning, order and signs, so that a network is told what it has learned. Refused are NCSN++ and ADM.
"""
import io
import pickle
import struct
from math import prod
from pathlib import Path

import torch

from data import CIFAR10_CLASSES
from model import build, check_facts
from util import Parser, UserError, save_checkpoints

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

def convert(filename):
    """A file of EDM's -> a checkpoint as train.py saves it. Raises UserError and OSError."""
    data = Path(filename).read_bytes()
    try:
        net = restricted_unpickle(data, KNOWN)["ema"]
        unet = unet_config(net)
        c, r, n = unet["in_channels"], unet["resolution"], unet["classes"]
        config = {"bnr": 0., "path": None, "sigma_data": float(net.sigma_data),
                  "param": "residual", "colour": None, "unet": unet}
        weights = convert_weights(config, tensors(net._modules["model"]), len(data))
        cifar10 = n == 10 and r == 32
        classes = CIFAR10_CLASSES if cifar10 else [str(i) for i in range(n)] or ["all"]
        name = Path(filename).stem
        checkpoint = {"config": config, "seen": 0,
                      "data": {"name": name, "shape": [c, r, r], "classes": classes},
                      "options": {"data": name, "resolution": r, "seed": 0,
                                  "sample_steps": 18 if r <= 32 else 40}}       # EDM's
        check_facts(checkpoint, weights, 2 * len(data))         # the zeros are not in the file
        return {"weights": weights, **checkpoint}
    except UserError as e:
        raise UserError(f"{filename}: {e}") from None
    except Exception as e:                                      # a pickle can raise nearly anything
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"{filename} is none of EDM's networks, or it is damaged ({reason})") \
            from None


def unet_config(net):
    """EDM's EDMPrecond, a Record -> the keywords of model.UNet. Raises UserError that names the
    setting which differs from DDPM++'s."""
    unet = net._modules["model"]
    for record, name in ((net, "EDMPrecond"), (unet, "SongUNet")):
        if record.class_name != name:
            raise UserError(f"the network is {shown(record.class_name)}, and not EDM's {name}")
    if unet._init_args:
        raise UserError("SongUNet has arguments without a name")
    given = {**DDPMPP, **DEFAULTS, **unet._init_kwargs}
    size = {"img_resolution", "in_channels", "out_channels"}
    for name, value in given.items():
        if name in DDPMPP and value != DDPMPP[name]:
            raise UserError(f"{name} is {shown(value)}, and DDPM++ has {DDPMPP[name]!r}")
        if name not in DDPMPP.keys() | DEFAULTS.keys() | size:
            raise UserError(f"{shown(name)} is {shown(value)}, a setting that DDPM++ does not have")
    if given["in_channels"] != given["out_channels"]:
        raise UserError("in_channels and out_channels differ")
    attention = list(given["attn_resolutions"])
    if not all(type(v) is int for v in attention):
        raise TypeError("attn_resolutions are not integers")
    return dict(in_channels=given["in_channels"], out_channels=2 * given["out_channels"],
                channels=given["model_channels"], mult=list(given["channel_mult"]),
                blocks=given["num_blocks"], resolution=given["img_resolution"],
                attention=attention, dropout=float(given["dropout"]),
                augment_dim=given["augment_dim"], classes=given["label_dim"])


def shown(value):
    return repr(value)[:80]


def convert_weights(config, theirs, size):
    """EDM's tensors by name -> the state dict of model.Denoiser. size: of the file, in bytes."""
    with torch.device("meta"):              # allocates nothing before the shapes are known to fit
        net = build(config)
    net.unet.check(config["unet"]["resolution"], config["unet"]["resolution"])
    ours = net.unet.state_dict()
    if sum(v.numel() for k, v in ours.items() if not k.startswith("last.")) * 4 > size:
        raise ValueError("its settings are of a network larger than the file")
    names, weights = layer_names(config["unet"]), {}
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


def layer_names(unet):
    """The layers of model.UNet with these keywords: {their name: their name in EDM's SongUNet}."""
    sizes = [f"{unet['resolution'] >> level}x{unet['resolution'] >> level}"
             for level in range(len(unet["mult"]))]
    encoder, decoder = [], []
    for level, size in enumerate(sizes):
        encoder += [f"enc.{size}_down"] if level else []
        encoder += [f"enc.{size}_block{i}" for i in range(unet["blocks"])]
    for level, size in reversed(list(enumerate(sizes))):
        decoder += [f"dec.{size}_up"] if level < len(sizes) - 1 else []
        decoder += [f"dec.{size}_block{i}" for i in range(unet["blocks"] + 1)]
    middle = [f"dec.{sizes[-1]}_in{i}" for i in range(2)]
    names = {"from_augment": "map_augment", "from_label": "map_label", "embed.0": "map_layer0",
             "embed.2": "map_layer1", "first": f"enc.{sizes[0]}_conv",
             "last_norm": f"dec.{sizes[0]}_aux_norm", "last": f"dec.{sizes[0]}_aux_conv"}
    for part, blocks in (("encoder", encoder), ("middle", middle), ("decoder", decoder)):
        for i, block in enumerate(blocks):
            names.update({f"{part}.{i}.{our}": f"{block}.{their}" for their, our in BLOCK.items()})
    return names


# Reading the pickle without executing anything

def restricted_unpickle(data, allowed):
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
    reader.find_class, reader.persistent_load = find_class, lambda pid: pid
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
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def read(self, shape):
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
    facts = [restricted_unpickle(file, KNOWN) for _ in range(5)]
    kind, dtype, _, _, count, view = facts[3]
    start = file.tell() + 8
    if (kind, dtype, view) != ("storage", "float32", None) \
            or struct.pack("<q", count) != data[start - 8:start] or len(data) - start != 4 * count:
        raise ValueError("a storage is not as torch.save writes float32 numbers")
    return memoryview(data)[start:]


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


def tensors(root):
    """{name: Tensor} of a Record of a module and those within it."""
    found, seen, todo = {}, set(), [("", root)]
    while todo:
        prefix, module = todo.pop()
        if id(module) in seen:
            raise ValueError("a module is part of itself, or there twice")
        seen.add(id(module))
        found.update({prefix + k: v for k, v in module._parameters.items() if v is not None})
        todo += [(f"{prefix}{k}.", m) for k, m in module._modules.items() if m is not None]
    return found


def main():
    p = Parser(prog="python -m study.edm",
               description="Convert one of EDM's published DDPM++ networks into a checkpoint of "
                           "BNR 0. Its licence, CC BY-NC-SA 4.0, goes with the weights.")
    p.add_argument("file", help="for example edm-cifar10-32x32-uncond-vp.pkl")
    p.add_argument("--out", default="edm.pt", help="the checkpoint (default edm.pt)")
    args = p.parse_args()
    with p.one_line_errors():
        checkpoint = convert(args.file)
        if not save_checkpoints({args.out: checkpoint}):
            raise UserError(f"{args.out} could not be saved")
        unet, (c, h, w) = checkpoint["config"]["unet"], checkpoint["data"]["shape"]
        print(f"{args.out}: {c} x {h} x {w}, {unet['classes'] or 'no'} classes, "
              f"{sum(v.numel() for v in checkpoint['weights'].values()):,} parameters, BNR 0. The "
              "licence of EDM's weights, CC BY-NC-SA 4.0, stays theirs.")


if __name__ == "__main__":
    main()
