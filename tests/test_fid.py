import contextlib
import hashlib
import json
import os
import pickle
import re
import socket
import sys
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

import data
import fid
import inception
import sample
import train
from degrade import ConstantBNR
from fid import frechet_distance, mean_and_covariance, opened, read_statistics, statistics_of
from inception import InceptionV3, load_inception
from test_data import png, server  # noqa: F401  (a fixture)
from util import UserError

HERE = Path(__file__).parent
KEYS = json.load(open(HERE / "inception_keys.json"))
GOLDEN = np.load(HERE / "inception_golden.npz")
SMALL = "--device cpu --resolution 8 --attention 4 --duration 0.016 --sample-steps 1".split()

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


def test_an_unknown_resize_other_channels_and_floats_are_refused(net):
    with pytest.raises(ValueError, match="tf1 or pytorch"):
        net(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "bicubic")
    with pytest.raises(UserError, match="1 or 3 channels, not uint8 of 4"):
        net(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))
    with pytest.raises(UserError, match="not float32 of 3"):
        net(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("resize", ["tf1", "pytorch"])
def test_images_on_the_cpu_and_a_network_elsewhere(resize, monkeypatch):
    """As on a GPU: what is left on the CPU cannot be mixed with what is on torch's meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *a, **kw: contextlib.nullcontext())
    with torch.device("meta"):
        net = InceptionV3().eval()
    features = net(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), resize)
    assert features.is_meta and features.shape == (2, 2048)


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
    assert 0 <= frechet_distance(mu, c, mu, c) < 1e-6 * np.trace(c)


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


def share_of_statistics(rank, port, images, folder):
    def net(images, resize=None):
        return images.flatten(1).float() + 100
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
                                         timeout=timedelta(seconds=60))
    mu, cov, n = mean_and_covariance(images[rank::2].split(7), net, 5)
    alone = mean_and_covariance([images] if rank == 1 else [], net)
    assert all(np.allclose(a, b) for a, b in zip(alone, (mu, cov, n)))
    with pytest.raises(UserError, match="one image"):
        mean_and_covariance([images[:1]] if rank == 0 else [], net)
    with pytest.raises(UserError, match="no images"):
        mean_and_covariance([], net)
    fid.WIDTH = 12
    found = data.Images(images, torch.zeros(len(images), dtype=torch.long), ["all"], "noise")
    how = dict(net=net, resize="tf1", digest="0", batch=5)
    for _ in range(2):                                          # where one disk has no file of them
        stats = statistics_of(found, "noise", folder=f"{folder}/{rank}", **how)
        assert all(np.allclose(a, stats[k]) for k, a in (("mu", mu), ("sigma", cov), ("num", n)))
    if rank == 1:
        assert not Path(folder, "1").exists()
        np.savez(f"{folder}/r.npz", mu=mu, cov=cov, n=n)
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_work(tmp_path):
    """Each takes every other image, and each has the statistics of all; a process without images
    has them too."""
    images = torch.randint(0, 256, (101, 3, 2, 2), dtype=torch.uint8)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = port, images, str(tmp_path)
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
    monkeypatch.setattr(fid, "WIDTH", 12)


def run(monkeypatch, capsys, *args):
    capsys.readouterr()
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


def train_a_model(out, *args, **parts):
    train.train(train.options([*SMALL, "--out", out, *map(str, args)]), **parts)


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
    """The whole way through the network: the distance that numpy gets from the features."""
    monkeypatch.chdir(tmp_path)
    images = pixels_of(folder)
    shifted = np.minimum(images + 50, 255).astype(np.uint8)
    np.save("shifted.npy", shifted)
    out = run(monkeypatch, capsys, "shifted.npy", "--ref", folder, "--weights", weights, "--json")
    result = json.loads(out.out)
    assert result["weights_sha256"] == hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    assert result["generated"] == result["reference_num"] == 6
    assert "50,000" in out.err and "2,048" in out.err
    net = load_inception(weights)[0]
    f, g = (net(torch.from_numpy(p).permute(0, 3, 1, 2)).double().numpy()
            for p in (shifted, images))
    f0, g0 = f - f.mean(0), g - g.mean(0)
    # with so few samples, the trace of the root is a nuclear norm of 6 x 6
    traces = (f0 ** 2).sum() + (g0 ** 2).sum() - 2 * np.linalg.norm(f0 @ g0.T, "nuc")
    closed = ((f.mean(0) - g.mean(0)) ** 2).sum() + traces / 5
    assert result["fid"] == pytest.approx(closed, rel=1e-5) and closed > 0.1


def test_statistics_are_kept_reused_and_readable_by_others(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    first = run(monkeypatch, capsys, folder, "--ref", folder)
    assert first.out.startswith("FID 0.0000   6 images of")
    kept, = Path("data").glob("fid-a-*.npz")
    saved = np.load(kept, allow_pickle=False)
    f = pixels_of(folder).reshape(6, 2, 8, 2, 8, 3).mean((2, 4)) / 255
    f = f.transpose(0, 3, 1, 2).reshape(6, 12)
    assert np.allclose(saved["mu"], f.mean(0), atol=1e-6)
    assert np.allclose(saved["sigma"], np.cov(f, rowvar=False), atol=1e-6)
    assert str(saved["source"]) == str(folder) and saved["num"] == 6
    assert str(saved["resize"]) == "tf1" and str(saved["size"]) == "16 x 16"
    monkeypatch.setattr(fid, "statistics", lambda *a, **kw: pytest.fail("computed again"))
    again = run(monkeypatch, capsys, kept, "--ref", folder)
    assert all(word in out for out in (first.out, again.out)
               for word in ("6 images", "at 16 x 16", "resize tf1", "weights ffffffff"))
    assert "does not say" not in again.err
    np.savez("theirs.npz", mu=saved["mu"], sigma=saved["sigma"])        # as EDM and pytorch-fid do
    theirs = run(monkeypatch, capsys, kept, "--ref", "theirs.npz")
    assert "against an unknown number of images of theirs.npz; resize" in theirs.out
    assert "theirs.npz does not say" in theirs.err
    assert "an unknown number of images of theirs.npz against 6" in run(
        monkeypatch, capsys, "theirs.npz", "--ref", kept).out
    assert "resize tf1, not pytorch" in refused(monkeypatch, capsys, kept, "--ref", kept,
                                                "--resize", "pytorch")
    assert "size 16 x 16, not 8 x 8" in refused(monkeypatch, capsys, kept, "--ref", kept,
                                                "--resolution", 8)


def test_only_the_very_same_images_have_the_kept_statistics(folder, tmp_path, monkeypatch):
    """Also where a file changes and keeps its name, size and time. A set with the same pixels has
    them at once, and under its own name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "WIDTH", 12)
    calls = []

    def source_and_count(spec, resolution=None, resize="tf1", digest="0"):
        def net(images, resize):
            calls.append(resize)
            return SmallNet()(images)
        del calls[:]
        stats = statistics_of(opened(str(spec), resolution), spec, folder="data", net=net,
                              resize=resize, digest=digest, batch=100)
        return stats["source"], stats["num"], bool(calls)
    np.save("a.npy", pixels_of(folder))
    assert source_and_count("a.npy") == ("a.npy", 6, True)
    assert source_and_count("a.npy") == ("a.npy", 6, False)
    before = os.stat("a.npy")
    Path("other").mkdir()
    Path("a.npy").rename("other/a.npy")
    assert source_and_count("other/a.npy") == ("other/a.npy", 6, False)
    np.save("a.npy", 255 - pixels_of(folder))
    os.utime("a.npy", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat("a.npy").st_size == before.st_size
    assert source_and_count("a.npy") == ("a.npy", 6, True)
    for changed in (dict(resize="pytorch"), dict(digest="1"), dict(resolution=8)):
        assert source_and_count("a.npy", **changed) == ("a.npy", 6, True)
        assert source_and_count("a.npy", **changed) == ("a.npy", 6, False)


def test_the_resolution_is_that_of_training(sizes, tmp_path, monkeypatch, capsys):
    """Samples and reference are cropped and resized as data.load does it for train.py."""
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    images = data.load(str(sizes), 8).images                    # [N, 3, 8, 8]
    np.save("at8.npy", images.permute(0, 2, 3, 1).numpy())
    out = run(monkeypatch, capsys, "at8.npy", "--ref", sizes, "--resolution", 8)
    assert out.out.startswith("FID 0.0000") and f"40 images of {sizes} at 8 x 8; resize" in out.out
    assert "fair" not in out.err
    np.save("at16.npy", np.repeat(np.repeat(np.load("at8.npy"), 2, 1), 2, 2))
    assert "no fair comparison" in run(monkeypatch, capsys, "at8.npy", "--ref", "at16.npy").err
    assert "resolution" in refused(monkeypatch, capsys, sizes, "--ref", sizes)
    with pytest.raises(UserError, match="at16.npy has the size 16 x 16, not 8 x 8"):
        statistics_of(opened("at16.npy"), "at16.npy", size="8 x 8", net=SmallNet(), resize="tf1",
                      digest="0", batch=9)
    trained = fid.statistics(images.split(7), SmallNet(), "tf1", "0", "x")
    kept, = (np.load(f) for f in Path("data").glob("fid-sizes-*.npz"))
    assert kept["num"] == trained["num"] == 40 and str(kept["size"]) == "8 x 8"
    assert np.allclose(kept["mu"], trained["mu"], rtol=1e-12)
    assert np.allclose(kept["sigma"], trained["sigma"], rtol=1e-10, atol=1e-15)


def test_a_number_of_images_is_a_fixed_draw(folder):
    """Not the first of them, which may be of one class."""
    found = opened(str(folder))
    seen = []

    def net(images, resize):
        seen.extend(images[:, 0, 0, 0].tolist())
        return images[:, 0, 0].float()
    for _ in range(2):
        assert statistics_of(found, "a", num=4, net=net, resize="tf1", digest="0",
                             batch=3)["num"] == 4
    pixels = found.images[:, 0, 0, 0].tolist()
    assert seen[:4] == seen[4:] and set(seen) < set(pixels) and seen[:4] != pixels[:4]


def test_samples_are_not_kept(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    kept = {}
    monkeypatch.setattr(fid, "load", lambda spec, *a, keep=True: (
        kept.update({spec: keep}), data.load(spec, *a))[1])
    np.save("ref.npy", pixels_of(folder))
    run(monkeypatch, capsys, folder, "--ref", "ref.npy", "--images", 4)
    assert kept == {str(folder): False, "ref.npy": True}
    assert [f.name[:7] for f in Path("data").iterdir()] == ["fid-ref"]


def test_the_array_of_an_npz_is_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    np.savez("x.npz", train=pixels_of(folder), labels=np.arange(6))
    out = run(monkeypatch, capsys, tmp_path / "x.npz", "--ref", folder).out
    assert f"6 images of {tmp_path}/x.npz at 16 x 16 against" in out


def test_data_that_cannot_be_written_costs_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    Path("data").write_text("a file")
    out = run(monkeypatch, capsys, folder, "--ref", folder)
    assert out.out.startswith("FID 0.0000") and "could not be written" in out.err


def test_no_option_is_taken_by_torchrun(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fid.py", "--help"])
    with pytest.raises(SystemExit):
        fid.main()
    text = capsys.readouterr().out
    assert "transparent parts go on white" in " ".join(text.split())
    options = set(re.findall(r"^  (--[a-z-]+)", text, re.M))
    assert {"--images", "--ref", "--class"} <= options
    for option in options:
        parsed = get_args_parser().parse_args(["--nproc_per_node=2", "fid.py", option, "1"])
        assert parsed.training_script_args == [option, "1"]


def test_a_sigma_that_is_not_a_covariance_is_refused(tmp_path, monkeypatch):
    """With it the FID could be negative. What rounding does to a covariance is accepted."""
    monkeypatch.setattr(fid, "WIDTH", 12)
    skewed = covariance(12, 0)
    skewed[0, 1] += 1
    slightly = np.diag([1.] * 11 + [-1e-3])
    for sigma in (-np.eye(12), skewed, slightly, np.full((12, 12), 1e308) - np.eye(12) * 1e308):
        np.savez(tmp_path / "s.npz", mu=np.zeros(12), sigma=sigma)
        with pytest.raises(UserError, match="s.npz holds mu .*covariance") as e:
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
    np.savez("rgba.npz", np.zeros((5, 8, 8, 4), np.uint8))
    np.save("floats.npy", np.zeros((4, 8, 8, 3)))
    np.savez("small.npz", mu=np.zeros(10), sigma=np.zeros((10, 10)))
    np.savez("objects.npz", mu=np.array([{}], dtype=object), sigma=np.zeros((12, 12)))
    np.savez("facts.npz", mu=np.zeros(12), sigma=np.zeros((12, 12)), num="many")
    np.savez_compressed("bomb.npz", mu=np.zeros(12), sigma=np.zeros((3000, 3000)))
    np.savez("features.npz", np.zeros((50, 12), np.float32))
    Path("edm2.pkl").write_bytes(pickle.dumps({}))
    np.savez("good.npz", mu=np.zeros(12), sigma=np.eye(12), num=70000)
    np.savez("negative.npz", mu=np.zeros(12), sigma=-np.eye(12))
    Path("notes.txt").write_text("no archive")
    os.mkfifo("pipe")
    os.mkfifo("pipe.npz")
    np.savez("nan.npz", mu=np.full(12, np.nan), sigma=np.zeros((12, 12)))
    torch.save({"conv.weight": torch.zeros(1)}, "other.pth")
    while_computing = [
        (["one", "--ref", folder], "one image has no covariance")]
    before = [
        (["rgba.npz", "--ref", folder], "rgba.npz holds"),
        ([folder, "--ref", "rgba.npz"], "rgba.npz holds"),
        ([folder, "--ref", "bomb.npz"], "bomb.npz cannot be read: it unpacks to more"),
        ([folder, "--ref", "features.npz"], "features.npz holds"),
        ([folder, "--ref", "edm2.pkl"], "pickle.load(open('edm2.pkl', 'rb'))['fid']"),
        (["pipe", "--ref", folder], "a device"), ([folder, "--ref", "pipe.npz"], "a device"),
        (["--ckpt", "pipe", "--ref", folder], "a device"),
        (["", "--ref", folder], "samples must not be empty"),
        (["empty", "--ref", folder], "empty"), ([folder, "--ref", "empty"], "empty"),
        (["broken", "--ref", folder], "broken"),
        (["none", "--ref", folder], "does not exist"),
        ([folder, "--ref", "none"], "does not exist"),
        (["none.npy", "--ref", folder], "does not exist"),
        (["none.npz", "--ref", folder], "does not exist"),
        (["notes.txt", "--ref", folder], "notes.txt cannot be read"),
        ([folder, "--ref", "notes.txt"], "notes.txt cannot be read"),
        ([folder / "0.png", "--ref", folder], "is one image"),
        (["broken.npz", "--ref", folder], "cannot be read"),
        (["floats.npy", "--ref", folder], "floats.npy holds float64"),
        ([folder, "--ref", "small.npz"], "FID takes a finite mu [12]"),
        ([folder, "--ref", "objects.npz"], "cannot be read"),
        ([folder, "--ref", "nan.npz"], "FID takes a finite mu"),
        ([folder, "--ref", "facts.npz"], "cannot be read"),
        ([folder, "--ref", "negative.npz"], "negative eigenvalue"),
        (["--ref", folder], "either samples or --ckpt"),
        ([folder, "--ckpt", "run/ema.pt", "--ref", folder], "either samples or --ckpt"),
        (["--ckpt", "run/ema.pt", "--ref", folder], "run/ema.pt does not exist"),
        ([folder, "--ref", folder, "--bnr", "1"], "--bnr is for --ckpt"),
        ([folder, "--ref", folder, "--path", "blurring"], "--path is for --ckpt"),
        ([folder, "--ref", folder, "--class", "a"], "--class is for --ckpt"),
        ([folder, "--ref", folder, "--s-max", "3"], "--s-max is for --ckpt"),
        (["good.npz", "--ref", folder, "--images", "3"], "holds statistics, not the images"),
        (["--ckpt", "c", "--ref", folder, "--bnr", "1", "--path", "blurring"], "give one of them"),
        (["--ckpt", "c", "--ref", folder, "--bnr", "-1"], "--bnr must be a number of at least 0"),
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


def test_the_line_about_edm2s_statistics_works(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    gaussian = {"mu": np.zeros(12), "sigma": np.eye(12)}
    Path("edm2.pkl").write_bytes(pickle.dumps({"fid": gaussian, "fd_dinov2": {}}))
    line = refused(monkeypatch, capsys, folder, "--ref", "edm2.pkl")
    exec(re.search(r"np.savez\(.*\)", line)[0], {"np": np, "pickle": pickle})
    assert "of x.npz" in run(monkeypatch, capsys, folder, "--ref", "x.npz").out


def test_weights_are_fetched_checked_and_kept(
        weights, tmp_path, monkeypatch, server):  # noqa: F811
    handler, url = server
    monkeypatch.setattr(inception, "WEIGHTS_URL", url.replace("cifar.tar.gz", "w.pth"))
    handler.body = Path(weights).read_bytes()
    with pytest.raises(UserError, match="6726825d.*--weights"):         # that of the published file
        load_inception(folder=tmp_path)
    (tmp_path / "w.pth").unlink(missing_ok=True)
    digest = hashlib.sha256(handler.body).hexdigest()
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", digest[:8])
    assert load_inception(folder=tmp_path)[1] == digest
    monkeypatch.setattr(inception, "WEIGHTS_URL", "http://127.0.0.1:9/w.pth")
    assert load_inception(folder=tmp_path)[1] == digest         # not fetched again
    (tmp_path / "w.pth").unlink()
    with pytest.raises(UserError) as e:
        load_inception(folder=tmp_path)
    message = str(e.value)
    assert "http://127.0.0.1:9/w.pth" in message and str(tmp_path / "w.pth") in message
    assert "--weights" in message and "\n" not in message
    assert not (tmp_path / "w.pth").exists()


# The command line on checkpoints

def test_a_checkpoint_is_sampled_and_scored(sizes, tmp_path, monkeypatch, capsys):
    """Three draws from seeds of their own, equal to scoring the same seeds' PNGs. The reference is
    prepared for the model's resolution."""
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    train_a_model("run", "--data", sizes)
    np.save("ref.npy", data.load(str(sizes), 8).images.permute(0, 2, 3, 1).numpy())
    options = ["--ckpt", "run/ema.pt", "--images", 20, "--steps", 3, "--batch", 7]
    result = run_json(monkeypatch, capsys, *options, "--ref", "ref.npy")
    draws = result["draws"]
    assert len(draws) == 3 and len(set(draws)) == 3 and result["fid"] == min(draws)
    assert result["mean"] == pytest.approx(np.mean(draws))
    assert result["std"] == pytest.approx(np.std(draws, ddof=1))
    assert result["size"] == "8 x 8" and result["nfe"] == 5 and "colour" not in result
    out = run(monkeypatch, capsys, *options, "--ref", sizes, "--draws", 1)
    assert f"draw 1 of 1: FID {draws[0]:.4f}" in out.err
    lines = out.out.splitlines()
    assert lines[0].startswith(f"draws {draws[0]:.4f}; lowest") and "+-" not in lines[0]
    assert lines[1].startswith("sampler: solver heun, steps 3, nfe 5, churn 0.0")
    assert lines[1].endswith("precision fp32")
    assert lines[2] == (f"FID {draws[0]:.4f}   20 images of run/ema.pt at 8 x 8 against 40 images "
                        f"of {sizes} at 8 x 8; resize tf1, weights ffffffff")
    monkeypatch.setattr(sys, "argv", "sample.py --ckpt run/ema.pt --seeds 20-39 --steps 3 --device "
                                     "cpu".split())
    sample.main()
    capsys.readouterr()
    drawn = run_json(monkeypatch, capsys, "samples", "--ref", "ref.npy")
    assert drawn["fid"] == pytest.approx(draws[1], rel=1e-4)


def test_a_network_for_any_ratio_is_scored_at_each(sizes, tmp_path, monkeypatch, capsys):
    """--bnr prints a line a ratio, or a JSON list; each is the FID of that ratio."""
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    train_a_model("run", "--data", sizes, "--bnr", "any")
    options = ["--ckpt", "run/ema.pt", "--ref", sizes, "--images", 20, "--draws", 2, "--steps", 3]
    results = run_json(monkeypatch, capsys, *options, "--bnr", 0, 0.5, 10)
    assert [r["bnr"] for r in results] == [0, 0.5, 10]
    assert len({r["fid"] for r in results}) == 3 and all(len(r["draws"]) == 2 for r in results)
    single = run_json(monkeypatch, capsys, *options)            # 0.5 is the default
    assert {**single, "bnr": 0.5} == results[1]
    blurring = run_json(monkeypatch, capsys, *options, "--path", "blurring")
    assert blurring["path"] == "blurring" and blurring["fid"] not in [r["fid"] for r in results]

    out = run(monkeypatch, capsys, *options, "--bnr", 0, 10).out.splitlines()
    assert len(out) == 4
    for line, r in zip(out, (results[0], results[2])):
        assert line == (f"BNR {r['bnr']:g}: draws {r['draws'][0]:.4f}, {r['draws'][1]:.4f}; lowest "
                        f"{r['fid']:.4f} (the paper's convention), mean {r['mean']:.4f} +- "
                        f"{r['std']:.4f}")
    assert out[3].startswith("FID of 20 images of run/ema.pt at 8 x 8 against 40 images of")
    monkeypatch.setattr(fid, "load_inception", lambda *a: pytest.fail("not checked first"))
    assert "ratios from 0 to 10" in refused(monkeypatch, capsys, *options, "--bnr", 1, 11)


def test_classes_are_drawn_as_often_as_the_data_have_them(tmp_path, monkeypatch, capsys):
    """As a checkpoint counts them; one without counts draws them evenly."""
    class Net(torch.nn.Module):
        classes = 2

        def forward(self, x, alpha, sigma, label):              # class 1 is white
            return (2. * label - 1)[:, None, None, None].expand_as(x), torch.zeros_like(x)

    def white(counts, first=0):
        batches = fid.drawn_batches(Net(), ConstantBNR(0), (3, 4, 4), first, 300, "cpu", 64,
                                    steps=3, solver="euler", counts=counts)
        return sum(int((images[:, 0, 0, 0] > 127).sum()) for images in batches)
    assert abs(white([270, 30]) - 30) <= 3 and abs(white([270, 30], 300) - 30) <= 3
    assert white(None) == 150

    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([1] * 5 + [0] * 15)
    sets = data.Images(images, labels, ["a", "b"], "ours")
    train_a_model("run", "--cond", data=sets)
    np.save("ref.npy", images.numpy())
    counts = []
    monkeypatch.setattr(fid, "generate", lambda *a, **options: (
        counts.append(options["counts"]), sample.generate(*a, **options))[1])
    options = "--ref", "ref.npy", "--images", 4, "--draws", 1, "--steps", 1
    result = run_json(monkeypatch, capsys, "--ckpt", "run/ema.pt", *options)
    assert "counts" not in result
    checkpoint = torch.load("run/ema.pt", weights_only=True)
    del checkpoint["data"]["counts"]
    torch.save(checkpoint, "old.pt")
    run(monkeypatch, capsys, "--ckpt", "old.pt", *options)
    assert counts == [[15, 5], None]


def test_models_that_cannot_be_scored(tmp_path, monkeypatch, capsys):
    """One line, before the weights are loaded."""
    monkeypatch.chdir(tmp_path)
    for out, channels in (("half", 3), ("four", 4)):
        images = torch.randint(0, 256, (32, channels, 8, 8), dtype=torch.uint8)
        labels = torch.zeros(32, dtype=torch.long)
        train_a_model(out, data=data.Images(images, labels, ["x"], "x"))
    checkpoint = torch.load("half/ema.pt", weights_only=True)
    checkpoint["data"]["latents"] = True
    torch.save(checkpoint, "latents.pt")
    np.savez("at16.npz", mu=np.zeros(12), sigma=np.eye(12), size="16 x 16", resize="tf1")
    small_net(monkeypatch)
    words = refused(monkeypatch, capsys, "--ckpt", "half/ema.pt", "--ref", "at16.npz")
    assert "at16.npz has the size 16 x 16, not 8 x 8" in words
    words = refused(monkeypatch, capsys, "--ckpt", "half/ema.pt", "--ref", "leaves", "--resolution",
                    4)
    assert "leaves has the size 4 x 4, not 8 x 8" in words
    monkeypatch.setattr(fid, "load_inception", lambda *a: pytest.fail("not checked first"))
    for name, kind in (("four/ema.pt", "images of 4 channels"), ("latents.pt", "floats")):
        words = refused(monkeypatch, capsys, "--ckpt", name, "--ref", "leaves")
        assert f"{name} makes {kind}: FID needs" in words
    for option in ("--bnr 1", "--path blurring"):
        words = refused(monkeypatch, capsys, "--ckpt", "half/ema.pt", "--ref", "leaves",
                        *option.split())
        assert "--bnr any" in words
    words = refused(monkeypatch, capsys, "--ckpt", "half/ema.pt", "--ref", "leaves", "--class", "9")
    assert "--cond" in words
