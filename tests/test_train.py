"""train.py: a step is the recipe's, a run repeats to the bit, what the command lines do."""
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from data import Images, augment, epoch, leaves, seed_for
from degrade import AnyBNR, BlurringSchedule, ColdSchedule, ConstantBNR, blur, degrade
from loss import disentangled_loss
from model import PARAMETERIZATIONS, Denoiser, UNet
from runs import (ROOT, command_line, draw, encoded, latents, log_of, options, pictures, refused,
                  same, same_run, seen_by, state_of, steps_of, words)
from sample import generate, sampling_schedule
from util.checkpoint import load_model, read_checkpoint
from util.cli import Parser, UserError
from util.images import normalize
from util.run import unet_config, write_options


def small_unet(**given) -> UNet:
    """The network of runs.SMALL."""
    return UNet(3, 6, channels=8, mult=(1, 2), blocks=1, attention=(4,), resolution=8, **given)


def pixels(filename) -> np.ndarray:
    return np.asarray(Image.open(filename)).astype(int)


# A step and its parts

def test_four_images_are_learned_by_heart(tmp_path):
    """Where four images can be told apart, both losses fall to a small share of what a network
    costs whose output is 0."""
    class LowLevels(ConstantBNR):
        def training_levels(self, n, h, w, device=None):
            sigma = torch.rand(n) * 0.8 + 0.1
            return self.bnr * sigma, sigma

    x0 = leaves(4, 8)
    text = "--channels 16 --batch 16 --duration 1.6 --lr 0.006 --warmup 0.2 --snapshot-every 0"
    ema = train.train(options(tmp_path, text), Images(x0), LowLevels(2))
    sigma = torch.tensor([0.2, 0.4, 0.6, 0.8]).repeat(16)
    noise = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def losses(net):
        x = normalize(x0).repeat_interleave(16, 0)
        denoise, deblur = disentangled_loss(net, x, 2 * sigma, sigma, noise, 0.5)
        return torch.stack([denoise.mean(), deblur.mean()])

    assert (losses(ema) < 0.3 * losses(Denoiser(small_unet()))).all()


