import hashlib
import http.server
import io
import json
import math
import os
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from data import Images, augment, leaves, load, warp
from degrade import dct2, frequencies
from util import UserError, normalize, save_grid, to_uint8


def test_leaves_are_seeded_and_their_power_falls_like_that_of_photographs():
    a = leaves(2000, 32, seed=1)
    assert a.dtype == torch.uint8 and a.shape == (2000, 3, 32, 32)
    assert torch.equal(a[:100], leaves(2000, 32, seed=1)[:100])
    assert not torch.equal(a[:100], leaves(100, 32, seed=2))
    x = normalize(a).double()
    power = dct2(x - x.mean((0, 2, 3), keepdim=True)).square().mean((0, 1)).flatten()
    lam = frequencies(32, 32).flatten()
    low = (lam > 0) & (lam < math.pi ** 2 / 4)
    z, y = lam[low].log(), power[low].log()
    slope = ((z - z.mean()) * (y - y.mean())).sum() / (z - z.mean()).square().sum()
    assert -1.8 < slope < -0.9              # 1 / lam is -1; smooth edges at this size are steeper


def test_leaves_have_the_right_distribution_of_radii():
    """With one disc, two pixels at distance d differ where it covers exactly one of them:
    2 (E[pi r^2] - E[lens]) / 9, with r of density r^-3."""
    x, d = leaves(2000, 64, seed=3, discs=1), 0.5
    differ = (x[..., 32:] != x[..., :32]).any(1).float().mean().item()
    r = np.linspace(0.25, 1, 10_001)
    sector = 2 * r ** 2 * np.arccos(np.minimum(d / (2 * r), 1))
    lens = np.where(r > d / 2, sector - d / 2 * np.sqrt(np.maximum(4 * r ** 2 - d ** 2, 0)), 0)
    expected = np.average(2 * (math.pi * r ** 2 - lens) / 9, weights=r ** -3.)
    assert differ == pytest.approx(expected, rel=0.1)           # soft edges make 5 % of it


def test_leaves_are_opaque_discs_of_flat_colour():
    x = leaves(200, 64).int()
    right = x[..., 1:, 1:] == x[..., :-1, :-1]
    flat = (right & (x[..., 1:, 1:] == x[..., 1:, :-1])).all(1).float().mean()
    assert flat > 0.75                                          # all but edges
    assert len({tuple(p) for p in x[:, :, 5, 5].tolist()}) > 190


def test_leaves_are_made_once_and_kept(tmp_path, monkeypatch):
    made = []

    def counted(n, resolution):
        made.append(1)
        return leaves(n, resolution, discs=len(made))
    monkeypatch.setattr(data, "leaves", counted)
    monkeypatch.setattr(data, "KEEP_FROM", 1)
    first = load("leaves", 4, tmp_path)
    assert first.images.shape == (16384, 3, 4, 4)
    assert torch.equal(load("leaves", 4, tmp_path).images, first.images) and len(made) == 1
    kept = tmp_path / "leaves-4.pt"
    kept.write_bytes(kept.read_bytes()[:1000])                  # an incomplete file is made again
    assert load("leaves", 4, tmp_path).images.shape == first.images.shape and len(made) == 2


def png(array):
    f = io.BytesIO()
    Image.fromarray(array).save(f, "png")
    return f.getvalue()


def noise(h, w, c=3, seed=0):
    shape = (h, w, c) if c == 3 else (h, w)
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def hwc(image):
    return image.permute(1, 2, 0).numpy()


@pytest.fixture
def files():
    return {"b/2.png": noise(8, 8, seed=1), "a/1.png": noise(8, 8), "a/3.png": noise(8, 8, seed=2)}


def as_folder(root, files):
    for name, array in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(array if isinstance(array, bytes) else png(array))
    return root


def as_zip(path, files):
    with zipfile.ZipFile(path, "w") as z:
        for name, content in files.items():
            z.writestr(name, content if isinstance(content, (bytes, str)) else png(content))
    return path


