import hashlib
import json
import os
import re
import socket
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import fid
import sample
import train
from fid import (InceptionV3, frechet_distance, load_inception, mean_and_covariance, read_array,
                 read_batches, read_statistics, reference_statistics, statistics)
from test_data import png, server  # noqa: F401  (a fixture)
from util import UserError

HERE = Path(__file__).parent
KEYS = json.load(open(HERE / "inception_keys.json"))
GOLDEN = np.load(HERE / "inception_golden.npz")
TRAIN = ("--device cpu --resolution 8 --attention 4 --duration 0.256 --sample-steps 3 "
         "--fid-every 0.128 --fid-num 20").split()


def filled(name, shape):
    """The golden features' rule for a tensor of that name."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        z = np.exp(0.2 * z)
    elif name.endswith(("running_mean", "bias")):
        z = 0.1 * z
    elif name.endswith("bn.weight"):
        z = 1 + 0.1 * z
    else:
        z = z * np.sqrt(2 / np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file of the published layout, batch counters included, filled by the rule."""
    state = {k: filled(k, shape) for k, shape in KEYS.items()}
    state.update({k.replace("running_var", "num_batches_tracked"): torch.tensor(0)
                  for k in KEYS if k.endswith("running_var")})
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(state, path)
    return str(path)


@pytest.fixture(scope="module")
def net(weights):
    return load_inception(weights)[0]


# The network

@pytest.mark.parametrize("resize, golden",
                         [("tf1", "features_tf1"), ("pytorch", "features_pytorch_fid")])
def test_golden_features(net, resize, golden):
    images = torch.from_numpy(GOLDEN["images"]).permute(0, 3, 1, 2)
    ours = net(images, resize).numpy()
    assert ours.dtype == np.float32 and ours.shape == (4, 2048)
    assert np.abs(ours - GOLDEN[golden]).max() < 1e-3 * GOLDEN[golden].std()
    with torch.autocast("cpu", torch.bfloat16):                 # the features stay float32
        assert np.array_equal(net(images, resize).numpy(), ours)


def test_names_and_shapes_are_the_published_ports():
    shapes = {k: list(v.shape) for k, v in InceptionV3().state_dict().items()}
    counters = {k.replace("running_var", "num_batches_tracked"): []
                for k in KEYS if k.endswith("running_var")}
    assert shapes == {**KEYS, **counters}


def test_weights_without_batch_counters_load_too(net, tmp_path):
    torch.save({k: v for k, v in net.state_dict().items() if k in KEYS}, tmp_path / "w.pth")
    image = torch.full((1, 3, 8, 8), 9, dtype=torch.uint8)
    assert torch.equal(load_inception(tmp_path / "w.pth")[0](image), net(image))


def test_grey_is_three_equal_channels(net):
    grey = torch.from_numpy(GOLDEN["images"][:1, :, :, :1]).permute(0, 3, 1, 2)
    assert torch.equal(net(grey), net(grey.expand(-1, 3, -1, -1)))


def test_an_unknown_resize_and_other_channels_are_refused(net):
    with pytest.raises(ValueError, match="tf1 or pytorch"):
        net(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "bicubic")
    with pytest.raises(UserError, match="1 or 3 channels, not 4"):
        net(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


# The distance and the statistics

def square_root(a):
    """A matrix square root by Denman and Beavers' iteration: no eigenvalues in it."""
    y, z = a.copy(), np.eye(len(a))
    for _ in range(60):
        y, z = (y + np.linalg.inv(z)) / 2, (z + np.linalg.inv(y)) / 2
    return y


def independent(mu1, cov1, mu2, cov2):
    return ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * square_root(cov1 @ cov2))


def covariance(d, seed, rank=None):
    x = np.random.RandomState(seed).randn(rank or 3 * d, d)
    return x.T @ x / len(x)


def centred_distance(cov1, cov2):
    return frechet_distance(np.zeros(len(cov1)), cov1, np.zeros(len(cov2)), cov2)


