"""A folder of samples belongs to one draw: the same command goes on with it, another is refused."""
import os

import pytest
from PIL import Image

import fid
import sample
import train
from runs import command_line, draw, largest_file, latents, options, pictures, refused


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two models of one run, at 4 and at 8 images."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train.train(options(out, "--keep-every 0.004 --duration 0.008"), pictures())
    return out


def test_the_same_command_goes_on_with_a_draw(trained, tmp_path):
    out = tmp_path / "samples"
    draw(trained / "ema.pt", out, "--seeds", "0-4,2,0")         # seeds given twice count once
    names = sorted(os.listdir(out))
    assert names == [f"{seed:06d}.png" for seed in range(5)] + ["draw.json"]
    images = {name: (out / name).read_bytes() for name in names}
    grid = (tmp_path / "samples-grid.png").read_bytes()
    (out / "000003.png").unlink()
    # the image of another seed in its place: a second draw of seed 1 would change it
    (out / "000001.png").write_bytes(images["000000.png"])
    draw(trained / "ema.pt", out, "--seeds", "0-4", "--batch", 2)
    assert (out / "000003.png").read_bytes() == images["000003.png"]
    assert (out / "000001.png").read_bytes() == images["000000.png"]
    (out / "000001.png").unlink()
    draw(trained / "ema.pt", out, "--seeds", "0-4")
    assert (tmp_path / "samples-grid.png").read_bytes() == grid


def test_another_draw_is_refused(trained, tmp_path, capsys):
    out = tmp_path / "samples"
    picture = tmp_path / "init.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    line = ["--ckpt", trained / "ema.pt", "--seeds", "0-2", "--steps", 2, "--device", "cpu",
            "--out", out, "--init", picture]
    command_line(sample.main, *line)
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    others = [["--ckpt", trained / "ema-000000.004.pt"], ["--seeds", "0-3"], ["--seeds", "3-5"],
              ["--steps", 3], ["--solver", "euler"], ["--level", 2], ["--churn", 1]]
    for other in others:
        assert "holds images of another draw" in refused(capsys, sample.main, *line, *other)
    Image.new("RGB", (8, 8), "blue").save(picture)               # the same name, another picture
    assert "holds images of another draw" in refused(capsys, sample.main, *line)
    assert before == {name: (out / name).read_bytes() for name in os.listdir(out)}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    Image.new("RGB", (8, 8)).save(foreign / "mine.png")
    assert "another draw" in refused(capsys, sample.main, *line, "--out", foreign)
    assert os.listdir(foreign) == ["mine.png"]


def test_fid_py_warns_of_an_unfinished_draw(trained, tmp_path, capsys):
    out = tmp_path / "samples"
    draw(trained / "ema.pt", out, "--seeds", "0-3")
    capsys.readouterr()
    assert len(fid.read_input(str(out), keep=False).images) == 4
    assert "draw" not in capsys.readouterr().err
    (out / "000002.png").unlink()
    fid.read_input(str(out), keep=False)
    assert "holds 3 of the 4 images of its draw" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["png", "npy"])
def test_an_image_is_written_whole_or_not_at_all(kind, trained, tmp_path, capsys):
    """Half of one would be taken for done by the same command."""
    if kind == "npy":
        train.train(options(tmp_path / "run", duration=0.004), latents())
        trained = tmp_path / "run"
    line = ["--ckpt", trained / "ema.pt", "--device", "cpu", "--steps", 2, "--seeds", "0-2",
            "--out", tmp_path / "s"]
    command_line(sample.main, *line)
    image = tmp_path / f"s/000001.{kind}"
    size = image.stat().st_size
    image.unlink()
    with largest_file(size // 2):
        message = refused(capsys, sample.main, *line)
    assert "File too large" in message and image.name in message
    assert not image.exists() and not list(tmp_path.rglob("*.part"))
