"""The first minutes on a GPU: does everything run, does it compute what a CPU does, how fast is it.

    python -m study.gpu                                # eight minutes; results in runs/first-gpu/
    python -m study.gpu --batch-gpu 128                # options of train.py, for smaller cards
    python -m study.gpu --device cpu --quick           # toy sizes, to try this program itself

The parts come in the order of their worth. Each starts if the time that it needs is left; one that
fails is reported, and the others go on. Results are lines of JSON as soon as they are known, also
in results.jsonl, and a table at the end. It downloads nothing. It ends with 1 where something
failed.
"""
import argparse
import copy
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import train
from data import Images, gather, shuffled
from degrade import ConstantBNR
from fid import frechet_distance
from loss import disentangled_loss
from model import Denoiser, UNet
from sample import generate, sample
from study.speed import edms_loop
from util.checkpoint import tf32
from util.cli import Parser, add_device_option, number
from util.files import refuse_special
from util.images import normalize, save_image
from util.inception import InceptionV3
from util.run import make_config, make_network

ROOT = Path(__file__).parent.parent
HALF = ConstantBNR(0.5)
TINY = ["--preset", "tiny", "--channels", "16", "--batch", "32"]


class Enough(Exception):
    """Ends train.train() from its on_log, before it saves anything."""