def add_to_tar(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def as_tar(path, files):
    mode = path.suffix[1:].replace("tar", "")
    with tarfile.open(path, f"w:{mode}") as t:
        for name, content in files.items():
            add_to_tar(t, name, content if isinstance(content, bytes) else png(content))
    return path


def test_the_same_images_in_every_format_are_the_same_set(tmp_path):
    """Whatever the order in the archive, and whether a folder lies around it."""
    x = np.random.RandomState(0).randint(0, 256, (30, 6, 6, 3), dtype=np.uint8)
    files = {f"{'abc'[i % 3]}/{i}.png": x[i] for i in range(30)}
    mixed = dict(sorted(files.items(), key=lambda item: hash(item[1].tobytes())))
    order = sorted(files)
    images, labels = np.stack([files[n] for n in order]), ["abc".index(n[0]) for n in order]
    np.save(tmp_path / "x.npy", images)
    np.savez(tmp_path / "x.npz", images=images.transpose(0, 3, 1, 2), labels=labels)
    windows = {name.replace("/", "\\"): image for name, image in mixed.items()}
    sets = [as_folder(tmp_path / "x", files), as_zip(tmp_path / "x.zip", mixed),
            *(as_tar(tmp_path / f"x.{kind}", mixed) for kind in ("tar", "gz", "bz2", "xz")),
            as_folder(tmp_path / "around", {f"x/{n}": image for n, image in files.items()}),
            as_zip(tmp_path / "windows.zip", windows), tmp_path / "x.npz"]
    found = [load(str(path)) for path in sets]
    for d in found:
        assert np.array_equal(d.images.numpy(), images.transpose(0, 3, 1, 2))
        assert d.labels.tolist() == labels and d.no_classes == ""
        assert d.classes == (["0", "1", "2"] if "npz" in d.name else ["a", "b", "c"])
    facts = [{**d.facts(), "name": "", "classes": []} for d in found]
    assert all(f == facts[0] for f in facts)
    assert load(tmp_path / "x.npy").facts()["digest"] != facts[0]["digest"]     # without labels
    assert load(tmp_path / "x.npy").facts()["mean"] == facts[0]["mean"]


def plain(*names):
    return {f"{name}.png": noise(4, 4, seed=i) for i, name in enumerate(names)}


@pytest.mark.parametrize("names, classes", [
    ("dog/day/1 dog/2 cat/day/3", "dog dog cat"),                       # not the innermost folder
    ("a/x/1 b/x/2", "a b"),                                     # two folders of one name
    ("set/train/n01/images/1 set/train/n02/images/2", "n01 n02"),
    ("train/1 bus/2", "train bus"),                             # a train is a vehicle, too
    ("test_tube/1 bullet_train/2 a/3 b/4 c/5", "test_tube bullet_train a b c"),
    ("train/1 validation/2", "train and validation are splits: give one of them"),
    ("Training/x/1 Testing/x/2", "Testing and Training are splits"),
    ("trainA/1 trainB/2 testA/3", "testA and trainA and trainB are splits"),
    ("coco/train2017/1 coco/val2017/2", "train2017 and val2017 are splits"),
    ("1 2", "2 of 2 images lie in no folder of a class"),
    ("set/1 set/dog/2 set/cat/3", "1 of 3 images lie in no folder of a class")])
def test_a_class_is_the_first_folder_in_which_the_paths_differ(names, classes, tmp_path):
    files = plain(*names.split())
    for path in (as_folder(tmp_path / "a", files), as_zip(tmp_path / "a.zip", files)):
        d = load(path)
        if d.no_classes:
            assert classes in d.no_classes and d.classes == ["all"] and not d.labels.any()
            continue
        of = dict(zip(sorted(files), (d.classes[i] for i in d.labels), strict=True))
        assert [of[name] for name in files] == classes.split()


@pytest.mark.parametrize("name", ["metadata.jsonl", "train/metadata.csv"])
def test_labels_in_a_metadata_file_are_not_read_in_one_line(name, tmp_path):
    folder = as_folder(tmp_path / "hub", {**plain("train/1", "validation/2"), name: b"{}"})
    assert load(folder).no_classes == ("train and validation are splits: give one of them, and "
                                       f"labels in {name} are not read")


LABELS = {"00000/a.png": 1, "00000/b.png": 0, "00001/c.png": 1}


@pytest.mark.parametrize("labels, words", [
    (LABELS, ""),
    ({k.replace("/", "\\"): v for k, v in LABELS.items()}, ""),
    ({**LABELS, "gone.png": 5}, ""), ({k: "xy"[v] for k, v in LABELS.items()}, ""),
    (None, "dataset.json has no label for 3 of 3 images"), ("absent", "no label for 3 of 3 images"),
    ({"00000/a.png": 1}, "no label for 2 of 3 images"),
    ({k: v / 2 for k, v in LABELS.items()}, "the labels in dataset.json are neither whole numbers"),
    ({k: [v, 1] for k, v in LABELS.items()}, "neither whole"),
    ({k: {} for k in LABELS}, "neither whole"), ({k: True for k in LABELS}, "neither whole")])
def test_edms_labels_are_in_dataset_json(labels, words, tmp_path):
    """And not in the names of its folders, in every container, also in a folder around all."""
    table = {} if labels == "absent" else \
        {"labels": list(labels.items()) if isinstance(labels, dict) else labels}
    for around in ("", "set/"):
        files = {f"{around}{n}": noise(4, 4, seed=i) for i, n in enumerate(LABELS)}
        files[f"{around}dataset.json"] = json.dumps(table).encode()
        root = tmp_path / ("around" if around else "alone")
        for path in (as_folder(root / "a", files), as_zip(root / "a.zip", files)):
            d = load(path)
            if words:
                assert words in d.no_classes.replace(around, "") and d.classes == ["all"]
                continue
            values = {int(c) if c.isdigit() else "xy".index(c): i for i, c in enumerate(d.classes)}
            zero, one = (values[v] for v in (0, 1))
            assert d.labels.tolist() == [one, zero, one]


@pytest.mark.parametrize("table", [b"{", b'{"labels": [1, 2]}', b"[]"])
def test_a_broken_dataset_json_is_one_line(table, tmp_path):
    folder = as_folder(tmp_path / "a", {**plain("0/a", "1/b"), "dataset.json": table})
    with pytest.raises(UserError, match="a cannot be read .(JSON|Type|Attrib).*: give"):
        load(folder)


def test_what_others_leave_behind_is_left_out_and_counted_in_one_line(tmp_path, capsys):
    left = [".ipynb_checkpoints/0", "red/.thumbnails/0", "red/@eaDir/0", "__MACOSX/red/._0"]
    files = {**plain("red/0", "blue/0", *left), "red/Thumbs.db": b"x", "blue/a.heic": b"x",
             "blue/raw": b"x", "notes.TXT": b"x"}
    for path in (as_folder(tmp_path / "a", files), as_zip(tmp_path / "a.zip", files)):
        d = load(path)
        assert d.classes == ["blue", "red"] and len(d.images) == 2
        line, = [n for n in capsys.readouterr().err.splitlines() if "not read" in n]
        assert line.startswith(f"{path}: files that are not read: 8, as ")
        assert line.rsplit(" as ", 1)[1] in files


def test_every_extension_that_pillow_reads_is_read(tmp_path):
    for i, extension in enumerate((".jfif", ".jpe", ".jp2", ".PNG", ".Tif", ".webp", ".tga")):
        Image.fromarray(noise(16, 16)).save(tmp_path / f"{i}{extension}")
    assert len(load(tmp_path).images) == 7
    assert not {".pdf", ".eps", ".ps", ".mpg", ".h5"} & data.EXTENSIONS


@pytest.mark.parametrize("name", ["stack.tif", "stack.gif", "stack.webp", "stack.png"])
def test_only_the_first_page_of_several_is_read_in_one_line(name, tmp_path, capsys):
    pages = [Image.fromarray(noise(8, 8, seed=i)) for i in range(3)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "one.png")
    assert len(load(tmp_path).images) == 2
    assert f"only the first page is read of 1 with several, as {name}" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [9, 12, 15, 16])