def test_frechet_distance_of_commuting_and_other_gaussians():
    d = 20
    q = np.linalg.qr(np.random.RandomState(0).randn(d, d))[0]
    a, b = np.random.RandomState(1).rand(2, d) + 0.1
    mu1, mu2 = np.random.RandomState(2).randn(2, d)
    closed = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    ours = frechet_distance(mu1, (q * a) @ q.T, mu2, (q * b) @ q.T)
    assert ours == pytest.approx(closed, rel=1e-10)
    c1, c2 = covariance(d, 3), covariance(d, 4)
    ours = frechet_distance(mu1, c1, mu2, c2)
    assert ours == pytest.approx(independent(mu1, c1, mu2, c2), rel=1e-8)
    assert ours == pytest.approx(frechet_distance(mu2, c2, mu1, c1), rel=1e-12)
    assert ours == frechet_distance(torch.tensor(mu1), torch.tensor(c1), mu2, c2)


@pytest.mark.parametrize("rank", [300, 40, 1])
def test_equal_gaussians_are_0_apart(rank):
    c, mu = covariance(100, 5, rank), np.ones(100)
    assert abs(frechet_distance(mu, c, mu, c)) < 1e-6 * np.trace(c)


def test_singular_covariances():
    """Rank one: tr (C1^1/2 C2 C1^1/2)^1/2 = |u . v|. Blocks: the sum over them. Fewer samples than
    dimensions: the limit of a regularised root."""
    u, v = np.random.RandomState(6).randn(2, 30)
    closed = u @ u + v @ v - 2 * abs(u @ v)
    assert centred_distance(np.outer(u, u), np.outer(v, v)) == pytest.approx(closed, rel=1e-9)

    def block(a):
        return np.block([[a, np.zeros((10, 5))], [np.zeros((5, 10)), np.zeros((5, 5))]])
    c1, c2 = covariance(10, 7), covariance(10, 8)
    ours = frechet_distance(np.zeros(15), block(c1), np.ones(15), block(c2))
    assert ours == pytest.approx(5 + independent(np.zeros(10), c1, np.ones(10), c2), rel=1e-8)

    few1, few2, zero = covariance(30, 9, rank=12), covariance(30, 10, rank=12), np.zeros(30)
    regular = independent(zero, few1 + 1e-7 * np.eye(30), zero, few2 + 1e-7 * np.eye(30))
    assert centred_distance(few1, few2) == pytest.approx(regular, rel=2e-3)
    assert frechet_distance(np.zeros(3), np.zeros((3, 3)), np.ones(3), np.zeros((3, 3))) == 3


@pytest.mark.parametrize("sizes, batch",
                         [([1000], 256), ([1] * 10 + [990], 7), ([333, 333, 334], 1000)])
def test_streaming_statistics_are_numpys(sizes, batch):
    g = torch.Generator().manual_seed(batch)
    images = torch.randint(0, 256, (1000, 3, 2, 2), dtype=torch.uint8, generator=g)

    def net(images):                        # far from 0, where plain sums of squares lose digits
        return 1000 + (images.flatten(1).float() / 255) ** 2
    mu, cov, n = mean_and_covariance(images.split(sizes), net, batch)
    f = net(images).double().numpy()
    expected = np.cov(f, rowvar=False)
    assert mu.dtype == cov.dtype == np.float64 and n == 1000
    assert np.abs(mu - f.mean(0)).max() <= 1e-10 * np.abs(f.mean(0)).max()
    assert np.abs(cov - expected).max() <= 1e-10 * np.abs(expected).max()


def share_of_statistics(rank, port, images, result):
    def net(images):
        return images.flatten(1).float() + 100
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mu, cov, n = mean_and_covariance(images[rank::2].split(7), net, 5)
    alone = mean_and_covariance([images] if rank == 1 else [], net)
    assert all(np.allclose(a, b) for a, b in zip(alone, (mu, cov, n)))
    with pytest.raises(UserError, match="one image"):
        mean_and_covariance([images[:1]] if rank == 0 else [], net)
    with pytest.raises(UserError, match="no images"):
        mean_and_covariance([], net)
    sizes = [images[:, :, :1], images][rank]                    # another one in each process
    assert fid.statistics([sizes], lambda x, resize: x[:, :, 0].flatten(1), "tf1", "0",
                          "x")["size"] == "several sizes"
    if rank == 1:
        np.savez(result, mu=mu, cov=cov, n=n)
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_work(tmp_path):
    """Each takes every other image, and each has the statistics of all; a process without images
    has them too."""
    images = torch.randint(0, 256, (101, 3, 2, 2), dtype=torch.uint8)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = port, images, str(tmp_path / "r.npz")
    torch.multiprocessing.spawn(share_of_statistics, arguments, nprocs=2)
    shared, f = np.load(tmp_path / "r.npz"), images.flatten(1).double().numpy() + 100
    assert shared["n"] == 101 and np.allclose(shared["mu"], f.mean(0), rtol=1e-12)
    assert np.allclose(shared["cov"], np.cov(f, rowvar=False), rtol=1e-10, atol=1e-8)


