"""What once went wrong without a word, or could not be taken back: each kind by what a user would
see. The runs are of latents, which draw no grid, where a grid does not matter."""
import copy
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageCms

import fid
import sample
import train
from data import Images, load
from degrade import ConstantBNR
from model import Denoiser
from util.checkpoint import load_model, read_checkpoint
from util.cli import UserError
from util.files import atomic_write
from util.images import read_image
from util.inception import load_inception

ROOT = Path(__file__).parent.parent


def pictures(n=20):
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator))


def latents():
    x = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Images(x / 2, name="noise", latents=True)


def options(out, *words):
    small = "--resolution 8 --channels 8 --mult 1 --blocks 1 --attention --device cpu --batch 4"
    intervals = "--warmup 0 --log-every 0.004 --snapshot-every 0 --sample-steps 2"
    words = [*small.split(), *intervals.split(), "--out", str(out), *map(str, words)]
    return train.options(words)


def state_of(folder, name="state.pt"):
    return read_checkpoint(f"{folder}/{name}")


def same(a, b):
    """Whether two nested dicts hold the same tensors, to the bit, and the same values."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def same_state(a, b):
    return all(same(a[part], b[part]) for part in ("net", "ema", "optimizer", "seen"))


def command_line(main, *line):
    before = sys.argv
    sys.argv = ["program.py", *map(str, line)]
    try:
        main()
    finally:
        sys.argv = before


def refused(capsys, main, *line):
    """The one line, with exit code 2, that the program answers to this command line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        command_line(main, *line)
    assert e.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two models of one run, at 4 and at 8 images."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train.train(options(out, "--duration", 0.008, "--keep-every", 0.004), pictures())
    return out


# A folder of samples belongs to one draw


def draw(model, out, *words):
    line = ["--ckpt", model, "--steps", 2, "--device", "cpu", "--out", out, *words]
    command_line(sample.main, *line)


def test_the_same_command_goes_on_with_a_draw(trained, tmp_path):
    out = tmp_path / "samples"
    draw(trained / "ema.pt", out, "--seeds", "0-4,2,0")          # seeds given twice count once
    names = sorted(os.listdir(out))
    assert names == [f"{seed:06d}.png" for seed in range(5)] + ["draw.json"]
    images = {name: (out / name).read_bytes() for name in names}
    grid = (tmp_path / "samples-grid.png").read_bytes()
    (out / "000003.png").unlink()
    (out / "000001.png").write_bytes(images["000000.png"])       # would be drawn again, if it were
    draw(trained / "ema.pt", out, "--seeds", "0-4", "--batch", 2)
    assert (out / "000003.png").read_bytes() == images["000003.png"]
    assert (out / "000001.png").read_bytes() == images["000000.png"]
    (out / "000001.png").unlink()
    draw(trained / "ema.pt", out, "--seeds", "0-4")
    assert (tmp_path / "samples-grid.png").read_bytes() == grid


def test_another_draw_is_refused(trained, tmp_path, capsys):
    out = tmp_path / "samples"
    picture = tmp_path / "init.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    line = ["--ckpt", trained / "ema.pt", "--seeds", "0-2", "--steps", 2, "--device", "cpu",
            "--out", out, "--init", picture]
    command_line(sample.main, *line)
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    others = [["--ckpt", trained / "ema-000000.004.pt"], ["--seeds", "0-3"], ["--seeds", "3-5"],
              ["--steps", 3], ["--solver", "euler"], ["--level", 2], ["--churn", 1]]
    for other in others:
        assert "holds images of another draw" in refused(capsys, sample.main, *line, *other)
    Image.new("RGB", (8, 8), "blue").save(picture)               # the same name, another picture
    assert "holds images of another draw" in refused(capsys, sample.main, *line)
    assert before == {name: (out / name).read_bytes() for name in os.listdir(out)}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    Image.new("RGB", (8, 8)).save(foreign / "mine.png")
    assert "another draw" in refused(capsys, sample.main, *line, "--out", foreign)
    assert os.listdir(foreign) == ["mine.png"]