def test_16_bit_images_that_use_few_of_their_bits_are_one_line(bits, tmp_path, capsys):
    ramp = np.linspace(0, 2 ** bits - 1, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp // 4).save(tmp_path / "b.tif")         # a dark one stays darker
    x = load(tmp_path).images
    assert np.array_equal(x[:, 0].numpy(), [ramp >> 8, ramp // 4 >> 8])
    said = f"use 1/{2 ** (16 - bits)} of their range: convert to 8 bits"
    assert (said in capsys.readouterr().err) == (bits < 16)


def test_a_pgm_declares_its_largest_value(tmp_path):
    for i, largest in enumerate((15, 255, 1023, 65535)):
        ramp = np.linspace(0, largest, 256).astype(">u2" if largest > 255 else np.uint8)
        (tmp_path / f"{i}.pgm").write_bytes(b"P5 16 16 %d\n" % largest + ramp.tobytes())
    x = load(tmp_path).images.float()
    assert x.shape == (4, 1, 16, 16)
    for image in x[:, 0]:
        assert (image.flatten() - torch.arange(256)).abs().max() < 20 and image.max() == 255


def test_arrays_are_read_with_their_labels_and_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, grey = np.stack([noise(8, 8, seed=i) for i in range(6)]), noise(168, 28, 1)
    grey = grey.reshape(6, 28, 28)
    y = np.array([0, 1, 0, 2, 0, 1])
    sets = {"guided": dict(arr_0=x, arr_1=y), "mnist": dict(x_train=grey, y_train=y, y_test=y[:4]),
            "medmnist": dict(train_images=x, train_labels=y[:, None].astype(np.uint8)),
            "planes": dict(images=x.transpose(0, 3, 1, 2), labels=y),
            "named": dict(x=x[..., :1], y=np.array(["a", "b", "a", "c", "a", "b"]))}
    for name, arrays in sets.items():
        np.savez(f"{name}.npz", **arrays)
        d = load(f"{name}.npz")
        assert d.name == f"{name}.npz" and d.labels.tolist() == y.tolist()
        assert d.classes == (list("abc") if name == "named" else list("012"))
    assert load("mnist.npz").images.shape == (6, 1, 28, 28)
    small = load("mnist.npz", 14).images[3, 0]
    lanczos = Image.fromarray(grey[3]).resize((14, 14), Image.Resampling.LANCZOS)
    assert np.array_equal(small, lanczos)

    np.savez("two.npz", x_test=x[:4], x_train=x, y_test=y[:4], y_train=y)
    with pytest.raises(UserError, match=r"two.npz holds x_test uint8 \[4, 8, 8, 3\], x_train uint8 "
                                        r"\[6, .* give one, as two.npz:NAME"):
        load("two.npz")
    assert load("two.npz:x_test").labels.tolist() == [0, 1, 0, 2]
    assert load("two.npz:x_train").name == "two.npz:x_train"
    assert load("two.npz:x_train").labels.tolist() == y.tolist()
    np.savez("three.npz", x=x, y=y, z=y)
    assert load("three.npz").no_classes == "2 of its arrays could be its labels"
    for name, array in (("float", x / 255.), ("int", x.astype(np.int64)), ("one", x[0]),
                        ("rgba", np.concatenate([x, x[..., :1]], 3)), ("none", x[:0])):
        np.save(f"{name}.npy", array)
        with pytest.raises(UserError, match=rf"{name}.npy holds {array.dtype} \[.*s are uint8"):
            load(f"{name}.npy")
    np.save("object.npy", np.array([{}]))
    with pytest.raises(UserError, match="object.npy cannot be read .ValueError: .*give"):
        load("object.npy")


def test_a_name_that_is_also_a_built_in_set_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_folder(tmp_path / "leaves", plain("0"))
    with pytest.raises(UserError, match="leaves is a built-in set, .* give ./leaves for"):
        load("leaves")
    assert load("./leaves").name == load("leaves/").name == "leaves"
    assert len(load("./leaves").images) == 1
    (tmp_path / "leaves/options.json").write_text("{}")         # a run is no data set
    made = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    monkeypatch.setattr(data, "leaves", lambda n, resolution: made)
    assert torch.equal(load("leaves", 4).images, made)
    monkeypatch.chdir("leaves")
    assert load(".").name == "leaves"


def test_images_are_checked_as_they_enter():
    x = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    d = Images(x, torch.tensor([0, 1, 1, 0]), (np.str_("a"), 1.5), np.str_("b"))
    assert [type(v) for v in (d.name, *d.classes)] == [str] * 3 and d.classes == ["a", "1.5"]
    assert Images(x).labels.tolist() == [0] * 4 and Images(x).facts()["classes"] == ["all"]
    assert Images(x.float(), latents=True).facts()["latents"] is True
    for bad in (x.long(), x.bool(), x.float(), x[0], x[:0], x.numpy()):
        with pytest.raises(UserError, match="mine: images must be a torch.uint8 tensor"):
            Images(bad)
    for bad in (x, x.float() * math.nan):
        with pytest.raises(UserError, match="finite floats, which latents=True takes as they are"):
            Images(bad, latents=True)
    for bad in ([0] * 4, torch.zeros(4), torch.zeros(3).long(), torch.tensor([0, 0, 0, 2]),
                torch.tensor([0, 0, 0, -1])):
        with pytest.raises(UserError, match="labels must be an int64 tensor .4. of places in"):
            Images(x, bad, ["a", "b"])
    with pytest.raises(UserError, match="which have different names"):
        Images(x, None, ["a", "a"])


def test_the_digest_is_of_pixels_and_labels():
    x, y = torch.arange(48, dtype=torch.uint8).reshape(4, 3, 2, 2), torch.tensor([0, 1, 1, 0])
    digest = Images(x, y, "ab").facts()["digest"]
    by_hand = hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
    last = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)       # channels last in memory
    assert digest == by_hand[:16] == Images(last, y, "ab").facts()["digest"]
    assert Images(x.flip(0), y, "ab").facts()["digest"] != digest
    assert Images(x, y.flip(0).roll(1), "ab").facts()["digest"] != digest


def test_facts_are_exact(tmp_path, files):
    d = load(as_folder(tmp_path, files))
    facts, x = d.facts(), d.images.double() / 127.5 - 1
    assert (facts["count"], facts["shape"], facts["classes"]) == (3, [3, 8, 8], ["a", "b"])
    assert facts["mean"] == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-9)
    assert facts["std"] == pytest.approx(x.std((0, 2, 3), unbiased=False).tolist(), abs=1e-9)


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_facts_and_colour_are_moments_of_uint8_and_of_float_images(kind):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 5, 4, 6), generator=g, dtype=torch.uint8)
    if kind == "float":                                         # latents: any range, any channels
        images = torch.randn(50, 5, 4, 6, generator=g) * 7 + 3
    d = Images(images, latents=kind == "float")
    assert torch.equal(normalize(images), images) or kind == "uint8"
    x = (images.double() if kind == "float" else images.double() / 127.5 - 1).numpy()
    facts, colour = d.facts(), d.colour()
    assert facts["shape"] == [5, 4, 6] and facts["count"] == 50
    assert facts["mean"] == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-9)
    assert facts["std"] == pytest.approx(x.std((0, 2, 3)).tolist(), abs=1e-9)
    means = x.mean((2, 3))
    assert colour["mean"] == pytest.approx(means.mean(0).tolist(), abs=1e-6)
    assert np.allclose(colour["cov"], np.cov(means.T, bias=True), rtol=1e-5, atol=1e-7)


