"""Data sets in every format, what a class is, what is refused in one line; the images of training:
scaled, augmented as EDM does, made of dead leaves."""
import hashlib
import io
import json
import math
import os
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train
from data import Images, augment, leaves, load, warp
from degrade import dct2, frequencies
from runs import draw, largest_file, options
from util.cli import UserError
from util.datasets import read_or_cached
from util.files import fetch
from util.images import normalize, save_grid, to_uint8


def pixels(h, w, seed=0, gray=False):
    """Random uint8 [h, w, 3], or [h, w]."""
    shape = (h, w) if gray else (h, w, 3)
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def encoded(array, kind="png"):
    f = io.BytesIO()
    Image.fromarray(array).save(f, kind)
    return f.getvalue()


def with_images(*names):
    """{NAME.png: the bytes of an image of its own}."""
    return {f"{name}.png": encoded(pixels(4, 4, seed)) for seed, name in enumerate(names)}


def as_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def as_zip(path, files):
    with zipfile.ZipFile(path, "w") as z:
        for name, content in files.items():
            z.writestr(name, content)
    return path


def as_tar(path, files):
    mode = path.suffix[1:].replace("tar", "")
    with tarfile.open(path, f"w:{mode}") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def hwc(image):
    return image.permute(1, 2, 0).numpy()


def lanczos(array, side):
    return np.asarray(Image.fromarray(array).resize((side, side), Image.Resampling.LANCZOS))


# Formats


def test_the_same_images_in_every_format_are_the_same_set(tmp_path):
    """Whatever the order in the archive, and whether a folder lies around it."""
    x = np.random.RandomState(0).randint(0, 256, (30, 6, 6, 3), dtype=np.uint8)
    files = {f"{'abc'[i % 3]}/{i}.png": encoded(x[i]) for i in range(30)}
    reversed_files = dict(reversed(files.items()))
    order = sorted(range(30), key=lambda i: f"{'abc'[i % 3]}/{i}.png")
    images = x[order]
    labels = [i % 3 for i in order]
    np.save(tmp_path / "x.npy", images)
    np.savez(tmp_path / "x.npz", images=images.transpose(0, 3, 1, 2), labels=labels)
    windows = {name.replace("/", "\\"): content for name, content in reversed_files.items()}
    around = {f"x/{name}": content for name, content in files.items()}
    paths = [as_folder(tmp_path / "x", files), as_folder(tmp_path / "around", around),
             as_zip(tmp_path / "x.zip", reversed_files), as_zip(tmp_path / "windows.zip", windows),
             tmp_path / "x.npz"]
    for kind in ("tar", "gz", "bz2", "xz"):
        paths.append(as_tar(tmp_path / f"x.{kind}", reversed_files))
    for path in paths:
        d = load(path)
        assert np.array_equal(d.images.numpy(), images.transpose(0, 3, 1, 2))
        assert d.labels.tolist() == labels and d.why_unlabeled == ""
        assert d.classes == (["0", "1", "2"] if path.suffix == ".npz" else ["a", "b", "c"])
    unlabeled = load(tmp_path / "x.npy")
    assert torch.equal(unlabeled.images, d.images) and unlabeled.classes == ["all"]


def test_arrays_are_read_with_their_labels_and_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.stack([pixels(8, 8, seed) for seed in range(6)])
    gray = pixels(168, 28, gray=True).reshape(6, 28, 28)
    y = np.array([0, 1, 0, 2, 0, 1])
    arrays = {"mnist": dict(x_train=gray, y_train=y, y_test=y[:4]),
              "medmnist": dict(images=x, labels=y[:, None].astype(np.uint8)),
              "named": dict(x=x[..., :1], y=np.array(["0", "1", "0", "2", "0", "1"]))}
    for name, content in arrays.items():
        np.savez(f"{name}.npz", **content)
        d = load(f"{name}.npz")
        assert d.name == f"{name}.npz" and d.labels.tolist() == y.tolist()
        assert d.classes == ["0", "1", "2"]
    assert load("mnist.npz").images.shape == (6, 1, 28, 28)
    assert np.array_equal(load("mnist.npz", 14).images[3, 0], lanczos(gray[3], 14))

    np.savez("two.npz", x_test=x[:4], x_train=x, y_test=y[:4], y_train=y)
    with pytest.raises(UserError, match=r"two.npz holds x_test uint8 \[4, 8, 8, 3\], x_train uint8 "
                                        r"\[6, .* give one, as two.npz:NAME"):
        load("two.npz")
    assert load("two.npz:x_test").labels.tolist() == [0, 1, 0, 2]
    assert load("two.npz:x_train").name == "two.npz:x_train"
    np.savez("three.npz", x=x, y=y, z=y)
    assert load("three.npz").why_unlabeled == "2 of its arrays could be its labels"


