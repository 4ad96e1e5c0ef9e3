"""Image files: bits, value ranges, bands, sizes and color profiles."""
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from data import load
from util.images import read_image


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
def test_12_bits_stored_in_16_give_one_warning(name, tmp_path, capsys):
    for i in range(5):
        (tmp_path / f"{i}-{name}").write_bytes(TWELVE_BITS[name])
    # one image of the full range does not stop the warning
    Image.fromarray(ramp(255, dtype=np.uint8)).save(tmp_path / "full.png")
    _, messages = warned(capsys, tmp_path)
    assert "use 1/16 of their range" in messages and "no value is above 15 of 255" in messages


def test_masks_give_a_warning_and_full_ranges_none(tmp_path, capsys):
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
    assert np.abs(expected - patches).max() > 8                  # the profile matters
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
