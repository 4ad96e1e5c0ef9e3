"""Beside the packages of others: whose blur, sampler or FID agrees with ours, and by how much. It
prints the tables of docs/peers.md.

    python3 -m venv .venv-peers && . .venv-peers/bin/activate
    pip install torch==2.13.0 torchvision==0.28.0   # both from one index: both CPU, or both CUDA
    pip install --no-deps -r study/peers-requirements.txt
    python -m study.peers                               # about half an hour on one core
    python -m study.peers blur samplers --ckpt run-hot/ema.pt run-warm/ema.pt
"""
import contextlib
import importlib
import json
import math
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageFilter

from data import load
from degrade import ConstantBNR, blur, dct2, frequencies, idct2
from fid import frechet_distance
from inception import InceptionV3, load_inception
from model import Denoiser, load_model
from sample import sample, sampling_path, seed_noise, time_steps
from study.common import steps_of
from train import options as train_options
from train import train
from util import Parser, UserError, full_float32, number

ALPHAS = (0.2, 0.3, 0.5, 1, 3, 40)              # in pixels
EVALUATIONS = (8, 12, 18, 35)


def imported(*names):
    """The modules of other packages. UserError where one is missing."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as e:
        raise UserError(f"{e}: pip install --no-deps -r study/peers-requirements.txt") from None


def table(*rows):
    """Prints rows of cells as a table of Markdown; the first row is the head."""
    for i, row in enumerate(rows):
        print("| " + " | ".join(map(str, row)) + " |")
        if i == 0:
            print("|" + "---|" * len(row))
    print(flush=True)


def figure(value):
    return f"{value:.2g}" if isinstance(value, float) else value


# Blur

def blurs():
    """Rows (name, border, function of float64 [H, W] and alpha in pixels)."""
    ndimage, fft, cv2, tv, kornia, torch_dct, dctorch = imported(
        "scipy.ndimage", "scipy.fft", "cv2", "torchvision.transforms.functional", "kornia.filters",
        "torch_dct", "dctorch.functional")

    def through(dct, idct):                     # the blur (1) by somebody's DCT
        def f(x, alpha):
            u = dct(torch.from_numpy(x))
            lam = frequencies(*x.shape)
            return np.asarray(idct(torch.as_tensor(u) * torch.exp(-lam * alpha ** 2 / 2)))
        return f

    def wide(alpha):                            # a kernel's width for 4 standard deviations a side
        return 2 * math.ceil(4 * alpha) + 1

    def pillow(x, alpha):
        image = Image.fromarray(np.uint8(np.round(x * 127.5 + 127.5)))
        return np.asarray(image.filter(ImageFilter.GaussianBlur(alpha))) / 127.5 - 1

    def torchvisions(x, alpha):
        return tv.gaussian_blur(torch.from_numpy(x)[None], wide(alpha), alpha)[0].numpy()

    def kornias(border):
        return lambda x, alpha: kornia.gaussian_blur2d(
            torch.from_numpy(x)[None, None], wide(alpha), (alpha, alpha), border)[0, 0].numpy()
    return [
        ("`scipy.ndimage.gaussian_filter(x, a)`", "reflect", ndimage.gaussian_filter),
        ("the same, `truncate=8`", "reflect", lambda x, a: ndimage.gaussian_filter(x, a,
                                                                                  truncate=8)),
        ("`cv2.GaussianBlur(x, (0, 0), a)`", "without the edge",
         lambda x, a: cv2.GaussianBlur(x, (0, 0), a)),
        ("the same, `borderType=BORDER_REFLECT`", "reflect",
         lambda x, a: cv2.GaussianBlur(x, (0, 0), a, borderType=cv2.BORDER_REFLECT)),
        ("Pillow `GaussianBlur(a)`, 8 bits", "edge goes on", pillow),
        ("`torchvision ... gaussian_blur`", "without the edge", torchvisions),
        ("`kornia.filters.gaussian_blur2d`", "without the edge", kornias("reflect")),
        ("the same, `border_type=\"replicate\"`", "edge goes on", kornias("replicate")),
        ("`scipy.fft.dctn(x, norm=\"ortho\")`, times M", "reflect",
         through(lambda x: fft.dctn(x.numpy(), norm="ortho"),
                 lambda u: fft.idctn(u.numpy(), norm="ortho"))),
        ("`torch_dct.dct_2d(x, norm=\"ortho\")`, times M", "reflect",
         through(lambda x: torch_dct.dct_2d(x, norm="ortho"),
                 lambda u: torch_dct.idct_2d(u, norm="ortho"))),
        ("`dctorch.functional.dct2(x)`, times M", "reflect", through(dctorch.dct2, dctorch.idct2))]


def blur_table():
    """The largest difference from (1)'s blur of random images of [-1, 1], by alpha, and how far the
    mean of one moves at alpha 3."""
    images = np.random.default_rng(0).uniform(-1, 1, (20, 32, 32))
    rows = [("blur", "border", *(f"alpha {a}" for a in ALPHAS), "mean moves at 3")]
    for name, border, function in blurs():
        cells = []
        for alpha in ALPHAS:
            right = blur(torch.from_numpy(images), alpha).numpy()
            try:
                found = np.stack([function(x, alpha) for x in images])
                cells.append(float(np.abs(found - right).max()))
            except (RuntimeError, ValueError) as e:
                cells.append(f"refused ({type(e).__name__})")
        moved = [function(x, 3).mean() - x.mean() for x in images]
        rows.append((name, border, *map(figure, cells), figure(float(np.abs(moved).max()))))
    table(*rows)


# Samplers

def samplers():
    """Rows (name, time steps, function of denoise(x, sigma), latents and a number of evaluations
    -> images and the evaluations it took). Those of others know hot diffusion only."""
    diffusers, ks, ad, an, asample, sd = imported(
        "diffusers", "k_diffusion.sampling", "azula.denoise", "azula.noise", "azula.sample",
        "smalldiffusion")

    def ours(solver):
        def f(denoise, latents, n):
            steps = steps_of(solver, n)

            def heads(x, alpha, sigma):
                d = denoise(x, sigma)
                return d, torch.zeros_like(d)
            return sample(heads, ConstantBNR(0), latents, steps, solver=solver)
        return f

    def k(name, spacing="karras", calls=1, **options):
        def f(denoise, latents, n):
            levels = getattr(ks, f"get_sigmas_{spacing}")((n + calls - 1) // calls, 0.002, 80.)
            with contextlib.redirect_stderr(None):
                return getattr(ks, f"sample_{name}")(denoise, 80 * latents, levels.double(),
                                                     disable=True, **options)
        return f

    def fast(denoise, latents, n):
        return ks.sample_dpm_fast(denoise, 80 * latents, 0.002, 80., n, disable=True)

    def edm(scheduler=diffusers.EDMDPMSolverMultistepScheduler, **options):
        def f(denoise, latents, n):
            s = scheduler(**options)
            s.set_timesteps(n)
            x = 80 * latents                    # its init_noise_sigma is sqrt(80^2 + 1)
            for t, sigma in zip(s.timesteps, s.sigmas.double()):
                s.scale_model_input(x, t)       # it takes the raw network's answer, F of (7)
                c_skip = 0.25 / (sigma ** 2 + 0.25)
                c_out = 0.5 * sigma / (sigma ** 2 + 0.25).sqrt()
                raw = (denoise(x, sigma) - c_skip * x) / c_out
                x = s.step(raw, t, x).prev_sample
            return x
        return f

    def azula(name, calls=1, **options):
        class Net(ad.Denoiser):
            schedule = an.VESchedule(0.002, 80.)

            def __init__(self, denoise):
                super().__init__()
                self.denoise = denoise

            def forward(self, x, t):
                return ad.DiracPosterior(mean=self.denoise(x, self.schedule.sigma(t)))
        return lambda denoise, latents, n: getattr(asample, name)(
            Net(denoise), steps=n // calls, silent=True, dtype=torch.float64, **options)(
                80 * latents)

    def small(gam):
        class Net(nn.Module, sd.ModelMixin):
            input_dims = (1,)

            def predict_eps_cfg(self, x, sigma, cond, scale):
                return (x - self.denoise(x, sigma)) / sigma

        def f(denoise, latents, n):
            net = Net()
            net.denoise = denoise
            *_, x = sd.samples(net, time_steps(n), gam=gam, xt=80 * latents)
            return x
        return f
    edm_steps, even = "EDM's (11)", "even in ln sigma"
    return [
        ("ours, multistep", "its own", ours("multistep")),
        ("ours, Heun", edm_steps, ours("heun")),
        ("ours, Euler", edm_steps, ours("euler")),
        ("k-diffusion heun", edm_steps, k("heun", calls=2)),
        ("k-diffusion dpmpp_2m", edm_steps, k("dpmpp_2m")),
        ("k-diffusion dpmpp_2m", even, k("dpmpp_2m", "exponential")),
        ("k-diffusion dpmpp_3m_sde, eta 0", edm_steps, k("dpmpp_3m_sde", eta=0)),
        ("k-diffusion dpmpp_3m_sde, eta 0", even, k("dpmpp_3m_sde", "exponential", eta=0)),
        ("k-diffusion dpm_fast", even, fast),
        ("diffusers EDMEuler", edm_steps, edm(diffusers.EDMEulerScheduler)),
        ("diffusers EDMDPM, order 1", edm_steps, edm(solver_order=1)),
        ("diffusers EDMDPM, order 2 midpoint", edm_steps, edm()),
        ("diffusers EDMDPM, order 2 heun", edm_steps, edm(solver_type="heun")),
        ("diffusers EDMDPM, order 3", edm_steps, edm(solver_order=3)),
        ("diffusers EDMDPM, order 2 midpoint", even, edm(sigma_schedule="exponential")),
        ("azula DDIM", even, azula("DDIMSampler", eta=0.)),
        ("azula Heun", even, azula("HeunSampler", calls=2)),
        ("azula REAB, order 2", even, azula("REABSampler")),
        ("smalldiffusion, gam 1", edm_steps, small(1.)),
        ("smalldiffusion, gam 1.5", edm_steps, small(1.5)),
        ("smalldiffusion, gam 2", edm_steps, small(2.))]


class Counted:
    """denoise(x, sigma) that counts its calls; sigma a number, 0-d or [B]."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, x, sigma, **unused):
        self.calls += 1
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        return self.function(x.double(), sigma.flatten()[0] if sigma.ndim else sigma)


