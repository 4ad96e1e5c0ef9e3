"""A stand-in for a GPU: tensors that say that they are on another device, and compute on the CPU.

    with OtherDevice() as device:
        x = torch.ones(2, device="meta")        # how the other device is called
        print((x + 1).cpu())                    # 2, 2; and one more place in device.waits
        x + torch.ones(2)                       # raises, as on a GPU

A tensor that is left on the CPU raises here as it would on a GPU, and each read or copy for which
the CPU would wait for a GPU is noted. What this cannot show: kernels and their rounding, bf16,
compilation, pinned memory, and the time anything takes.
"""
import contextlib
import traceback
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parent.parent
# Every build of torch lets tensors be called so. Not "meta" alone, whose tensors the caches of
# degrade.py may hold already
OTHER = torch.device("meta", 1)
READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal",
         "aten::nonzero", "aten::masked_select"}
PINNING = {"aten::pin_memory", "aten::_pin_memory"}


class OnOther(torch.Tensor):
    """A tensor on the other device. values: the same tensor on the CPU."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device=OTHER)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of the context of the device")

    def __reduce_ex__(self, protocol):
        """Saved as torch.load(map_location="cpu") reads it."""
        return self.values.__reduce_ex__(protocol)


class OtherDevice(TorchDispatchMode):
    """The context. waits: "file.py:line" of this project for each read and blocking copy."""

    def __init__(self):
        super().__init__()
        self.waits = []
        self.autocast = torch.autocast

    def __enter__(self):
        torch.autocast = self.autocast_elsewhere
        return super().__enter__()

    def __exit__(self, *exception):
        torch.autocast = self.autocast
        return super().__exit__(*exception)

    def autocast_elsewhere(self, device_type, *args, **options):
        """torch.autocast, which does not know the other device."""
        if device_type == OTHER.type:
            return contextlib.nullcontext()
        return self.autocast(device_type, *args, **options)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function._schema.name
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        on_other = [v for v in tensors if isinstance(v, OnOther)]
        is_result_on_other = bool(on_other)
        blocks = not kwargs.get("non_blocking")

        if name in PINNING:
            return args[0]
        if name == "aten::copy_":
            is_result_on_other = isinstance(args[0], OnOther)
            blocks = len(args) < 3 or not args[2]
        elif kwargs.get("device") is not None:
            is_result_on_other = torch.device(kwargs["device"]) == OTHER
            kwargs["device"] = "cpu"
        elif on_other and any(v.ndim for v in tensors if not isinstance(v, OnOther)):
            raise RuntimeError(f"{name} of tensors on the CPU and on the other device")

        is_copy = name in ("aten::copy_", "aten::_to_copy")
        source = args[1] if name == "aten::copy_" else args[0] if args else None
        moves = is_copy and isinstance(source, OnOther) != is_result_on_other
        if moves and blocks or on_other and name in READS:
            self.waits.append(running_line())

        result = function(*values_of(args), **values_of(kwargs))
        if not is_result_on_other:
            return result
        same = {id(v.values): v for v in on_other}              # changed in place

        def wrapped(value):
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in same:
                return same[id(value)]
            return OnOther(value)
        return tree_map(wrapped, result)


def values_of(tree):
    def values(v):
        return v.values if isinstance(v, OnOther) else v
    return tree_map(values, tree)


def running_line() -> str:
    """The innermost line of this project that is running."""
    line = "elsewhere"
    for frame in traceback.extract_stack():
        if Path(frame.filename).parent in (ROOT, ROOT / "util"):
            line = f"{Path(frame.filename).name}:{frame.lineno}"
    return line