def test_images_are_cropped_in_the_middle_and_resized(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200                                        # the middle square has one colour
    square = np.full((5, 5, 3), 200, np.uint8)
    d = load(as_folder(tmp_path, {"w.png": wide, "s.png": square}), 10)
    assert d.images.shape == (2, 3, 10, 10) and (d.images[:, :, 1:-1, 1:-1] == 200).all()
    assert d.classes == ["all"]
    with pytest.raises(UserError, match="w.png and the first image have different sizes: give a"):
        load(tmp_path)
    tall = load(as_folder(tmp_path / "tall", {"t.png": wide.transpose(1, 0, 2)}), 10).images
    assert (tall[:, :, 1:-1, 1:-1] == 200).all()
    large = noise(40, 40)
    resized = load(as_folder(tmp_path / "large", {"l.png": large}), 10).images[0]
    lanczos = Image.fromarray(large).resize((10, 10), Image.Resampling.LANCZOS)
    assert np.array_equal(hwc(resized), np.asarray(lanczos))


def test_non_square_images_keep_their_shape_and_grey_stays_grey(tmp_path):
    grey = load(as_folder(tmp_path, {"a.png": noise(6, 9, 1), "b.png": noise(6, 9, 1, 1)}))
    assert grey.images.shape == (2, 1, 6, 9)
    mixed = load(as_folder(tmp_path, {"c.png": noise(6, 9)})).images
    assert mixed.shape == (3, 3, 6, 9) and (mixed[0, 0] == mixed[0, 2]).all()


def test_the_orientation_of_the_camera_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                            # rotate by 90 degrees, clockwise
    Image.fromarray(noise(6, 9)).save(tmp_path / "rotated.png", exif=exif)
    assert np.array_equal(hwc(load(tmp_path).images[0]), np.rot90(noise(6, 9), -1))


def test_16_bit_and_transparent_images_are_read_as_they_look(tmp_path):
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(load(tmp_path).images[0, 0].numpy(), deep // 256)
    clear = np.dstack([noise(8, 8), np.zeros((8, 8), np.uint8)])
    clear[:4, :, 3] = 255
    (tmp_path / "rgba").mkdir()
    Image.fromarray(clear).save(tmp_path / "rgba/clear.png")
    seen = hwc(load(tmp_path / "rgba").images[0])
    assert np.array_equal(seen[:4], clear[:4, :, :3]) and (seen[4:] == 255).all()


@pytest.mark.parametrize("dtype, mode", [(np.float32, "F"), (np.int32, "I")])
def test_32_bit_images_are_skipped_with_the_reason(dtype, mode, tmp_path, capsys):
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(np.arange(64, dtype=dtype).reshape(8, 8)).save(tmp_path / "scan.tif")
    assert Image.open(tmp_path / "scan.tif").mode == mode
    d, name = load(tmp_path), "scan.tif"
    assert np.array_equal(d.images[:, 0].numpy(), [deep // 256])
    assert f"skipped {name}: 32-bit and float images have no" in capsys.readouterr().err


def test_images_are_written_in_the_format_of_their_extension(tmp_path):
    with pytest.raises(UserError, match="use the extension .png"):
        save_grid(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), tmp_path / "grid.text")


def test_a_broken_file_is_named_skipped_and_counted(tmp_path, files, capsys):
    files["a/0.png"] = png(noise(8, 8))[:60]
    d = load(as_folder(tmp_path, files))
    assert len(d.images) == 3
    printed = capsys.readouterr().err
    assert "skipped a/0.png" in printed and "1 of 4 images skipped" in printed


def test_what_contains_no_images_is_an_error(tmp_path):
    (tmp_path / "text.zip").write_text("not a zip")
    (tmp_path / "one.png").write_bytes(png(noise(4, 4)))
    (tmp_path / "empty").mkdir()
    as_folder(tmp_path / "text", {"a.txt": b""})
    for name, words in (("no", "does not exist"),
                        ("empty", r"empty contains no image that can be read; give leaves"),
                        ("text.zip", "text.zip cannot be read .ReadError.*: give leaves, cifar10"),
                        ("text", "text contains no image .*; files that are not read: 1, as a.txt"),
                        ("one.png", "one.png cannot be read .* is one image: give its folder")):
        with pytest.raises(UserError, match=words):
            load(tmp_path / name)


def test_a_zip_of_a_later_version_is_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("a.png", png(noise(4, 4)))
    b = bytearray((tmp_path / "a.zip").read_bytes())
    b[b.index(b"PK\x01\x02") + 6] = 208                         # the version needed to unpack it
    (tmp_path / "a.zip").write_bytes(b)
    with pytest.raises(UserError, match="a.zip cannot be read .NotImplementedError"):
        load(tmp_path / "a.zip")


def test_an_image_beyond_twice_pillows_limit_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    d = load(as_folder(tmp_path, {"a.png": noise(10, 10), "b.png": noise(10, 21)}))
    assert len(d.images) == 1
    assert "skipped b.png: Image size (210 pixels) exceeds limit" in capsys.readouterr().err


def test_names_that_lead_outside_an_archive_are_left_out(tmp_path, capsys):
    files = {name: noise(4, 4) for name in ("in.png", "../out.png", "a/../../out.png", "..\\o.png")}
    assert len(load(as_zip(tmp_path / "a.zip", files)).images) == 1
    assert "files that are not read: 3, as ../out.png" in capsys.readouterr().err


def test_a_tar_that_is_cut_short_is_not_taken_for_whole(tmp_path):
    """Cut anywhere before the zeros at its end, also between two files."""
    whole, part = tmp_path / "whole.tar", tmp_path / "part.tar"
    with tarfile.open(whole, "w") as t:
        for i in range(3):
            add_to_tar(t, f"{i}.png", png(noise(4, 4, seed=i)))
        end = t.offset
    assert len(load(whole).images) == 3
    for size in (*range(512, end + 1, 512), end - 100, end + 100):
        part.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(UserError, match="cut short or damaged|cannot be read"):
            load(part)


def test_a_sparse_file_in_a_tar_is_bounded(tmp_path):
    """512 bytes that say: an image of 4 GiB without any data."""
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = tarfile.itn(2 ** 32, 12, tarfile.GNU_FORMAT)              # the unpacked size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)                                  # the checksum
    (tmp_path / "a.tar").write_bytes(header + bytes(1024))
    with tarfile.open(tmp_path / "a.tar") as t:
        assert t.getmembers()[0].size == 2 ** 32
    with pytest.raises(UserError, match="unpacks to 4.0 GiB"):
        load(tmp_path / "a.tar")


def test_links_in_a_folder_are_followed_and_what_cannot_be_read_is_named(tmp_path, files, capsys):
    as_folder(tmp_path / "far", {"x.png": noise(8, 8, seed=3)})
    folder = as_folder(tmp_path / "set", files)
    (folder / "c").symlink_to(tmp_path / "far")
    (folder / "a/again").symlink_to(folder)                     # a circle
    (folder / "a/gone.png").symlink_to("nowhere")
    (folder / "b/link.png").symlink_to(folder / "a/1.png")
    os.mkfifo(folder / "a/pipe.png")
    d = load(folder)
    assert d.classes == ["a", "b", "c"] and d.labels.tolist() == [0, 0, 1, 1, 2]
    assert np.array_equal(hwc(d.images[4]), noise(8, 8, seed=3))
    printed = capsys.readouterr().err
    for name in ("gone.png", "pipe.png", "set/a/again"):
        assert f"{name} is not read: it is no file, or a link to none or around itself" in printed


def test_many_images_are_decoded_once_and_mapped(tmp_path, files, monkeypatch):
    grey_first = {**files, "a/0.png": noise(8, 8, 1), "a/4.png": noise(8, 8, 1, 1), "c/9.png": b"x"}
    whole = load(as_folder(tmp_path / "set", grey_first), None, tmp_path / "data")
    assert not (tmp_path / "data").exists()                     # too few to be worth a file
    monkeypatch.setattr(data, "KEEP_FROM", 8 * 8 * 2)
    first = load(tmp_path / "set", None, tmp_path / "data")
    kept, = (tmp_path / "data").iterdir()
    small = load(tmp_path / "set", 4, tmp_path / "data").images
    assert small.shape == (5, 3, 4, 4)                          # another resolution, another file
    with monkeypatch.context() as m:
        m.setattr(data, "decode", lambda *a: pytest.fail("it was decoded again"))
        again = load(tmp_path / "set", None, tmp_path / "data")
    for d in (first, again):
        assert torch.equal(d.images, whole.images) and d.facts() == whole.facts()
        assert d.labels.tolist() == whole.labels.tolist()
    again.images[0] = 0                                         # a change stays in this process
    assert torch.equal(load(tmp_path / "set", None, tmp_path / "data").images, whole.images)
    (tmp_path / "set/a/1.png").write_bytes(png(noise(8, 8, seed=7)))
    changed = load(tmp_path / "set", None, tmp_path / "data").images
    assert np.array_equal(hwc(changed[1]), noise(8, 8, seed=7))
    kept.write_bytes(kept.read_bytes()[:200])                   # a damaged one is made again
    os.utime(tmp_path / "set/a/1.png", ns=(0, 0))
    assert torch.equal(load(tmp_path / "set", None, tmp_path / "data").images, changed)
    (tmp_path / "file").write_text("not a folder")
    assert torch.equal(load(tmp_path / "set", None, tmp_path / "file").images, changed)


def test_what_is_kept_is_used_for_the_very_same_files_only(tmp_path, files, monkeypatch):
    """Other images of equal names, sizes and times, as another unpacking leaves them."""
    monkeypatch.setattr(data, "KEEP_FROM", 1)
    for i, make in enumerate((as_folder, as_zip)):
        path = tmp_path / f"set{i}{['', '.zip'][i]}"
        made = []
        for seed in range(2):
            raw = {f"{k}.bmp": io.BytesIO() for k in "ab"}
            for k, file in enumerate(raw.values()):
                Image.fromarray(noise(8, 8, seed=10 * seed + k)).save(file, "bmp")
            make(path, {name: file.getvalue() for name, file in raw.items()})
            for file in (*path.glob("*"), path):
                os.utime(file, ns=(0, 0))
            stat = os.stat(path if path.is_file() else path / "a.bmp")
            made.append((stat.st_size, stat.st_mtime_ns))
            assert np.array_equal(hwc(load(path, None, tmp_path / "data").images[0]),
                                  noise(8, 8, seed=10 * seed))
        assert made[0] == made[1]
    labels = {"labels": [["a.bmp", 0], ["b.bmp", 1]]}
    (tmp_path / "set0/dataset.json").write_text(json.dumps(labels))
    assert load(tmp_path / "set0", None, tmp_path / "data").labels.tolist() == [0, 1]


def test_where_nothing_can_be_kept_images_stay_in_memory(tmp_path, files, monkeypatch, capsys):
    """Also where the disk is full, for which torch.save has an error of its own."""
    monkeypatch.setattr(data, "KEEP_FROM", 1)
    folder, kept = as_folder(tmp_path / "set", files), tmp_path / "data"
    whole = load(folder, None, kept, keep=False).images
    assert not kept.exists() and whole.shape == (3, 3, 8, 8)

    for error in (OSError(28, "No space left on device"), RuntimeError("unexpected pos 704")):
        def full(*args, error=error):
            raise error
        with monkeypatch.context() as m:
            m.setattr(torch, "save", full)
            assert torch.equal(load(folder, None, kept).images, whole)
            assert not list(kept.iterdir())
    (tmp_path / "file").write_text("not a folder")
    assert torch.equal(load(folder, None, tmp_path / "file").images, whole)
    monkeypatch.setattr(data, "leaves", lambda n, resolution: whole)
    assert torch.equal(load("leaves", 8, tmp_path / "file").images, whole)
    printed = capsys.readouterr().err
    for words in ("No space left", "unexpected pos", "leaves-8.pt could not be written"):
        assert words in printed


def test_names_are_printed_without_their_control_characters(tmp_path, files, capsys):
    """And a name that no terminal can encode ends nothing."""
    load(as_folder(tmp_path / "set\x1b[2J\udc80", {**files, "c/\x1b]0;x\x07\n.png": b"x"}))
    printed = capsys.readouterr().err
    assert "skipped c/\\x1b]0;x\\x07\\n.png" in printed and "\\x1b[2J" in printed
    assert "\x1b" not in printed.replace("\x1b[A", "")


def cifar_archive():
    labels = np.arange(50) % 10
    images = np.random.RandomState(0).randint(0, 256, (50, 3072), dtype=np.uint8)
    records = np.concatenate([labels[:, None].astype(np.uint8), images], 1)
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode="w:gz") as tar:
        for i in range(5):
            part = records[i * 10:i * 10 + 10].tobytes()
            add_to_tar(tar, f"cifar-10-batches-bin/data_batch_{i + 1}.bin", part)
    return f.getvalue(), images.reshape(50, 3, 32, 32), labels


@pytest.fixture
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        body, length = b"", None

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(Handler.length or len(Handler.body)))
            self.end_headers()
            self.wfile.write(Handler.body)

        def log_message(self, *args):
            pass
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield Handler, f"http://127.0.0.1:{s.server_port}/cifar.tar.gz"
    s.shutdown()
    s.server_close()


def test_a_download_that_breaks_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, server):
    handler, url = server
    monkeypatch.setattr(data, "CIFAR10_URL", url)
    for line in (b"no http at all\r\n\r\n",
                 b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nshort"):
        monkeypatch.setattr(handler, "do_GET", lambda self: self.wfile.write(line))
        with pytest.raises(UserError, match="cannot fetch cifar-10-binary.tar.gz .*put it at"):
            load("cifar10", folder=tmp_path)
        assert not list(tmp_path.iterdir())


def test_two_programs_may_decode_the_same_images_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "KEEP_FROM", 1)
    path, x = tmp_path / "data/x.pt", torch.arange(9)
    found = data.kept(path, lambda: data.kept(path, lambda: {"images": x}))
    assert torch.equal(found["images"], x)
    assert list(path.parent.iterdir()) == [path]