def power_law(n):
    """S = A / lam with total variance 0.25 a pixel; the mean's S is the next one's. [n, n]"""
    lam = frequencies(n, n).clone()
    lam[0, 0] = lam[0, 1]
    return 0.25 * (1 / lam) / (1 / lam).mean()


def sampler_rows(denoise, latents, right, scale, rows):
    """Rows of the rms error of each sampler; scale [...]: what the error is divided by."""
    for name, steps, function in rows:
        cells = []
        for n in EVALUATIONS:
            counted = Counted(denoise)
            error = dct2(function(counted, latents, n) - right) / scale
            note = "" if counted.calls == n else f" ({counted.calls})"
            cells.append(f"{error.square().mean().sqrt().item():.4f}{note}")
        yield name, steps, *cells


def sampler_tables(ckpts, count):
    """On Gaussian data with the exact heads: the rms relative error of the gain of 32 x 32
    frequencies. On networks: the rms distance over pixels to the converged flow."""
    spectrum = power_law(32)
    unit = idct2(torch.ones(1, 1, 32, 32, dtype=torch.float64))
    gain = (spectrum / (spectrum + 80 ** 2)).sqrt() * 80
    head = ("sampler", "time steps", *(f"{n} evaluations" for n in EVALUATIONS))

    def exact(x, sigma):
        return idct2(spectrum / (spectrum + sigma ** 2) * dct2(x))
    print("Gaussian data, hot")
    table(head, *sampler_rows(exact, unit, idct2(gain), gain, samplers()))
    for ckpt in ckpts:
        net, checkpoint = load_model(ckpt)
        path, shape = sampling_path(checkpoint), checkpoint["data"]["shape"]
        latents = seed_noise(range(count), shape)()
        right = sample(net, path, latents, 100, solver="heun")
        print(f"{ckpt}, BNR {path.bnr:g}, {checkpoint['seen'] / 1000:g} kimg, {count} samples")
        if path.bnr == 0:
            table(head, *sampler_rows(lambda x, s: net(x, 0., s)[0].double(), latents, right, 1,
                                      samplers()))
            continue
        rows = []
        for name in ("multistep", "heun", "euler"):
            errors = [(sample(net, path, latents, steps_of(name, n), solver=name) - right)
                      .square().mean() for n in EVALUATIONS]
            rows.append((f"ours, {name}", "its own" if name == "multistep" else "EDM's (11)",
                         *(f"{e.sqrt().item():.4f}" for e in errors)))
        table(head, *rows)


