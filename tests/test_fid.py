"""The FID: its network against golden features, its distance and statistics against independent
computations, and what it says and refuses."""
import hashlib
import json
import os
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fid
from data import Images, load
from exact import square_root
from fid import frechet_distance, mean_and_covariance, read_input, read_statistics, statistics_of
from runs import command_line, refused
from util.cli import UserError
from util.inception import WIDTH, load_inception

HERE = Path(__file__).parent
KEYS = json.loads((HERE / "inception_keys.json").read_text())
GOLDEN = np.load(HERE / "inception_golden.npz")


# The network


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
    state = {}
    for name, shape in KEYS.items():
        state[name] = filled(name, shape)
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def net(weights):
    return load_inception(weights)[0]


@pytest.mark.parametrize("resize, golden",
                         [("tf1", "features_tf1"), ("pytorch", "features_pytorch_fid")])
def test_golden_features(net, resize, golden):
    images = torch.from_numpy(GOLDEN["images"]).permute(0, 3, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):                 # the features stay float32
        ours = net(images, resize).numpy()
    assert ours.dtype == np.float32 and ours.shape == (4, 2048)
    assert np.abs(ours - GOLDEN[golden]).max() < 1e-3 * GOLDEN[golden].std()


def test_gray_is_three_equal_channels_and_other_images_are_refused(net):
    gray = torch.from_numpy(GOLDEN["images"][:1, :, :, :1]).permute(0, 3, 1, 2)
    assert torch.equal(net(gray), net(gray.expand(-1, 3, -1, -1)))
    with pytest.raises(UserError, match="1 or 3 channels, torch.uint8, not of 4, "):
        net(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))
    with pytest.raises(UserError, match="not of 3, torch.float32"):
        net(torch.zeros(1, 3, 8, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("resize", ["tf1", "pytorch"])
def test_features_on_a_gpu_are_those_of_the_cpu(weights, net, resize):
    on_gpu, _ = load_inception(weights, "cuda")
    images = torch.from_numpy(GOLDEN["images"]).permute(0, 3, 1, 2)
    expected = net(images, resize)
    assert (on_gpu(images, resize).cpu() - expected).abs().max() < 1e-3 * expected.std()


def test_weights_that_are_not_the_published_ones_are_one_line(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth is no weights file: Error"):
        load_inception(tmp_path / "w.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(UserError, match="no weights file: Weights only load failed$"):
        load_inception(tmp_path / "module.pth")                 # torch would advise to run it
    with pytest.raises(UserError, match="no.pth is no weights file: .*No such file"):
        load_inception(tmp_path / "no.pth")
    damaged = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    damaged.write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"{damaged} is damaged .*6726825d.* file with --weights"):
        load_inception(folder=tmp_path)


# The distance and the statistics


def independent(mu1, cov1, mu2, cov2):
    """The distance by the square root of the product, which takes no eigenvalues."""
    root = square_root(torch.from_numpy(cov1 @ cov2)).numpy()
    return ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)


def covariance(d, seed, rank=None):
    x = np.random.RandomState(seed).randn(rank or 3 * d, d)
    return x.T @ x / len(x)


def test_the_distance_is_the_closed_form_and_an_independent_computation():
    d = 20
    random = np.random.RandomState(0)
    q = np.linalg.qr(random.randn(d, d))[0]
    a, b = random.rand(2, d) + 0.1
    mu1, mu2 = random.randn(2, d)
    commuting = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    ours = frechet_distance(mu1, (q * a) @ q.T, mu2, (q * b) @ q.T)
    assert ours == pytest.approx(commuting, rel=1e-10)
    c1 = covariance(d, 3)
    c2 = covariance(d, 4)
    ours = frechet_distance(mu1, c1, mu2, c2)
    assert ours == pytest.approx(independent(mu1, c1, mu2, c2), rel=1e-8)
    assert ours == pytest.approx(frechet_distance(mu2, c2, mu1, c1), rel=1e-12)


@pytest.mark.parametrize("rank", [300, 40, 1])
def test_equal_gaussians_are_0_apart(rank):
    c = covariance(100, 5, rank)
    mu = np.ones(100)
    assert 0 <= frechet_distance(mu, c, mu, c) < 1e-6 * np.trace(c)


def test_singular_covariances():
    """Rank one: tr (C1^1/2 C2 C1^1/2)^1/2 = |u . v|. Fewer samples than dimensions: the limit of a
    regularized root."""
    u, v = np.random.RandomState(6).randn(2, 30)
    zero = np.zeros(30)
    closed = u @ u + v @ v - 2 * abs(u @ v)
    ours = frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v))
    assert ours == pytest.approx(closed, rel=1e-9)
    c1 = covariance(30, 9, rank=12)
    c2 = covariance(30, 10, rank=12)
    regular = independent(zero, c1 + 1e-7 * np.eye(30), zero, c2 + 1e-7 * np.eye(30))
    assert frechet_distance(zero, c1, zero, c2) == pytest.approx(regular, rel=2e-3)
    assert frechet_distance(zero, 0 * c1, np.ones(30), 0 * c1) == 30


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


