import hashlib
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import fid
import train
from data import UserError
from fid import InceptionV3, features, frechet_distance, load_inception, read_batches
from test_data import png, server  # noqa: F401  (a fixture)

HERE = Path(__file__).parent
KEYS = json.load(open(HERE / "inception_keys.json"))
GOLDEN = np.load(HERE / "inception_golden.npz")


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
    state.update({k.replace("running_var", "num_batches_tracked"): torch.tensor(0) for k in KEYS if k.endswith("running_var")})
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(state, path)
    return str(path)


@pytest.fixture(scope="module")
def net(weights):
    return load_inception(weights)[0]


@pytest.mark.parametrize("resize, golden", [("tf1", "features_tf1"), ("pytorch", "features_pytorch_fid")])
def test_golden_features(net, resize, golden):
    pictures = torch.from_numpy(GOLDEN["images"]).permute(0, 3, 1, 2)
    ours = net(pictures, resize).numpy()
    assert ours.dtype == np.float32 and ours.shape == (4, 2048)
    assert np.abs(ours - GOLDEN[golden]).max() < 1e-3 * GOLDEN[golden].std()
    with torch.autocast("cpu", torch.bfloat16):                 # features stay float32 whatever is around them
        assert np.array_equal(net(pictures, resize).numpy(), ours)


def test_names_and_shapes_are_the_published_ports():
    assert {k: list(v.shape) for k, v in InceptionV3().state_dict().items()} == KEYS


def test_grey_is_three_equal_channels(net):
    grey = torch.from_numpy(GOLDEN["images"][:1, :, :, :1]).permute(0, 3, 1, 2)
    assert torch.equal(net(grey), net(grey.expand(-1, 3, -1, -1)))


def test_an_unknown_resize_is_refused(net):
    with pytest.raises(ValueError, match="tf1 or pytorch"):
        net(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "bicubic")


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


def test_frechet_distance_of_commuting_and_other_gaussians():
    d = 20
    q = np.linalg.qr(np.random.RandomState(0).randn(d, d))[0]
    a, b = np.random.RandomState(1).rand(2, d) + 0.1
    mu1, mu2 = np.random.RandomState(2).randn(2, d)
    closed = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(mu1, (q * a) @ q.T, mu2, (q * b) @ q.T) == pytest.approx(closed, rel=1e-10)
    c1, c2 = covariance(d, 3), covariance(d, 4)
    assert frechet_distance(mu1, c1, mu2, c2) == pytest.approx(independent(mu1, c1, mu2, c2), rel=1e-8)
    assert frechet_distance(mu1, c1, mu2, c2) == pytest.approx(frechet_distance(mu2, c2, mu1, c1), rel=1e-12)
    assert frechet_distance(torch.tensor(mu1), torch.tensor(c1), mu2, c2) == frechet_distance(mu1, c1, mu2, c2)


@pytest.mark.parametrize("rank", [300, 40, 1])
def test_equal_gaussians_are_0_apart(rank):
    c, mu = covariance(100, 5, rank), np.ones(100)
    assert abs(frechet_distance(mu, c, mu, c)) < 1e-6 * np.trace(c)


def test_singular_covariances():
    """Rank one: tr (C1^1/2 C2 C1^1/2)^1/2 = |u . v|; blocks: the sum over them; fewer samples than dimensions: the limit of a regularised root."""
    u, v = np.random.RandomState(6).randn(2, 30)
    closed = u @ u + v @ v - 2 * abs(u @ v)
    assert frechet_distance(np.zeros(30), np.outer(u, u), np.zeros(30), np.outer(v, v)) == pytest.approx(closed, rel=1e-9)
    c1, c2, zero = covariance(10, 7), covariance(10, 8), np.zeros((5, 5))
    block = lambda a: np.block([[a, np.zeros((10, 5))], [np.zeros((5, 10)), zero]])
    assert frechet_distance(np.zeros(15), block(c1), np.ones(15), block(c2)) == pytest.approx(5 + independent(np.zeros(10), c1, np.ones(10), c2), rel=1e-8)
    few1, few2 = covariance(30, 9, rank=12), covariance(30, 10, rank=12)
    regular = independent(np.zeros(30), few1 + 1e-7 * np.eye(30), np.zeros(30), few2 + 1e-7 * np.eye(30))
    assert frechet_distance(np.zeros(30), few1, np.zeros(30), few2) == pytest.approx(regular, rel=2e-3)
    assert frechet_distance(np.zeros(3), np.zeros((3, 3)), np.ones(3), np.zeros((3, 3))) == 3