def test_a_step_is_the_recipe(tmp_path):
    """The first step by hand: what is drawn, the gradient of the loss summed over pixels and
    averaged over the batch, Adam at the rate of the warm-up, the EMA."""
    data = pictures()
    text = "--augment 0.3 --seed 3 --bnr 2 --P-mean -1 --P-std 0.9 --lr 0.01 --warmup 0.008"
    train.train(options(tmp_path, text, duration=0.004), data)
    state = read_checkpoint(tmp_path / "state.pt")

    torch.manual_seed(seed_for("weights", 3))
    net = Denoiser(small_unet(augment_dim=9))
    shuffle = torch.Generator().manual_seed(seed_for("epoch", 3))
    x0 = data.images[torch.randperm(20, generator=shuffle)[:4]] / 127.5 - 1
    torch.manual_seed(seed_for("step", 3))
    x0, labels = augment(x0, 0.3)
    sigma = torch.exp(-1 + 0.9 * torch.randn(4))
    noise = torch.randn(4, 3, 8, 8)
    blurry = blur(x0, 2 * sigma)
    d, r = net(blurry + sigma[:, None, None, None] * noise, 2 * sigma, sigma, labels)
    weight = (sigma ** 2 + 0.25) / (0.5 * sigma) ** 2
    error = (d - blurry).square() + (r - (x0 - blurry)).square()
    (weight * error.sum((1, 2, 3))).mean().backward()

    assert net.unet.from_augment.weight.grad.any()
    ema_share = 1 - 0.5 ** (4 / 0.2)                            # half-life 4 / 20 images
    for i, (name, p) in enumerate(net.named_parameters()):
        moments = state["optimizer"]["state"][i]
        mean = moments["exp_avg"]
        square = moments["exp_avg_sq"]
        torch.testing.assert_close(mean, 0.1 * p.grad, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(square, 0.001 * p.grad ** 2, rtol=1e-3, atol=1e-9)
        start = p.detach()
        stepped = start - 0.005 * (mean / 0.1) / ((square / 0.001).sqrt() + 1e-8)
        torch.testing.assert_close(state["net"][name], stepped, rtol=1e-4, atol=1e-6)
        averaged = start + ema_share * (state["net"][name] - start)
        torch.testing.assert_close(state["ema"][name], averaged, rtol=1e-5, atol=1e-7)
    assert not same(state["net"], state["ema"])
    assert same(state["ema"], read_checkpoint(tmp_path / "ema.pt")["weights"])


@pytest.mark.parametrize("kind", ["images", "latents"])
def test_every_image_is_seen_once_an_epoch_in_network_units(kind, tmp_path):
    values = torch.arange(10)[:, None, None, None].expand(10, 3, 8, 8) * 25
    data = {"images": Images(values.byte()), "latents": Images(values.float(), latents=True)}
    expected = {"images": values / 127.5 - 1, "latents": values.float()}
    trained_on = []

    def watched(net, x0, *others):
        trained_on.extend(x0[:, 0, 0, 0].tolist())
        return disentangled_loss(net, x0, *others)

    train.train(options(tmp_path, "--duration 0.04"), data[kind], loss=watched)
    epochs = torch.tensor(trained_on).reshape(4, 10)
    assert torch.equal(epochs.sort(1).values, expected[kind][:, 0, 0, 0].expand(4, 10))
    assert len(epochs.unique(dim=0)) == 4
    assert not torch.equal(epoch(0, 10, seed=0), epoch(0, 10, seed=1))


def test_the_network_is_given_the_levels_and_the_class_of_each_image(tmp_path):
    """What reaches the unet of --bnr any --cond is the image at the levels on which it is
    conditioned, in parts of a batch, too."""
    shades = torch.arange(10).remainder(2)                      # classes black and white
    x = (255 * shades)[:, None, None, None].expand(10, 3, 8, 8).byte().contiguous()
    data = Images(x, shades, ("black", "white"))
    net = Denoiser(small_unet(classes=2, ratio=True))
    inputs = []
    batches = []

    def watch_inputs(unet, args, keywords):
        inputs.append((*args, keywords["ratio"]))

    def watched(*args):
        terms = disentangled_loss(*args)
        batches.append((args, inputs[-1]))
        return terms

    net.unet.register_forward_pre_hook(watch_inputs, with_kwargs=True)
    text = "--bnr any --cond --batch 16 --batch-gpu 8 --duration 0.064"
    train.train(options(tmp_path, text), data, net=net, loss=watched)
    assert len(batches) == 8
    bnrs = []
    for (_, x0, alpha, sigma, noise, _), (c_in_x, c_noise, _, label, ratio) in batches:
        assert torch.equal(x0.mean((1, 2, 3)), 2. * label - 1)
        torch.testing.assert_close(c_noise, sigma.log() / 4)
        torch.testing.assert_close(ratio, 4 * alpha / (alpha + sigma))
        degraded, _ = degrade(x0, alpha, sigma, noise)
        c_in = 1 / (sigma ** 2 + 0.25).sqrt()
        torch.testing.assert_close(c_in_x, c_in[:, None, None, None] * degraded)
        bnrs += (alpha / sigma).tolist()
    assert len(set(bnrs)) == 65 - bnrs.count(0)                 # each image has a ratio of its own


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    moments = []
    for out, text in (("whole", ""), ("parts", "--batch-gpu 1")):
        text += " --duration 0.016 --augment 1"
        train.train(options(tmp_path / out, text), latents())
        state = read_checkpoint(tmp_path / out / "state.pt")["optimizer"]["state"]
        moments.append(torch.cat([of_p["exp_avg"].flatten() for of_p in state.values()]))
    whole, parts = moments
    assert 0 < (whole - parts).norm() < 1e-3 * whole.norm()
    for a, b in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "parts")):
        assert a["denoise"] == pytest.approx(b["denoise"], rel=1e-4)


