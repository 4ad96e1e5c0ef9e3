import hashlib
import http.server
import io
import math
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import UserError, augment, leaves, load, normalize, save_grid, to_uint8, warp
from degrade import dct2, frequencies


def test_leaves_are_seeded_and_fall_as_photographs_do():
    a = leaves(2000, 32, seed=1)
    assert a.dtype == torch.uint8 and a.shape == (2000, 3, 32, 32)
    assert torch.equal(a[:100], leaves(2000, 32, seed=1)[:100]) and not torch.equal(a[:100], leaves(100, 32, seed=2))
    x = normalize(a).double()
    power, lam = dct2(x - x.mean((0, 2, 3), keepdim=True)).square().mean((0, 1)).flatten(), frequencies(32, 32).flatten()
    low = (lam > 0) & (lam < math.pi ** 2 / 4)
    z, y = lam[low].log(), power[low].log()
    slope = ((z - z.mean()) * (y - y.mean())).sum() / (z - z.mean()).square().sum()
    assert -1.8 < slope < -0.9                                  # 1 / lam is -1; smooth edges at this size make it steeper


def test_leaves_have_their_radii_by_the_law():
    """With one disc, two pixels at a distance d differ where it covers just one of them: 2 (E[pi r^2] - E[lens]) / 9, r of density r^-3."""
    x, d = leaves(2000, 64, seed=3, discs=1), 0.5
    differ = (x[..., 32:] != x[..., :32]).any(1).float().mean().item()
    r = np.linspace(0.25, 1, 10_001)
    lens = np.where(r > d / 2, 2 * r ** 2 * np.arccos(np.minimum(d / (2 * r), 1)) - d / 2 * np.sqrt(np.maximum(4 * r ** 2 - d ** 2, 0)), 0)
    expected = np.average(2 * (math.pi * r ** 2 - lens) / 9, weights=r ** -3.)
    assert differ == pytest.approx(expected, rel=0.1)           # the soft edges, a pixel wide, are 5 % of it


def test_leaves_are_opaque_discs_of_flat_colour():
    x = leaves(200, 64).int()
    flat = ((x[..., 1:, 1:] == x[..., :-1, :-1]) & (x[..., 1:, 1:] == x[..., 1:, :-1])).all(1).float().mean()
    assert flat > 0.75                                          # but for edges, one pixel is as the next
    assert len({tuple(p) for p in x[:, :, 5, 5].tolist()}) > 190


def test_leaves_are_made_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "leaves", lambda n, resolution, made=[]: made.append(1) or leaves(n, resolution, discs=len(made)))
    first = load("leaves", 4, tmp_path)
    assert first.pictures.shape == (16384, 3, 4, 4) and torch.equal(load("leaves", 4, tmp_path).pictures, first.pictures)
    kept = tmp_path / "leaves-4.npy"
    kept.write_bytes(kept.read_bytes()[:1000])                  # a file that broke off is made again
    assert load("leaves", 4, tmp_path).pictures.shape == first.pictures.shape


def png(array):
    f = io.BytesIO()
    Image.fromarray(array).save(f, "png")
    return f.getvalue()


def noise(h, w, c=3, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (h, w, c) if c == 3 else (h, w), dtype=np.uint8)


@pytest.fixture
def files():
    return {"b/2.png": noise(8, 8, seed=1), "a/1.png": noise(8, 8), "a/3.png": noise(8, 8, seed=2)}


def as_folder(root, files):
    for name, array in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(array if isinstance(array, bytes) else png(array))
    return root


def test_a_folder_a_zip_and_a_tar_give_the_same_pictures(tmp_path, files):
    folder = as_folder(tmp_path / "set", files)
    (folder / "notes.txt").write_text("no picture")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as z, tarfile.open(tmp_path / "set.tar.xz", "w:xz") as t:
        for name in sorted(files):
            z.writestr(name, png(files[name]))
            t.add(folder / name, name)
    for path in (folder, tmp_path / "set.zip", tmp_path / "set.tar.xz"):
        d = load(str(path))
        assert d.classes == ["a", "b"] and d.labels.tolist() == [0, 0, 1] and d.skipped == []
        for picture, name in zip(d.pictures, sorted(files)):
            assert np.array_equal(picture.permute(1, 2, 0).numpy(), files[name])


def test_facts_are_exact(tmp_path, files):
    d = load(as_folder(tmp_path, files))
    facts, x = d.facts(), normalize(d.pictures).double()
    assert (facts["count"], facts["shape"], facts["classes"]) == (3, [3, 8, 8], ["a", "b"])
    assert facts["mean"] == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-7)
    assert facts["std"] == pytest.approx(x.std((0, 2, 3), unbiased=False).tolist(), abs=1e-7)