@pytest.mark.parametrize("sizes, batch", [([1000], 256), ([1] * 10 + [990], 7), ([333, 333, 334], 1000)])
def test_streaming_statistics_are_numpys(sizes, batch):
    pictures = torch.randint(0, 256, (1000, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = pictures[torch.randperm(1000, generator=torch.Generator().manual_seed(batch))]
    net = lambda p: 1000 + (p.flatten(1).float() / 255) ** 2    # far from 0, where plain sums of squares lose digits
    mu, cov = features(pictures.split(sizes), net, batch)
    f = net(pictures).double().numpy()
    assert mu.dtype == cov.dtype == np.float64
    assert np.abs(mu - f.mean(0)).max() <= 1e-10 * np.abs(f.mean(0)).max()
    assert np.abs(cov - np.cov(f, rowvar=False)).max() <= 1e-10 * np.abs(np.cov(f, rowvar=False)).max()


def small_net(monkeypatch):
    """In the place of InceptionV3, where a test is not about it: 12 features, the means of the pictures' quarters."""
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(1, 1)

        def forward(self, x, resize="tf1"):
            return torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)
    monkeypatch.setattr(fid, "load_inception", lambda *a: (Net(), "f" * 64))
    monkeypatch.setattr(fid, "WIDTH", 12)


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, args), "--device", "cpu"])
    fid.main()
    return capsys.readouterr()


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
        (tmp_path / f"a/{i}.png").write_bytes(png(np.random.RandomState(i).randint(0, 200, (16, 16, 3), dtype=np.uint8)))
    return tmp_path / "a"


def test_end_to_end_with_a_weights_file(folder, weights, tmp_path, monkeypatch, capsys):
    """The whole way through the network: against themselves 0; against a shifted copy the distance that numpy gets from the features."""
    monkeypatch.chdir(tmp_path)
    pictures = np.stack([np.asarray(Image.open(f)) for f in sorted(folder.iterdir())])
    np.savez("shifted.npz", np.minimum(pictures + 50, 255).astype(np.uint8))
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    out = run(monkeypatch, capsys, folder, "--ref", folder, "--weights", weights, "--json")
    result = json.loads(out.out)
    assert abs(result["fid"]) < 1e-6 and result["weights_sha256"] == digest and result["generated"] == result["reference_num"] == 6
    assert "50,000" in out.err and "singular" in out.err
    shifted = json.loads(run(monkeypatch, capsys, "shifted.npz", "--ref", folder, "--weights", weights, "--json").out)["fid"]
    net = load_inception(weights)[0]
    f, g = (net(torch.from_numpy(p).permute(0, 3, 1, 2)).double().numpy() for p in (np.load("shifted.npz")["arr_0"], pictures))
    f0, g0 = f - f.mean(0), g - g.mean(0)                       # with as few samples, the trace of the root is a nuclear norm of 6 x 6
    closed = ((f.mean(0) - g.mean(0)) ** 2).sum() + ((f0 ** 2).sum() + (g0 ** 2).sum() - 2 * np.linalg.norm(f0 @ g0.T, "nuc")) / 5
    assert shifted == pytest.approx(closed, rel=1e-5) and shifted > 0.1