# FID

def random_weights(filename):
    """Inception weights in the published layout, filled at random, always the same."""
    state = InceptionV3().state_dict()
    for name, old in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(old.shape))
        if name.endswith("running_var"):
            z = np.exp(0.2 * z)
        elif name.endswith("bn.weight"):
            z = 1 + 0.1 * z
        elif name.endswith(("running_mean", "bias")):
            z = 0.1 * z
        else:
            z = z * math.sqrt(2 / np.prod(old.shape[1:]))
        state[name] = torch.from_numpy(np.float32(z))
    torch.save(state, filename)


def pictures(n, seed, slope):
    """uint8 [n, 3, 32, 32]: Gaussian fields with power 1 / lam^slope."""
    g = torch.Generator().manual_seed(seed)
    spectrum = power_law(32) ** slope
    spectrum = 0.25 * spectrum / spectrum.mean()
    x = idct2(spectrum.sqrt() * torch.randn(n, 3, 32, 32, generator=g, dtype=torch.float64))
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def extractors(weights):
    """Rows (name, features of uint8 [B, 3, 32, 32], distance of two sets of features)."""
    pytorch_fid, score, fidelity, metric, metrics, clean, cleanfid = imported(
        "pytorch_fid.inception", "pytorch_fid.fid_score", "torch_fidelity",
        "torch_fidelity.metric_fid", "torchmetrics.image.fid", "cleanfid.resize", "cleanfid.fid")
    net, _ = load_inception(weights)
    pytorch_fid.load_state_dict_from_url = lambda *a, **k: torch.load(weights, weights_only=True)
    theirs = pytorch_fid.InceptionV3([3]).eval()
    bare = pytorch_fid.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    compatible = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"],
                                                      feature_extractor_weights_path=weights).eval()

    def moments(f):
        return f.mean(0), np.cov(f, rowvar=False)

    def ours(a, b):
        return frechet_distance(*moments(a), *moments(b))

    def root(function):
        return lambda a, b: function(*moments(a), *moments(b))

    def fidelitys(a, b):
        stats = [dict(zip(("mu", "sigma"), moments(f))) for f in (a, b)]
        found = metric.fid_statistics_to_metric(*stats, verbose=False)
        return found["frechet_inception_distance"]

    def metrics_distance(a, b):
        (mu1, c1), (mu2, c2) = ((torch.from_numpy(v) for v in moments(f)) for f in (a, b))
        return metrics._compute_fid(mu1, c1, mu2, c2).item()

    def torchmetric(antialias):
        return metrics.NoTrainInceptionV3("inception-v3-compat", ["2048"], weights,
                                          antialias=antialias)

    def resized(mode, middle, half):            # its resize rule, and pytorch-fid's network: its
        resize = clean.build_resizer(mode)      # own is fetched as a compiled file

        def features(x):
            some = [torch.from_numpy(resize(i.permute(1, 2, 0).numpy())).permute(2, 0, 1)
                    for i in x]
            return bare((torch.stack(some) - middle) / half)[0].flatten(1)
        return features
    antialiased, tf1 = torchmetric(True), torchmetric(False)
    return [
        ("`fid.py --resize tf1`", net, ours),
        ("torch-fidelity, its default", lambda x: compatible(x)[0], fidelitys),
        ("torchmetrics, `antialias=False`", lambda x: tf1(x), metrics_distance),
        ("`fid.py --resize pytorch`", lambda x: net(x, resize="pytorch"), ours),
        ("pytorch-fid", lambda x: theirs(x / 255)[0].flatten(1),
         root(score.calculate_frechet_distance)),
        ("torchmetrics, its default", lambda x: antialiased(x), metrics_distance),
        ("clean-fid `legacy_pytorch`", resized("legacy_pytorch", 127.5, 127.5),
         root(cleanfid.frechet_distance)),
        ("clean-fid `clean`, its default", resized("clean", 128, 128),
         root(cleanfid.frechet_distance))]