def test_the_ema_has_its_half_life_in_images(tmp_path):
    """One step at a time: ema' = ema + (1 - 2^(-batch / half-life)) (net' - ema), the half-life at
    most a twentieth of what was seen."""
    text = "--ema 0.016 --snapshot-every 0"
    train.train(options(tmp_path, text, duration=0.36), latents())
    before = read_checkpoint(tmp_path / "state.pt")
    train.train(options(tmp_path, text, duration=0.364), latents())
    after = read_checkpoint(tmp_path / "state.pt")
    share = 1 - 0.5 ** (4 / 16)             # 364 / 20 = 18.2 images would be longer than the 16
    for name, old in before["ema"].items():
        expected = old + share * (after["net"][name] - old)
        torch.testing.assert_close(after["ema"][name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bnr", ["0.5", "inf"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_step(what, bnr, tmp_path):
    """The message names the step and the losses by level; the last checkpoint stays."""
    calls = []
    optimizers = []

    def poisoned(net, x0, alpha, *others):
        calls.append(alpha)
        denoise, deblur = disentangled_loss(net, x0, alpha, *others)
        if len(calls) < 11:
            return denoise, deblur
        if what == "loss":
            poison = torch.zeros(4).index_fill(0, alpha.argmin(), math.inf)
        else:
            poison = (deblur - deblur.detach()).sqrt()          # 0, with an infinite slope
        return denoise, deblur + poison

    def adam(parameters):
        optimizers.append(torch.optim.Adam(parameters))
        return optimizers[0]

    args = options(tmp_path, bnr=bnr, duration=0.064)
    with pytest.raises(UserError, match="not finite at step 11, .* try a lower --lr") as e:
        train.train(args, latents(), loss=poisoned, optimizer=adam)
    assert ("'deblur_by_level': [inf, " in str(e.value)) == (what == "loss")
    assert all(of_p["step"] == 10 for of_p in optimizers[0].state.values())
    assert seen_by(tmp_path) == 32


def test_log_lines_split_the_loss_by_quartile_of_the_levels():
    t = torch.tensor([0.4, 0.5, 2., 3., 0.1, 0.6, 1., 9.])
    denoise = torch.tensor([1., 2, 3, 4, 3, 4, 5, 6])
    line = train.by_level(torch.stack([t, denoise, torch.zeros(8)]))
    assert line["denoise_by_level"] == [2, 3, 4, 5]
    assert line["denoise"] == 3.5 and line["deblur"] == 0
    of_one_image = train.by_level(torch.ones(3, 1))
    assert of_one_image["denoise_by_level"] == [1, None, None, None]


# Repetition

@pytest.mark.parametrize("text", ["", "--dropout 0.3 --augment 0.5", "--bnr any --param x0"])
def test_resumed_equals_uninterrupted_bit_for_bit(text, tmp_path):
    train.train(options(tmp_path / "whole", text, duration=0.096), latents())
    for duration in (0.032, 0.096):
        train.train(options(tmp_path / "parts", text, duration=duration), latents())
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    assert steps_of(tmp_path / "parts") == [4, 8, 12, 16, 20, 24]
    config = read_checkpoint(tmp_path / "parts/ema.pt")["config"]
    asked = (0.3, 9) if "dropout" in text else (0, 0)
    assert (config["unet"]["dropout"], config["unet"]["augment_dim"]) == asked
    assert config["unet"].get("ratio", False) == ("any" in text)


def test_a_run_cut_between_checkpoints_repeats_from_the_last(tmp_path):
    """And what a crash has left in the log does not stay."""
    class Cut(Exception):
        pass

    def cut(line):
        if line["step"] == 20:
            raise Cut

    run = options(tmp_path / "cut", duration=0.096)
    with pytest.raises(Cut):
        train.train(run, latents(), on_log=cut)
    assert seen_by(tmp_path / "cut") == 64
    with open(tmp_path / "cut/log.jsonl", "ab") as f:
        f.write(b'{"a": 1}\n[]\n\xff\xfe{"kimg"\n{"kimg": "x"}\n{"kimg": 0.0')
    train.train(run, latents())
    train.train(options(tmp_path / "whole", duration=0.096), latents())
    assert same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_goes_on_longer_with_another_learning_rate_and_keeps_snapshots(tmp_path, images,
                                                                             capsys):
    text = "--bnr inf --seed 3 --keep-every 0.016 --snapshot-every 0"
    run = tmp_path / "run"
    command_line(train.main, *words(run, text, data=images, duration=0.032))
    assert capsys.readouterr().out.splitlines()[-1] == \
        f"To draw images: python sample.py --ckpt {run}/ema.pt --out {run}/samples"
    again = ["--resume", run, "--device", "cpu"]
    more = [*again, "--duration", 0.048, "--lr", 0.005, "--precision", "bf16"]
    command_line(train.main, *more)
    assert "from 0.032 to 0.048 kimg" in capsys.readouterr().out
    command_line(train.main, *again, "--duration", 0.064)       # with the options it had last
    assert [line["lr"] for line in log_of(run)] == [0.002, 0.002, 0.005, 0.005]
    copies = sorted(f.name for f in run.glob("ema-*"))
    assert copies == [f"ema-000000.0{kimg}.pt" for kimg in (16, 32, 48, 64)]
    assert read_checkpoint(run / copies[2])["seen"] == 48

    before = {file: file.read_bytes() for file in run.iterdir()}
    for line, message in ((["--seed", 4], "--seed 3, not 4, on which it depends: .*--init-from"),
                          (["--bnr", 1], "--bnr inf, not 1.0"),
                          (["--preset", "ffhq64"], "--preset is for a new run"),
                          (["--out", "x"], "two folders")):
        assert re.search(message, refused(capsys, train.main, *again, *line))
    assert {file: file.read_bytes() for file in run.iterdir()} == before


def write_as_before_december_2026(run):
    """Gives a run's files the names that they had then, leaves out what there was not in the first
    months, and puts the optimizer's moments in torch's usual order in memory."""
    for file in (run / "ema.pt", run / "state.pt"):
        checkpoint = torch.load(file, weights_only=True)
        config = checkpoint["config"]
        for old, new in (("path", "schedule"), ("colour", "mean_color"),
                         ("levels", "sampling_levels"), ("trained", "training_range")):
            config[old] = config.pop(new)
        kind = config.pop("denoiser")
        config["answers"] = f"{kind}, {config.pop('precondition').split('.')[0]}.answers"
        del config["loss"], config["optimizer"], checkpoint["data"]["digest"]
        checkpoint["options"]["path"] = checkpoint["options"].pop("schedule")
        del checkpoint["options"]["keep_every"], checkpoint["options"]["precision"]
        for moments in checkpoint.get("optimizer", {}).get("state", {}).values():
            moments["exp_avg"] = moments["exp_avg"].contiguous()
        torch.save(checkpoint, file)
    stored = json.loads((run / "options.json").read_text())
    stored["path"] = stored.pop("schedule")
    (run / "options.json").write_text(json.dumps(stored))


@pytest.mark.parametrize("text, kind", [("--schedule blurring --param x0", BlurringSchedule),
                                        ("--bnr inf", ColdSchedule)])
def test_files_of_older_versions_load_and_resume(text, kind, tmp_path, images):
    old = tmp_path / "old"
    for out, duration in (("old", 0.032), ("new", 0.032), ("new", 0.064)):
        command_line(train.main, *words(tmp_path / out, text, data=images, duration=duration))
    net, checkpoint = load_model(old / "ema.pt")
    write_as_before_december_2026(old)
    loaded, renamed = load_model(old / "ema.pt")
    assert type(loaded) is type(net) and same(loaded.state_dict(), net.state_dict())
    assert type(sampling_schedule(renamed)) is kind
    assert renamed["config"]["mean_color"] == checkpoint["config"]["mean_color"]
    command_line(train.main, "--resume", old, "--device", "cpu", "--duration", 0.064)
    assert same_run(old, tmp_path / "new")


def test_a_run_starts_from_another_models_weights(tmp_path):
    """The ratio's layer, which is new, starts at zero. To resume it the file is not needed."""
    hot = tmp_path / "hot/ema.pt"
    train.train(options(hot.parent, "--bnr 0 --duration 0.032 --lr 0.01"), latents())
    expected = {**read_checkpoint(hot)["weights"], "unet.from_ratio.weight": torch.zeros(8, 8)}
    text = "--bnr any --lr 0 --duration"
    train.train(options(tmp_path / "any", f"{text} 0.004", init_from=hot), latents())
    hot.rename(tmp_path / "away.pt")
    train.train(options(tmp_path / "any", f"{text} 0.008", init_from=hot), latents())
    state = read_checkpoint(tmp_path / "any/state.pt")
    assert state["seen"] == 8 and same(state["net"], expected) and same(state["ema"], expected)


# Going back

def test_a_run_goes_back_to_a_kept_state(tmp_path, capsys):
    """To the bit, for good at once, and without the log of what came after it."""
    run = tmp_path / "run"
    small = "--mult 1 --attention --log-every 0.004"
    text = f"{small} --keep-every 0.008 --snapshot-every 0"
    train.train(options(run, text, duration=0.016), latents())
    whole = state_of(run / "state.pt")
    kept = state_of(run / "state-000000.008.pt")
    capsys.readouterr()
    train.train(options(run, text, duration=0.036, lr=1), latents())       # it explodes
    assert "warning: the loss rose from" in capsys.readouterr().err
    assert read_checkpoint(run / "ema-000000.008.pt")["seen"] == 8

    train.train(options(run, f"{small} --from 0.008", duration=0.008), latents())
    assert same(state_of(run / "state.pt"), kept) and seen_by(run) == 8
    assert "kept" not in json.loads((run / "options.json").read_text())
    train.train(options(run, text, duration=0.016), latents())
    assert same(state_of(run / "state.pt"), whole)
    assert steps_of(run) == [1, 2, 3, 4]
    with pytest.raises(UserError, match="state-000000.007.pt does not exist"):
        train.train(options(run, f"{small} --from 0.007"), latents())
    assert same(state_of(run / "state.pt"), whole)


def test_an_ordinary_log_has_no_warning_and_significant_digits(tmp_path, capsys):
    def tiny_loss(net, x0, alpha, sigma, noise, sigma_data):
        d, r = net(x0, alpha, sigma)
        return d.square().mean((1, 2, 3)), 1e-9 * r.square().mean((1, 2, 3))
    train.train(options(tmp_path, duration=0.04), latents(), loss=tiny_loss)
    assert "rose" not in capsys.readouterr().err
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert 0 < line["deblur"] < 1e-8 and len(f"{line['deblur']:.9g}") > 7


# Resuming with other options

def test_what_may_change_on_resuming(tmp_path, capsys):
    train.train(options(tmp_path, duration=0.004), latents())
    train.train(options(tmp_path, duration=0.008, ema=7, warmup=3), latents())
    capsys.readouterr()
    train.train(options(tmp_path, duration=0.004), latents())
    assert "is complete at 0.008 kimg" in capsys.readouterr().out
    assert seen_by(tmp_path) == 8


def test_options_of_a_script_need_not_be_plain(tmp_path):
    for duration in (0.004, 0.008):
        args = options(tmp_path, duration=duration)
        args.lr = np.geomspace(1e-3, 1e-2, 3)[1]
        args.out = tmp_path / "run"
        args.mult = (1, 2)
        train.train(args, latents())
    assert seen_by(tmp_path / "run") == 8


@pytest.mark.parametrize("line", ["", "[1]", '{"kimg": 0.004}', '{"kimg": 0.004, "denoise": null}'])
def test_a_log_without_a_loss_resumes(line, tmp_path):
    train.train(options(tmp_path, duration=0.004), latents())
    (tmp_path / "log.jsonl").write_text(line + "\n")
    train.train(options(tmp_path, duration=0.008), latents())


# Variants

@pytest.mark.parametrize("text, kind", [
    ("--schedule blurring", BlurringSchedule), ("--bnr 0 --param x0", ConstantBNR),
    ("--param noise", ConstantBNR), ("--bnr inf", ColdSchedule),
    ("--bnr inf --param x0", ColdSchedule), ("--cond --augment 0.2", ConstantBNR),
    ("--bnr any", AnyBNR)])
def test_each_variant_trains_loads_and_samples(text, kind, tmp_path):
    data = pictures(classes=("a", "b"))
    args = options(tmp_path, text, duration=0.008)
    ema = train.train(args, data)
    net, checkpoint = load_model(tmp_path / "ema.pt")
    schedule = sampling_schedule(checkpoint)
    assert type(schedule) is kind and type(net) is PARAMETERIZATIONS[args.param]
    assert net.classes == 2 * args.cond and net.has_ratio == (args.bnr == "any")
    mean_color = checkpoint["config"]["mean_color"]
    assert mean_color == (data.mean_color() if kind is ColdSchedule else None)
    drawn = []
    for model in (ema, net):
        batches = generate(model, schedule, (3, 8, 8), range(4), steps=3, churn=1.,
                           mean_color=mean_color)
        drawn.append(torch.cat(list(batches)))
    assert torch.equal(drawn[0], drawn[1]) and drawn[0].isfinite().all()
    assert Image.open(tmp_path / "grid-000000.008.png").size == (8 * 66, 8 * 66)


@pytest.mark.parametrize("bnr", ["0.5", "inf", "any"])
def test_one_gray_image_that_is_not_square_is_enough(bnr, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(0, shape=(12, 8)))
    text = "--duration 0.008 --resolution 0 --attention"
    command_line(train.main, *words(tmp_path / "run", text), "--data", folder, "--bnr", bnr)
    draw(tmp_path / "run/ema.pt", tmp_path / "s", "--seeds", 0)
    image = Image.open(tmp_path / "s/000000.png")
    assert image.size == (8, 12) and image.mode == "L"


def test_latents_are_sampled_as_arrays(tmp_path):
    """Four channels; there is no picture of them."""
    train.train(options(tmp_path / "run", duration=0.016), latents(4))
    draw(tmp_path / "run/ema.pt", tmp_path / "s", "--seeds", "0-3")
    names = sorted(f.name for f in (tmp_path / "s").glob("*.npy"))
    assert names == [f"{seed:06d}.npy" for seed in range(4)]
    assert not list(tmp_path.rglob("*.png"))
    net, _ = load_model(tmp_path / "run/ema.pt")
    expected = torch.cat(list(generate(net, ConstantBNR(0.5), (4, 8, 8), range(4), steps=2)))
    arrays = np.stack([np.load(tmp_path / "s" / name) for name in names])
    np.testing.assert_allclose(arrays, expected.numpy(), rtol=1e-4, atol=1e-4)


# From the command line

@pytest.fixture(scope="module")
def trained(tmp_path_factory, images):
    run = tmp_path_factory.mktemp("trained") / "run"
    command_line(train.main, *words(run, data=images, duration=0.064))
    return run


def test_training_and_sampling_from_the_command_line(trained, tmp_path, capsys):
    assert {f.name for f in trained.iterdir()} == {
        "ema.pt", "state.pt", "log.jsonl", "options.json", ".lock", "grid-000000.032.png",
        "grid-000000.064.png"}
    ckpt = trained / "ema.pt"
    checkpoint = torch.load(ckpt, weights_only=True)
    assert checkpoint.keys() == {"weights", "config", "data", "options", "seen"}
    every = tmp_path / "all"
    draw(ckpt, f"{every}/", "--seeds", "0-9", "--churn", 1)
    assert "NFE 3" in capsys.readouterr().out
    assert sorted(f.name for f in every.glob("*.png")) == [f"{i:06d}.png" for i in range(10)]
    assert Image.open(tmp_path / "all-grid.png").size == (4 * 66, 3 * 66)
    draw(ckpt, tmp_path / "some", "--seeds", "5,6-7,60", "--churn", 1, "--batch", 2)
    for name in ("000005.png", "000006.png", "000007.png"):
        difference = pixels(every / name) - pixels(tmp_path / "some" / name)
        assert abs(difference).max() <= 1
    churned = set()
    for line in ("", "--churn 1", "--churn 1 --s-max 5", "--churn 1 --s-max 5 --s-noise 2"):
        out = tmp_path / f"s {line}"
        draw(ckpt, out, "--steps", 3, "--seeds", 7, *line.split())
        churned.add((out / "000007.png").read_bytes())
    assert len(churned) == 4
    draw(ckpt, tmp_path / "new/s", "--solver", "multistep", "--seeds", "0-3")
    assert (tmp_path / "new/s-grid.png").exists()
    start = every / "000000.png"
    draw(ckpt, tmp_path / "back", "--init", start, "--level", 0.02, "--seeds", 9)
    difference = pixels(start) - pixels(tmp_path / "back/000009.png")
    assert abs(difference).mean() < 8       # a hundredth of the range in, about that out


def test_weights_are_saved_contiguously_and_load_in_the_layout_of_training(trained):
    state = read_checkpoint(trained / "state.pt")
    model = read_checkpoint(trained / "ema.pt")["weights"]
    for weights in (model, state["net"], state["ema"]):
        assert all(value.is_contiguous() for value in weights.values())
    net, _ = load_model(trained / "ema.pt")
    assert net.unet.first.weight.is_contiguous(memory_format=torch.channels_last)


def test_one_network_for_every_ratio_and_class_from_the_command_line(trained, tmp_path, capsys):
    folder = tmp_path / "set"
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for i in range(4):
            (folder / name / f"{i}.png").write_bytes(encoded(i))
    run = tmp_path / "run"
    text = "--bnr any --cond --duration 0.032 --lr 0.01"
    command_line(train.main, *words(run, text, data=folder))

    def drawn(out, *line) -> list:
        draw(run / "ema.pt", tmp_path / out, "--seeds", "0-3", *line)
        return [(tmp_path / out / f"00000{seed}.png").read_bytes() for seed in range(4)]

    plain = drawn("plain")
    assert drawn("half", "--bnr", 0.5) == plain
    others = [drawn(line, *line.split()) for line in ("--bnr 0", "--bnr 10", "--schedule blurring")]
    assert len({plain[0], *(images[0] for images in others)}) == 4
    of_b = drawn("b", "--class", "b")
    assert of_b[1::2] == plain[1::2] and of_b[0] != plain[0]    # classes take turns unless asked

    def sampling_refused(checkpoint, line) -> str:
        return refused(capsys, sample.main, "--ckpt", checkpoint, "--device", "cpu", "--out",
                       tmp_path / "none", *line.split())

    for line, message in (("--bnr 11", "--bnr 11: the model knows ratios from 0 to 10"),
                          ("--bnr 0 --schedule blurring", "--bnr and --schedule are two ways"),
                          ("--class c", "the classes are a, b")):
        assert message in sampling_refused(run / "ema.pt", line)
    for line, message in (("--bnr 0.5", "for a model trained with --bnr any"),
                          ("--schedule blurring", "for a model trained with --bnr any"),
                          ("--class b", "--class is for a model trained with --cond"),
                          ("--s-min 1", "belong to --churn"),
                          ("--churn 1 --s-min 5 --s-max 1", "--s-min 5 is above"),
                          ("--solver multistep --churn 3", "no churn"),
                          ("--level 2", "--level is for --init"),
                          ("--seeds=-3", "must be like 0-63"), ("--seeds=5-2", "must be like 0-63"),
                          ("--seeds=0-99999999999", "at most 10 million"),
                          (f"--seeds {2 ** 32}", "below 2^32"),
                          (f"--init {run}/log.jsonl", "is not an image that can be read")):
        assert message in sampling_refused(trained / "ema.pt", line)
    assert "take the ema.pt" in sampling_refused(trained / "state.pt", "")
    assert "does not exist" in sampling_refused(trained / "none.pt", "")


def test_what_a_user_can_get_wrong_is_one_line(images, tmp_path, capsys):
    """Before anything is written."""
    empty = tmp_path / "empty"
    empty.mkdir()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    cases = {
        "--bnr half": "--bnr: must be a number of at least 0, inf or any, not 'half'",
        "--lr nan": "--lr: must be", "--duration 0": "must be", "--warmup inf": "--warmup: must be",
        "--device tpu": "must be cpu or", "--unknown 1": "--unknown", "--out=": "must not be empty",
        "--bnr any --schedule blurring": "--bnr and --schedule are two ways",
        "--bnr inf --P-mean 1": "--bnr inf has no noise",
        "--bnr inf --param noise": "--param noise needs noise to predict, and --bnr inf has none",
        "--cond": "--cond needs images of at least two classes",
        "--resolution 7": "--attention 4: the levels have sides of 7, 3",
        "--resolution 7 --attention 7": "7 x 7 do not divide by 2",
        "--channels 10": "a width of 30 does not divide",
        "--batch 10 --batch-gpu 4": "--batch 10 does not divide into 1 processes of --batch-gpu 4",
        f"--data {empty}": "contains no image that can be read",
        f"--data {empty}/none": "does not exist", f"--data {images}/0.png": "is one image",
        f"--data {pipe}": "is a device or a pipe", f"--init-from {pipe}": "is a device or a pipe",
        f"--resume {empty}": "it holds no run"}
    for text, message in cases.items():
        last = refused(capsys, train.main, *words(tmp_path / "new", text, data=images, duration=1))
        assert message in last, (text, last)
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("line, duration, batch", [
    ("", "60.0", "16"), ("--data cifar10", "200000.0", "512"),
    ("--preset ffhq64", "200000.0", "256")])
def test_help_shows_the_defaults_in_force(line, duration, batch, capsys):
    with pytest.raises(SystemExit) as e:
        train.options([*line.split(), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0
    assert f"kimg to train for (default {duration})" in text
    assert f"over all GPUs and accumulation (default {batch})" in text


def test_a_run_in_its_folder_has_any_value_that_can_be_given(tmp_path):
    given = options(tmp_path / "run", "--P-mean=-1e-05 --data=-x- --no-cond --mult 1 2 --compile")
    (tmp_path / "run").mkdir()
    write_options(given)
    again = train.options(["--resume", str(tmp_path / "run"), "--device", "cpu"])
    assert vars(again) == vars(given)


def too_large():
    torch.empty(2 ** 60, dtype=torch.uint8)


def too_large_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("allocate, text, advice", [
    (too_large, "", "give --batch-gpu 2"), (too_large_on_a_gpu, "", "give --batch-gpu 2"),
    (too_large, "--batch 9", "give --batch-gpu 3"),             # which is the next that divides
    (too_large, "--batch 6 --batch-gpu 3", "give --batch-gpu 1"),
    (too_large, "--batch-gpu 1", "take a smaller --resolution or --channels")])
def test_out_of_memory_names_the_batch_to_take(allocate, text, advice, tmp_path):
    def hungry(*args):
        allocate()

    with pytest.raises(UserError, match=f"^out of memory: {advice}$"):
        train.train(options(tmp_path / "run", text), latents(), loss=hungry)


def test_running_out_of_memory_and_an_interrupt_are_one_line(capsys):
    with pytest.raises(SystemExit) as e, Parser().one_line_errors():
        torch.empty(2 ** 60, dtype=torch.uint8)
    assert e.value.code == 2 and "out of memory" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e, Parser().one_line_errors():
        raise KeyboardInterrupt
    assert e.value.code == 130 and "interrupted; what is written" in capsys.readouterr().err


# Presets

def test_presets_are_the_recipes_table():
    """Every number of the README's table, read from it."""
    rows = []
    for line in (ROOT / "README.md").read_text().splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.split("|")[1:-1]])
    head = next(i for i, row in enumerate(rows) if "`church128`" in row)
    table = {row[0]: row[1:] for row in rows[head + 1:head + 11]}

    def numbers(topic, column) -> list:
        """Those in the row about this topic."""
        cells = next(cells for name, cells in table.items() if topic in name)
        return [float(n) for n in re.findall(r"[\d.]+(?:e-?\d+)?", cells[column])]

    for column, preset in enumerate(name.strip("`") for name in rows[head][1:]):
        args = train.options(["--preset", preset, "--data", "x"])
        side = args.resolution
        attention = unet_config(args, 3, side, side, 0)["attention"]
        kimg = 1 if preset == "tiny" else 1000                  # of the unit in the table
        assert numbers("images", column) == [side, side]
        assert numbers("width", column) == args.mult
        assert numbers("attention", column) == [args.blocks, *attention]
        assert numbers("batch", column) == [args.batch, args.lr]
        assert numbers("warm-up", column) == [args.warmup / kimg, args.duration / kimg]
        regularized = [*numbers("dropout", column), 0, 0]       # "none" is not written as 0
        assert regularized[:2] == [args.dropout, args.augment]
        assert numbers("half-life", column) == [args.ema]
        assert numbers("sampling", column) == [2 * args.sample_steps - 1]


def test_presets_have_the_papers_sizes():
    assert vars(train.options(["--data", "cifar10"])) \
        == {**vars(train.options(["--preset", "cifar10"])), "data": "cifar10"}
    with torch.device("meta"):
        # the paper has 55,733,891 and 61,805,571 for one head; the second one's layer has 6,915 and
        # 3,459 more
        for name, count in (("cifar10", 55_740_806), ("ffhq64", 61_809_030), ("tiny", 423_870)):
            args = train.options(["--preset", name])
            unet = UNet(**unet_config(args, 3, args.resolution, args.resolution, 0))
            assert sum(p.numel() for p in unet.parameters()) == count
