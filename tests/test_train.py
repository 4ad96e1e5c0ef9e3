import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from data import leaves, normalize
from degrade import BlurNoisePath
from loss import disentangled_loss
from model import Denoiser, UNet
from sample import load_model

ROOT = Path(__file__).parent.parent
SMALL = "--resolution 8 --channels 8 --mult 1 2 --attention 4 --batch 4 --warmup 0 --log-every 0.016 --snapshot-every 0.032 --sample-steps 2".split()


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(10):
        Image.fromarray(np.random.RandomState(i).randint(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return str(folder)


def run(monkeypatch, *args, main=train.main):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    main()


def small(monkeypatch, data, out, *args):
    run(monkeypatch, "--data", data, "--out", out, "--device", "cpu", *SMALL, *args)


def weights(out, name="ema.pt"):
    state = torch.load(f"{out}/{name}", weights_only=True)
    return {k: v for part in ("weights", "net", "ema") for k, v in state.get(part, {}).items()}, state


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refused(capsys, call, *words):
    with pytest.raises(SystemExit) as e:
        call()
    printed = capsys.readouterr().err
    last = printed.strip().splitlines()[-1]
    assert e.value.code == 2 and all(w in last for w in words), printed
    assert "Traceback" not in printed


def test_four_pictures_are_learned_by_heart():
    """The loss at fixed levels falls to a small share of what knowing nothing costs, in both heads."""
    torch.manual_seed(0)
    x0, path = normalize(leaves(4, 8)), BlurNoisePath(2)
    net = Denoiser(UNet(3, 6, channels=32, mult=(1, 2), blocks=1, attention=(4,), resolution=8), path)
    optimizer = torch.optim.Adam(net.parameters())
    t, noise = torch.tensor([0.2, 0.4, 0.6, 0.8]).repeat(16), torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    score = lambda: torch.stack([l.mean() for l in disentangled_loss(net, x0.repeat_interleave(16, 0), path, t, noise)]).detach()
    before = score()
    for i in range(250):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 2 * (1 - i / 250))
        (sum(disentangled_loss(net, x0.repeat(8, 1, 1, 1), path, torch.rand(32) * 0.8 + 0.1)).mean() * x0[0].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (score() < 0.1 * before).all()


@pytest.mark.parametrize("extra", [[], ["--dropout", "0.3", "--augment", "0.5"]])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, pictures, monkeypatch, extra):
    small(monkeypatch, pictures, tmp_path / "whole", "--duration", 0.096, *extra)
    small(monkeypatch, pictures, tmp_path / "parts", "--duration", 0.032, *extra)
    small(monkeypatch, pictures, tmp_path / "parts", "--duration", 0.096, *extra)
    for name in ("ema.pt", "state.pt"):
        assert same(weights(tmp_path / "whole", name)[0], weights(tmp_path / "parts", name)[0])
    unet = weights(tmp_path / "whole")[1]["config"]["unet"]
    assert (unet["dropout"], unet["augment_dim"]) == ((0.3, 9) if extra else (0, 0))
    logs = [[json.loads(l) for l in open(tmp_path / d / "log.jsonl")] for d in ("whole", "parts")]
    assert [l["step"] for l in logs[0]] == [l["step"] for l in logs[1]] == [4, 8, 12, 16, 20, 24]
    assert [l["denoise"] for l in logs[0]] == [l["denoise"] for l in logs[1]]


def test_a_run_cut_between_checkpoints_repeats_from_the_last(tmp_path, pictures, monkeypatch):
    small(monkeypatch, pictures, tmp_path / "whole", "--duration", 0.096)

    def cut(seen, *args, original=train.summary):
        if seen == 80:
            raise KeyboardInterrupt
        return original(seen, *args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train, "summary", cut)
        small(m, pictures, tmp_path / "cut", "--duration", 0.096)
    assert weights(tmp_path / "cut")[1]["seen"] == 64
    small(monkeypatch, pictures, tmp_path / "cut", "--duration", 0.096)
    assert same(weights(tmp_path / "whole")[0], weights(tmp_path / "cut")[0])
    assert [json.loads(l)["step"] for l in open(tmp_path / "cut/log.jsonl")] == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_step_saves_and_resumes_bit_for_bit(tmp_path, pictures, monkeypatch, number):
    import signal
    script = [sys.executable, str(ROOT / "train.py"), "--data", pictures, "--out", str(tmp_path / "cut"), "--device", "cpu", *SMALL,
              "--snapshot-every", "0"]
    process = subprocess.Popen([*script, "--duration", "100"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    log = tmp_path / "cut/log.jsonl"
    while not (log.exists() and log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(getattr(signal, number))
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + getattr(signal, number) and "stopped and saved at" in printed and "Traceback" not in printed
    seen = weights(tmp_path / "cut")[1]["seen"]
    assert 0 < seen < 100_000
    for out in ("cut", "other"):                                # interrupted at seen and not, up to the same picture
        small(monkeypatch, pictures, tmp_path / out, "--duration", (seen + 16) / 1000, "--snapshot-every", 0)
    assert same(weights(tmp_path / "cut", "state.pt")[0], weights(tmp_path / "other", "state.pt")[0])


def test_a_second_signal_ends_at_once():
    """The first only takes a note and gives the signal its own meaning back."""
    import signal
    before = signal.getsignal(signal.SIGTERM)
    with train.interrupts() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_full_disk_leaves_the_old_checkpoint_and_training_goes_on(tmp_path, pictures, monkeypatch, capsys):
    import resource
    small(monkeypatch, pictures, tmp_path / "run", "--duration", 0.032)
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("ema.pt", "state.pt")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))                              # no file may grow beyond
    try:
        refused(capsys, lambda: small(monkeypatch, pictures, tmp_path / "run", "--duration", 0.096), "last checkpoint could not be saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
    assert not list((tmp_path / "run").glob("*.part"))
    assert [json.loads(line)["step"] for line in open(tmp_path / "run/log.jsonl")] == [4, 8, 12, 16, 20, 24]                # it went on
    small(monkeypatch, pictures, tmp_path / "run", "--duration", 0.096)
    assert weights(tmp_path / "run")[1]["seen"] == 96


@pytest.mark.parametrize("extra", [[], ["--augment", "1"]])
def test_accumulation_changes_nothing_but_rounding(tmp_path, pictures, monkeypatch, extra):
    small(monkeypatch, pictures, tmp_path / "whole", "--duration", 0.016, *extra)
    small(monkeypatch, pictures, tmp_path / "parts", "--duration", 0.016, "--batch-gpu", 1, *extra)
    logs = [json.loads(open(tmp_path / d / "log.jsonl").readline()) for d in ("whole", "parts")]
    assert logs[0]["denoise"] == pytest.approx(logs[1]["denoise"], rel=1e-4)
    a, b = weights(tmp_path / "whole", "state.pt")[1]["optimizer"]["state"], weights(tmp_path / "parts", "state.pt")[1]["optimizer"]["state"]
    first = [torch.cat([s["exp_avg"].flatten() for s in state.values()]) for state in (a, b)]
    assert (first[0] - first[1]).norm() < 1e-3 * first[0].norm()


def test_a_step_is_the_recipes(tmp_path, pictures, monkeypatch):
    """The first step by hand: what is drawn, the gradient of the loss summed over pixels and averaged over the batch, Adam, the average."""
    drawn = []

    def watched(net, x0, path, t, noise, original=train.disentangled_loss):
        drawn.append((x0, t, noise))
        return original(net, x0, path, t, noise)
    monkeypatch.setattr(train, "disentangled_loss", watched)
    asked = []
    monkeypatch.setattr(train, "augment", lambda x, p, *part, original=train.augment: asked.append((x, p)) or original(x, p, *part))
    grids = []

    def look(net, *args):
        grids.append((net.training, {k: v.clone() for k, v in net.state_dict().items()}))
        assert all(p.is_leaf and not p.requires_grad for p in net.parameters())                 # or each step's graph would be kept
    monkeypatch.setattr(train, "draw_grid", look)
    small(monkeypatch, pictures, tmp_path, "--duration", 0.008, "--augment", 0.3, "--snapshot-every", 0.004, "--seed", 3, "--bnr", 2, "--lr", 1e-2)
    (x0, t, noise), (_, t2, noise2) = drawn
    assert not torch.equal(t, t2) and not torch.equal(noise, noise2)                            # each step has draws of its own
    assert asked[0][1] == 0.3 and asked[0][0].min() >= -1 and asked[0][0].max() <= 1
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["config"]["unet"] == dict(in_channels=3, out_channels=6, channels=8, mult=[1, 2], blocks=1, attention=[4], dropout=0.0,
                                           augment_dim=9, resolution=8, classes=0)
    assert state["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999) and state["optimizer"]["param_groups"][0]["eps"] == 1e-8
    small(monkeypatch, pictures, tmp_path / "one", "--duration", 0.004, "--augment", 0.3, "--seed", 3, "--bnr", 2, "--lr", 1e-2)
    state = torch.load(tmp_path / "one/state.pt", weights_only=True)
    torch.manual_seed(3)
    net = train.build(state["config"])
    labels = []
    torch.manual_seed(3 * 1_000_003)
    labels = train.augment(asked[0][0], 0.3)[1]
    losses = disentangled_loss(lambda x, t: net(x, t, labels), x0, net.path, t, noise)
    (sum(losses).sum() * 192 / 4).backward()
    moments = state["optimizer"]["state"]
    before = dict(net.named_parameters())
    assert labels.any() and before["unet.from_augment.weight"].grad.any()
    for i, (name, p) in enumerate(before.items()):
        torch.testing.assert_close(moments[i]["exp_avg"], 0.1 * p.grad, rtol=1e-3, atol=1e-7)
    ema = torch.load(tmp_path / "one/ema.pt", weights_only=True)["weights"]
    for k, v in state["net"].items():                           # half-life 4 / 20 pictures after 4 of them
        torch.testing.assert_close(ema[k], before[k].detach() + (1 - 0.5 ** (4 / 0.2)) * (v - before[k].detach()), rtol=1e-5, atol=1e-7)
        assert torch.equal(ema[k], state["ema"][k]) and torch.equal(grids[-1][1][k], ema[k])
    assert not any(training for training, _ in grids) and any(not torch.equal(ema[k], state["net"][k]) for k in ema)


def test_the_average_has_its_half_life_in_pictures(tmp_path, pictures, monkeypatch):
    """One step at a time: ema' = ema + (1 - 2^(-batch / half-life)) (net' - ema), the half-life at most a twentieth of what was seen."""
    small(monkeypatch, pictures, tmp_path, "--duration", 0.36, "--ema", 0.016, "--snapshot-every", 0)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    small(monkeypatch, pictures, tmp_path, "--duration", 0.364, "--ema", 0.016, "--snapshot-every", 0)
    after = torch.load(tmp_path / "state.pt", weights_only=True)
    assert after["seen"] == 364
    for k, v in state["ema"].items():                           # 364 / 20 = 18.2 pictures would be longer than the 16 asked for
        torch.testing.assert_close(after["ema"][k], v + (1 - 0.5 ** (4 / 16)) * (after["net"][k] - v), rtol=1e-5, atol=1e-7)


def test_the_learning_rate_warms_up_linearly(tmp_path, pictures, monkeypatch):
    small(monkeypatch, pictures, tmp_path, "--duration", 0.064, "--warmup", 0.032, "--lr", 0.004)
    assert [json.loads(l)["lr"] for l in open(tmp_path / "log.jsonl")] == pytest.approx([0.002, 0.004, 0.004, 0.004])


def test_every_picture_is_seen_once_an_epoch():
    stream = torch.cat([train.shuffled(start, 4, 10, 0) for start in range(0, 40, 4)])
    for e in range(4):
        assert sorted(stream[e * 10:e * 10 + 10].tolist()) == list(range(10))
    assert stream[:10].tolist() != stream[10:20].tolist()
    assert torch.equal(torch.cat([train.shuffled(0, 25, 10, 0), train.shuffled(25, 15, 10, 0)]), stream)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, pictures, monkeypatch, capsys):
    small(monkeypatch, pictures, tmp_path / "run", "--duration", 0.032)
    before = (tmp_path / "run/ema.pt").read_bytes()

    def poisoned(net, x0, path, t, noise, original=train.disentangled_loss):
        denoise, deblur = original(net, x0, path, t, noise)
        poisoned.t.append(t)
        return (denoise * math.nan if len(poisoned.t) == 3 else denoise), deblur
    poisoned.t = []
    monkeypatch.setattr(train, "disentangled_loss", poisoned)
    refused(capsys, lambda: small(monkeypatch, pictures, tmp_path / "run", "--duration", 0.064), "not finite at step 11")
    refused_level = f"{poisoned.t[2][0]:.4g}"
    poisoned.t = []
    refused(capsys, lambda: small(monkeypatch, pictures, tmp_path / "run", "--duration", 0.064), f"level {refused_level}", "denoise nan")
    assert (tmp_path / "run/ema.pt").read_bytes() == before


@pytest.mark.parametrize("bnr", [0.5, "inf"])
def test_a_gradient_that_is_not_finite_stops_the_run_and_is_named(tmp_path, pictures, monkeypatch, capsys, bnr):
    monkeypatch.setitem(globals(), "SMALL", [*SMALL, "--bnr", str(bnr)])
    small(monkeypatch, pictures, tmp_path / "run", "--duration", 0.032)
    before = (tmp_path / "run/ema.pt").read_bytes()

    def burst(net, x0, path, t, noise, original=train.disentangled_loss):
        denoise, deblur = original(net, x0, path, t, noise)
        burst.calls += 1
        if burst.calls == 3:
            burst.level = t[2].item()
        for i in (t == burst.level).nonzero().flatten():
            deblur = deblur.index_add(0, i, (deblur[i] - deblur[i].detach()).sqrt()[None])      # adds 0, with a slope that is not finite
        return denoise, deblur
    burst.calls, burst.level = 0, 0.
    monkeypatch.setattr(train, "disentangled_loss", burst)
    with pytest.raises(SystemExit):
        small(monkeypatch, pictures, tmp_path / "run", "--duration", 0.064)
    assert f"gradient is not finite at step 11, level {burst.level:.4g}, term deblur" in capsys.readouterr().err
    assert (tmp_path / "run/ema.pt").read_bytes() == before


def test_a_torn_log_line_is_dropped(tmp_path, pictures, monkeypatch):
    small(monkeypatch, pictures, tmp_path / "run", "--duration", 0.032)
    with open(tmp_path / "run/log.jsonl", "a") as f:
        f.write('{"kimg": 0.0')
    small(monkeypatch, pictures, tmp_path / "run", "--duration", 0.064)
    assert [json.loads(line)["step"] for line in open(tmp_path / "run/log.jsonl")] == [4, 8, 12, 16]


def test_log_lines_split_the_loss_by_quartile_of_the_levels():
    t = torch.exp(-1.2 + 1.2 * torch.tensor([-0.75, -0.6, 0.6, 0.75, -2., -0.3, 0.3, 2.]))
    records = torch.stack([t, torch.tensor([1., 2, 3, 4, 3, 4, 5, 6]), torch.zeros(8)]).reshape(3, 2, 4).transpose(0, 1)    # [steps, 3, batch]
    line = train.summary(8, records, 0.1, time.time() - 2, torch.device("cpu"))
    assert line["denoise_by_level"] == [2, 3, 4, 5] and line["denoise"] == 3.5 and line["deblur"] == 0
    assert line["step"] == 2 and line["images_per_s"] == pytest.approx(4, rel=0.1)
    assert train.summary(1, records[:1, :, :1], 0.1, 0., torch.device("cpu"))["denoise_by_level"] == [1, None, None, None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Leaves, the whole way from the command line: what the README's first command does, made short."""
    out = tmp_path_factory.mktemp("trained")
    script = [sys.executable, str(ROOT / "train.py"), "--device", "cpu", "--duration", "0.256", "--out", "run", "--sample-steps", "3", "--resolution", "8",
              "--attention", "4"]
    subprocess.run(script, cwd=out, check=True, capture_output=True)
    return out


def test_a_run_leaves_what_the_readme_says(trained):
    names = {f.name for f in (trained / "run").iterdir()}
    assert names == {"ema.pt", "state.pt", "log.jsonl", "options.json", "grid-000000.png"}
    assert json.load(open(trained / "run/options.json"))["bnr"] == 0.5
    checkpoint = torch.load(trained / "run/ema.pt", weights_only=True)
    assert checkpoint["data"]["name"] == "leaves" and checkpoint["config"]["bnr"] == 0.5 and checkpoint["seen"] == 256
    assert Image.open(trained / "run/grid-000000.png").size == (8 * 66, 8 * 66)


def test_sampling_from_the_command_line(trained, monkeypatch, capsys):
    def draw(*args):
        run(monkeypatch, "--ckpt", trained / "run/ema.pt", "--device", "cpu", "--steps", 4, *args, main=sample.main)
        return capsys.readouterr().out
    assert "NFE 7" in draw("--seeds", "0-9", "--out", trained / "all/", "--churn", 1)
    assert sorted(f.name for f in (trained / "all").iterdir()) == [f"{i:06d}.png" for i in range(10)]
    assert Image.open(trained / "all-grid.png").size == (4 * 66, 3 * 66)
    draw("--seeds", "7", "--out", trained / "one", "--churn", 1)
    draw("--seeds", "5,6-7,60-63", "--out", trained / "some", "--churn", 1, "--batch", 2)
    for other in ("one", "some"):
        a, b = (np.asarray(Image.open(trained / d / "000007.png")).astype(int) for d in ("all", other))
        assert abs(a - b).max() <= 1
    draw("--seeds", "7", "--out", trained / "calm")
    draw("--seeds", "7", "--out", trained / "late", "--churn", 1, "--s-max", 0.1)
    different = {(trained / d / "000007.png").read_bytes() for d in ("one", "calm", "late")}
    assert len(different) == 3
    draw("--grid", "--out", trained / "new/grid", "--solver", "multistep")
    assert (trained / "new/grid-grid.png").exists() and not (trained / "new/grid").exists()
    draw("--strip", "--out", trained / "film")
    assert (trained / "film-strip.png").exists()
    draw("--init", trained / "all/000000.png", "--level", 0.02, "--seeds", "0", "--out", trained / "back")
    a, b = (np.asarray(Image.open(trained / d / "000000.png")).astype(int) for d in ("all", "back"))
    assert abs(a - b).mean() < 8                                # a hundredth of the range in, about that out


def test_bad_options(trained, pictures, tmp_path, monkeypatch, capsys):
    go = lambda *args: lambda: run(monkeypatch, "--out", tmp_path / "new", "--device", "cpu", *args)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for args, words in ((["--bnr", "-1"], ["--bnr", "-1"]), (["--bnr", "nan"], ["--bnr", "nan", "or inf"]), (["--bnr", "inf", "--param", "noise"], ["no noise"]),
                        (["--bnr", "inf", "--blind"], ["no noise"]), (["--blind", "--param", "x0"], ["blind", "not x0"]),
                        (["--bnr", "1", "--path", "blurring"], ["--path", "--bnr"]), (["--cond"], ["--cond", "leaves"]),
                        (["--bnr", "half"], ["--bnr", "half"]), (["--data", tmp_path / "empty"], ["holds no picture"]),
                        (["--data", tmp_path / "none"], ["does not exist"]), (["--resolution", "15"], ["15 x 15 do not divide by 2"]),
                        (["--unknown", "1"], ["--unknown"]), (["--batch", "10", "--batch-gpu", "4"], ["--batch 10", "--batch-gpu 4"]),
                        (["--device", "tpu"], ["--device", "tpu"]), (["--lr", "nan"], ["--lr"]),
                        (["--channels", "10"], ["30", "multiple of 4"]), (["--attention", "7"], ["--attention [7]", "[16, 8]"]),
                        (["--data", Path(pictures) / "0.png"], ["is one picture"]), (["--duration", "x"], ["'x' is no number"])):
        refused(capsys, go(*args), *words)
        assert not (tmp_path / "new").exists()


def test_a_run_is_not_overwritten_by_another(trained, tmp_path, monkeypatch, capsys):
    before = {f: f.read_bytes() for f in (trained / "run").iterdir()}
    monkeypatch.chdir(trained)
    refused(capsys, lambda: run(monkeypatch, "--device", "cpu", "--bnr", "0", "--resolution", 8, "--attention", 4), "--bnr 0.5, not 0.0")
    refused(capsys, lambda: run(monkeypatch, "--device", "cpu"), "--resolution 8, not 16")
    assert {f: f.read_bytes() for f in (trained / "run").iterdir()} == before
    (tmp_path / "text").mkdir()
    (tmp_path / "text/state.pt").write_text("hello")
    refused(capsys, lambda: run(monkeypatch, "--device", "cpu", "--out", tmp_path / "text"), "no checkpoint of this project")
    assert (tmp_path / "text/state.pt").read_text() == "hello"


def test_bad_checkpoints(trained, tmp_path, monkeypatch, capsys):
    def draw(path, *args):
        return lambda: run(monkeypatch, "--ckpt", path, "--device", "cpu", "--out", tmp_path / "out", *args, main=sample.main)
    (tmp_path / "text.pt").write_text("hello")
    refused(capsys, draw(tmp_path / "text.pt"), "text.pt is no checkpoint")
    refused(capsys, draw(tmp_path / "none.pt"), "does not exist")
    checkpoint = torch.load(trained / "run/ema.pt", weights_only=True)
    for name, change in (("shape", lambda c: c["config"]["unet"].update(channels=32)), ("config", lambda c: c.pop("config")),
                         ("huge", lambda c: c["config"]["unet"].update(channels=10 ** 6)), ("unknown", lambda c: c["config"]["unet"].update(depth=3))):
        changed = {**checkpoint, "config": {**checkpoint["config"], "unet": dict(checkpoint["config"]["unet"])}}
        change(changed)
        torch.save(changed, tmp_path / f"{name}.pt")
        refused(capsys, draw(tmp_path / f"{name}.pt"), f"{name}.pt is no model of this project")
    for seeds in ("x", "-3", "5-2,7", "1-", "9" * 30):
        refused(capsys, draw(trained / "run/ema.pt", f"--seeds={seeds}"), "--seeds", "write 0-63")
    refused(capsys, draw(trained / "run/state.pt"), "take the ema.pt")
    refused(capsys, draw(trained / "run/ema.pt", "--level", 2), "--level is for --init")
    monkeypatch.setattr(sample, "generate", lambda *a, **kw: pytest.fail("drew before it looked where to write"))
    refused(capsys, lambda: run(monkeypatch, "--ckpt", trained / "run/ema.pt", "--device", "cpu", "--out", tmp_path / "text.pt", main=sample.main), "exists")
    refused(capsys, draw(trained / "run/ema.pt", "--solver", "multistep", "--churn", "3"), "no churn")
    refused(capsys, draw(trained / "run/ema.pt", "--init", tmp_path / "text.pt"), "no picture that can be read")
    assert not (tmp_path / "out").exists()


def test_a_model_loads_as_it_was_saved(trained):
    net, checkpoint = load_model(trained / "run/ema.pt")
    saved = torch.load(trained / "run/ema.pt", weights_only=True)["weights"]
    assert same(dict(net.state_dict()), saved) and not net.training and checkpoint["data"]["shape"] == [3, 8, 8]


def test_grey_pictures_train_and_sample(tmp_path, monkeypatch, capsys):
    (tmp_path / "grey").mkdir()
    for i in range(4):
        Image.fromarray(np.random.RandomState(i).randint(0, 256, (12, 8), dtype=np.uint8)).save(tmp_path / f"grey/{i}.png")
    small(monkeypatch, tmp_path / "grey", tmp_path / "run", "--duration", 0.016, "--resolution", 0, "--attention")
    run(monkeypatch, "--ckpt", tmp_path / "run/ema.pt", "--seeds", 0, "--steps", 2, "--out", tmp_path / "s", "--device", "cpu", main=sample.main)
    assert Image.open(tmp_path / "s/000000.png").size == (8, 12) and Image.open(tmp_path / "s/000000.png").mode == "L"


@pytest.mark.parametrize("script, made", [("degrade.py", "degrade.png"), ("model.py", None), ("loss.py", None), ("data.py --resolution 4", "data.png")])
def test_every_file_runs_by_itself(tmp_path, script, made):
    name, *args = script.split()
    done = subprocess.run([sys.executable, str(ROOT / name), *args], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and done.stderr == ""
    assert made is None or Image.open(tmp_path / made).size[0] > 100


@pytest.mark.parametrize("preset, recipe", [
    ("cifar10", dict(batch=512, lr=1e-3, warmup=10_000, duration=200_000, dropout=0.13, augment=0.12, ema=500, sample_steps=18, bnr=0.5)),
    ("ffhq64", dict(batch=256, lr=2e-4, warmup=10_000, duration=200_000, dropout=0.05, augment=0.15, ema=500, sample_steps=40, resolution=64)),
    ("church128", dict(batch=256, lr=2e-4, warmup=10_000, duration=200_000, dropout=0.1, augment=0, ema=500, sample_steps=40, resolution=128)),
    ("tiny", dict(batch=64, lr=2e-3, warmup=3, duration=60, dropout=0, augment=0, ema=3, resolution=16))])
def test_presets_are_the_recipes_table(monkeypatch, preset, recipe):
    for flags in (["--preset", preset], ["--data", "cifar10"] if preset == "cifar10" else ["--preset", preset, "--data", "x"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        chosen = vars(train.options()[1])
        assert {k: chosen[k] for k in recipe} == recipe and chosen["preset"] == preset


def test_presets_have_the_papers_sizes():
    with torch.device("meta"):
        for name, count in (("cifar10", 55_740_806), ("ffhq64", 61_809_030), ("tiny", None)):
            kw = {**dict(resolution=32, channels=128, mult=[2, 2, 2], blocks=4, attention=[16], augment=0.12), **train.PRESETS[name]}
            n = sum(p.numel() for p in UNet(3, 6, kw["channels"], kw["mult"], kw["blocks"], kw["attention"], kw["resolution"],
                                            augment_dim=9 if kw["augment"] else 0).parameters())
            assert n == count or name == "tiny" and 3.5e5 < n < 4.5e5


SHARED = ROOT.parent / "shared/data/cifar10-train-jpeg.tar.xz"


@pytest.mark.skipif(not SHARED.exists(), reason="the photographs are not beside this checkout")
def test_photographs_train(tmp_path, monkeypatch):
    import tarfile
    folder = tmp_path / "photos"
    with tarfile.open(SHARED) as tar:
        for _, member in zip(range(300), tar):
            if member.isfile():
                (folder / member.name).parent.mkdir(parents=True, exist_ok=True)
                (folder / member.name).write_bytes(tar.extractfile(member).read())
    run(monkeypatch, "--data", folder, "--preset", "tiny", "--duration", 1.5, "--out", tmp_path / "run", "--device", "cpu",
        "--log-every", 0.5, "--warmup", 0.5, "--sample-steps", 4)
    lines = [json.loads(l) for l in open(tmp_path / "run/log.jsonl")]
    assert lines[-1]["denoise"] < 0.95 * lines[0]["denoise"]
    assert os.path.exists(tmp_path / "run/ema.pt")