@pytest.mark.parametrize("array", [
    np.zeros((6, 8, 8, 3)), np.zeros((6, 8, 8, 3), int), np.zeros((8, 8, 3), np.uint8),
    np.zeros((6, 8, 8, 4), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)])
def test_an_array_that_holds_no_images_is_one_line(array, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=rf"a.npy holds {array.dtype} \[.*images are uint8"):
        load(tmp_path / "a.npy")


def test_other_files_are_left_out_and_counted_in_one_line(tmp_path, capsys):
    """What file managers leave, other extensions, and names that lead outside an archive."""
    others = [".ipynb_checkpoints/0", "red/.thumbnails/0", "red/@eaDir/0", "__MACOSX/red/._0"]
    files = {**with_images("red/0", "blue/0", *others), "red/Thumbs.db": b"x", "blue/a.heic": b"x",
             "blue/raw": b"x", "notes.TXT": b"x"}
    outside = with_images("red/0", "blue/0", "../out", "a/../../out", "..\\out")
    for path, count in ((as_folder(tmp_path / "a", files), 8),
                        (as_zip(tmp_path / "b.zip", outside), 3)):
        d = load(path)
        assert d.classes == ["blue", "red"] and len(d.images) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "not read" in line]
        assert len(lines) == 1
        assert lines[0].startswith(f"{path}: files that are not read: {count}, as ")


def test_links_in_a_folder_are_followed_and_what_cannot_be_read_is_named(tmp_path, capsys):
    far = encoded(pixels(4, 4, seed=9))
    as_folder(tmp_path / "far", {"x.png": far})
    folder = as_folder(tmp_path / "set", with_images("b/2", "a/1", "a/3"))
    (folder / "c").symlink_to(tmp_path / "far")
    (folder / "a/again").symlink_to(folder)                     # a circle
    (folder / "a/gone.png").symlink_to("nowhere")
    os.mkfifo(folder / "a/pipe.png")
    d = load(folder)
    assert d.classes == ["a", "b", "c"] and d.labels.tolist() == [0, 0, 1, 2]
    assert np.array_equal(hwc(d.images[3]), pixels(4, 4, seed=9))
    printed = capsys.readouterr().err
    for name in ("gone.png", "pipe.png", "set/a/again"):
        assert f"{name} is not read: it is no file, or a link to none or around itself" in printed


# Classes


@pytest.mark.parametrize("names, classes", [
    ("dog/day/1 dog/2 cat/day/3", "dog dog cat"),               # not the innermost folder
    ("a/x/1 b/x/2", "a b"),                                     # two folders of one name
    ("set/train/n01/images/1 set/train/n02/images/2", "n01 n02"),
    ("train/1 bus/2", "train bus"),                             # a train is a vehicle, too
    ("train/1 validation/2", "train and validation are splits: give one of them"),
    ("Training/x/1 Testing/x/2", "Testing and Training are splits"),
    ("trainA/1 trainB/2 testA/3", "testA and trainA and trainB are splits"),
    ("coco/train2017/1 coco/val2017/2", "train2017 and val2017 are splits"),
    ("set/1 set/dog/2 set/cat/3", "1 of 3 images lie in no folder of a class")])
def test_a_class_is_the_first_folder_in_which_the_paths_differ(names, classes, tmp_path):
    files = with_images(*names.split())
    for path in (as_folder(tmp_path / "a", files), as_zip(tmp_path / "a.zip", files)):
        d = load(path)
        if d.why_unlabeled:
            assert classes in d.why_unlabeled and d.classes == ["all"] and not d.labels.any()
            continue
        by_name = dict(zip(sorted(files), [d.classes[i] for i in d.labels], strict=True))
        assert [by_name[name] for name in files] == classes.split()