def test_an_unfinished_draw_is_said_where_it_is_scored(trained, tmp_path, capsys):
    out = tmp_path / "samples"
    draw(trained / "ema.pt", out, "--seeds", "0-3")
    capsys.readouterr()
    assert len(fid.read_input(str(out), keep=False).images) == 4
    assert "draw" not in capsys.readouterr().err
    (out / "000002.png").unlink()
    fid.read_input(str(out), keep=False)
    assert "holds 3 of the 4 images of its draw" in capsys.readouterr().err


def test_processes_share_a_draw(trained, tmp_path):
    draw(trained / "ema.pt", tmp_path / "one", "--seeds", "0-4")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--master_port=29571", str(ROOT / "sample.py"), "--ckpt", str(trained / "ema.pt"),
               "--steps", "2", "--device", "cpu", "--seeds", "0-4", "--out", str(tmp_path / "two")]
    for _ in range(2):                                           # the second time goes on
        subprocess.run(command, check=True, capture_output=True, timeout=500)
        for name in os.listdir(tmp_path / "one"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        (tmp_path / "two" / "000001.png").unlink()


# Ranges, bands, sizes and color profiles of images


def chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png16(values, color_type):
    """A PNG of 16 bits; color_type: 0 gray, 2 RGB, 4 gray and alpha, 6 RGB and alpha."""
    h, w = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", w, h, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) \
        + chunk(b"IEND", b"")


def tiff(values, extra=None, photometric=2):
    """A TIFF without compression, uint8 or uint16 [H, W, bands]. extra: its ExtraSamples."""
    h, w, bands = values.shape
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    tags = [(256, [w]), (257, [h]), (258, [8 * values.itemsize] * bands), (259, [1]),
            (262, [photometric]), (273, [0]), (277, [bands]), (278, [h]), (279, [len(data)])]
    if extra is not None:
        tags.append((338, extra))
    start = 8 + 2 + 12 * len(tags) + 4
    later = b""
    directory = struct.pack("<H", len(tags))
    offset = start + sum(2 * len(v) for _, v in tags if len(v) > 2)
    for tag, value in tags:
        if tag == 273:
            value = [offset]
        packed = struct.pack(f"<{len(value)}H", *value)
        if len(packed) > 4:
            directory += struct.pack("<HHII", tag, 3, len(value), start + len(later))
            later += packed
        else:
            directory += struct.pack("<HHI", tag, 3, len(value)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + later + data


def ramp(top, bands=3, dtype=np.uint16):
    """[16, 16, bands], from 0 to top, the bands in different order."""
    values = np.linspace(0, top, 256).round().astype(dtype).reshape(16, 16)
    return np.stack([values, values.T, values[::-1], values[:, ::-1]][:bands], -1)


def opaque(values, alpha):
    return np.concatenate([values, np.full_like(values[..., :1], alpha)], -1)


def warned(capsys, path, **how):
    capsys.readouterr()
    images = load(path, keep=False, **how)
    return images, capsys.readouterr().err


TWELVE_BITS = {
    "rgb.png": png16(ramp(4095), 2),
    "rgba.png": png16(opaque(ramp(4095), 65535), 6),
    "faint.png": png16(opaque(ramp(4095), 4095), 6),
    "gray.png": png16(ramp(4095, 1), 0),
    "la.png": png16(opaque(ramp(4095, 1), 65535), 4),
    "rgb.tif": tiff(ramp(4095)),
}


@pytest.mark.parametrize("name", TWELVE_BITS)
def test_12_bits_in_16_are_one_line(name, tmp_path, capsys):
    for i in range(5):
        (tmp_path / f"{i}-{name}").write_bytes(TWELVE_BITS[name])
    Image.fromarray(ramp(255, dtype=np.uint8)).save(tmp_path / "full.png")       # hides nothing
    _, messages = warned(capsys, tmp_path)
    assert "use 1/16 of their range" in messages and "no value is above 15 of 255" in messages


def test_masks_are_one_line_and_full_ranges_none(tmp_path, capsys):
    masks = tmp_path / "masks"
    full = tmp_path / "full"
    masks.mkdir()
    full.mkdir()
    for i in range(4):
        Image.fromarray((ramp(255, 1, np.uint8)[..., 0] > 9 * i).astype(np.uint8)).save(
            masks / f"{i}.png")
        (full / f"{i}.png").write_bytes(png16(ramp(65535), 2))
    (full / "black.png").write_bytes(png16(0 * ramp(65535), 2))
    glyph = np.zeros((16, 16, 4), np.uint8)                      # black on nothing
    glyph[4:9, 4:9, 3] = 255
    Image.fromarray(glyph).save(full / "glyph.png")
    array = (ramp(255, 3, np.uint8) > 9).astype(np.uint8)
    np.save(tmp_path / "masks.npy", np.stack([array] * 3))
    assert "no value is above 1 of 255" in warned(capsys, masks)[1]
    assert "no value is above 1 of 255" in warned(capsys, tmp_path / "masks.npy")[1]
    assert "range" not in warned(capsys, full)[1]


def test_gray_of_16_bits_with_alpha_stays_gray(tmp_path, capsys):
    values = opaque(ramp(65535, 1), 65535)
    values[:4, :, 1] = 0
    (tmp_path / "a.png").write_bytes(png16(values, 4))
    images, _ = warned(capsys, tmp_path)
    assert images.images.shape == (1, 1, 16, 16)
    expected = np.where(values[..., 1] > 0, values[..., 0] >> 8, 255)
    assert np.abs(images.images[0, 0].numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("extra", [None, [0], [0, 0]])
def test_bands_that_are_not_read_are_counted(extra, tmp_path, capsys):
    bands = 4 if extra is None else 3 + len(extra)
    values = np.random.RandomState(0).randint(0, 256, (9, 9, bands), np.uint8)
    for i in range(2):
        (tmp_path / f"{i}.tif").write_bytes(tiff(values, extra))
    Image.fromarray(values[..., :3]).save(tmp_path / "rgb.tif")
    Image.fromarray(values[..., :3]).convert("CMYK").save(tmp_path / "cmyk.tif")
    (tmp_path / "alpha.tif").write_bytes(tiff(values[..., :4], [2]))
    assert "only color is read of 2 with more bands, as 0.tif" in warned(capsys, tmp_path)[1]


def test_enlarged_images_are_counted(tmp_path, capsys):
    for i, size in enumerate([(16, 16), (40, 16), (32, 32)]):
        Image.effect_noise(size, 99).save(tmp_path / f"{i}.png")
    line = "smaller than the resolution, and so enlarged, are 2, as 0.png"
    assert line in warned(capsys, tmp_path, resolution=32)[1]
    assert "enlarged" not in warned(capsys, tmp_path, resolution=16)[1]


def fixed(*values):
    return b"".join(struct.pack(">i", round(v * 65536)) for v in values)


def profile(space, tags):
    """An ICC profile, version 2, of a display: {name: content of the tag}."""
    start = 128 + 4 + 12 * len(tags)
    table = struct.pack(">I", len(tags))
    body = b""
    for name, content in tags.items():
        content = content.ljust(-(-len(content) // 4) * 4, b"\0")
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02100000, b"mntr", space,
                         b"XYZ ").ljust(36, b"\0") + b"acsp"
    header = header.ljust(68, b"\0") + fixed(0.9642, 1, 0.8249)
    return header.ljust(128, b"\0") + table + body


def print_profile():
    """Of a printer whose cyan, magenta and yellow are gray ink: each takes a third of the light."""
    nodes = np.indices((2, 2, 2, 2)).reshape(4, -1).T           # C, M, Y and K
    light = 255 * (1 - nodes[:, :3].mean(1)) * (1 - nodes[:, 3])
    lab = np.stack([light, 0 * light + 128, 0 * light + 128], 1).round().astype(np.uint8)
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) \
        + 4 * bytes(range(256)) + lab.tobytes() + 3 * bytes(range(256))
    made = profile(b"CMYK", {b"A2B0": table})
    return made[:12] + b"prtr" + made[16:20] + b"Lab " + made[24:]


def matrix_profile(red, green, blue, gamma):
    """The primaries as XYZ under D50."""
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)}
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    for letter, xyz in ((b"r", red), (b"g", green), (b"b", blue)):
        tags[letter + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*xyz)
        tags[letter + b"TRC"] = curve
    return profile(b"RGB ", tags)


SRGB = [(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]
ADOBE = [(0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)]
P3 = [(0.5151, 0.2412, -0.0011), (0.2919, 0.6922, 0.0419), (0.1572, 0.0666, 0.7841)]


def encode_srgb(linear):
    linear = linear.clip(0, 1)
    return 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp"])
@pytest.mark.parametrize("primaries", [P3, ADOBE])
def test_colors_of_a_wide_profile_become_srgb(primaries, kind, tmp_path, capsys):
    patches = np.random.RandomState(0).randint(40, 216, (4, 4, 3), np.uint8)
    image = Image.fromarray(patches).resize((64, 64), Image.NEAREST)
    how = {"webp": {"lossless": True}, "jpeg": {"quality": 100, "subsampling": 0}}.get(kind, {})
    image.save(tmp_path / f"a.{kind}", icc_profile=matrix_profile(*primaries, 2.2), **how)
    linear = (patches / 255) ** (round(2.2 * 256) / 256)
    expected = encode_srgb(linear @ np.array(primaries) @ np.linalg.inv(np.array(SRGB)))
    images, messages = warned(capsys, tmp_path)
    found = images.images[0].permute(1, 2, 0).numpy()[8::16, 8::16]
    assert np.abs(expected - patches).max() > 8                  # it matters
    assert np.abs(found - expected).max() < 3 + 3 * (kind == "jpeg") and "profile" not in messages
    assert np.abs(read_image(tmp_path / f"a.{kind}", 3, 64, 64)[0].permute(1, 2, 0).numpy()
                  - images.images[0].permute(1, 2, 0).numpy()).max() == 0


def test_gray_and_transparent_images_have_profiles_too(tmp_path, capsys):
    gray = profile(b"GRAY", {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249),
                             b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, 461)})
    values = ramp(255, 1, np.uint8)[..., 0]
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=gray)
    images, _ = warned(capsys, tmp_path)
    assert images.images.shape[1] == 1
    expected = encode_srgb((values / 255) ** (461 / 256))        # a gamma of 1.8
    assert np.abs(images.images[0, 0].numpy() - expected).max() < 2
    clear = np.dstack([np.full((16, 16, 3), (200, 60, 60)), 255 * (values > 99)]).astype(np.uint8)
    Image.fromarray(clear).save(tmp_path / "b.png", icc_profile=matrix_profile(*P3, 2.2))
    x = read_image(tmp_path / "b.png", 3, 16, 16)[0].permute(1, 2, 0).numpy()
    assert (x[values <= 99] == 255).all()
    assert abs(int(x[values > 99][0, 0]) - 200) > 8