# The command line on images

class SmallNet(torch.nn.Module):
    """12 features, the means of an image's quarters."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(1, 1)

    def forward(self, x, resize="tf1"):
        return torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)


def small_net(monkeypatch):
    """In the place of InceptionV3, where a test is not about it."""
    monkeypatch.setattr(fid, "load_inception", lambda *a: (SmallNet(), "f" * 64))
    monkeypatch.setattr(train, "load_inception", lambda *a: (SmallNet(), "f" * 64))
    monkeypatch.setattr(fid, "WIDTH", 12)


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, args), "--device", "cpu"])
    fid.main()
    return capsys.readouterr()


def run_json(monkeypatch, capsys, *args):
    return json.loads(run(monkeypatch, capsys, *args, "--json").out)


def refused(monkeypatch, capsys, *args):
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, capsys, *args)
    err = capsys.readouterr().err
    assert e.value.code == 2 and "Traceback" not in err
    return err.strip().splitlines()[-1]


def train_a_model(monkeypatch, capsys, *args):
    """run/ema.pt; returns the lines of its log."""
    monkeypatch.setattr(sys, "argv", ["train.py", *TRAIN, *map(str, args)])
    train.main()
    capsys.readouterr()
    return [json.loads(line) for line in open("run/log.jsonl")]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(6):
        pixels = np.random.RandomState(i).randint(0, 200, (16, 16, 3), dtype=np.uint8)
        (tmp_path / f"a/{i}.png").write_bytes(png(pixels))
    return tmp_path / "a"


@pytest.fixture
def sizes(tmp_path):
    """A folder of images of many sizes, one of them grey."""
    (tmp_path / "sizes").mkdir()
    for i in range(40):
        r = np.random.RandomState(i)
        shape = (*r.randint(10, 40, 2), 3) if i else (20, 30)
        pixels = r.randint(0, 40 + 5 * i, shape, dtype=np.uint8)
        (tmp_path / f"sizes/{i}.png").write_bytes(png(pixels))
    return tmp_path / "sizes"


def pixels_of(folder):
    return np.stack([np.asarray(Image.open(f)) for f in sorted(folder.iterdir())])


def test_end_to_end_with_a_weights_file(folder, weights, tmp_path, monkeypatch, capsys):
    """The whole way through the network: against themselves 0; against a shifted copy the distance
    that numpy gets from the features."""
    monkeypatch.chdir(tmp_path)
    images = pixels_of(folder)
    np.savez("shifted.npz", np.minimum(images + 50, 255).astype(np.uint8))
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    out = run(monkeypatch, capsys, folder, "--ref", folder, "--weights", weights, "--json")
    result = json.loads(out.out)
    assert abs(result["fid"]) < 1e-6 and result["weights_sha256"] == digest
    assert result["generated"] == result["reference_num"] == 6
    assert "50,000" in out.err and "singular" in out.err
    shifted = run_json(monkeypatch, capsys, "shifted.npz", "--ref", folder, "--weights", weights)
    net = load_inception(weights)[0]
    f, g = (net(torch.from_numpy(p).permute(0, 3, 1, 2)).double().numpy()
            for p in (np.load("shifted.npz")["arr_0"], images))
    f0, g0 = f - f.mean(0), g - g.mean(0)
    # with so few samples, the trace of the root is a nuclear norm of 6 x 6
    traces = (f0 ** 2).sum() + (g0 ** 2).sum() - 2 * np.linalg.norm(f0 @ g0.T, "nuc")
    closed = ((f.mean(0) - g.mean(0)) ** 2).sum() + traces / 5
    assert shifted["fid"] == pytest.approx(closed, rel=1e-5) and shifted["fid"] > 0.1


def test_statistics_are_kept_reused_and_readable_by_others(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    first = run(monkeypatch, capsys, folder, "--ref", folder)
    kept, = Path("data").glob("fid-a-*.npz")
    saved = np.load(kept, allow_pickle=False)
    f = pixels_of(folder).reshape(6, 2, 8, 2, 8, 3).mean((2, 4)) / 255
    f = f.transpose(0, 3, 1, 2).reshape(6, 12)
    assert np.allclose(saved["mu"], f.mean(0), atol=1e-6)
    assert np.allclose(saved["sigma"], np.cov(f, rowvar=False), atol=1e-6)
    assert str(saved["source"]) == str(folder) and saved["num"] == 6
    assert str(saved["resize"]) == "tf1" and saved["resolution"] == 0
    monkeypatch.setattr(fid, "read_batches",
                        lambda spec, *a, **kw: pytest.fail(f"{spec} was read again"))
    again = run(monkeypatch, capsys, kept, "--ref", folder)
    assert all(word in out for out in (first.out, again.out)
               for word in ("FID ", "6 images", "resize tf1", "weights ffffffff"))
    assert " at " not in first.out + again.out and "does not say" not in again.err
    np.savez("theirs.npz", mu=saved["mu"], sigma=saved["sigma"])        # as EDM and pytorch-fid do
    theirs = run(monkeypatch, capsys, kept, "--ref", "theirs.npz")
    assert "unknown number" in theirs.out and "theirs.npz does not say" in theirs.err
    assert "resize" in refused(monkeypatch, capsys, kept, "--ref", kept, "--resize", "pytorch")
    assert "resolution 0, not 8" in refused(monkeypatch, capsys, kept, "--ref", kept,
                                            "--resolution", 8)


def test_a_changed_reference_is_not_taken_for_the_kept_one(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)

    def reference_num():
        return run_json(monkeypatch, capsys, folder, "--ref", folder)["reference_num"]
    assert reference_num() == 6
    (folder / "6.png").write_bytes(png(np.zeros((16, 16, 3), np.uint8)))
    assert reference_num() == 7
    (folder / "7.png").write_bytes((folder / "6.png").read_bytes()[:40])        # unreadable now
    kept = set(Path("data").iterdir())
    assert reference_num() == 7
    assert set(Path("data").iterdir()) == kept and len(kept) == 2       # not kept without that file


def test_the_resolution_belongs_to_the_kept_statistics(sizes, tmp_path, monkeypatch, capsys):
    """It crops and resizes samples and reference, as data.load does, in every kind of file; each
    resolution has kept statistics of its own."""
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    images = data.load(str(sizes), 8).images                    # [N, 3, 8, 8]
    np.save("at8.npy", images.permute(0, 2, 3, 1).numpy())
    out = run(monkeypatch, capsys, "at8.npy", "--ref", sizes, "--resolution", 8)
    assert float(re.search(r"FID (\S+)", out.out)[1]) == pytest.approx(0, abs=1e-4)
    assert f"40 of {sizes} at 8 x 8; resize" in out.out
    whole = run(monkeypatch, capsys, "at8.npy", "--ref", sizes).out
    assert "8 x 8 against several sizes" in whole and " against several" not in out.out
    whole = run_json(monkeypatch, capsys, "at8.npy", "--ref", sizes)
    assert whole["fid"] > 1e-4 and whole["resolution"] == 0
    assert len(list(Path("data").glob("fid-sizes-*.npz"))) == 2
    for size in (8, 4):
        result = run_json(monkeypatch, capsys, sizes, "--ref", sizes, "--resolution", size)
        assert abs(result["fid"]) < 1e-9 and result["resolution"] == size
    resized = next(read_batches("at8.npy", 4))
    expected = [Image.fromarray(i).resize((4, 4), Image.Resampling.LANCZOS)
                for i in np.load("at8.npy")]
    assert np.array_equal(resized.permute(0, 2, 3, 1).numpy(), np.stack(expected))
    np.save("grey.npy", np.load("at8.npy")[..., 0])
    assert next(read_batches("grey.npy", 4)).shape == (40, 3, 4, 4)


@pytest.mark.parametrize("resolution", [8, 16])
def test_a_reference_is_what_training_sees(sizes, resolution, tmp_path, monkeypatch):
    """The statistics of a folder at a resolution are those of data.load, as train.py takes them."""
    monkeypatch.chdir(tmp_path)
    ours = reference_statistics(str(sizes), resolution, SmallNet(), "tf1", "f" * 64)
    batches = data.load(str(sizes), resolution).images.split(256)
    trained = statistics(batches, SmallNet(), "tf1", "f" * 64, "sizes")
    assert ours["num"] == trained["num"] == 40 and ours["resolution"] == resolution
    assert np.allclose(ours["mu"], trained["mu"], rtol=1e-12)
    assert np.allclose(ours["sigma"], trained["sigma"], rtol=1e-10, atol=1e-15)


def test_leaves_are_a_reference_at_any_resolution(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "WIDTH", 12)
    ours = [reference_statistics("leaves", n, SmallNet(), "tf1", "f" * 64) for n in (4, 0, 16)]
    assert [stats["resolution"] for stats in ours] == [4, 16, 16]
    assert len(list(Path("data").glob("fid-leaves-*.npz"))) == 2        # 0 is their own resolution
    batches = data.load("leaves", 4).images.split(256)
    trained = statistics(batches, SmallNet(), "tf1", "f" * 64, "leaves")
    assert np.allclose(ours[0]["mu"], trained["mu"], rtol=1e-12)


def collected(spec, num=None, batch=256):
    return torch.cat([b.float().mean((2, 3)) for b in read_batches(spec, 0, num, batch)])


def test_all_containers_give_the_same_images(folder, tmp_path):
    images = pixels_of(folder)
    np.save(tmp_path / "n.npy", images)
    np.savez(tmp_path / "first.npz", images.transpose(0, 3, 1, 2))
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z, tarfile.open(tmp_path / "t.tar", "w") as t:
        for f in sorted(folder.iterdir()):
            z.write(f, f.name)
            t.add(f, f.name)
    expected = torch.from_numpy(images).float().mean((1, 2))
    names = ("n.npy", "first.npz", "z.zip", "t.tar")
    for spec in (folder, *(tmp_path / name for name in names)):
        torch.testing.assert_close(collected(spec), expected)
        few = collected(spec, 4, 2)
        assert len(few) == 4 and all((row == expected).all(1).any() for row in few)


def test_grey_mixed_sizes_and_corrupt_images(folder, capsys):
    (folder / "7.png").write_bytes(png(np.full((9, 5), 40, np.uint8)))
    (folder / "8.png").write_bytes(png(np.full((9, 5), 50, np.uint8))[:50])
    shapes = [tuple(b.shape) for b in read_batches(folder)]
    assert shapes == [(6, 3, 16, 16), (1, 3, 9, 5)] and "skipped" in capsys.readouterr().err


@pytest.mark.parametrize("shape, expected", [
    ((4, 8, 6), (4, 8, 6, 1)), ((4, 8, 6, 1), (4, 8, 6, 1)), ((4, 8, 6, 3), (4, 8, 6, 3)),
    ((4, 1, 8, 6), (4, 8, 6, 1)), ((4, 3, 8, 6), (4, 8, 6, 3)), ((4, 8, 6, 4), None),
    ((4, 2, 8, 6), None), ((8, 6), None), ((0, 8, 6, 3), None), ((4, 0, 6, 3), None)])
def test_arrays_of_one_or_three_channels(shape, expected, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    if expected:
        assert read_array(tmp_path / "a.npy").shape == expected
    else:
        with pytest.raises(UserError, match="not uint8 images .* of 1 or 3 channels") as e:
            read_array(tmp_path / "a.npy")
        assert "\n" not in str(e.value)


def test_a_sigma_that_is_not_a_covariance_is_refused(tmp_path, monkeypatch):
    """With it the FID could be negative. What rounding does to a covariance is accepted."""
    monkeypatch.setattr(fid, "WIDTH", 12)
    skewed = covariance(12, 0)
    skewed[0, 1] += 1
    slightly = np.diag([1.] * 11 + [-1e-3])
    for sigma in (-np.eye(12), skewed, slightly, np.full((12, 12), 1e308) - np.eye(12) * 1e308):
        np.savez(tmp_path / "s.npz", mu=np.zeros(12), sigma=sigma)
        with pytest.raises(UserError, match="s.npz holds a sigma that is not a covariance") as e:
            read_statistics(tmp_path / "s.npz")
        assert "\n" not in str(e.value)
    singular = covariance(12, 1, rank=3)
    for sigma in (singular, singular.astype(np.float32), 1e6 * singular, np.zeros((12, 12))):
        np.savez(tmp_path / "s.npz", mu=np.zeros(12), sigma=sigma)
        assert np.array_equal(read_statistics(tmp_path / "s.npz")["sigma"], sigma)


def test_what_cannot_be_scored_is_one_line(folder, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("one").mkdir()
    (Path("one") / "0.png").write_bytes((folder / "0.png").read_bytes())
    Path("broken.npz").write_bytes(b"no zip")
    Path("broken").mkdir()
    (Path("broken") / "0.png").write_bytes(b"no image")
    np.savez("images.npz", np.zeros((4, 8, 8, 4), np.uint8))
    np.save("floats.npy", np.zeros((4, 8, 8, 3)))
    np.savez("small.npz", mu=np.zeros(10), sigma=np.zeros((10, 10)))
    np.savez("objects.npz", mu=np.array([{}], dtype=object), sigma=np.zeros((2048, 2048)))
    np.savez("wide.npz", mu=np.zeros(12, np.longdouble), sigma=np.zeros((12, 12), np.longdouble))
    np.savez("facts.npz", mu=np.zeros(12), sigma=np.zeros((12, 12)), resolution="8")
    np.savez("good.npz", mu=np.zeros(12), sigma=np.eye(12), num=70000)
    np.savez("negative.npz", mu=np.zeros(12), sigma=-np.eye(12))
    Path("notes.txt").write_text("no archive")
    os.mkfifo("pipe")
    os.mkfifo("pipe.npz")
    np.savez("nan.npz", mu=np.full(12, np.nan), sigma=np.zeros((12, 12)))
    torch.save({"conv.weight": torch.zeros(1)}, "other.pth")
    while_computing = [
        (["one", "--ref", folder], "one image has no covariance"),
        (["broken", "--ref", folder], "there are no images")]
    before = [
        (["images.npz", "--ref", folder], "not uint8"),
        ([folder, "--ref", "images.npz"], "not uint8"),
        (["pipe", "--ref", folder], "a device"), ([folder, "--ref", "pipe.npz"], "a device"),
        (["--ckpt", "pipe", "--ref", folder], "a device"),
        (["", "--ref", folder], "samples must not be empty"),
        (["empty", "--ref", folder], "no images"), ([folder, "--ref", "empty"], "no images"),
        (["none", "--ref", folder], "does not exist"),
        ([folder, "--ref", "none"], "does not exist"),
        (["none.npy", "--ref", folder], "does not exist"),
        (["none.npz", "--ref", folder], "does not exist"),
        (["notes.txt", "--ref", folder], "not a folder, zip or tar"),
        ([folder, "--ref", "notes.txt"], "not a folder, zip or tar"),
        ([folder / "0.png", "--ref", folder], "is one image"),
        (["broken.npz", "--ref", folder], "cannot be read"),
        (["floats.npy", "--ref", folder], "not uint8"),
        ([folder, "--ref", "small.npz"], "not finite float [12]"),
        ([folder, "--ref", "objects.npz"], "cannot be read"),
        ([folder, "--ref", "nan.npz"], "not finite"), ([folder, "--ref", "wide.npz"], "not finite"),
        ([folder, "--ref", "facts.npz"], "unknown type"),
        ([folder, "--ref", "negative.npz"], "not a covariance"),
        (["--ref", folder], "either samples or --ckpt"),
        ([folder, "--ckpt", "run/ema.pt", "--ref", folder], "either samples or --ckpt"),
        (["--ckpt", "run/ema.pt", "--ref", folder], "run/ema.pt does not exist"),
        (["--ckpt", "run/ema.pt", "--ref", "none"], "none does not exist"),
        ([folder, "--ref", folder, "--bnr", "1"], "--bnr is for --ckpt"),
        ([folder, "--ref", folder, "--path", "blurring"], "--path is for --ckpt"),
        ([folder, "--ref", folder, "--class", "a"], "--class is for --ckpt"),
        ([folder, "--ref", folder, "--s-max", "3"], "--s-max is for --ckpt"),
        (["good.npz", "--ref", folder, "--num", "3"], "holds statistics, and not the images"),
        (["--ckpt", "c", "--ref", folder, "--bnr", "1", "--path", "blurring"], "give one of them"),
        (["--ckpt", "c", "--ref", folder, "--bnr", "-1"], "--bnr must be a number of at least 0"),
        (["--ckpt", "c", "--ref", folder, "--resolution", 8], "--resolution is for images on disk"),
        ([folder, "--ref", folder, "--resize", "lanczos"], "--resize")]
    with monkeypatch.context() as m:
        small_net(m)
        for args, words in while_computing:
            assert words in refused(m, capsys, *args), args
        m.setattr(fid, "load_inception", lambda *a: pytest.fail("the weights were loaded first"))
        for args, words in before:
            assert words in refused(m, capsys, *args), args
    for file, words in (("other.pth", "layout"), ("none.pth", "does not exist")):
        assert words in refused(monkeypatch, capsys, folder, "--ref", folder, "--weights", file)


def test_weights_are_fetched_checked_and_kept(
        weights, tmp_path, monkeypatch, server):  # noqa: F811
    handler, url = server
    url = url.replace("cifar.tar.gz", "w.pth")
    monkeypatch.setattr(fid, "WEIGHTS_URL", url)
    handler.body = Path(weights).read_bytes()
    with pytest.raises(UserError, match="does not have the sha256 6726825d.*--weights"):
        load_inception(folder=tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["w.pth.bad"]
    digest = hashlib.sha256(handler.body).hexdigest()
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", digest[:8])
    assert load_inception(folder=tmp_path)[1] == digest
    (tmp_path / "w.pth").unlink()
    handler.length, handler.body = len(handler.body), handler.body[:100_000]
    with pytest.raises(UserError, match="cannot fetch w.pth .*connection was lost"):
        load_inception(folder=tmp_path)
    monkeypatch.setattr(fid, "WEIGHTS_URL", "http://127.0.0.1:9/w.pth")
    with pytest.raises(UserError) as e:
        load_inception(folder=tmp_path)
    message = str(e.value)
    assert "http://127.0.0.1:9/w.pth" in message and str(tmp_path / "w.pth") in message
    assert "--weights" in message and "\n" not in message
    assert not (tmp_path / "w.pth").exists()


def test_the_published_file_is_asked_for():
    assert fid.WEIGHTS_URL.endswith("/pt_inception-2015-12-05-6726825d.pth")
    assert fid.WEIGHTS_SHA256 == "6726825d"


# The command line on checkpoints

def test_a_checkpoint_is_sampled_and_scored(tmp_path, monkeypatch, capsys):
    """Three draws from seeds of their own, equal to scoring the same seeds' PNGs; and the same FID
    during training."""
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    lines = train_a_model(monkeypatch, capsys)
    np.save("ref.npy", data.load("leaves", 8).images.permute(0, 2, 3, 1).numpy())
    options = ["--ckpt", "run/ema.pt", "--num", 20, "--steps", 3, "--batch", 7]
    result = run_json(monkeypatch, capsys, *options, "--ref", "ref.npy")
    draws = result["draws"]
    assert len(draws) == 3 and len(set(draws)) == 3 and result["fid"] == min(draws)
    assert result["mean"] == pytest.approx(np.mean(draws))
    assert result["std"] == pytest.approx(np.std(draws, ddof=1))
    assert result["resolution"] == 8 and result["nfe"] == 5 and "colour" not in result
    assert [line["kimg"] for line in lines if "fid" in line] == [0.128, 0.256]
    assert lines[-1]["fid"] == pytest.approx(draws[0], abs=2e-4)
    leaves = run_json(monkeypatch, capsys, *options, "--ref", "leaves")
    assert leaves["draws"] == pytest.approx(draws, rel=1e-6)    # made at the model's resolution
    out = run(monkeypatch, capsys, *options, "--ref", "leaves", "--draws", 1).out.splitlines()
    assert out[0].startswith(f"draws {draws[0]:.4f}; lowest") and "+-" not in out[0]
    assert out[1] == "sampler heun, 3 steps, NFE 5, no churn, fp32"
    assert out[2] == (f"FID {draws[0]:.4f}   20 images of run/ema.pt against 16,384 of leaves at "
                      "8 x 8; resize tf1, weights ffffffff")
    monkeypatch.setattr(sys, "argv", "sample.py --ckpt run/ema.pt --seeds 20-39 --steps 3 --device "
                                     "cpu".split())
    sample.main()
    capsys.readouterr()
    drawn = run_json(monkeypatch, capsys, "samples", "--ref", "ref.npy")
    assert drawn["fid"] == pytest.approx(draws[1], rel=1e-4)


def test_a_folder_as_reference_gives_the_fid_of_training(sizes, tmp_path, monkeypatch, capsys):
    """Its images, of many sizes, are cropped and resized to the model's resolution."""
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    lines = train_a_model(monkeypatch, capsys, "--data", sizes)
    result = run_json(monkeypatch, capsys, "--ckpt", "run/ema.pt", "--ref", sizes, "--num", 20,
                      "--draws", 1)
    assert lines[-1]["fid"] == pytest.approx(result["fid"], abs=2e-4)
    assert result["resolution"] == 8 and result["std"] is None
    with zipfile.ZipFile("sizes.zip", "w") as z:
        for f in sizes.iterdir():
            z.write(f, f.name)
    zipped = run_json(monkeypatch, capsys, "--ckpt", "run/ema.pt", "--ref", "sizes.zip", "--num",
                      20, "--draws", 1)
    assert zipped["fid"] == pytest.approx(result["fid"], rel=1e-9)


