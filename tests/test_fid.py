import contextlib
import hashlib
import json
import os
import pickle
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import fid
import inception
from fid import frechet_distance, mean_and_covariance, opened, read_statistics, statistics_of
from inception import InceptionV3, load_inception
from test_data import png, server  # noqa: F401  (a fixture)
from util import UserError

HERE = Path(__file__).parent
KEYS = json.load(open(HERE / "inception_keys.json"))
GOLDEN = np.load(HERE / "inception_golden.npz")
MADE = {"resize": "tf1", "weights": "0"}

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
    with pytest.raises(UserError, match="1 or 3 channels, torch.uint8, not of 4, "):
        net(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))
    with pytest.raises(UserError, match="not of 3, torch.float32"):
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


@pytest.mark.parametrize("sizes", [[1000], [1] * 10 + [990], [7] * 142 + [6]])
def test_streaming_statistics_are_numpys(sizes):
    g = torch.Generator().manual_seed(len(sizes))
    images = torch.randint(0, 256, (1000, 3, 2, 2), dtype=torch.uint8, generator=g)

    def net(images):                        # far from 0, where plain sums of squares lose digits
        return 1000 + (images.flatten(1).float() / 255) ** 2
    mu, cov, n = mean_and_covariance(images.split(sizes), net)
    f = net(images).double().numpy()
    expected = np.cov(f, rowvar=False)
    assert mu.dtype == cov.dtype == np.float64 and n == 1000
    assert np.abs(mu - f.mean(0)).max() <= 1e-10 * np.abs(f.mean(0)).max()
    assert np.abs(cov - expected).max() <= 1e-10 * np.abs(expected).max()


def test_fewer_than_two_images_have_no_covariance():
    for images in ([], [torch.zeros(1, 3, 2, 2).byte()]):
        with pytest.raises(UserError, match=f"two images, not {len(images)}"):
            mean_and_covariance(images, lambda x: x.flatten(1).float())


# The command line

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
    result, = json.loads(out.out)
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    facts = {"num": 6, "resize": "tf1", "weights": digest, "size": "16 x 16"}
    assert result["samples"] == {**facts, "source": "shifted.npy"}
    assert result["reference"] == {**facts, "source": str(folder)}
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
    made = f"num 6, source {folder}, resize tf1, weights {'f' * 64}, size 16 x 16"
    assert first.out.splitlines() == [f"FID 0.0000: {made}", f"reference: {made}"]
    kept, = Path("data").glob("fid-*.npz")
    saved = np.load(kept, allow_pickle=False)
    f = pixels_of(folder).reshape(6, 2, 8, 2, 8, 3).mean((2, 4)) / 255
    f = f.transpose(0, 3, 1, 2).reshape(6, 12)
    assert np.allclose(saved["mu"], f.mean(0), atol=1e-6)
    assert np.allclose(saved["sigma"], np.cov(f, rowvar=False), atol=1e-6)
    assert str(saved["source"]) == str(folder) and saved["num"] == 6
    assert str(saved["resize"]) == "tf1" and str(saved["size"]) == "16 x 16"
    monkeypatch.setattr(fid, "mean_and_covariance", lambda *a: pytest.fail("computed again"))
    assert run(monkeypatch, capsys, kept, "--ref", folder).out == first.out
    np.savez("theirs.npz", mu=saved["mu"], sigma=saved["sigma"])        # as EDM and pytorch-fid do
    theirs = run(monkeypatch, capsys, kept, "--ref", "theirs.npz")
    assert theirs.out.endswith("reference: source theirs.npz\n")      # all that it says
    theirs = run(monkeypatch, capsys, "theirs.npz", "--ref", kept)
    assert theirs.out.startswith("FID 0.0000: source theirs.npz\n")
    assert "resize tf1, not pytorch" in refused(monkeypatch, capsys, kept, "--ref", kept,
                                                "--resize", "pytorch")


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
        stats = statistics_of(opened(str(spec), resolution), spec, partial(net, resize=resize),
                              {"resize": resize, "weights": digest}, folder="data")
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
    assert out.out.startswith("FID 0.0000") and f"num 40, source {sizes}, resize tf1" in out.out
    assert out.out.count("size 8 x 8") == 2
    assert "fair" not in out.err
    np.save("at16.npy", np.repeat(np.repeat(np.load("at8.npy"), 2, 1), 2, 2))
    assert "no fair comparison" in run(monkeypatch, capsys, "at8.npy", "--ref", "at16.npy").err
    assert "resolution" in refused(monkeypatch, capsys, sizes, "--ref", sizes)
    mu, sigma, n = mean_and_covariance(images.split(7), SmallNet())
    kept, = (k for k in map(read_statistics, Path("data").glob("fid-*.npz")) if k["num"] == 40 and
             k["size"] == "8 x 8")
    assert n == 40 and np.allclose(kept["mu"], mu, rtol=1e-12)
    assert np.allclose(kept["sigma"], sigma, rtol=1e-10, atol=1e-15)