LABELS = {"00000/a.png": 1, "00000/b.png": 0, "00001/c.png": 1}
NAMES = {name: "xy"[label] for name, label in LABELS.items()}
BACKSLASHES = {name.replace("/", "\\"): label for name, label in LABELS.items()}


@pytest.mark.parametrize("around", ["", "set/"])
@pytest.mark.parametrize("labels, classes", [
    (LABELS, ["0", "1"]), (BACKSLASHES, ["0", "1"]), ({**LABELS, "gone.png": 5}, ["0", "1"]),
    (NAMES, ["x", "y"])])
def test_edms_labels_are_in_dataset_json(labels, classes, around, tmp_path):
    """And not in the names of its folders; also in a folder around all."""
    table = json.dumps({"labels": list(labels.items())}).encode()
    files = {f"{around}dataset.json": table}
    for i, name in enumerate(LABELS):
        files[around + name] = encoded(pixels(4, 4, i))
    for path in (as_folder(tmp_path / "a", files), as_zip(tmp_path / "a.zip", files)):
        d = load(path)
        assert d.classes == classes and d.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("table, words", [
    ({"labels": None}, "dataset.json has no label for 3 of 3 images"), ({}, "for 3 of 3 images"),
    ({"labels": [["00000/a.png", 1]]}, "no label for 2 of 3 images"),
    ({"labels": [[name, 0.5] for name in LABELS]}, "are neither whole numbers nor names"),
    ({"labels": [[name, [1, 2]] for name in LABELS]}, "the labels in dataset.json are neither"),
    ({"labels": [[name, True] for name in LABELS]}, "the labels in dataset.json are neither")])
def test_an_incomplete_dataset_json_gives_no_classes(table, words, tmp_path):
    files = {"dataset.json": json.dumps(table).encode()}
    for i, name in enumerate(LABELS):
        files[name] = encoded(pixels(4, 4, i))
    d = load(as_folder(tmp_path / "a", files))
    assert words in d.why_unlabeled and d.classes == ["all"]


def test_labels_that_are_broken_or_in_a_metadata_file_are_one_line(tmp_path):
    files = with_images("train/1", "validation/2")
    d = load(as_folder(tmp_path / "hub", {**files, "metadata.jsonl": b"{}"}))
    assert d.why_unlabeled == ("train and validation are splits: give one of them, and labels in "
                               "metadata.jsonl are not read")
    for table in (b"{", b'{"labels": [1, 2]}', b"[]"):
        folder = as_folder(tmp_path / "a", {**files, "dataset.json": table})
        with pytest.raises(UserError, match="a cannot be read .(JSON|Type|Attrib).*: give"):
            load(folder)


# How an image is read