@torch.no_grad()
def fid_table(n):
    """Two sets of n images: how far the features are from both of fid.py's, and the distances."""
    sets = pictures(n, 0, 1.), pictures(n, 1, 1.2)
    features = {}
    with tempfile.TemporaryDirectory() as folder:
        random_weights(f"{folder}/weights.pth")
        for name, function, distance in extractors(f"{folder}/weights.pth"):
            a, b = (np.concatenate([function(x).double().numpy() for x in images.split(50)])
                    for images in sets)
            try:
                found = f"{distance(a, b):.4f}"
            except (ValueError, TypeError) as e:
                found = f"{type(e).__name__}: {e}"
            features[name] = a, found
    names = list(features)
    rows = [("FID of", "features from tf1's", "from pytorch's", "distance")]
    for name, (a, found) in features.items():
        apart = [np.sqrt(np.mean((a - features[names[i]][0]) ** 2)) / features[names[i]][0].std()
                 for i in (0, 3)]
        rows.append((name, *(f"{v:.1e}" for v in apart), found))
    table(*rows)


def folder_table():
    """Which files of a folder each of them reads."""
    score, utils, cleanfid = imported("pytorch_fid.fid_score", "torch_fidelity.utils",
                                      "cleanfid.fid")
    names = ["a.png", "b.jpg", "c.JPG", "d.PNG", "e.bmp", "f.webp", "g.tif", "below/h.png"]

    def found_by_score(root):
        found = []
        score.calculate_activation_statistics = lambda files, *a, **k: (found.extend(files), None)
        score.compute_statistics_of_path(str(root), None, 1, 2048, "cpu")
        return found

    def found_by_clean(root):
        cleanfid.get_files_features = lambda files, *a, **k: files
        return cleanfid.get_folder_features(str(root), verbose=False)

    def found_by_fidelity(root):
        return utils.glob_samples_paths(str(root), False, "png,jpg,jpeg", verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "images"
        (root / "below").mkdir(parents=True)
        for name in names:
            Image.new("RGB", (16, 16)).save(root / name)
        rows = [("reads", *names)]
        for name, function in (("pytorch-fid", found_by_score), ("torch-fidelity",
                                found_by_fidelity), ("clean-fid", found_by_clean)):
            files = {str(Path(f).relative_to(root)) for f in function(root)}
            rows.append((name, *("yes" if n in files else "-" for n in names)))
        seen = len(load(str(root), None, f"{folder}/kept").images)
        rows.append(("`fid.py`", *(["yes"] * len(names) if seen == len(names) else [seen] * 8)))
        table(*rows)


# Networks of others

class UNet2D(nn.Module):
    """diffusers' UNet. Its embedding is of positions 0 to 1,000: c_noise times 1,000."""

    def __init__(self):
        super().__init__()
        diffusers, = imported("diffusers")
        self.unet = diffusers.UNet2DModel(
            16, 3, 6, block_out_channels=(24, 48), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"))

    def forward(self, x, c_noise, augment=None, label=None):
        return self.unet(x, 1000 * c_noise).sample


class DDPMUnet(nn.Module):
    """denoising-diffusion-pytorch's: the same embedding."""

    def __init__(self):
        super().__init__()
        package, = imported("denoising_diffusion_pytorch")
        self.unet = package.Unet(24, out_dim=6, dim_mults=(1, 2))

    def forward(self, x, c_noise, augment=None, label=None):
        return self.unet(x, 1000 * c_noise)


class Transformer(nn.Module):
    """Patches of 2 x 2 and one token for the level."""

    def __init__(self, width=96, side=16):
        super().__init__()
        self.first = nn.Conv2d(3, width, 2, 2)
        self.place = nn.Parameter(0.02 * torch.randn(side ** 2 // 4, width))
        self.level = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0., "gelu", batch_first=True,
                                           norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.last = nn.ConvTranspose2d(width, 6, 2, 2)

    def forward(self, x, c_noise, augment=None, label=None):
        x = self.first(x)                                       # [B, width, H / 2, W / 2]
        h = x.flatten(2).mT + self.place                        # [B, H W / 4, width]
        h = torch.cat([self.level(c_noise[:, None])[:, None], h], 1)
        return self.last(self.layers(h)[:, 1:].mT.reshape(x.shape))             # [B, 6, H, W]


def network_table(kimg):
    """Each network under our Denoiser, trained on dead leaves: the last line of its log."""
    rows = [("network", "parameters", "denoise", "deblur")]
    for name, network in (("ours, `tiny`", None), ("`diffusers.UNet2DModel`", UNet2D),
                          ("denoising-diffusion-pytorch `Unet`", DDPMUnet),
                          ("a transformer", Transformer)):
        with tempfile.TemporaryDirectory() as out:
            torch.manual_seed(0)
            args = train_options(["--duration", str(kimg), "--out", out, "--device", "cpu",
                                  "--seed", "0", "--log-every", str(kimg / 2)])
            net = None if network is None else Denoiser(network())
            ema = train(args, net=net)
            line = Path(f"{out}/log.jsonl").read_text().splitlines()[-1]
        log = json.loads(line)
        size = sum(p.numel() for p in ema.parameters())
        rows.append((name, f"{size:,}", f"{log['denoise']:.4f}", f"{log['deblur']:.4f}"))
    table(*rows)


def main():
    parts = ("blur", "samplers", "fid", "networks")
    p = Parser(prog="python -m study.peers", description=__doc__.split("\n\n")[0])
    a = p.add_argument
    a("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} (default: all)")
    a("--ckpt", nargs="*", default=[], help="samplers: networks beside the Gaussian data")
    a("--samples", type=number(int, 1), default=32, help="of a network (default 32)")
    a("--images", type=number(int, 2), default=150, help="fid: of each of two sets (default 150)")
    a("--kimg", type=number(float, 0.1), default=2, help="networks: training (default 2)")
    args = p.parse_args()
    if set(args.parts) - set(parts):
        p.error(f"the parts are {', '.join(parts)}")
    warnings.simplefilter("ignore")             # of others; ours are lines of text
    with p.one_line_errors():
        full_float32()
        for part in args.parts or parts:
            if part == "blur":
                blur_table()
            elif part == "samplers":
                sampler_tables(args.ckpt, args.samples)
            elif part == "fid":
                fid_table(args.images)
                folder_table()
            else:
                network_table(args.kimg)


if __name__ == "__main__":
    main()