def test_inks_of_a_profile_become_srgb(tmp_path, capsys):
    inks = np.array([[0, 0, 0, 0], [255, 255, 0, 0], [0, 0, 0, 255], [255, 0, 0, 0]], np.uint8)
    Image.fromarray(inks[None].repeat(4, 0), "CMYK").save(tmp_path / "a.tif",
                                                          icc_profile=print_profile())
    images, messages = warned(capsys, tmp_path)
    assert "profile" not in messages
    lightness = np.array([100, 100 / 3, 0, 200 / 3])
    linear = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    found = images.images[0, :, 0].numpy()                                      # [3, 4]
    assert np.abs(found - encode_srgb(linear)).max() < 3


def test_srgb_changes_nothing_and_a_profile_of_no_use_is_counted(tmp_path, capsys):
    values = ramp(255, dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=srgb)
    images, messages = warned(capsys, tmp_path)
    assert np.array_equal(images.images[0].permute(1, 2, 0).numpy(), values)
    assert "profile" not in messages
    Image.fromarray(values).save(tmp_path / "b.png", icc_profile=b"damaged")
    Image.fromarray(values).convert("CMYK").save(tmp_path / "c.jpg", icc_profile=srgb)
    _, messages = warned(capsys, tmp_path)
    assert "the color profile cannot be used of 2, as b.png" in messages