def test_images_are_cropped_in_the_middle_and_resized(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200                                        # the middle square has one color
    square = np.full((5, 5, 3), 200, np.uint8)
    tall = wide.transpose(1, 0, 2)
    files = {"t.png": encoded(tall), "w.png": encoded(wide), "z.png": encoded(square)}
    d = load(as_folder(tmp_path / "a", files), 10)
    assert d.images.shape == (3, 3, 10, 10) and (d.images[:, :, 1:-1, 1:-1] == 200).all()
    assert d.why_unlabeled == "3 of 3 images lie in no folder of a class"
    with pytest.raises(UserError, match="w.png and the first image have different sizes: give --r"):
        load(tmp_path / "a")
    large = load(as_folder(tmp_path / "b", {"l.png": encoded(pixels(40, 40))}), 10)
    assert np.array_equal(hwc(large.images[0]), lanczos(pixels(40, 40), 10))


def test_images_that_are_not_square_keep_their_shape_and_gray_stays_gray(tmp_path):
    gray = {"a.png": encoded(pixels(6, 9, gray=True)), "b.png": encoded(pixels(6, 9, 1, gray=True))}
    assert load(as_folder(tmp_path, gray)).images.shape == (2, 1, 6, 9)
    mixed = load(as_folder(tmp_path, {"c.png": encoded(pixels(6, 9))})).images
    assert mixed.shape == (3, 3, 6, 9) and (mixed[0, 0] == mixed[0, 2]).all()


def test_rotated_and_transparent_images_are_read_as_they_look(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                            # rotate by 90 degrees, clockwise
    Image.fromarray(pixels(8, 8)).save(tmp_path / "a.png", exif=exif)
    clear = np.dstack([pixels(8, 8), np.zeros((8, 8), np.uint8)])
    clear[:4, :, 3] = 255
    Image.fromarray(clear).save(tmp_path / "b.png")
    rotated, on_white = load(tmp_path).images
    assert np.array_equal(hwc(rotated), np.rot90(pixels(8, 8), -1))
    assert np.array_equal(hwc(on_white)[:4], clear[:4, :, :3]) and (on_white[:, 4:] == 255).all()


@pytest.mark.parametrize("bits", [12, 16])
def test_16_bits_are_read_as_8_and_a_small_range_is_a_warning(bits, tmp_path, capsys):
    ramp = np.linspace(0, 2 ** bits - 1, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp // 4).save(tmp_path / "b.tif")         # a dark one stays darker
    x = load(tmp_path).images
    assert np.array_equal(x[:, 0].numpy(), [ramp >> 8, ramp // 4 >> 8])
    message = "use 1/16 of their range"
    assert (message in capsys.readouterr().err) == (bits == 12)


@pytest.mark.parametrize("name", ["stack.tif", "stack.gif", "stack.webp", "stack.png"])
def test_only_the_first_page_of_several_is_read_in_one_line(name, tmp_path, capsys):
    pages = [Image.fromarray(pixels(8, 8, seed)) for seed in range(3)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "one.png")
    assert len(load(tmp_path).images) == 2
    assert f"only the first page is read of 1 with several, as {name}" in capsys.readouterr().err


def test_what_cannot_be_read_is_named_skipped_and_counted(tmp_path, monkeypatch, capsys):
    """A broken file, float images, and one beyond twice Pillow's limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    good = encoded(pixels(8, 8))
    as_folder(tmp_path, {"broken.png": good[:60], "good.png": good,
                         "large.png": encoded(pixels(10, 21))})
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.zeros((8, 8), np.int32)).save(tmp_path / "int.tif")
    d = load(tmp_path)
    assert np.array_equal(hwc(d.images[0]), pixels(8, 8)) and len(d.images) == 1
    printed = capsys.readouterr().err
    for words in ("skipped broken.png", "skipped float.tif: 32-bit and float images have no",
                  "skipped int.tif: 32-bit", "skipped large.png: Image size (210 pixels) exceeds",
                  "4 of 5 images skipped"):
        assert words in printed


# One line for what holds no images, or more than it has


def test_what_contains_no_images_is_one_line(tmp_path):
    (tmp_path / "text.zip").write_text("not a zip")
    (tmp_path / "one.png").write_bytes(encoded(pixels(4, 4)))
    (tmp_path / "empty").mkdir()
    as_folder(tmp_path / "cifar", {"data_batch_1": b"x", "batches.meta": b"x"})
    np.save(tmp_path / "object.npy", np.array([{}]))
    for name, words in (("no", "does not exist: give leaves"),
                        ("empty", "empty contains no image that can be read; give leaves"),
                        ("text.zip", "text.zip cannot be read .ReadError.*: give leaves, cifar10"),
                        ("cifar", "cifar contains no .*not read: 2, as batches.meta; give leaves"),
                        ("object.npy", "object.npy cannot be read .ValueError: .*give"),
                        ("one.png", "one.png is one image: give its folder")):
        with pytest.raises(UserError, match=words) as e:
            load(tmp_path / name)
        assert "\n" not in str(e.value)


def test_a_name_that_is_also_a_built_in_set_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_folder(tmp_path / "leaves", with_images("0"))
    with pytest.raises(UserError, match="leaves is a built-in set, .* give ./leaves for"):
        load("leaves")
    assert load("./leaves").name == load("leaves/").name == "leaves"
    assert len(load("./leaves").images) == 1
    (tmp_path / "leaves/options.json").write_text("{}")         # a run is no data set
    assert len(load("leaves", 4).images) == 16384
    monkeypatch.chdir("leaves")
    assert load(".").name == "leaves"


def test_runs_and_draws_in_a_data_folder_are_left_out(tmp_path, monkeypatch, capsys):
    for i in range(3):
        Image.effect_noise((8, 8), 99).convert("RGB").save(tmp_path / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    train.train(options("run", "--data .", duration=0.004))
    draw("run/ema.pt", "samples", "--seeds", "0-2")
    assert Path("run/grid-000000.004.png").exists() and Path("samples-grid.png").exists()
    capsys.readouterr()
    images = load(".")
    messages = capsys.readouterr().err
    assert len(images.images) == 3 and "runs and draws are left out, run, samples" in messages
    train.train(options("run", "--data .", duration=0.008))     # it resumes
    draws = tmp_path / "classes"
    for name in "ab":
        (draws / name).mkdir(parents=True)
        (draws / name / "draw.json").write_text("{}")
        Image.effect_noise((8, 8), 99).save(draws / name / "000000.png")
        Image.effect_noise((99, 99), 99).save(draws / f"{name}-grid.png")
    capsys.readouterr()
    assert load(draws).classes == ["a", "b"]                    # there is nothing but draws
    assert "left out" not in capsys.readouterr().err


def test_a_sparse_file_in_a_tar_is_bounded(tmp_path):
    """512 bytes that say: an image of 2 GiB without any data. Other archives that unpack to far
    more than they have: tests/test_survival.py."""
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = tarfile.itn(2 ** 31, 12, tarfile.GNU_FORMAT)              # the unpacked size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)                                  # the checksum
    (tmp_path / "a.tar").write_bytes(header + bytes(1024))
    with pytest.raises(UserError, match="a.tar is refused: it unpacks to 2.0 GiB"):
        load(tmp_path / "a.tar")


def test_a_tar_that_is_cut_short_is_not_taken_for_whole(tmp_path):
    """Cut anywhere before the zeros at its end, also between two files."""
    whole = as_tar(tmp_path / "whole.tar", with_images("0", "1", "2"))
    assert len(load(whole).images) == 3
    with tarfile.open(whole) as tar:
        tar.getmembers()
        end = tar.offset
    for size in (*range(512, end + 1, 512), end - 100, end + 100):
        part = tmp_path / "part.tar"
        part.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(UserError, match="cut short or damaged|cannot be read"):
            load(part)


# Images as they enter


def test_images_are_checked_as_they_enter():
    x = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    d = Images(x, torch.tensor([0, 1, 1, 0]), (np.str_("a"), 1.5), np.str_("b"))
    assert [type(v) for v in (d.name, *d.classes)] == [str] * 3 and d.classes == ["a", "1.5"]
    assert Images(x).labels.tolist() == [0] * 4
    for bad in (x.long(), x.float(), x[0], x[:0], x.numpy(), torch.zeros(4, 5, 2, 3).byte()):
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


@pytest.mark.parametrize("latents", [False, True])
def test_facts_and_mean_color_are_numpys_moments(latents):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 4, 4, 6), generator=g, dtype=torch.uint8)
    x = images.double().numpy() / 127.5 - 1
    if latents:                                                 # any range, any channels
        images = torch.randn(50, 5, 4, 6, generator=g) * 7 + 3
        x = images.double().numpy()
    labels = torch.arange(50) % 2
    d = Images(images, labels, "ab", latents=latents)
    facts = d.facts()
    assert facts["count"] == 50 and facts["shape"] == list(images.shape[1:])
    assert facts["classes"] == ["a", "b"] and facts["latents"] is latents
    assert facts["mean"] == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-9)
    assert facts["std"] == pytest.approx(x.std((0, 2, 3)).tolist(), abs=1e-9)
    colors = x.mean((2, 3))
    assert d.mean_color()["mean"] == pytest.approx(colors.mean(0).tolist(), abs=1e-6)
    assert np.allclose(d.mean_color()["cov"], np.cov(colors.T, bias=True), rtol=1e-5, atol=1e-7)
    # the digest is of pixels and labels, whatever their layout in memory
    sha256 = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert facts["digest"] == sha256[:16]
    assert Images(last, labels, "ab", latents=latents).facts()["digest"] == sha256[:16]


def test_images_are_scaled_by_edms_rule_and_back():
    p = torch.arange(256, dtype=torch.uint8)
    assert normalize(p)[[0, 255]].tolist() == [-1, 1] and torch.equal(to_uint8(normalize(p)), p)
    assert to_uint8(torch.tensor([-3., 0., 3.])).tolist() == [0, 128, 255]


def test_a_grid_shows_every_image_in_order(tmp_path):
    tiles = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 64, 64) * 50
    save_grid(tiles, tmp_path / "g.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert grid.shape == (2 * 66, 3 * 66, 3)
    assert grid[33::66, 33::66, 0].flatten().tolist() == [0, 50, 100, 150, 200, 0]
    with pytest.raises(UserError, match="use the extension .png"):
        save_grid(tiles, tmp_path / "grid.text")


# Many images are decoded once


@pytest.fixture
def many(tmp_path):
    """A folder of just over 2 MiB of images, from which on they are cached."""
    files = {f"{i % 2}/{i:02}.bmp": encoded(pixels(128, 128, i), "bmp") for i in range(43)}
    return as_folder(tmp_path / "set", files)


def test_many_images_are_decoded_once_until_a_file_changes(tmp_path, many, capsys):
    folder = tmp_path / "data"
    load(as_folder(tmp_path / "few", with_images("a")), None, folder)
    whole = load(many, None, folder, keep=False)
    assert not folder.exists()                                  # too few, and none was asked for
    first = load(many, None, folder)
    cache, = folder.iterdir()
    load(many, 160, folder)
    assert len(list(folder.iterdir())) == 2                     # another resolution, another file
    capsys.readouterr()
    again = load(many, None, folder)
    assert "decoding" not in capsys.readouterr().err
    for d in (first, again):
        assert torch.equal(d.images, whole.images) and d.facts() == whole.facts()
    again.images[0] = 0                                         # a change stays in this process
    assert torch.equal(load(many, None, folder).images, whole.images)
    cache.write_bytes(cache.read_bytes()[:200])                 # a damaged one is made again
    assert torch.equal(load(many, None, folder).images, whole.images)

    before = os.stat(many / "0/00.bmp")                         # other pixels, of the same size
    (many / "0/00.bmp").write_bytes(encoded(pixels(128, 128, 99), "bmp"))
    os.utime(many / "0/00.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert np.array_equal(hwc(load(many, None, folder).images[0]), pixels(128, 128, 99))


def test_where_nothing_can_be_cached_images_stay_in_memory(tmp_path, many, capsys):
    whole = load(many, keep=False).images
    (tmp_path / "file").write_text("not a folder")
    assert torch.equal(load(many, None, tmp_path / "file").images, whole)
    assert "could not be written" in capsys.readouterr().err
    with largest_file(2 ** 20):                                 # a full disk
        assert torch.equal(load(many, None, tmp_path / "data").images, whole)
    assert "could not be written" in capsys.readouterr().err
    assert not list((tmp_path / "data").iterdir())


# CIFAR-10, and what is fetched


def cifar10(path):
    """Fifty images in the layout of CIFAR-10's archive. Returns its images and labels."""
    labels = (np.arange(50) % 10).astype(np.uint8)
    images = np.random.RandomState(0).randint(0, 256, (50, 3, 32, 32), dtype=np.uint8)
    records = np.concatenate([labels[:, None], images.reshape(50, -1)], 1)
    files = {"cifar-10-batches-bin/test_batch.bin": records[:7].tobytes()}
    for i in range(5):
        files[f"cifar-10-batches-bin/data_batch_{i + 1}.bin"] = records[i * 10:][:10].tobytes()
    as_tar(path, files)
    return images, labels


def test_cifar10_is_its_training_images_and_another_file_is_refused(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    images, labels = cifar10(path)
    d = read_or_cached(path, "cifar10", resolution=None, cache_folder=None)
    assert np.array_equal(d["images"].numpy(), images)
    assert d["labels"].tolist() == labels.tolist() and d["classes"][3] == "cat"
    with pytest.raises(UserError, match="binary.tar.gz is damaged .its SHA-256 is not c4a38c50"):
        load("cifar10", folder=tmp_path)


def test_a_file_is_fetched_once_and_checked(tmp_path):
    source = tmp_path / "source.bin"
    path = tmp_path / "data/a.bin"
    sha256 = hashlib.sha256(b"content").hexdigest()
    get = partial(fetch, source.as_uri(), path, sha256, ", or give another")
    remedy = f"download {source.as_uri()} elsewhere and put it at {path}, or give another"
    for content in (None, b"other content"):                    # the first file is missing
        if content:
            source.write_bytes(content)
        with pytest.raises(UserError, match=f"cannot fetch a.bin .*: {remedy}") as e:
            get()
        assert "\n" not in str(e.value) and not list(path.parent.iterdir())
    source.write_bytes(b"content")
    assert get() == path and path.read_bytes() == b"content"
    source.unlink()
    assert get() == path                                        # from the disk
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"a.bin is damaged .its SHA-256 is not {sha256}.*{remedy}"):
        get()


# EDM's augmentation


def test_a_warp_by_a_right_angle_and_by_whole_pixels_is_exact():
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    x = F.interpolate(x, 24, mode="bicubic")
    close = partial(torch.testing.assert_close, rtol=0, atol=2e-2)
    close(warp(x, torch.tensor([[[0., -1, 0], [1, 0, 0]]])), x.rot90(1, (2, 3)))
    shifted = warp(x, torch.tensor([[[1., 0, 6 / 24], [0, 1, 0]]]))             # by 3 pixels
    close(shifted[..., :-3], x[..., 3:])
    close(shifted[..., -3:], x[..., -3:].flip(-1))                              # reflected
    rough = torch.randn(1, 1, 8, 12)                            # resampling keeps every frequency
    close(warp(rough, torch.tensor([[[1., 0, 0], [0, 1, 0]]])), rough, atol=1e-4)


def rotate(angle):
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def edms_maps(label, h, w):
    """The two maps that a label allows, each a matrix and an offset from a point of the source to
    its point in the result, in pixels from the middle: the inverse of EDM's product."""
    flip_x, flip_y, scale, cos1, sin, stretch_c, stretch_s, *shift = label
    angle = math.atan2(sin, cos1 + 1)
    direction = math.atan2(stretch_s, stretch_c)
    stretch = math.hypot(stretch_c, stretch_s)
    for s, d in ((stretch, direction), (-stretch, direction + math.pi)):
        axes = np.diag([2 ** (-0.2 * s), 2 ** (0.2 * s)])
        inverse = 2 ** (-0.2 * scale) * rotate(angle) @ rotate(-d) @ axes @ rotate(d)
        forward = np.linalg.inv(inverse) @ np.diag([1 - 2 * flip_x, 1 - 2 * flip_y])
        yield forward, 0.125 * np.array([w, h]) * shift


@pytest.mark.parametrize("h, w", [(48, 48), (48, 64)])
def test_augmentation_does_what_its_labels_say_in_edms_convention(h, w):
    """A spot off the center moves and stretches as the labels say."""
    torch.manual_seed(0)
    x = torch.arange(w) + 0.5 - w / 2                           # 0 is the middle
    y = (torch.arange(h) + 0.5 - h / 2)[:, None]
    start = np.array([3., -2.])
    radius = 3.
    spot = torch.exp(-((x - start[0]) ** 2 + (y - start[1]) ** 2) / (2 * radius ** 2))
    out, labels = augment(spot.float().expand(300, 1, h, w), 1.)

    def is_near(image, middle, cov):
        reach = 4 * math.sqrt(np.linalg.eigvalsh(cov)[1])       # reflections may lie further away
        p = image * ((x - middle[0]) ** 2 + (y - middle[1]) ** 2 < reach ** 2)
        p = p / p.sum()
        mean_x = (p * x).sum().item()
        mean_y = (p * y).sum().item()
        row = [(p * (x - mean_x) ** 2).sum().item(),
               (p * (x - mean_x) * (y - mean_y)).sum().item()]
        return ([mean_x, mean_y] == pytest.approx(middle, abs=0.1)
                and row == pytest.approx(cov[0], rel=0.03, abs=0.2))
    checked = 0
    for image, label in zip(out[:, 0].double(), labels.tolist()):
        spots = []
        for forward, offset in edms_maps(label, h, w):
            spots.append((forward @ start + offset, forward @ forward.T * radius ** 2))
        extents = [abs(middle) + 3.5 * np.sqrt(np.diag(cov)) for middle, cov in spots]
        if (np.array(extents) > np.array([w, h]) / 2).any():
            continue                                            # partly outside, and reflected
        assert any(is_near(image, *spot) for spot in spots)
        checked += 1
    assert checked > 80


def test_augmentation_happens_as_often_as_asked():
    torch.manual_seed(0)
    x = torch.randn(20_000, 1, 2, 2)
    out, labels = augment(x, 0.12)
    flip_x, flip_y, scale = labels[:, :3].T
    rotated = labels[:, 3:5].any(1)
    stretched = labels[:, 5:7].any(1)
    shifted = labels[:, 7:9].any(1)
    done = torch.stack([flip_x != 0, flip_y != 0, scale != 0, rotated, stretched, shifted])
    often = [0.5, 0.06, 0.12, 0.12, 0.12, 0.12]
    assert done.float().mean(1).tolist() == pytest.approx(often, abs=0.012)
    assert scale[scale != 0].std().item() == pytest.approx(1, abs=0.05)
    assert labels[shifted, 7:].std(0).tolist() == pytest.approx([1, 1], abs=0.05)
    angle = torch.atan2(labels[:, 4], labels[:, 3] + 1)[rotated]
    eighths = torch.histc(angle, 8, -math.pi, math.pi).div(len(angle)).tolist()
    assert eighths == pytest.approx([1 / 8] * 8, abs=0.03)
    assert (labels[stretched, 6] == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    still = (labels[:, 1:] == 0).all(1)                         # these have their exact pixels
    assert torch.equal(out[still & (flip_x == 0)], x[still & (flip_x == 0)])
    assert torch.equal(out[still & (flip_x == 1)], x[still & (flip_x == 1)].flip(-1))


# Dead leaves


def test_leaves_are_seeded_and_their_power_falls_like_that_of_photographs():
    a = leaves(500, 32, seed=1)
    assert a.dtype == torch.uint8 and a.shape == (500, 3, 32, 32)
    x = normalize(a).double()
    power = dct2(x - x.mean((0, 2, 3), keepdim=True)).square().mean((0, 1)).flatten()
    lam = frequencies(32, 32).flatten()
    low = (lam > 0) & (lam < math.pi ** 2 / 4)
    slope = np.polyfit(lam[low].log(), power[low].log(), 1)[0]
    assert -1.8 < slope < -0.9              # 1 / lam is -1; smooth edges at this size are steeper
    assert torch.equal(leaves(20, 8, seed=2), leaves(20, 8, seed=2))
    assert not torch.equal(leaves(20, 8, seed=2), leaves(20, 8, seed=3))


def test_leaves_are_opaque_discs_of_flat_color():
    x = leaves(50, 64)
    is_flat = (x[..., 1:] == x[..., :-1]).all(1)
    assert is_flat.float().mean() > 0.85                        # all but edges


def test_leaves_have_the_right_distribution_of_radii():
    """With one disc, two pixels at distance d differ where it covers exactly one of them:
    2 (E[pi r^2] - E[lens]) / 9, with r of density r^-3."""
    x = leaves(2000, 64, seed=3, discs=1)
    d = 0.5
    differ = (x[..., 32:] != x[..., :32]).any(1).float().mean().item()
    r = np.linspace(0.25, 1, 10_001)
    sector = 2 * r ** 2 * np.arccos(np.minimum(d / (2 * r), 1))
    lens = np.where(r > d / 2, sector - d / 2 * np.sqrt(np.maximum(4 * r ** 2 - d ** 2, 0)), 0)
    expected = np.average(2 * (math.pi * r ** 2 - lens) / 9, weights=r ** -3.)
    assert differ == pytest.approx(expected, rel=0.1)           # soft edges make 5 % of it