def test_pictures_are_cropped_in_the_middle_and_resized(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200                                        # the middle square, all of one colour
    d = load(as_folder(tmp_path, {"w.png": wide, "s.png": np.full((5, 5, 3), 200, np.uint8)}), 10)
    assert d.pictures.shape == (2, 3, 10, 10) and (d.pictures[:, :, 1:-1, 1:-1] == 200).all()
    assert d.classes == [tmp_path.name]
    with pytest.raises(UserError, match="w.png is not of the first picture's size"):
        load(tmp_path)
    tall = load(as_folder(tmp_path / "tall", {"t.png": wide.transpose(1, 0, 2)}), 10).pictures
    assert (tall[:, :, 1:-1, 1:-1] == 200).all()
    large = noise(40, 40)
    resized = load(as_folder(tmp_path / "large", {"l.png": large}), 10).pictures[0].permute(1, 2, 0).numpy()
    assert np.array_equal(resized, np.asarray(Image.fromarray(large).resize((10, 10), Image.Resampling.LANCZOS)))


def test_non_square_pictures_stay_as_they_are_and_grey_stays_grey(tmp_path):
    grey = load(as_folder(tmp_path, {"a.png": noise(6, 9, 1), "b.png": noise(6, 9, 1, 1)}))
    assert grey.pictures.shape == (2, 1, 6, 9)
    mixed = load(as_folder(tmp_path, {"c.png": noise(6, 9)}))
    assert mixed.pictures.shape == (3, 3, 6, 9) and (mixed.pictures[0, 0] == mixed.pictures[0, 2]).all()


def test_a_cameras_orientation_is_heeded(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                            # to be turned by a quarter, clockwise
    Image.fromarray(noise(6, 9)).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load(tmp_path).pictures[0].permute(1, 2, 0).numpy(), np.rot90(noise(6, 9), -1))


def test_deep_and_transparent_pictures_are_read_as_they_look(tmp_path):
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(load(tmp_path).pictures[0, 0].numpy(), deep // 256)
    clear = np.dstack([noise(8, 8), np.zeros((8, 8), np.uint8)])
    clear[:4, :, 3] = 255
    (tmp_path / "rgba").mkdir()
    Image.fromarray(clear).save(tmp_path / "rgba/clear.png")
    seen = load(tmp_path / "rgba").pictures[0].permute(1, 2, 0).numpy()
    assert np.array_equal(seen[:4], clear[:4, :, :3]) and (seen[4:] == 255).all()


def test_pictures_are_written_by_their_ending(tmp_path):
    with pytest.raises(UserError, match="end it in .png"):
        save_grid(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), tmp_path / "grid.text")


def test_a_broken_file_is_named_skipped_and_counted(tmp_path, files, capsys):
    files["a/0.png"] = png(noise(8, 8))[:60]
    d = load(as_folder(tmp_path, files))
    assert len(d.pictures) == 3 and d.skipped == ["a/0.png"] and d.facts()["skipped"] == 1
    printed = capsys.readouterr().err
    assert "skipped a/0.png" in printed and "1 broken files skipped" in printed


def test_what_holds_no_pictures_is_an_error(tmp_path):
    (tmp_path / "text.zip").write_text("not a zip")
    for path, words in ((tmp_path / "no", "does not exist"), (tmp_path, "holds no picture"), (tmp_path / "text.zip", "no folder, zip or tar")):
        with pytest.raises(UserError, match=words):
            load(path)


def test_damaged_archives_are_one_line(tmp_path):
    """Every kind of damage that a seeded fuzz found to end otherwise, and some more of each."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("a.png", png(noise(4, 4)))
    for mode in ("gz", "xz", "bz2", ""):
        with tarfile.open(tmp_path / f"a.tar{mode}", f"w:{mode}") as t:
            for i in range(40):
                info = tarfile.TarInfo(f"{i}.png")
                info.size = len(png(noise(16, 16, seed=i)))
                t.addfile(info, io.BytesIO(png(noise(16, 16, seed=i))))
    ends = {"ok": 0, "refused": 0}
    for whole in sorted(tmp_path.iterdir()):
        r = np.random.RandomState(0)
        for i in range(40):
            b = bytearray(whole.read_bytes())
            if i % 2:
                b = b[:1 + r.randint(len(b) - 1)]
            for _ in range(4):
                b[r.randint(len(b))] = r.randint(256)
            damaged = tmp_path / "damaged"
            damaged.write_bytes(b)
            try:
                load(damaged)
                ends["ok"] += 1
            except UserError as e:
                assert "\n" not in str(e)
                ends["refused"] += 1
        damaged.unlink()
    assert min(ends.values()) > 20


def test_a_zip_of_a_later_version_is_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("a.png", png(noise(4, 4)))
    b = bytearray((tmp_path / "a.zip").read_bytes())
    b[b.index(b"PK\x01\x02") + 6] = 208                        # the version it takes to unpack
    (tmp_path / "a.zip").write_bytes(b)
    with pytest.raises(UserError, match="no folder, zip or tar that can be read"):
        load(tmp_path / "a.zip")


def test_a_picture_beyond_pillows_limit_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    d = load(as_folder(tmp_path, {"a.png": noise(10, 10), "b.png": noise(10, 11)}))
    assert len(d.pictures) == 1 and d.skipped == [f"{tmp_path.name}/b.png"]


@pytest.mark.parametrize("name", ["../out.png", "/out.png", "a/../../out.png", "..\\out.png"])
def test_an_archive_that_reaches_outside_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as z, tarfile.open(tmp_path / "s.tar", "w") as t:
        z.writestr(name, png(noise(4, 4)))
        info = tarfile.TarInfo(name)
        info.size = len(png(noise(4, 4)))
        t.addfile(info, io.BytesIO(png(noise(4, 4))))
    for path in ("s.zip", "s.tar"):
        with pytest.raises(UserError, match="outside its folder"):
            load(tmp_path / path)


def cifar_archive():
    labels, pictures = np.arange(50) % 10, np.random.RandomState(0).randint(0, 256, (50, 3072), dtype=np.uint8)
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode="w:gz") as tar:
        for i in range(5):
            part = np.concatenate([labels[i * 10:i * 10 + 10, None].astype(np.uint8), pictures[i * 10:i * 10 + 10]], 1).tobytes()
            info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i + 1}.bin")
            info.size = len(part)
            tar.addfile(info, io.BytesIO(part))
    return f.getvalue(), pictures.reshape(50, 3, 32, 32), labels


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


def test_cifar10_is_fetched_once_and_checked(tmp_path, monkeypatch, server):
    handler, url = server
    handler.body, pictures, labels = cifar_archive()
    monkeypatch.setattr(data, "CIFAR10_URL", url)
    with pytest.raises(UserError, match="has not the md5"):     # the real archive's digest
        load("cifar10", folder=tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["cifar-10-binary.tar.gz.bad"]
    monkeypatch.setattr(data, "CIFAR10_MD5", hashlib.md5(handler.body).hexdigest())
    d = load("cifar10", folder=tmp_path)
    assert np.array_equal(d.pictures.numpy(), pictures) and d.labels.tolist() == labels.tolist() and d.classes[3] == "cat"
    assert load("cifar10", 16, tmp_path).pictures.shape == (50, 3, 16, 16)

    handler.length, handler.body = len(handler.body), handler.body[:1000]
    load("cifar10", folder=tmp_path)                            # the kept archive, whatever the server says now
    kept = tmp_path / "cifar-10-binary.tar.gz"
    kept.write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged"):
        load("cifar10", folder=tmp_path)
    kept.unlink()
    with pytest.raises(UserError, match="cannot fetch .* elsewhere and put it at"):
        load("cifar10", folder=tmp_path)                        # the connection breaks off
    assert not kept.exists()


def test_cifar10_offline_says_where_to_get_it_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR10_URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    with pytest.raises(UserError) as e:
        load("cifar10", folder=tmp_path)
    assert str(tmp_path / "cifar-10-binary.tar.gz") in str(e.value) and data.CIFAR10_URL in str(e.value) and "\n" not in str(e.value)


def test_pictures_are_scaled_by_edms_rule_and_back():
    p = torch.arange(256, dtype=torch.uint8)
    assert normalize(p)[[0, 255]].tolist() == [-1, 1] and torch.equal(to_uint8(normalize(p)), p)
    assert to_uint8(torch.tensor([-3., 0., 3.])).tolist() == [0, 128, 255]


def test_a_warp_by_a_right_angle_and_a_whole_shift_are_exact():
    x = torch.nn.functional.interpolate(torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)), 24, mode="bicubic")
    torch.testing.assert_close(warp(x, torch.tensor([[[0., -1, 0], [1, 0, 0]]])), x.rot90(1, (2, 3)), rtol=0, atol=2e-2)
    shifted = warp(x, torch.tensor([[[1., 0, 6 / 24], [0, 1, 0]]]))                             # shows what stands 3 pixels to the right
    torch.testing.assert_close(shifted[..., :-3], x[..., 3:], rtol=0, atol=2e-2)
    torch.testing.assert_close(shifted[..., -3:], x[..., -3:].flip(-1), rtol=0, atol=2e-2)      # and reflects at the border
    rough = torch.randn(1, 1, 8, 12)                            # up and down again loses nothing, of any frequency
    torch.testing.assert_close(warp(rough, torch.tensor([[[1., 0, 0], [0, 1, 0]]])), rough, rtol=0, atol=1e-4)


@pytest.mark.parametrize("h, w", [(48, 48), (48, 64)])
def test_augmentation_does_what_its_labels_say(h, w):
    """A spot off the centre lands where the labels' own transformations, one after the other, send it, and stretches as they say."""
    n = 400
    torch.manual_seed(0)
    across, down = torch.arange(w) + 0.5 - w / 2, (torch.arange(h) + 0.5 - h / 2)[:, None]      # 0 is the middle
    start, radius = torch.tensor([3., -2.]), 3.
    spot = torch.exp(-((across - start[0]) ** 2 + (down - start[1]) ** 2) / (2 * radius ** 2))
    out, labels = augment(spot.expand(n, 1, h, w), 1.)
    checked = 0
    for picture, (flip_x, flip_y, scale, cos1, sin, stretch_c, stretch_s, shift_x, shift_y) in zip(out[:, 0].double(), labels.tolist()):
        turn = lambda c, s: np.array([[c, -s], [s, c]])
        stretch, along = math.hypot(stretch_c, stretch_s), turn(*np.array([stretch_c, stretch_s]) / (math.hypot(stretch_c, stretch_s) or 1))
        near = []
        for sign in (1, -1):                                    # wider along its direction or narrower against it: the label is the same
            forward = along @ np.diag([2 ** (0.2 * sign * stretch), 2 ** (-0.2 * sign * stretch)]) @ along.T
            forward = forward @ turn(cos1 + 1, sin) * 2 ** (0.2 * scale) @ np.diag([1 - 2 * flip_x, 1 - 2 * flip_y])
            middle = forward @ start.numpy() + 0.125 * np.array([w * shift_x, h * shift_y])
            cov = forward @ forward.T * radius ** 2
            if (abs(middle) + 3.5 * np.sqrt(np.diag(cov)) > np.array([w, h]) / 2).any():
                break                                           # partly outside, and reflected
            reach = 4 * math.sqrt(np.linalg.eigvalsh(cov)[1])   # of the spot itself: reflections of it may stand further away
            p = picture * ((across - middle[0]) ** 2 + (down - middle[1]) ** 2 < reach ** 2)
            p = p / p.sum()
            mx, my = (p * across).sum().item(), (p * down).sum().item()
            spread = [(p * (across - mx) ** 2).sum().item(), (p * (across - mx) * (down - my)).sum().item()]
            near.append((mx, my) == pytest.approx(middle, abs=0.1) and spread == pytest.approx([cov[0, 0], cov[0, 1]], rel=0.03, abs=0.2))
        else:
            assert any(near)
            checked += 1
    assert checked > 100


def test_augmentation_happens_as_often_as_asked():
    torch.manual_seed(0)
    x = torch.randn(20_000, 1, 2, 2)
    out, labels = augment(x, 0.12)
    done = torch.stack([labels[:, 0] != 0, labels[:, 1] != 0, labels[:, 2] != 0, labels[:, 3:5].any(1), labels[:, 5:7].any(1), labels[:, 7:].any(1)])
    assert done.float().mean(1).tolist() == pytest.approx([0.5, 0.06, 0.12, 0.12, 0.12, 0.12], abs=0.012)
    assert labels[labels[:, 2] != 0, 2].std().item() == pytest.approx(1, abs=0.05)
    assert labels[labels[:, 7:].any(1), 7:].std(0).tolist() == pytest.approx([1, 1], abs=0.05)
    angle = torch.atan2(labels[:, 4], labels[:, 3] + 1)[labels[:, 3:5].any(1)]
    assert torch.histc(angle, 8, -math.pi, math.pi).div(len(angle)).tolist() == pytest.approx([1 / 8] * 8, abs=0.03)
    assert (labels[labels[:, 5:7].any(1), 6] == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    still = (labels[:, 1:] == 0).all(1)                         # flipped or not, its pixels are untouched
    assert torch.equal(out[still & (labels[:, 0] == 0)], x[still & (labels[:, 0] == 0)])
    assert torch.equal(out[still & (labels[:, 0] == 1)], x[still & (labels[:, 0] == 1)].flip(-1))


def test_a_grid_shows_every_picture_in_order(tmp_path):
    tiles = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 64, 64) * 50
    save_grid(tiles, tmp_path / "g.png", columns=3)
    g = np.asarray(Image.open(tmp_path / "g.png"))
    assert g.shape == (2 * 66, 3 * 66, 3)
    assert [g[33 + 66 * (i // 3), 33 + 66 * (i % 3), 0] for i in range(5)] == [0, 50, 100, 150, 200]