def test_runs_and_draws_in_a_data_folder_are_left_out(tmp_path, monkeypatch, capsys):
    for i in range(3):
        Image.effect_noise((8, 8), 99).convert("RGB").save(tmp_path / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    args = options("run", "--duration", 0.004, "--data", ".")
    train.train(args)
    command_line(sample.main, "--ckpt", "run/ema.pt", "--steps", 1, "--seeds", "0-2", "--device",
                 "cpu")
    assert Path("run/grid-000000.004.png").exists() and Path("samples-grid.png").exists()
    images, messages = warned(capsys, ".")
    assert len(images.images) == 3 and "runs and draws are left out, run, samples" in messages
    train.train(options("run", "--duration", 0.008, "--data", "."))              # it resumes
    draws = tmp_path / "classes"
    for name in "ab":
        (draws / name).mkdir(parents=True)
        (draws / name / "draw.json").write_text("{}")
        Image.effect_noise((8, 8), 99).save(draws / name / "000000.png")
        Image.effect_noise((99, 99), 99).save(draws / f"{name}-grid.png")
    images, messages = warned(capsys, draws)                     # each class is a draw: no other
    assert images.classes == ["a", "b"] and "left out" not in messages


# Networks of one's own


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x, c_noise, augment=None, label=None):
        return self.conv(x)