# From images on disk


def quarters(images):
    """A stand-in for InceptionV3: the means of an image's quarters, and zeros."""
    means = F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)           # [B, 12]
    return F.pad(means, (0, WIDTH - means.shape[1]))


SETTINGS = {"resize": "tf1", "weights": "0"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six images in the folder a. The test runs in the folder around it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a"
    folder.mkdir()
    random = np.random.RandomState(0)
    for i in range(6):
        pixels = random.randint(0, 200, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def pixels_of(folder):
    return load(folder).images.permute(0, 2, 3, 1).numpy()                      # [N, H, W, 3]


def run(capsys, *args):
    capsys.readouterr()
    command_line(fid.main, *args, "--device", "cpu")
    return capsys.readouterr()


def test_fid_py_prints_the_distance_that_numpy_computes(folder, weights, net, capsys):
    images = pixels_of(folder)
    shifted = np.minimum(images + 50, 255).astype(np.uint8)
    np.save("shifted.npy", shifted)
    printed = run(capsys, "shifted.npy", "--ref", folder, "--weights", weights,
                  "--json")
    result, = json.loads(printed.out)
    facts = {"num": 6, "resize": "tf1", "size": "16 x 16",
             "weights": hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert result["samples"] == {**facts, "source": "shifted.npy"}
    assert result["reference"] == {**facts, "source": str(folder)}
    assert "50,000" in printed.err and "2,048" in printed.err
    cache, = Path("data").glob("fid-*.npz")                     # of the reference alone
    assert np.load(cache)["source"] == str(folder)

    def centered(images):
        f = net(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy()
        return f.mean(0), f - f.mean(0)
    mu1, f = centered(shifted)
    mu2, g = centered(images)
    # with so few samples, the trace of the root is a nuclear norm of 6 x 6
    traces = (f ** 2).sum() + (g ** 2).sum() - 2 * np.linalg.norm(f @ g.T, "nuc")
    closed = ((mu1 - mu2) ** 2).sum() + traces / 5
    assert result["fid"] == pytest.approx(closed, rel=1e-5) and closed > 0.1


def test_statistics_are_cached_for_the_very_same_pixels_and_settings(folder, capsys):
    """Also where a file changes and keeps its name, size and time. A set with the same pixels has
    them at once, and under its own name."""
    calls = []

    def net(images):
        calls.append(len(images))
        return quarters(images)

    def compute(spec, resolution=None, **changes):
        """Whether the statistics were computed, and not read."""
        calls.clear()
        statistics = statistics_of(read_input(spec, resolution), spec, net,
                                   {**SETTINGS, **changes}, folder="data")
        assert statistics["source"] == spec and statistics["num"] == 6
        return bool(calls)
    np.save("a.npy", pixels_of(folder))
    assert compute("a.npy") and not compute("a.npy")
    before = os.stat("a.npy")
    os.mkdir("other")
    os.rename("a.npy", "other/a.npy")
    assert not compute("other/a.npy")
    np.save("a.npy", 255 - pixels_of(folder))
    os.utime("a.npy", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat("a.npy").st_size == before.st_size and compute("a.npy")
    for changes in (dict(resize="pytorch"), dict(weights="1"), dict(resolution=8)):
        assert compute("a.npy", **changes)
    os.rename("data", "old-data")
    Path("data").write_text("a file")                           # a warning, and no more
    assert compute("a.npy") and "could not be written" in capsys.readouterr().err


def test_statistics_are_numpys_and_those_of_others_are_read(folder):
    """Files of EDM and of pytorch-fid have mu and sigma alone."""
    inputs = read_input(str(folder))
    ours = statistics_of(inputs, str(folder), quarters, SETTINGS, folder="data")
    cache, = Path("data").iterdir()
    f = pixels_of(folder).reshape(6, 2, 8, 2, 8, 3).mean((2, 4)) / 255
    f = f.transpose(0, 3, 1, 2).reshape(6, 12)
    for statistics in (ours, read_input(str(cache))):
        assert np.allclose(statistics["mu"][:12], f.mean(0), atol=1e-6)
        assert np.allclose(statistics["sigma"][:12, :12], np.cov(f, rowvar=False), atol=1e-6)
        assert statistics["size"] == "16 x 16" and statistics["num"] == 6
    np.savez("theirs.npz", mu=ours["mu"], sigma=ours["sigma"].astype(np.float32))
    theirs = read_input("theirs.npz")
    assert theirs.keys() == {"mu", "sigma", "source"}
    assert statistics_of(theirs, "theirs.npz", quarters, SETTINGS) is theirs
    with pytest.raises(UserError, match="a.npz has the resize tf1, not pytorch"):
        statistics_of(ours, "a.npz", quarters, {"resize": "pytorch"})
    np.savez("images.npz", train=pixels_of(folder), labels=np.arange(6))
    assert type(read_input("images.npz")) is Images


def test_a_number_of_images_is_a_fixed_draw(folder):
    """Not the first of them, which may be of one class."""
    inputs = load(folder)
    draws = []

    def net(images):
        draws.append(images[:, 0, 0, 0])
        return quarters(images)
    for _ in range(2):
        assert statistics_of(inputs, "a", net, SETTINGS, num=4)["num"] == 4
    pixels = inputs.images[:, 0, 0, 0]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], pixels[:4])
    assert set(draws[0].tolist()) < set(pixels.tolist())


def test_several_draws_are_reported_with_the_lowest_their_mean_and_their_spread(capsys):
    reference = {"mu": np.zeros(2), "sigma": np.eye(2), "num": 9000, "size": "8 x 8"}
    draws = []
    for i in (3, 1, 2):
        draws.append({"mu": np.full(2, i), "sigma": np.eye(2), "num": 50000, "size": "8 x 8"})
    fid.report(draws, reference, False)
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.splitlines() == [
        "FID 18.0000: num 50000, size 8 x 8", "FID 2.0000: num 50000, size 8 x 8",
        "FID 8.0000: num 50000, size 8 x 8",
        "the lowest (the paper's convention) 2.0000; mean 9.3333 +- 8.0829",
        "reference: num 9000, size 8 x 8"]
    fid.report(draws, {**reference, "size": "16 x 16"}, True)
    printed = capsys.readouterr()
    assert [result["fid"] for result in json.loads(printed.out)] == pytest.approx([18, 2, 8])
    assert "images of different sizes make no fair comparison" in printed.err


# What cannot be scored is one line


@pytest.mark.parametrize("name, content, words", [
    ("small", dict(mu=np.zeros(10), sigma=np.eye(10)), r"FID takes a finite mu \[2048\]"),
    ("nan", dict(mu=np.full(WIDTH, np.nan), sigma=np.eye(WIDTH)), "FID takes a finite mu"),
    ("skewed", dict(mu=np.zeros(WIDTH), sigma=np.tri(WIDTH)), "symmetric, without negative eigen"),
    ("negative", dict(mu=np.zeros(WIDTH), sigma=np.diag([1.] * (WIDTH - 1) + [-1e-3])),
     "symmetric, without negative eigenvalues"),
    ("objects", dict(mu=np.array([{}]), sigma=np.eye(2)), "Object arrays cannot be loaded"),
    ("facts", dict(mu=np.zeros(2), sigma=np.eye(2), num="many"), "invalid literal"),
    ("bomb", dict(mu=np.zeros(2), sigma=np.zeros((3000, 3000), np.float64)), "it unpacks to more")])
def test_invalid_statistics_are_refused_in_one_line(name, content, words, tmp_path):
    """With a sigma that is no covariance the FID could be negative."""
    path = tmp_path / f"{name}.npz"
    np.savez_compressed(path, **content)
    with pytest.raises(UserError, match=f"{name}.npz cannot be read: .*{words}") as e:
        read_statistics(path)
    assert "\n" not in str(e.value)


def test_what_is_no_input_is_one_line_before_the_network_is_loaded(folder, capsys):
    Path("broken.npz").write_bytes(b"no zip")
    Path("notes.txt").write_text("no archive")
    np.savez("features.npz", np.zeros((50, 12), np.float32))
    os.mkfifo("pipe.npz")
    for args, words in ((["features.npz", "--ref", folder], "features.npz holds"),
                        ([folder, "--ref", "features.npz"], "features.npz holds"),
                        ([folder, "--ref", "pipe.npz"], "pipe.npz is a device or a pipe"),
                        ([folder, "--ref", "none.npz"], "none.npz does not exist"),
                        ([folder, "--ref", "broken.npz"], "broken.npz cannot be read"),
                        ([folder, "--ref", "notes.txt"], "notes.txt cannot be read"),
                        ([folder / "0.png", "--ref", folder], "is one image"),
                        ([folder], "required: --ref")):
        assert words in refused(capsys, fid.main, *args, "--weights", "none.pth"), args


def test_fewer_than_two_images_have_no_covariance():
    one = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    for batches in ([], [one]):
        with pytest.raises(UserError, match=f"two images, not {len(batches)}"):
            mean_and_covariance(batches, partial(torch.flatten, start_dim=1))