def test_a_number_of_images_is_a_fixed_draw(folder):
    """Not the first of them, which may be of one class."""
    found = opened(str(folder))
    seen = []

    def net(images):
        seen.extend(images[:, 0, 0, 0].tolist())
        return images[:, 0, 0].float()
    for _ in range(2):
        assert statistics_of(found, "a", net, MADE, batch=3, num=4)["num"] == 4
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
    file, = Path("data").iterdir()
    assert np.load(file)["source"] == "ref.npy"


def test_the_array_of_an_npz_is_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    np.savez("x.npz", train=pixels_of(folder), labels=np.arange(6))
    out = run(monkeypatch, capsys, tmp_path / "x.npz", "--ref", folder).out
    assert f": num 6, source {tmp_path}/x.npz, resize" in out


def test_data_that_cannot_be_written_costs_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    Path("data").write_text("a file")
    out = run(monkeypatch, capsys, folder, "--ref", folder)
    assert out.out.startswith("FID 0.0000") and "could not be written" in out.err


def test_several_draws_are_scored_at_once(folder, tmp_path, monkeypatch, capsys):
    """The lowest, the paper's convention; their mean and standard deviation."""
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    names = ["a.npy", "b.npy", "c.npy"]
    for i, name in enumerate(names):
        np.save(name, np.minimum(pixels_of(folder) + 9 * i ** 2 + 5, 255).astype(np.uint8))
    results = run_json(monkeypatch, capsys, *names, "--ref", folder)
    assert [r["samples"]["source"] for r in results] == names
    assert all(r["reference"]["source"] == str(folder) for r in results)
    alone = [run_json(monkeypatch, capsys, name, "--ref", folder)[0] for name in names]
    assert results == alone and len({r["fid"] for r in results}) == 3
    *lines, last, ref = run(monkeypatch, capsys, *names, "--ref", folder).out.splitlines()
    fids = [r["fid"] for r in results]
    assert [line.split(",")[0] for line in lines] == [f"FID {f:.4f}: num 6" for f in fids]
    assert last == (f"the lowest (the paper's convention) {min(fids):.4f}; mean {np.mean(fids):.4f}"
                    f" +- {np.std(fids, ddof=1):.4f}")
    assert ref.startswith(f"reference: num 6, source {folder}")


def test_a_sigma_that_is_not_a_covariance_is_refused(tmp_path, monkeypatch):
    """With it the FID could be negative. What rounding does to a covariance is accepted."""
    monkeypatch.setattr(fid, "WIDTH", 12)
    skewed = covariance(12, 0)
    skewed[0, 1] += 1
    slightly = np.diag([1.] * 11 + [-1e-3])
    for sigma in (-np.eye(12), skewed, slightly, np.full((12, 12), 1e308) - np.eye(12) * 1e308):
        np.savez(tmp_path / "s.npz", mu=np.zeros(12), sigma=sigma)
        with pytest.raises(UserError, match="s.npz cannot be read: .*negative eigenvalues") as e:
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
    np.savez("negative.npz", mu=np.zeros(12), sigma=-np.eye(12))
    Path("notes.txt").write_text("no archive")
    os.mkfifo("pipe")
    os.mkfifo("pipe.npz")
    np.savez("nan.npz", mu=np.full(12, np.nan), sigma=np.zeros((12, 12)))
    torch.save({"conv.weight": torch.zeros(1)}, "other.pth")
    while_computing = [
        (["one", "--ref", folder], "a covariance takes at least two images, not 1")]
    before = [
        (["rgba.npz", "--ref", folder], "rgba.npz holds"),
        ([folder, "--ref", "rgba.npz"], "rgba.npz holds"),
        ([folder, "--ref", "bomb.npz"], "bomb.npz cannot be read: it unpacks to more"),
        ([folder, "--ref", "features.npz"], "features.npz holds"),
        ([folder, "--ref", "edm2.pkl"], "edm2.pkl cannot be read"),
        (["pipe", "--ref", folder], "a device"), ([folder, "--ref", "pipe.npz"], "a device"),
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
        (["--ref", folder], "required: samples"), ([folder], "required: --ref"),
        ([folder, "--ref", folder, "--resize", "lanczos"], "--resize")]
    with monkeypatch.context() as m:
        small_net(m)
        for args, words in while_computing:
            assert words in refused(m, capsys, *args), args
        m.setattr(fid, "load_inception", lambda *a: pytest.fail("the weights were loaded first"))
        for args, words in before:
            assert words in refused(m, capsys, *args), args
    for file, words in (("other.pth", "published layout"), ("none.pth", "No such file")):
        assert words in refused(monkeypatch, capsys, folder, "--ref", folder, "--weights", file)


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