class Tied(Own):
    def __init__(self):
        super().__init__()
        self.more = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 6, 3, padding=1)
        self.last.weight = self.more.weight

    def forward(self, x, *others, **more):
        return self.last(self.more(self.conv(x)).relu())


class Masked(Own):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((64, 64), -torch.inf).triu(1))

    def forward(self, x, *others, **more):
        return self.conv((torch.softmax(self.mask, 1) @ x.flatten(2).mT).mT.reshape(x.shape))


class Viewing(Own):
    def __init__(self):
        super().__init__()
        self.deep = nn.Conv2d(6, 6, 3, padding=1, bias=False)

    def forward(self, x, *others, **more):
        return self.deep(self.conv(x)).view(len(x), -1).view(len(x), 6, 8, 8)


class Volume(Own):
    def __init__(self):
        super().__init__()
        self.volume = nn.Conv3d(6, 6, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x, *others, **more):
        return self.volume(self.conv(x)[:, :, None])[:, :, 0]


class Normed(Own):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x, *others, **more):
        return F.dropout(self.norm(self.conv(x)), 0.1)           # also in eval mode: it is random


class Stated(Own):
    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        self.version = state["version"]


class Half(Own):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.conv.to(dtype)

    def forward(self, x, *others, **more):
        return self.conv(x.to(self.conv.weight.dtype))


class HardHalf(Half):
    def forward(self, x, *others, **more):
        return self.conv(x.bfloat16())                           # fails with weights of float32


class Late(Own):
    def forward(self, x, *others, **more):
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.ones(1))
        return self.scale * self.conv(x)


class Growing(Own):
    def __init__(self):
        super().__init__()
        self.register_buffer("history", torch.zeros(0))

    def forward(self, x, *others, **more):
        self.history = torch.cat([self.history, x.new_ones(1)])
        return self.conv(x)


class Hidden(Own):
    scale = 1.

    def forward(self, x, *others, **more):
        if self.training:
            self.scale = self.scale + 1                          # state_dict() does not have it
        return self.scale * self.conv(x)


class Lazy(Own):
    def __init__(self):
        super().__init__()
        self.conv = nn.LazyConv2d(6, 3, padding=1)


class Single(Own):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x, *others, **more):
        y = self.conv(x)
        return y + self.norm(y.mean((2, 3)))[:, :, None, None]


@pytest.mark.parametrize("kind", [Tied, Masked, Viewing, Volume, Normed, Stated, Half, HardHalf])
def test_a_network_that_trains_can_be_loaded_and_samples(kind, tmp_path):
    for duration in (0.008, 0.016):
        args = options(tmp_path, "--duration", duration)
        ema = train.train(args, latents(), net=Denoiser(kind()))
    net, checkpoint = load_model(tmp_path / "ema.pt", net=Denoiser(kind()))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    answers = []
    for model in (ema, net):
        torch.manual_seed(0)
        answers.append(torch.cat(model(x, 0.5, 1.)))
    assert torch.equal(*answers)
    images = list(sample.generate(net, ConstantBNR(0.5), (3, 8, 8), range(2), steps=3))
    assert images[0].isfinite().all()
    if kind is Tied:
        assert net.unet.last.weight is net.unet.more.weight