def test_cifar10_is_fetched_once_and_checked(tmp_path, monkeypatch, server):
    handler, url = server
    handler.body, images, labels = cifar_archive()
    monkeypatch.setattr(data, "CIFAR10_URL", url)
    with pytest.raises(UserError, match="invalid hash"):        # it is not the real file
        load("cifar10", folder=tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(data, "CIFAR10_SHA256", hashlib.sha256(handler.body).hexdigest())
    d = load("cifar10", folder=tmp_path)
    assert np.array_equal(d.images.numpy(), images)
    assert d.labels.tolist() == labels.tolist() and d.classes[3] == "cat"
    small = load("cifar10", 16, tmp_path).images
    assert small.shape == (50, 3, 16, 16)
    lanczos = Image.fromarray(hwc(d.images[7])).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(hwc(small[7]), np.asarray(lanczos))

    handler.length, handler.body = len(handler.body), handler.body[:1000]
    load("cifar10", folder=tmp_path)                            # from the file, not the server
    kept = tmp_path / "cifar-10-binary.tar.gz"
    kept.write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged"):
        load("cifar10", folder=tmp_path)
    kept.unlink()
    with pytest.raises(UserError, match="cannot fetch .* elsewhere and put it at"):
        load("cifar10", folder=tmp_path)                        # the connection is lost
    assert not kept.exists()


def test_cifar10_for_python_is_one_line_that_says_what_to_give(tmp_path):
    """Its files are pickles, which could run code."""
    folder = as_folder(tmp_path / "set", {"data_batch_1": b"x", "batches.meta": b"x"})
    with pytest.raises(UserError, match="set contains no image .* as batches.meta; give .*cifar10"):
        load(folder)


def test_cifar10_offline_says_where_to_get_it_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR10_URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    with pytest.raises(UserError) as e:
        load("cifar10", folder=tmp_path)
    message = str(e.value)
    assert str(tmp_path / "cifar-10-binary.tar.gz") in message and data.CIFAR10_URL in message
    assert "\n" not in message


def test_images_are_scaled_by_edms_rule_and_back():
    p = torch.arange(256, dtype=torch.uint8)
    assert normalize(p)[[0, 255]].tolist() == [-1, 1] and torch.equal(to_uint8(normalize(p)), p)
    assert to_uint8(torch.tensor([-3., 0., 3.])).tolist() == [0, 128, 255]


def test_a_warp_by_a_right_angle_and_by_whole_pixels_is_exact():
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    x = F.interpolate(x, 24, mode="bicubic")

    def close(a, b, tolerance=2e-2):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    close(warp(x, torch.tensor([[[0., -1, 0], [1, 0, 0]]])), x.rot90(1, (2, 3)))
    shifted = warp(x, torch.tensor([[[1., 0, 6 / 24], [0, 1, 0]]]))             # by 3 pixels
    close(shifted[..., :-3], x[..., 3:])
    close(shifted[..., -3:], x[..., -3:].flip(-1))                              # reflected
    rough = torch.randn(1, 1, 8, 12)                            # resampling keeps every frequency
    close(warp(rough, torch.tensor([[[1., 0, 0], [0, 1, 0]]])), rough, 1e-4)


def rotate(angle):
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def edms_maps(label, h, w):
    """The two maps that a label allows, each a matrix and an offset from a point of the source to
    its point in the result, in pixels from the middle: the inverse of EDM's product."""
    flip_x, flip_y, scale, cos1, sin, stretch_c, stretch_s, *shift = label
    angle, direction = math.atan2(sin, cos1 + 1), math.atan2(stretch_s, stretch_c)
    stretch = math.hypot(stretch_c, stretch_s)
    for s, d in ((stretch, direction), (-stretch, direction + math.pi)):
        axes = np.diag([2 ** (-0.2 * s), 2 ** (0.2 * s)])
        inverse = 2 ** (-0.2 * scale) * rotate(angle) @ rotate(-d) @ axes @ rotate(d)
        forward = np.linalg.inv(inverse) @ np.diag([1 - 2 * flip_x, 1 - 2 * flip_y])
        yield forward, 0.125 * np.array([w, h]) * shift


@pytest.mark.parametrize("h, w", [(48, 48), (48, 64)])
def test_augmentation_does_what_its_labels_say(h, w):
    """A spot off the centre moves and stretches as the labels say."""
    n = 400
    torch.manual_seed(0)
    x = torch.arange(w) + 0.5 - w / 2                           # 0 is the middle
    y = (torch.arange(h) + 0.5 - h / 2)[:, None]
    start, radius = np.array([3., -2.]), 3.
    spot = torch.exp(-((x - start[0]) ** 2 + (y - start[1]) ** 2) / (2 * radius ** 2))
    out, labels = augment(spot.float().expand(n, 1, h, w), 1.)
    checked = 0
    for image, label in zip(out[:, 0].double(), labels.tolist()):
        near = []
        for forward, offset in edms_maps(label, h, w):
            middle, cov = forward @ start + offset, forward @ forward.T * radius ** 2
            if (abs(middle) + 3.5 * np.sqrt(np.diag(cov)) > np.array([w, h]) / 2).any():
                break                                           # partly outside, and reflected
            reach = 4 * math.sqrt(np.linalg.eigvalsh(cov)[1])   # reflections may lie further away
            p = image * ((x - middle[0]) ** 2 + (y - middle[1]) ** 2 < reach ** 2)
            p = p / p.sum()
            mx, my = (p * x).sum().item(), (p * y).sum().item()
            spread = [(p * (x - mx) ** 2).sum().item(), (p * (x - mx) * (y - my)).sum().item()]
            near.append((mx, my) == pytest.approx(middle, abs=0.1)
                        and spread == pytest.approx(cov[0], rel=0.03, abs=0.2))
        else:
            assert any(near)
            checked += 1
    assert checked > 100


def test_augmentation_happens_as_often_as_asked():
    torch.manual_seed(0)
    x = torch.randn(20_000, 1, 2, 2)
    out, labels = augment(x, 0.12)
    flip_x, flip_y, scale = labels[:, :3].T
    rotated, stretched, shifted = (labels[:, part].any(1)
                                   for part in (slice(3, 5), slice(5, 7), slice(7, 9)))
    done = torch.stack([flip_x != 0, flip_y != 0, scale != 0, rotated, stretched, shifted])
    often = [0.5, 0.06, 0.12, 0.12, 0.12, 0.12]
    assert done.float().mean(1).tolist() == pytest.approx(often, abs=0.012)
    assert scale[scale != 0].std().item() == pytest.approx(1, abs=0.05)
    assert labels[shifted, 7:].std(0).tolist() == pytest.approx([1, 1], abs=0.05)
    angle = torch.atan2(labels[:, 4], labels[:, 3] + 1)[rotated]
    eighths = torch.histc(angle, 8, -math.pi, math.pi).div(len(angle)).tolist()
    assert eighths == pytest.approx([1 / 8] * 8, abs=0.03)
    assert (labels[stretched, 6] == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    still = (labels[:, 1:] == 0).all(1)                         # these keep their exact pixels
    assert torch.equal(out[still & (flip_x == 0)], x[still & (flip_x == 0)])
    assert torch.equal(out[still & (flip_x == 1)], x[still & (flip_x == 1)].flip(-1))


def test_a_grid_shows_every_image_in_order(tmp_path):
    tiles = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 64, 64) * 50
    save_grid(tiles, tmp_path / "g.png", columns=3)
    g = np.asarray(Image.open(tmp_path / "g.png"))
    assert g.shape == (2 * 66, 3 * 66, 3)
    middles = [g[33 + 66 * (i // 3), 33 + 66 * (i % 3), 0] for i in range(5)]
    assert middles == [0, 50, 100, 150, 200]