def test_a_network_for_any_ratio_is_scored_at_each(tmp_path, monkeypatch, capsys):
    """--bnr prints a table, a row a ratio, or a JSON list; each row is the FID of that ratio."""
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    lines = train_a_model(monkeypatch, capsys, "--bnr", "any", "--duration", 0.128)
    options = ["--ckpt", "run/ema.pt", "--ref", "leaves", "--num", 20, "--draws", 2]
    results = run_json(monkeypatch, capsys, *options, "--bnr", 0, 0.5, 10)
    assert [r["bnr"] for r in results] == [0, 0.5, 10]
    assert len({r["fid"] for r in results}) == 3 and all(len(r["draws"]) == 2 for r in results)
    single = run_json(monkeypatch, capsys, *options)            # 0.5 is the default
    assert "bnr" not in single
    assert {**single, "bnr": 0.5} == results[1] == run_json(monkeypatch, capsys, *options, "--bnr",
                                                            0.5)[0]
    assert lines[-1]["fid"] == pytest.approx(single["draws"][0], abs=2e-4)
    blurring = run_json(monkeypatch, capsys, *options, "--path", "blurring")
    assert blurring["path"] == "blurring" and blurring["fid"] not in [r["fid"] for r in results]

    out = run(monkeypatch, capsys, *options, "--bnr", 0, 0.5, 10).out.splitlines()
    assert out[0].split() == ["BNR", "lowest", "mean", "std"] and len(out) == 6
    for line, r in zip(out[1:4], results):
        assert line.split() == [f"{r['bnr']:g}",
                                *(f"{r[name]:.4f}" for name in ("fid", "mean", "std"))]
    assert out[4] == "sampler heun, 3 steps, NFE 5, no churn, fp32"
    assert out[5] == ("FID of 20 images of run/ema.pt against 16,384 of leaves at 8 x 8; resize "
                      "tf1, weights ffffffff")
    one = run(monkeypatch, capsys, *options[:-1], 1, "--bnr", 2).out.splitlines()
    assert len(one) == 4 and one[1].split()[::3] == ["2", "-"]
    monkeypatch.setattr(fid, "load_inception", lambda *a: pytest.fail("not checked first"))
    assert "ratios from 0 to 10" in refused(monkeypatch, capsys, *options, "--bnr", 1, 11)