@pytest.mark.parametrize("kind, words, message", [
    (Late, [], "Unexpected key"), (Growing, [], "size mismatch"), (Lazy, [], "uninitialized"),
    (Hidden, [], "another one when it is loaded"),
    (Single, ["--batch-gpu", 1], "more than 1 value per channel")])
def test_one_that_could_not_be_loaded_is_one_line_before_the_run_writes(kind, words, message,
                                                                       tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match=message) as e:
        train.train(options(out, "--duration", 0.008, *words), latents(), net=Denoiser(kind()))
    assert "\n" not in str(e.value) and not out.exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_average_of_16_bit_weights_is_float32(dtype, tmp_path):
    """As the recursion in float64 gives it; in 16 bits it would stand still."""
    net = Denoiser(Half(dtype))
    start = copy.deepcopy(net)
    weights = [net.unet.conv.weight.double().clone()]

    def note(line):
        weights.append(net.unet.conv.weight.double().clone())
    optimizer = partial(torch.optim.SGD, lr=1e-4)
    args = options(tmp_path, "--duration", 0.4, "--ema", 0.02)
    train.train(args, latents(), net=net, optimizer=optimizer, on_log=note)
    average = weights[0]
    for step, weight in enumerate(weights[1:], 1):
        decay = 0.5 ** (4 / min(20, 0.05 * 4 * step))
        average = decay * average + (1 - decay) * weight
    saved = state_of(tmp_path)["ema"]["unet.conv.weight"]
    assert saved.dtype == torch.float32 and len(weights) == 101
    assert (weights[-1] - weights[0]).abs().max() > 0.01
    assert (saved - average).abs().max() < 1e-6
    whole = state_of(tmp_path)
    for duration in (0.2, 0.4):
        args = options(tmp_path / "parts", "--duration", duration, "--ema", 0.02)
        train.train(args, latents(), net=copy.deepcopy(start), optimizer=optimizer)
    parts = state_of(tmp_path / "parts")
    assert torch.equal(parts["ema"]["unet.conv.weight"], whole["ema"]["unet.conv.weight"])


def test_weights_are_saved_contiguously_and_load_in_the_layout_of_training(trained):
    model = state_of(trained, "ema.pt")["weights"]
    state = state_of(trained)
    for weights in (model, state["net"], state["ema"]):
        assert all(value.is_contiguous() for value in weights.values())
    torch.nn.utils.parameters_to_vector(model.values())
    net, _ = load_model(trained / "ema.pt")
    assert net.unet.first.weight.is_contiguous(memory_format=torch.channels_last)


# Optimizers


