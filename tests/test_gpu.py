"""study/gpu.py, the first minutes on a GPU, tried at toy size on a CPU."""
import json

import pytest

from runs import command_line
from study import gpu


def start(out, *more):
    """The program's exit code, and its results by part."""
    with pytest.raises(SystemExit) as e:
        command_line(gpu.main, "--device", "cpu", "--quick", "--out", out, *more)
    parts = {}
    for line in (out / "results.jsonl").read_text().splitlines():
        values = json.loads(line)
        parts.setdefault(values.pop("part"), {}).update(values)
    return e.value.code, parts


def test_every_part_but_the_programs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["machine", "numbers", "waits", "training eager, 16", "profile", "sampling", "data",
             "training EDM-like, 8"]
    code, parts = start(tmp_path / "out", "--only", *names)
    assert code == 0 and list(parts) == names
    assert all("failed" not in values for values in parts.values()), parts
    assert len(parts["training eager, 16"]["images_per_s"]) == 3
    fp32 = parts["numbers"]["eager fp32 beside the CPU: loss, gradient"]
    bf16 = parts["numbers"]["eager bf16 beside the CPU: loss, gradient"]
    assert max(fp32) < 1e-5 < max(bf16) < 0.1
    assert parts["sampling"]["eager bf16, batch 4"] > 0
    assert capsys.readouterr().out.splitlines()[-1] == "failed: nothing"
    assert not list((tmp_path / "out").glob("run/*.pt"))        # it measures, and saves nothing


def test_a_part_that_fails_is_reported_and_one_without_time_is_skipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/pngs").write_text("in the way")
    code, parts = start(tmp_path / "out", "--only", "sampling", "machine")
    assert code == 1 and "FileExistsError" in parts["sampling"]["failed"]
    assert "failed" not in parts["machine"]
    report = gpu.Report(tmp_path / "results.jsonl", seconds=10)
    report.run("long", 11, None)
    assert "skipped" in report.parts["long"] and not report.failed()


@pytest.mark.slow
def test_the_programs_run_and_agree_with_the_cpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, parts = start(tmp_path / "out", "--only", "programs", "--seconds", "3000")
    programs = parts["programs"]
    assert code == 0 and programs["passed"] == 25 and "failed" not in programs
    assert programs["heun beside the CPU"]["largest difference"] == 0
    assert programs["bf16 beside the CPU"]["largest difference"] > 0
    ours, cpu = programs["fid_with_random_weights"]
    assert ours == cpu > 1e-3