class Report:
    """What is known so far, {part: {name: value}}, and the time that is left."""

    def __init__(self, file: Path, seconds: float):
        self.file = file
        self.end = time.time() + seconds
        self.parts = {}
        file.write_text("")

    def left(self) -> float:
        return self.end - time.time()

    def add(self, part: str, **values) -> None:
        """Prints the values at once: a run that is stopped has told what it knew."""
        self.parts.setdefault(part, {}).update(values)
        line = json.dumps({"part": part, **values})
        print(line, flush=True)
        with open(self.file, "a") as f:
            print(line, file=f)

    def run(self, part: str, needs: float, function) -> None:
        """function(part), if so many seconds are left."""
        if self.left() < needs:
            self.add(part, skipped=f"{self.left():.0f} s are left, and it needs {needs:g}")
            return
        start = time.time()
        try:
            function(part)
        except Exception as error:                              # the other parts go on
            traceback.print_exc()
            message = " ".join(str(error).split())[:300]
            self.add(part, failed=f"{type(error).__name__}: {message}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.add(part, seconds=round(time.time() - start, 1))

    def failed(self) -> list:
        return [part for part, values in self.parts.items() if "failed" in values]


class Minutes:
    """The parts. Each is a method that adds to the report under the name that it is given."""

    def __init__(self, args, report: Report):
        self.args = args
        self.report = report
        self.device = torch.device(args.device)
        self.is_gpu = self.device.type == "cuda"
        self.preset = ["--preset", "cifar10"]
        self.side = 32
        self.batches = (512, 128)               # of training
        self.steps = 10                         # of training, between log lines
        if args.quick:
            self.preset = ["--preset", "tiny", "--channels", "8", "--augment", "0.12"]
            self.side = 16
            self.batches = (16, 8)
            self.steps = 2

    # The machine

    def machine(self, part: str) -> None:
        facts = {"torch": torch.__version__, "cores": os.cpu_count(),
                 "threads": torch.get_num_threads()}
        if self.is_gpu:
            gpu = torch.cuda.get_device_properties(self.device)
            facts["gpu"] = gpu.name
            facts["gib"] = round(gpu.total_memory / 2 ** 30, 1)
            facts["cuda"] = torch.version.cuda
            facts["cudnn"] = torch.backends.cudnn.version()
        n = 128 if self.args.quick else 8192
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            if dtype != torch.bfloat16:
                n = min(n, 4096)
            m = torch.randn(n, n, device=self.device).to(dtype)
            seconds = self.seconds(partial(torch.mm, m, m), 5)
            name = str(dtype).removeprefix("torch.")
            facts[f"product_tflops_{name}"] = round(2 * n ** 3 / seconds / 1e12, 2)
        source = torch.empty(2 ** 20 if self.args.quick else 2 ** 30, dtype=torch.uint8,
                             device=self.device)
        seconds = self.seconds(partial(torch.empty_like(source).copy_, source), 5)
        facts["copy_tb_per_s"] = round(2 * source.numel() / seconds / 1e12, 3)
        self.report.add(part, **facts)

    # The programs, as a user starts them, several at once

    def programs(self, part: str) -> None:
        work = Path(self.args.out, "programs").resolve()
        write_inputs(work)
        device = ["--device", self.args.device]
        compiled = ["--compile"] if self.is_gpu else ["--no-compile"]
        small = ["train.py", *TINY, "--duration", "0.32", "--log-every", "0.16", "--snapshot-every",
                 "0.32", "--sample-steps", "3"]
        on_array = [*small, "--data", "a.npy", *device]
        eager = [*on_array, "--no-compile"]
        trained = {
            "train": [*eager, "--augment", "0.2", "--out", "run"],
            "train on the CPU": [*small, "--data", "a.npy", "--device", "cpu", "--no-compile",
                                 "--out", "run-cpu"],
            "train compiled": [*on_array, *compiled, "--out", "run-compiled"],
            "train --cond": [*small, "--data", "classes", "--cond", "--batch-gpu", "8", *device,
                             "--no-compile", "--out", "run-cond"],
            "train --bnr any": [*eager, "--bnr", "any", "--out", "run-any"],
            "train --bnr inf": [*eager, "--bnr", "inf", "--out", "run-inf"],
            "train --schedule": [*eager, "--schedule", "blurring", "--out", "run-blurring"],
            "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=1",
                         str(ROOT / "train.py"), *eager[1:], "--out", "run-torchrun"],
            "degrade": ["degrade.py", "--out", "degrade.png"],
        }
        sampled = {"resume": ["train.py", "--resume", "run", "--duration", "0.64", *device,
                              "--no-compile"]}
        draw = ["sample.py", "--seeds", "0-11", "--batch", "5"]
        of_cpu = [*draw, "--ckpt", "run-cpu/ema.pt"]
        for name, options in {"heun": [], "multistep": ["--solver", "multistep"],
                              "churn": ["--churn", "5"]}.items():
            sampled[name] = [*of_cpu, *options, *device, "--out", name]
            sampled[f"{name} on the CPU"] = [*of_cpu, *options, "--device", "cpu", "--out",
                                             f"{name}-cpu"]
        for precision in ("tf32", "bf16"):
            sampled[precision] = [*of_cpu, *device, "--precision", precision, "--out", precision]
        sampled["compiled"] = [*of_cpu, *device, *compiled[:self.is_gpu], "--out", "compiled"]
        sampled["--init"] = [*of_cpu, *device, "--init", "classes/a/0.png", "--level", "1", "--out",
                             "init"]
        sampled["--class"] = [*draw, "--ckpt", "run-cond/ema.pt", *device, "--class", "b", "--out",
                              "class"]
        sampled["--bnr 2"] = [*draw, "--ckpt", "run-any/ema.pt", *device, "--bnr", "2", "--out",
                              "bnr-2"]
        sampled["cold"] = [*draw, "--ckpt", "run-inf/ema.pt", *device, "--out", "cold"]
        fid = ["fid.py", "heun", "--ref", "classes", "--weights", "inception.pth", "--json"]
        scored = {"fid": [*fid, *device], "fid on the CPU": [*fid, "--device", "cpu"]}

        results = {}
        for commands in (trained, sampled, scored):
            results.update(self.at_once(commands, work))
        broken = {name: r["last"] for name, r in results.items() if r["code"]}
        self.report.add(part, passed=len(results) - len(broken))
        for name in ("heun", "multistep", "churn"):
            self.compare_folders(part, work, name, f"{name}-cpu")
        for precision in ("tf32", "bf16", "compiled"):
            self.compare_folders(part, work, precision, "heun-cpu")
        fids = [json.loads(results[name]["stdout"])[0]["fid"] for name in scored
                if not results[name]["code"]]
        self.report.add(part, fid_with_random_weights=fids)
        if broken:
            self.report.add(part, failed=broken)

    def at_once(self, commands: dict, work: Path) -> dict:
        """Runs Python's command lines beside each other: {name: code, stdout, last line of stderr}.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        started = {}
        for name, line in commands.items():
            if line[0].endswith(".py"):
                line = [str(ROOT / line[0]), *line[1:]]
            started[name] = subprocess.Popen([sys.executable, *line], cwd=work, env=environment,
                                             text=True, stdout=subprocess.PIPE,
                                             stderr=subprocess.PIPE)
        results = {}
        for name, process in started.items():
            try:
                stdout, stderr = process.communicate(timeout=max(1, self.report.left()))
            except subprocess.TimeoutExpired:
                process.kill()
                stdout, stderr = process.communicate()
            lines = stderr.replace("\r", "\n").splitlines() or [""]
            results[name] = {"code": process.returncode, "stdout": stdout, "last": lines[-1][:200]}
        return results

    def compare_folders(self, part: str, work: Path, ours: str, cpu: str) -> None:
        """How far the images of a folder are from those of the CPU, in gray levels."""
        files = sorted((work / ours).glob("*.png"))
        largest = 0
        differ = 0
        pixels = 1e-9
        for file in files:
            a = np.asarray(Image.open(file)).astype(int)
            b = np.asarray(Image.open(work / cpu / file.name))
            largest = max(largest, int(np.abs(a - b).max()))
            differ += int((a != b).sum())
            pixels += a.size
        self.report.add(part, **{f"{ours} beside the CPU": {
            "images": len(files), "largest difference": largest,
            "share of values that differ": round(differ / pixels, 5)}})

    # What the preset's network computes, away from its initial values

    def numbers(self, part: str) -> None:
        cpu_net = stirred(self.network())
        device_net = copy.deepcopy(cpu_net).to(self.device, memory_format=torch.channels_last)
        expected = self.loss_and_gradient(cpu_net, "cpu", bf16=False)
        for bf16 in (False, True):
            result = self.loss_and_gradient(device_net, self.device, bf16)
            name = "bf16" if bf16 else "fp32"
            self.report.add(part, **{f"eager {name} beside the CPU: loss, gradient":
                                     [distance(a, b) for a, b in zip(result, expected)]})
        for solver in ("heun", "multistep"):
            images = []
            for net in (device_net, cpu_net):
                batches = generate(net, HALF, (3, self.side, self.side), range(2), steps=6,
                                   solver=solver)
                images.append(torch.cat(list(batches)))
            self.report.add(part, **{f"{solver} beside the CPU: images": distance(*images)})
        if self.is_gpu:
            self.compiled_numbers(part)

    def compiled_numbers(self, part: str) -> None:
        """A smaller network, which compiles in less time."""
        net = stirred(Denoiser(UNet(3, 6, 64, (2, 2), 1, (self.side // 2,), self.side)))
        net = net.to(self.device, memory_format=torch.channels_last)
        compiled = copy.deepcopy(net)
        compiled.unet.compile()
        for bf16 in (False, True):
            expected = self.loss_and_gradient(net, self.device, bf16)
            result = self.loss_and_gradient(compiled, self.device, bf16)
            name = "bf16" if bf16 else "fp32"
            self.report.add(part, **{f"compiled {name} beside eager: loss, gradient":
                                     [distance(a, b) for a, b in zip(result, expected)]})

    def loss_and_gradient(self, net: Denoiser, device, bf16: bool) -> list:
        """Both terms [2, 8] and the gradient of their sum, of the same eight images each time."""
        generator = torch.Generator().manual_seed(1)
        x0 = normalize(smooth_images(8, self.side, seed=3)).to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        alpha, sigma = HALF.levels(torch.logspace(-2, 1, 8))
        net.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            terms = disentangled_loss(net, x0, alpha.to(device), sigma.to(device), noise,
                                      net.sigma_data)
        terms = torch.stack(terms)
        terms.sum().backward()
        gradients = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        return [terms.detach(), torch.cat(gradients)]

    # Where the CPU waits for the GPU

    def waits(self, part: str) -> None:
        if not self.is_gpu:
            self.report.add(part, skipped="a CPU waits for nothing")
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")

            def on_line(i):
                torch.cuda.set_sync_debug_mode("warn" if i == 0 else "default")
            self.log_lines(["--batch", "16", "--no-compile"], 2, on_line)
        self.report.add(part, **{f"training, {self.steps} steps and a log line": places(caught)})

        net = self.network().to(self.device).eval().requires_grad_(False)
        for solver, steps in (("heun", 3), ("multistep", 12)):
            draw = partial(generate, net, HALF, (3, self.side, self.side), range(4), steps=steps,
                           solver=solver)
            list(draw())
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                list(draw())
                torch.cuda.set_sync_debug_mode("default")
            self.report.add(part, **{f"{solver}, {steps} steps": places(caught)})

    # Training

    def training(self, part: str, batch: int, compiled: bool) -> None:
        """The rates of train.py's own log, and the memory."""
        torch.compiler.reset()
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.time()
        first = []

        def on_line(i):
            first.append(time.time() - start)
        how = "--compile" if compiled else "--no-compile"
        lines = self.log_lines(["--batch", str(batch), how], 4, on_line)
        rates = [line["images_per_s"] for line in lines[1:]]
        facts = {"images_per_s": rates, "ms_a_step": round(1000 * batch / max(rates), 2),
                 "seconds_until_the_first_line": round(first[0], 1)}
        if self.is_gpu:
            facts["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
            facts["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2 ** 30, 2)
        self.report.add(part, **facts)

    def profile(self, part: str) -> None:
        """What the GPU does in a compiled step."""
        from torch.profiler import ProfilerActivity, profile
        activities = [ProfilerActivity.CPU]
        if self.is_gpu:
            activities.append(ProfilerActivity.CUDA)
        profiler = profile(activities=activities)
        clock = []

        def on_line(i):
            clock.append(time.time())
            if i == 0:
                profiler.start()
            if i == 1:
                profiler.stop()
        how = "--compile" if self.is_gpu else "--no-compile"
        self.log_lines(["--batch", str(self.batches[0]), how], 2, on_line)
        kernels = [e for e in profiler.key_averages() if str(e.device_type).endswith("CUDA")]
        kernels.sort(key=lambda e: -e.self_device_time_total)
        busy = sum(e.self_device_time_total for e in kernels) / 1e6
        top = [[e.key[:70], round(e.self_device_time_total / 1000 / self.steps, 2)]
               for e in kernels[:12]]
        self.report.add(part, gpu_busy=round(busy / (clock[1] - clock[0]), 3),
                        kernels_a_step=round(sum(e.count for e in kernels) / self.steps),
                        longest_ms_a_step=top)

    def edm_like(self, part: str) -> None:
        """A loop like EDM's: fp32 without TF32, eager, channels first."""
        batch = self.batches[1]
        args = self.options(["--batch", str(batch)])
        edms_steps = edms_loop(args, Images(smooth_images(2000, self.side)))
        edms_steps(1)
        n = 1 if self.args.quick else 3
        seconds = self.seconds(partial(edms_steps, n), 1, warm=0)
        self.report.add(part, images_per_s=[round(n * batch / seconds, 1)])

    # Sampling

    def sampling(self, part: str) -> None:
        """Images a second at NFE 35, from fewer steps."""
        net = stirred(self.network()).to(self.device, memory_format=torch.channels_last)
        net = net.eval().requires_grad_(False)
        few = 2 if self.args.quick else 4

        def rate(batch, context, net=net):
            z = torch.randn(batch, 3, self.side, self.side, device=self.device)

            def draw():
                with context():
                    sample(net, HALF, z, few)
            seconds = self.seconds(draw, 1, warm=1) * 35 / (2 * few - 1)
            return round(batch / seconds, 2)
        bf16 = partial(torch.autocast, self.device.type, torch.bfloat16)
        fp32 = partial(torch.autocast, self.device.type, enabled=False)
        batches = (4, 8) if self.args.quick else (64, 256)
        for name, context in (("fp32", fp32), ("tf32", tf32), ("bf16", bf16)):
            for batch in batches:
                self.report.add(part, **{f"eager {name}, batch {batch}": rate(batch, context)})
        if self.is_gpu and self.report.left() > 90:
            net.unet.compile()
            self.report.add(part, **{f"compiled bf16, batch {batches[1]}": rate(batches[1], bf16)})

        folder = Path(self.args.out, "pngs")
        folder.mkdir(exist_ok=True)
        start = time.perf_counter()
        for i, image in enumerate(smooth_images(64, self.side)):
            save_image(image, folder / f"{i}.png")
        self.report.add(part, ms_a_png=round(1000 / 64 * (time.perf_counter() - start), 3))

    # Data and FID

    def data_and_fid(self, part: str) -> None:
        images = smooth_images(5000, self.side)
        batch = self.batches[0]
        gathered = partial(gather, images, shuffled(0, batch, len(images), 0), self.device)
        self.report.add(part, ms_a_batch=round(1000 * self.seconds(gathered, 10), 3))

        torch.manual_seed(0)
        net = InceptionV3().eval().requires_grad_(False)
        n = 2 if self.args.quick else 256
        with torch.no_grad():
            expected = net(images[:2])
            net = net.to(self.device, memory_format=torch.channels_last)
            self.report.add(part, features_beside_the_cpu=distance(net(images[:2]), expected))
            seconds = self.seconds(partial(net, images[:n]), 3, warm=1)
        self.report.add(part, features_images_per_s=round(n / seconds, 1))
        if not self.args.quick:
            x = torch.randn(4096, 2048, dtype=torch.float64)
            cov = x.T @ x / len(x)
            start = time.time()
            frechet_distance(x[0], cov, x[1], cov)
            self.report.add(part, frechet_distance_s=round(time.time() - start, 2))

    # What these share

    def options(self, more: list) -> argparse.Namespace:
        args = train.options([*self.preset, "--device", self.args.device, "--warmup", "0", "--out",
                              str(Path(self.args.out, "run")), "--snapshot-every", "0", *more,
                              *self.args.others])
        args.log_every = self.steps * args.batch / 1000
        return args

    def network(self) -> Denoiser:
        """The preset's network on the CPU."""
        args = self.options([])
        data = Images(smooth_images(2, self.side))
        return make_network(args, data, make_config(args, data, HALF, None, None), None)

    def log_lines(self, more: list, n: int, on_line) -> list:
        """The first n log lines of train.py, `steps` steps each. on_line(i) is called at each."""
        lines = []

        def on_log(line):
            on_line(len(lines))
            lines.append(line)
            if len(lines) == n:
                raise Enough
        args = self.options(more)
        args.duration = n * args.log_every
        try:
            train.train(args, Images(smooth_images(2000, self.side)), on_log=on_log)
        except Enough:
            pass
        return lines

    def seconds(self, function, n: int, warm: int = 2) -> float:
        """The mean time of n calls without a wait between them, after some that do not count."""
        for _ in range(warm):
            function()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            function()
        self.synchronize()
        return (time.perf_counter() - start) / n

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()


def smooth_images(n: int, side: int, seed: int = 0) -> torch.Tensor:
    """uint8 [n, 3, side, side]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    x = F.interpolate(coarse, (side, side), mode="bicubic")
    return (255 * x).clamp(0, 255).byte()


def write_inputs(work: Path) -> None:
    """An array, a folder with two classes, and random weights in the layout of the FID's."""
    refuse_special(work)
    work.mkdir(parents=True, exist_ok=True)
    np.save(work / "a.npy", smooth_images(300, 16).permute(0, 2, 3, 1).numpy())
    for seed, name in enumerate("ab"):
        folder = work / "classes" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(smooth_images(10, 16, seed)):
            save_image(image, folder / f"{i}.png")
    torch.manual_seed(0)
    net = InceptionV3()
    for weights in net.parameters():
        if weights.ndim == 4:
            torch.nn.init.kaiming_normal_(weights)              # else the features vanish
    torch.save(net.state_dict(), work / "inception.pth")


@torch.no_grad()
def stirred(net: Denoiser) -> Denoiser:
    """With weights away from their initial values, where the outputs are nearly 0; in eval mode."""
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return net.eval()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference over the norm of b."""
    a = a.double().cpu()
    b = b.double().cpu()
    return float(f"{((a - b).norm() / b.norm()).item():.3g}")


def places(caught: list) -> dict:
    """{"file.py:line": how often} of the warnings that something synchronizes."""
    counts = {}
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = f"{Path(warning.filename).name}:{warning.lineno}"
            counts[place] = counts.get(place, 0) + 1
    return counts


def table(parts: dict) -> None:
    """What is for the page: the rates, and how far it is from the CPU."""
    print()
    for part, values in parts.items():
        if "images_per_s" in values:
            rate = np.median(values["images_per_s"])
            memory = ""
            if "peak_gib" in values:
                memory = f"{values['peak_gib']:8.1f} GiB"
            print(f"{part:36}{rate:10.1f} images/s{memory}")
    for part in ("sampling", "numbers", "waits", "programs"):
        for name, value in parts.get(part, {}).items():
            if name != "seconds":
                print(f"{part}: {name}: {value}")


def main():
    p = Parser(prog="python -m study.gpu",
               description="The first minutes on a GPU. Options that are not named here are "
                           "train.py's.")
    add_device_option(p)
    p.add_argument("--seconds", type=number(float, 1), default=470.,
                   help="the time there is (default 470)")
    p.add_argument("--out", default="runs/first-gpu",
                   help="folder of what it writes (default runs/first-gpu)")
    p.add_argument("--only", nargs="+", help="these parts alone")
    p.add_argument("--quick", action="store_true", help="toy sizes, to try it on a CPU")
    args, args.others = p.parse_known_args()
    with p.one_line_errors():
        Path(args.out).mkdir(parents=True, exist_ok=True)
        cache = str(Path(args.out, "compiled").resolve())
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        report = Report(Path(args.out, "results.jsonl"), args.seconds)
        minutes = Minutes(args, report)
        large, small = minutes.batches
        parts = [                                               # name, seconds, function
            ("machine", 20, minutes.machine),
            ("programs", 90, minutes.programs),
            ("numbers", 40, minutes.numbers),
            ("waits", 25, minutes.waits),
            (f"training eager, {large}", 45,
             partial(minutes.training, batch=large, compiled=False)),
            (f"training compiled, {large}", 110,
             partial(minutes.training, batch=large, compiled=True)),
            ("profile", 30, minutes.profile),
            ("sampling", 45, minutes.sampling),
            ("data", 15, minutes.data_and_fid),
            (f"training EDM-like, {small}", 30, minutes.edm_like),
            (f"training eager, {small}", 20,
             partial(minutes.training, batch=small, compiled=False)),
            (f"training compiled, {small}", 90,
             partial(minutes.training, batch=small, compiled=True)),
        ]
        for name, needs, function in parts:
            is_wanted = not args.only or name in args.only
            is_possible = minutes.is_gpu or "compiled" not in name
            if is_wanted and is_possible:
                report.run(name, needs * (not args.quick), function)
        table(report.parts)
        print(f"failed: {', '.join(report.failed()) or 'nothing'}")
    sys.exit(1 if report.failed() else 0)


if __name__ == "__main__":
    main()