class Factored(torch.optim.Optimizer):
    """Moments of rows and columns, as Adafactor has, and a number in the group, as Prodigy has."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, dict(lr=lr, d=1.))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["d"] *= 1.01
            for p in group["params"]:
                state = self.state[p]
                square = p.grad.square().flatten(1) if p.ndim > 1 else p.grad.square()[None]
                for name, dim in (("row", 1), ("column", 0)):
                    mean = square.mean(dim)
                    state[name] = 0.9 * state[name] + 0.1 * mean if name in state else mean
                scale = state["row"].mean().sqrt() + state["column"].mean().sqrt()
                p -= group["lr"] * group["d"] * p.grad / (1e-8 + scale)


OPTIMIZERS = {
    "momentum": partial(torch.optim.SGD, lr=1e-4, momentum=0.9, nesterov=True),
    "plain": partial(torch.optim.SGD, lr=1e-4),
    "fused": partial(torch.optim.AdamW, lr=1e-3, fused=True, amsgrad=True),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-3),
    "rprop": partial(torch.optim.Rprop, lr=1e-4),
    "factored": partial(Factored, lr=1e-3),
    "asgd": partial(torch.optim.ASGD, lr=1e-4),
    "numpy": partial(torch.optim.SGD, lr=np.float64(1e-4), momentum=0.5),
    "tensor": partial(torch.optim.Adam, lr=torch.tensor(1e-3)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_resumes_to_the_bit(name, tmp_path):
    optimizer = OPTIMIZERS[name]
    for folder, durations in (("whole", [0.04]), ("parts", [0.02, 0.04])):
        for duration in durations:
            train.train(options(tmp_path / folder, "--duration", duration), latents(),
                        optimizer=optimizer)
    assert same_state(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))


def test_a_resumed_optimizer_has_the_new_learning_rates_and_is_of_the_same_kind(tmp_path):
    def in_two_groups(parameters, lr):
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "lr": 10 * lr}, {"params": others}], lr,
                               momentum=0.9)
    rates = []
    for duration, lr in ((0.008, 1e-4), (0.016, 1e-5)):
        train.train(options(tmp_path, "--duration", duration), latents(),
                    optimizer=partial(in_two_groups, lr=lr), on_log=lambda line: rates.append(line))
    groups = state_of(tmp_path)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 1e-5])
    with pytest.raises(UserError, match="optimizer SGD, not Adam"):
        train.train(options(tmp_path, "--duration", 0.024), latents())


# Going back


def test_a_run_goes_back_to_a_kept_state(tmp_path, capsys):
    """To the bit, for good at once, and without the log of what came after it."""
    run = tmp_path / "run"
    words = ["--keep-every", 0.008]
    train.train(options(run, "--duration", 0.016, *words), latents())
    whole = state_of(run)
    kept = state_of(run, "state-000000.008.pt")
    capsys.readouterr()
    train.train(options(run, "--duration", 0.036, "--lr", 1), latents())         # it explodes
    assert "warning: the loss rose from" in capsys.readouterr().err
    assert state_of(run, "ema-000000.008.pt")["seen"] == 8

    train.train(options(run, "--duration", 0.008, "--from", 0.008), latents())
    assert same_state(state_of(run), kept) and state_of(run, "ema.pt")["seen"] == 8
    assert "kept" not in json.loads((run / "options.json").read_text())
    train.train(options(run, "--duration", 0.016, *words), latents())
    assert same_state(state_of(run), whole)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    with pytest.raises(UserError, match="state-000000.007.pt does not exist"):
        train.train(options(run, "--from", 0.007), latents())
    assert same_state(state_of(run), whole)


def test_an_ordinary_log_has_no_warning_and_significant_digits(tmp_path, capsys):
    def tiny_loss(net, x0, alpha, sigma, noise, sigma_data):
        d, r = net(x0, alpha, sigma)
        return d.square().mean((1, 2, 3)), 1e-9 * r.square().mean((1, 2, 3))
    train.train(options(tmp_path, "--duration", 0.04), latents(), loss=tiny_loss)
    assert "rose" not in capsys.readouterr().err
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert 0 < line["deblur"] < 1e-8 and len(f"{line['deblur']:.9g}") > 7


# Options


def test_what_may_change_on_resuming(tmp_path, capsys):
    train.train(options(tmp_path, "--duration", 0.004), latents())
    train.train(options(tmp_path, "--duration", 0.008, "--ema", 7, "--warmup", 3), latents())
    with pytest.raises(UserError, match="--seed 0, not 1, on which it depends: .*--init-from"):
        train.train(options(tmp_path, "--duration", 0.012, "--seed", 1), latents())
    picture = latents()
    picture.images = torch.cat([picture.images, picture.images[:1]])
    picture.labels = torch.zeros(11, dtype=torch.long)
    with pytest.raises(UserError, match="count 10, not 11.*--init-from"):
        train.train(options(tmp_path, "--duration", 0.012), picture)
    capsys.readouterr()
    train.train(options(tmp_path, "--duration", 0.004), latents())
    assert "is complete at 0.008 kimg" in capsys.readouterr().out
    assert state_of(tmp_path)["seen"] == 8


def test_options_of_a_script_need_not_be_plain(tmp_path):
    for duration in (0.004, 0.008):
        args = options(tmp_path, "--duration", duration)
        args.lr = np.geomspace(1e-3, 1e-2, 3)[1]
        args.out = tmp_path / "run"
        args.mult = (1,)
        train.train(args, latents())
    assert state_of(tmp_path / "run")["seen"] == 8


@pytest.mark.parametrize("line", ["", "[1]", '{"kimg": 0.004}', '{"kimg": 0.004, "denoise": null}'])
def test_a_log_without_a_loss_resumes(line, tmp_path):
    train.train(options(tmp_path, "--duration", 0.004), latents())
    (tmp_path / "log.jsonl").write_text(line + "\n")
    train.train(options(tmp_path, "--duration", 0.008), latents())


@pytest.mark.parametrize("name, value", [
    ("batch", "many"), ("lr", float("nan")), ("mult", "2 a"), ("mult", ["a"]), ("precision", "fp8"),
    ("schedule", "slow"), ("cond", "yes"), ("duration", -1), ("attention", {"a": 1}),
    ("preset", "gone"), ("channels", 8.5)])
def test_edited_options_of_a_run_are_parsed(name, value, tmp_path, capsys):
    stored = vars(options(tmp_path, "--no-compile")) | {"preset": "tiny"}
    (tmp_path / "options.json").write_text(json.dumps(stored))
    again = vars(train.options(["--resume", str(tmp_path)]))
    assert {k: v for k, v in again.items() if k != "device"} == \
        {k: v for k, v in stored.items() if k != "device"}
    (tmp_path / "options.json").write_text(json.dumps({**stored, name: value}))
    line = refused(capsys, train.options, "--resume", tmp_path)
    assert f"--{name}" in line or str(value) in line


def test_options_that_would_do_nothing_are_refused(tmp_path, capsys):
    (tmp_path / "options.json").write_text(json.dumps(vars(options(tmp_path))))
    for words in (["--resume", str(tmp_path), "--preset", "ffhq64"], ["--warmup", "inf"]):
        with pytest.raises(SystemExit):
            train.options(words)
    assert "--preset is for a new run" in capsys.readouterr().err
    with pytest.raises(UserError, match="seeds"):
        list(sample.generate(None, ConstantBNR(0.5), (3, 8, 8), [2 ** 32]))
    for seeds, batch in ((5, 64), ([0], 0)):
        with pytest.raises(UserError, match="batch must be"):
            list(sample.generate(None, ConstantBNR(0.5), (3, 8, 8), seeds, batch=batch))
    line = refused(capsys, sample.main, "--ckpt", "x", "--seeds", str(2 ** 32))
    assert "below 2^32" in line


# What a script has around train()


def test_random_state_and_gradients_are_as_before(tmp_path):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    with torch.no_grad():
        train.train(options(tmp_path / "a", "--duration", 0.004), latents())
    assert torch.equal(torch.randn(3), expected) and torch.is_grad_enabled()
    with_graph = Images((latents().images * torch.ones(1, requires_grad=True)), latents=True)
    train.train(options(tmp_path / "b", "--duration", 0.004), with_graph)


# What the lines say


def test_a_model_of_any_ratio_starts_no_network_of_one(tmp_path):
    train.train(options(tmp_path / "any", "--duration", 0.004, "--bnr", "any"), latents())
    words = ["--duration", 0.004, "--init-from", tmp_path / "any/ema.pt"]
    with pytest.raises(UserError, match="its --param, --bnr or") as e:
        train.train(options(tmp_path / "one", *words), latents())
    assert "Unexpected" not in str(e.value)


def test_a_full_disk_is_named(tmp_path):
    """A file system without room for it."""
    with pytest.raises(OSError) as e:
        with atomic_write(tmp_path / "a.npy"):
            raise OSError(28, "No space left on device")
    assert e.value.filename == tmp_path / "a.npy" and not os.listdir(tmp_path)


def test_wrong_weights_of_the_fid_give_no_advice_to_run_them(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "w.pth")
    with pytest.raises(UserError) as e:
        load_inception(tmp_path / "w.pth")
    assert str(e.value).endswith("w.pth is no weights file: Weights only load failed")


def test_images_files_are_whole(trained, tmp_path):
    """.npy files of latents are written whole or not at all: no part of one is left."""
    out = tmp_path / "run"
    train.train(options(out, "--duration", 0.004), latents())
    draw(out / "ema.pt", tmp_path / "samples", "--seeds", "0-2")
    names = sorted(os.listdir(tmp_path / "samples"))
    assert names == ["000000.npy", "000001.npy", "000002.npy", "draw.json"]
    first = np.load(io.BytesIO((tmp_path / "samples/000000.npy").read_bytes()))
    assert first.shape == (3, 8, 8)