def test_models_that_cannot_be_scored(tmp_path, monkeypatch, capsys):
    """One line, before the weights are loaded."""
    monkeypatch.chdir(tmp_path)
    small = "--device cpu --resolution 8 --attention 4 --duration 0.016 --sample-steps 1".split()
    train.train(train.options([*small, "--out", "half"]))
    latents = data.Images(torch.randn(32, 4, 8, 8), torch.zeros(32, dtype=torch.long), ["x"], "x")
    train.train(train.options([*small, "--out", "latents"]), data=latents)
    np.savez("at16.npz", mu=np.zeros(12), sigma=np.eye(12), resolution=16, resize="tf1")
    capsys.readouterr()
    small_net(monkeypatch)
    words = refused(monkeypatch, capsys, "--ckpt", "half/ema.pt", "--ref", "at16.npz")
    assert "at16.npz was made with resolution 16, not 8" in words
    monkeypatch.setattr(fid, "load_inception", lambda *a: pytest.fail("not checked first"))
    words = refused(monkeypatch, capsys, "--ckpt", "latents/ema.pt", "--ref", "leaves")
    assert "latents/ema.pt makes images of 4 channels: FID needs 1 or 3" in words
    for option in ("--bnr 1", "--path blurring"):
        words = refused(monkeypatch, capsys, "--ckpt", "half/ema.pt", "--ref", "leaves",
                        *option.split())
        assert "--bnr any" in words
    words = refused(monkeypatch, capsys, "--ckpt", "half/ema.pt", "--ref", "leaves", "--class", "9")
    assert "--cond" in words