def test_statistics_are_kept_reused_and_readable_by_others(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    first = run(monkeypatch, capsys, folder, "--ref", folder)
    kept, = Path("data").glob("fid-a-*.npz")
    saved = np.load(kept, allow_pickle=False)
    f = np.stack([np.asarray(Image.open(p)) for p in sorted(folder.iterdir())]).reshape(6, 2, 8, 2, 8, 3).mean((2, 4)) / 255
    f = f.transpose(0, 3, 1, 2).reshape(6, 12)
    assert np.allclose(saved["mu"], f.mean(0), atol=1e-6) and np.allclose(saved["sigma"], np.cov(f, rowvar=False), atol=1e-6)
    assert str(saved["source"]) == str(folder) and saved["num"] == 6 and str(saved["resize"]) == "tf1"
    monkeypatch.setattr(fid, "read_batches", lambda spec, *a: pytest.fail(f"{spec} was read again"))
    again = run(monkeypatch, capsys, kept, "--ref", folder)
    assert all(word in out for out in (first.out, again.out) for word in ("FID ", "6 pictures", "resize tf1", "weights ffffffff"))
    np.savez("theirs.npz", mu=saved["mu"], sigma=saved["sigma"])                                # as EDM and pytorch-fid keep them
    assert "unknown number" in run(monkeypatch, capsys, kept, "--ref", "theirs.npz").out
    assert "resize" in refused(monkeypatch, capsys, kept, "--ref", kept, "--resize", "pytorch")


def test_a_changed_reference_is_not_taken_for_the_kept_one(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    run(monkeypatch, capsys, folder, "--ref", folder)
    (folder / "6.png").write_bytes(png(np.zeros((16, 16, 3), np.uint8)))
    assert json.loads(run(monkeypatch, capsys, folder, "--ref", folder, "--json").out)["reference_num"] == 7
    (folder / "7.png").write_bytes((folder / "6.png").read_bytes()[:40])                        # a file that cannot be read this time
    kept = set(Path("data").iterdir())
    assert json.loads(run(monkeypatch, capsys, folder, "--ref", folder, "--json").out)["reference_num"] == 7
    assert set(Path("data").iterdir()) == kept                  # is no reason to keep what there is without it


def collected(spec, *args):
    return torch.cat([b.float().mean((2, 3)) for b in read_batches(spec, *args)])


def test_all_containers_give_the_same_pictures(folder, tmp_path):
    import tarfile
    import zipfile
    pictures = np.stack([np.asarray(Image.open(f)) for f in sorted(folder.iterdir())])
    np.save(tmp_path / "n.npy", pictures)
    np.savez(tmp_path / "first.npz", pictures.transpose(0, 3, 1, 2))
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z, tarfile.open(tmp_path / "t.tar", "w") as t:
        for f in sorted(folder.iterdir()):
            z.write(f, f.name)
            t.add(f, f.name)
    expected = torch.from_numpy(pictures).float().mean((1, 2))
    for spec in (folder, tmp_path / "n.npy", tmp_path / "first.npz", tmp_path / "z.zip", tmp_path / "t.tar"):
        torch.testing.assert_close(collected(spec), expected)
        few = collected(spec, 4, 2)
        assert len(few) == 4 and all((row == expected).all(1).any() for row in few)


def test_grey_mixed_sizes_and_corrupt_pictures(folder, capsys):
    (folder / "7.png").write_bytes(png(np.full((9, 5), 40, np.uint8)))
    (folder / "8.png").write_bytes(png(np.full((9, 5), 50, np.uint8))[:50])
    shapes = [tuple(b.shape) for b in read_batches(folder)]
    assert shapes == [(6, 3, 16, 16), (1, 3, 9, 5)] and "skipped" in capsys.readouterr().err


def test_what_cannot_be_scored_is_one_line(folder, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("one").mkdir()
    (Path("one") / "0.png").write_bytes((folder / "0.png").read_bytes())
    Path("broken.npz").write_bytes(b"no zip")
    np.save("floats.npy", np.zeros((4, 8, 8, 3)))
    np.savez("small.npz", mu=np.zeros(10), sigma=np.zeros((10, 10)))
    np.savez("objects.npz", mu=np.array([{}], dtype=object), sigma=np.zeros((2048, 2048)))
    Path("notes.txt").write_text("no archive")
    np.savez("nan.npz", mu=np.full(12, np.nan), sigma=np.zeros((12, 12)))
    torch.save({"conv.weight": torch.zeros(1)}, "other.pth")
    with monkeypatch.context() as m:
        small_net(m)
        for args, words in ((["empty", "--ref", folder], "no pictures"), (["one", "--ref", folder], "one picture has no covariance"),
                            (["none", "--ref", folder], "does not exist"), (["none.npy", "--ref", folder], "does not exist"),
                            (["notes.txt", "--ref", folder], "no folder, zip or tar"), ([folder, "--ref", "notes.txt"], "no folder, zip or tar"),
                            (["broken.npz", "--ref", folder], "cannot be read"), (["floats.npy", "--ref", folder], "not uint8"),
                            ([folder, "--ref", "small.npz"], "not finite [12]"), ([folder, "--ref", "objects.npz"], "cannot be read"),
                            ([folder, "--ref", "nan.npz"], "not finite"), (["--ref", folder], "either samples or --ckpt"),
                            ([folder, "--ref", folder, "--resize", "lanczos"], "--resize")):
            assert words in refused(m, capsys, *args), args
    assert "layout" in refused(monkeypatch, capsys, folder, "--ref", folder, "--weights", "other.pth")
    assert "does not exist" in refused(monkeypatch, capsys, folder, "--ref", folder, "--weights", "none.pth")


def test_weights_are_fetched_checked_and_kept(weights, tmp_path, monkeypatch, server):      # noqa: F811
    handler, url = server
    url = url.replace("cifar.tar.gz", "w.pth")
    monkeypatch.setattr(fid, "WEIGHTS_URL", url)
    handler.body = Path(weights).read_bytes()
    with pytest.raises(UserError, match="has not the sha256 6726825d.*--weights"):
        load_inception(folder=tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["w.pth.bad"]
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", hashlib.sha256(handler.body).hexdigest()[:8])
    assert load_inception(folder=tmp_path)[1].startswith(fid.WEIGHTS_SHA256)
    (tmp_path / "w.pth").unlink()
    handler.length, handler.body = len(handler.body), handler.body[:100_000]
    with pytest.raises(UserError, match="cannot fetch w.pth .*broke off"):
        load_inception(folder=tmp_path)
    monkeypatch.setattr(fid, "WEIGHTS_URL", "http://127.0.0.1:9/w.pth")
    with pytest.raises(UserError) as e:
        load_inception(folder=tmp_path)
    assert all(word in str(e.value) for word in ("http://127.0.0.1:9/w.pth", str(tmp_path / "w.pth"), "--weights")) and "\n" not in str(e.value)
    assert not (tmp_path / "w.pth").exists()


def test_the_published_file_is_asked_for():
    assert fid.WEIGHTS_URL.endswith("/pt_inception-2015-12-05-6726825d.pth") and fid.WEIGHTS_SHA256 == "6726825d"


def test_a_checkpoint_is_sampled_and_scored(tmp_path, monkeypatch, capsys):
    """Three draws from seeds of their own, equal to scoring the same seeds' PNGs; and the same FID during training."""
    import sample
    monkeypatch.chdir(tmp_path)
    small_net(monkeypatch)
    monkeypatch.setattr(sys, "argv", "train.py --device cpu --resolution 8 --attention 4 --duration 0.256 --sample-steps 3 --fid-every 0.128 --fid-num 20".split())
    train.main()
    lines = [json.loads(line) for line in open("run/log.jsonl")]
    capsys.readouterr()
    np.save("ref.npy", data.load("leaves", 8).pictures.permute(0, 2, 3, 1).numpy())
    result = json.loads(run(monkeypatch, capsys, "--ckpt", "run/ema.pt", "--ref", "ref.npy", "--num", 20, "--steps", 3, "--batch", 7, "--json").out)
    assert len(result["draws"]) == 3 and len(set(result["draws"])) == 3 and result["fid"] == min(result["draws"])
    assert result["mean"] == pytest.approx(np.mean(result["draws"])) and result["std"] == pytest.approx(np.std(result["draws"], ddof=1))
    assert [line["kimg"] for line in lines if "fid" in line] == [0.128, 0.256]
    assert lines[-1]["fid"] == pytest.approx(result["draws"][0], abs=2e-4)
    monkeypatch.setattr(sys, "argv", "sample.py --ckpt run/ema.pt --seeds 20-39 --steps 3 --device cpu".split())
    sample.main()
    capsys.readouterr()
    drawn = json.loads(run(monkeypatch, capsys, "samples", "--ref", "ref.npy", "--json").out)
    assert drawn["fid"] == pytest.approx(result["draws"][1], rel=1e-4)


def share_of_statistics(rank, port, pictures, result):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mu, cov = features(pictures[rank::2].split(7), lambda p: p.flatten(1).float() + 100, 5)
    alone = features([pictures] if rank == 1 else [], lambda p: p.flatten(1).float() + 100)
    assert all(np.allclose(a, b) for a, b in zip(alone, (mu, cov)))
    with pytest.raises(UserError, match="one picture"):
        features([pictures[:1]] if rank == 0 else [], lambda p: p.flatten(1).float())
    if rank == 1:
        np.savez(result, mu=mu, cov=cov)
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_work(tmp_path):
    """Each takes every other picture, and each has the statistics of all; a process without pictures has them too."""
    import socket
    pictures = torch.randint(0, 256, (101, 3, 2, 2), dtype=torch.uint8)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(share_of_statistics, (port, pictures, str(tmp_path / "r.npz")), nprocs=2)
    shared, f = np.load(tmp_path / "r.npz"), pictures.flatten(1).double().numpy() + 100
    assert np.allclose(shared["mu"], f.mean(0), rtol=1e-12) and np.allclose(shared["cov"], np.cov(f, rowvar=False), rtol=1e-10, atol=1e-8)
