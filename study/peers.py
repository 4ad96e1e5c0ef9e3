"""Beside the packages of others: whose blur, sampler or FID agrees with ours, and by how much. It
prints the tables of docs/peers.md.

    python3 -m venv .venv-peers && . .venv-peers/bin/activate
    pip install torch==2.13.0 torchvision==0.28.0   # both from one index: both CPU, or both CUDA
    pip install --no-deps -r study/peers-requirements.txt
    python -m study.peers blur fid networks                     # 15 minutes on one idle core
    python -m study.peers samplers --ckpt run-hot/ema.pt run-warm/ema.pt
"""
import contextlib
import json
import math
import sys
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
from sample import sample, sampling_path, time_steps
from study.common import seed_noise, steps_of
from train import options as train_options
from train import train
from util import Parser, UserError, number

ALPHAS = (0.2, 0.3, 0.5, 1, 3, 40)              # in pixels
EVALUATIONS = (8, 12, 18, 35)


def table(head, rows):
    """Prints a table of Markdown, each row as soon as it is computed."""
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print()


# Blur

def blurs():
    """Rows (name, border, function of float64 [H, W] and alpha in pixels)."""
    import cv2
    import torch_dct
    from dctorch import functional as dctorch
    from kornia.filters import gaussian_blur2d
    from scipy.fft import dctn, idctn
    from scipy.ndimage import gaussian_filter
    from torchvision.transforms.functional import gaussian_blur

    def width(alpha):                           # of a kernel of 4 standard deviations a side
        return 2 * math.ceil(4 * alpha) + 1

    def m(x, alpha):                            # M of (1)
        return torch.exp(-frequencies(*x.shape) * alpha ** 2 / 2)

    def pillow(x, alpha):
        image = Image.fromarray(np.uint8(np.round(x * 127.5 + 127.5)))
        return np.asarray(image.filter(ImageFilter.GaussianBlur(alpha))) / 127.5 - 1

    def with_tensors(f):
        return lambda x, alpha: f(torch.from_numpy(x)[None, None], alpha)[0, 0].numpy()

    def kornia(border):
        return with_tensors(lambda x, a: gaussian_blur2d(x, width(a), (a, a), border))
    return [
        ("`scipy.ndimage.gaussian_filter(x, a)`", "reflect", gaussian_filter),
        ("the same, `truncate=8`", "reflect", lambda x, a: gaussian_filter(x, a, truncate=8)),
        ("`cv2.GaussianBlur(x, (0, 0), a)`", "without the edge",
         lambda x, a: cv2.GaussianBlur(x, (0, 0), a)),
        ("the same, `borderType=BORDER_REFLECT`", "reflect",
         lambda x, a: cv2.GaussianBlur(x, (0, 0), a, borderType=cv2.BORDER_REFLECT)),
        ("Pillow `GaussianBlur(a)`, 8 bits", "edge goes on", pillow),
        ("`torchvision ... gaussian_blur`", "without the edge",
         with_tensors(lambda x, a: gaussian_blur(x, width(a), a))),
        ("`kornia.filters.gaussian_blur2d`", "without the edge", kornia("reflect")),
        ("the same, `border_type=\"replicate\"`", "edge goes on", kornia("replicate")),
        ("`scipy.fft.dctn(x, norm=\"ortho\")`, times M", "reflect",
         lambda x, a: idctn(m(x, a).numpy() * dctn(x, norm="ortho"), norm="ortho")),
        ("`torch_dct.dct_2d(x, norm=\"ortho\")`, times M", "reflect",
         with_tensors(lambda x, a: torch_dct.idct_2d(
             m(x[0, 0], a) * torch_dct.dct_2d(x, norm="ortho"), norm="ortho"))),
        ("`dctorch.functional.dct2(x)`, times M", "reflect",
         with_tensors(lambda x, a: dctorch.idct2(m(x[0, 0], a) * dctorch.dct2(x))))]


def blur_table(args):
    """The largest difference from (1)'s blur of random images in [-1, 1], by alpha, and how far the
    mean of one moves at alpha 3."""
    images = np.random.default_rng(0).uniform(-1, 1, (20, 32, 32))

    def row(name, border, function):
        cells = []
        for alpha in ALPHAS:
            right = blur(torch.from_numpy(images), alpha).numpy()
            try:
                found = np.stack([function(x, alpha) for x in images])
                cells.append(f"{np.abs(found - right).max():.2g}")
            except (RuntimeError, ValueError) as e:
                cells.append(f"refused ({type(e).__name__})")
        moved = max(abs(function(x, 3).mean() - x.mean()) for x in images)
        return name, border, *cells, f"{moved:.2g}"
    table(("blur", "border", *(f"alpha {a}" for a in ALPHAS), "mean moves at 3"),
          (row(*blur) for blur in blurs()))


# Samplers

class Heads:
    """The two heads of a network, which count their calls, and the denoiser as others call it."""

    def __init__(self, net):
        self.net, self.calls = net, 0

    def __call__(self, x, alpha, sigma):
        self.calls += 1
        return self.net(x, alpha, sigma)

    def denoise(self, x, sigma, **unused):      # sigma: a number, 0-d or [B] of one value
        sigma = torch.as_tensor(sigma, dtype=torch.float64).flatten()[0]
        return self(x.double(), torch.zeros_like(sigma), sigma)[0].double()


def our_samplers(path):
    """Rows (name, time steps, function of Heads, latents and a number of evaluations -> images)."""
    def row(solver, steps):
        return f"ours, {solver}", steps, lambda heads, latents, n: sample(
            heads, path, latents, steps_of(solver, n), solver=solver)
    return [row("multistep", "its own"), row("heun", "EDM's (11)"), row("euler", "EDM's (11)")]


def other_samplers():
    """The same for other packages, which know hot diffusion only. All start from 80 n."""
    import azula.denoise
    import azula.noise
    import azula.sample
    import diffusers
    import k_diffusion.sampling as k_sampling
    import smalldiffusion

    def k(name, spacing="karras", calls=1, **options):
        def f(heads, latents, n):
            levels = getattr(k_sampling, f"get_sigmas_{spacing}")(math.ceil(n / calls), 0.002, 80.)
            return getattr(k_sampling, f"sample_{name}")(
                heads.denoise, 80 * latents, levels.double(), disable=True, **options)
        return f

    def edm(scheduler=diffusers.EDMDPMSolverMultistepScheduler, **options):
        def f(heads, latents, n):
            s = scheduler(**options)
            s.set_timesteps(n)
            x = 80 * latents                    # its init_noise_sigma is sqrt(80^2 + 1)
            for t, sigma in zip(s.timesteps, s.sigmas.double()):
                s.scale_model_input(x, t)       # it takes the raw network's answer, F of (7)
                c_skip = 0.25 / (sigma ** 2 + 0.25)
                c_out = 0.5 * sigma / (sigma ** 2 + 0.25).sqrt()
                raw = (heads.denoise(x, sigma) - c_skip * x) / c_out
                x = s.step(raw, t, x).prev_sample
            return x
        return f

    class Azulas(azula.denoise.Denoiser):
        schedule = azula.noise.VESchedule(0.002, 80.)

        def forward(self, x, t):
            return azula.denoise.DiracPosterior(self.heads.denoise(x, self.schedule.sigma(t)))

    class Smalls(nn.Module, smalldiffusion.ModelMixin):
        input_dims = (1,)

        def predict_eps_cfg(self, x, sigma, cond, scale):
            return (x - self.heads.denoise(x, sigma)) / sigma

    def of_azula(name, calls=1, **options):
        def f(heads, latents, n):
            net = Azulas()
            net.heads = heads
            sampler = getattr(azula.sample, name)(net, steps=n // calls, silent=True,
                                                  dtype=torch.float64, **options)
            return sampler(80 * latents)
        return f

    def small(gam):
        def f(heads, latents, n):
            net = Smalls()
            net.heads = heads
            return list(smalldiffusion.samples(net, time_steps(n), gam=gam, xt=80 * latents))[-1]
        return f
    edm_steps, even = "EDM's (11)", "even in ln sigma"
    return [
        ("k-diffusion heun", edm_steps, k("heun", calls=2)),
        ("k-diffusion dpmpp_2m", edm_steps, k("dpmpp_2m")),
        ("k-diffusion dpmpp_2m", even, k("dpmpp_2m", "exponential")),
        ("k-diffusion dpmpp_3m_sde, eta 0", edm_steps, k("dpmpp_3m_sde", eta=0)),
        ("k-diffusion dpmpp_3m_sde, eta 0", even, k("dpmpp_3m_sde", "exponential", eta=0)),
        ("diffusers EDMEuler", edm_steps, edm(diffusers.EDMEulerScheduler)),
        ("diffusers EDMDPM, order 1", edm_steps, edm(solver_order=1)),
        ("diffusers EDMDPM, order 2 midpoint", edm_steps, edm()),
        ("diffusers EDMDPM, order 2 midpoint", even, edm(sigma_schedule="exponential")),
        ("diffusers EDMDPM, order 2 heun", edm_steps, edm(solver_type="heun")),
        ("diffusers EDMDPM, order 3", edm_steps, edm(solver_order=3)),
        ("azula DDIM", even, of_azula("DDIMSampler", eta=0.)),
        ("azula Heun", even, of_azula("HeunSampler", calls=2)),
        ("azula REAB, order 2", even, of_azula("REABSampler")),
        ("smalldiffusion, gam 1", edm_steps, small(1.)),
        ("smalldiffusion, gam 1.5", edm_steps, small(1.5)),
        ("smalldiffusion, gam 2", edm_steps, small(2.))]


def sampler_table(net, path, latents, right, scale=1.):
    """The rms of (images - right) / scale in the DCT domain, by evaluations."""
    def row(name, steps, function):
        cells = []
        for n in EVALUATIONS:
            heads = Heads(net)
            error = dct2(function(heads, latents, n) - right) / scale
            note = "" if heads.calls == n else f" ({heads.calls})"
            cells.append(f"{error.square().mean().sqrt().item():.4f}{note}")
        return name, steps, *cells
    samplers = our_samplers(path) + (other_samplers() if path.bnr == 0 else [])
    table(("sampler", "time steps", *(f"{n} evaluations" for n in EVALUATIONS)),
          (row(*sampler) for sampler in samplers))


def power_law(n):
    """S = A / lam with total variance 0.25 a pixel; the mean's S is the next one's. [n, n]"""
    lam = frequencies(n, n).clone()
    lam[0, 0] = lam[0, 1]
    return 0.25 * (1 / lam) / (1 / lam).mean()


def sampler_tables(args):
    """On Gaussian data with the exact heads: the rms relative error of the gain of 32 x 32
    frequencies. On networks: the rms distance over pixels to the flow's end."""
    spectrum = power_law(32)

    def exact(x, alpha, sigma):                 # (6) without blur
        d = idct2(spectrum / (spectrum + sigma ** 2) * dct2(x))
        return d, torch.zeros_like(d)
    gain = 80 * (spectrum / (spectrum + 80 ** 2)).sqrt()
    ones = idct2(torch.ones(1, 1, 32, 32, dtype=torch.float64))
    print("Gaussian data, hot")
    sampler_table(exact, ConstantBNR(0), ones, idct2(gain), gain)
    for ckpt in args.ckpt:
        net, checkpoint = load_model(ckpt)
        path = sampling_path(checkpoint)
        latents = seed_noise(range(args.samples), checkpoint["data"]["shape"])()
        print(f"{ckpt}: BNR {path.bnr:g}, {checkpoint['seen'] / 1000:g} kimg")
        sampler_table(net, path, latents, sample(net, path, latents, 100, solver="heun"))


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
    """Rows (name, features of uint8 [B, 3, 32, 32], distance of two means and covariances)."""
    import pytorch_fid.inception
    import torch_fidelity
    from cleanfid.fid import frechet_distance as cleanfid_distance
    from cleanfid.resize import build_resizer
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torchmetrics.image.fid import NoTrainInceptionV3, _compute_fid
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights)
    pytorchs = pytorch_fid.inception.InceptionV3([3]).eval()
    bare = pytorch_fid.inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    fidelity = torch_fidelity.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights).eval()
    net, _ = load_inception(weights)

    def fidelity_distance(mu1, cov1, mu2, cov2):
        stats = {"mu": mu1, "sigma": cov1}, {"mu": mu2, "sigma": cov2}
        return fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]

    def metrics_distance(*moments):
        return _compute_fid(*(torch.from_numpy(a) for a in moments))

    def metrics(antialias):
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], weights, antialias=antialias)

    def clean(mode, middle, half):              # its resize rule before pytorch-fid's network: its
        resize = build_resizer(mode)            # own is fetched as a compiled file

        def features(x):
            x = np.stack([resize(image) for image in x.permute(0, 2, 3, 1).numpy()])
            return bare((torch.from_numpy(x).permute(0, 3, 1, 2) - middle) / half)[0].flatten(1)
        return features
    return [
        ("`fid.py --resize tf1`", net, frechet_distance),
        ("torch-fidelity, its default", lambda x: fidelity(x)[0], fidelity_distance),
        ("torchmetrics, `antialias=False`", metrics(False), metrics_distance),
        ("`fid.py --resize pytorch`", lambda x: net(x, resize="pytorch"), frechet_distance),
        ("pytorch-fid", lambda x: pytorchs(x / 255)[0].flatten(1), calculate_frechet_distance),
        ("clean-fid `legacy_pytorch`", clean("legacy_pytorch", 127.5, 127.5), cleanfid_distance),
        ("torchmetrics, its default", metrics(True), metrics_distance),
        ("clean-fid `clean`, its default", clean("clean", 128, 128), cleanfid_distance)]


@torch.no_grad()
def fid_tables(args):
    """Of two sets of images: how far the features are from both of fid.py's, and the distances.
    Then which files of a folder each of them reads."""
    sets = pictures(args.images, 0, 1.), pictures(args.images, 1, 1.2)
    with tempfile.TemporaryDirectory() as folder:
        random_weights(f"{folder}/weights.pth")
        packages = extractors(f"{folder}/weights.pth")
    features = [[np.concatenate([extract(x).double().numpy() for x in images.split(50)])
                 for images in sets] for _, extract, _ in packages]
    tf1, pytorch = features[0][0], features[3][0]

    def row(name, distance, a, b):
        apart = [np.sqrt(np.mean((a - ours) ** 2)) / ours.std() for ours in (tf1, pytorch)]
        moments = a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
        return name, *(f"{v:.1e}" for v in apart), f"{float(distance(*moments)):.4f}"
    table(("FID of", "features from tf1's", "from pytorch's", "distance"),
          (row(name, distance, *some) for (name, _, distance), some in zip(packages, features)))
    names = ["a.png", "b.jpg", "c.JPG", "d.PNG", "e.bmp", "f.webp", "g.tif", "below/h.png"]
    table(("reads", *names), folder_rows(names))


def folder_rows(names):
    """Which of these files in a folder each of them reads."""
    import cleanfid.fid
    import pytorch_fid.fid_score
    from torch_fidelity.utils import glob_samples_paths
    seen = []                                   # what is given to the networks of two of them
    pytorch_fid.fid_score.calculate_activation_statistics = \
        cleanfid.fid.get_files_features = lambda files, *_, **__: (seen.extend(files), None)
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            Path(root, name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (16, 16)).save(Path(root, name))
        pytorch_fid.fid_score.compute_statistics_of_path(root, None, 1, 2048, "cpu")
        found = {"pytorch-fid": seen[:]}
        seen.clear()
        cleanfid.fid.get_folder_features(root, verbose=False)
        found["clean-fid"] = seen
        found["torch-fidelity"] = glob_samples_paths(root, False, "png,jpg,jpeg", verbose=False)
        for package, files in found.items():
            files = [str(Path(file).relative_to(root)) for file in files]
            yield package, *("yes" if name in files else "-" for name in names)
        yield "`fid.py`", f"{len(load(root, keep=False).images)} of {len(names)}"


# Networks of others

class Positional(nn.Module):
    """A network whose embedding is for positions 0 to 1,000: it is told c_noise times 1,000."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, c_noise, augment=None, label=None):
        found = self.net(x, 1000 * c_noise)
        return getattr(found, "sample", found)


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


def network_table(args):
    """Each network under our Denoiser, trained on dead leaves: the last line of its log."""
    from denoising_diffusion_pytorch import Unet
    from diffusers import UNet2DModel
    networks = {
        "ours, `tiny`": None,
        "`diffusers.UNet2DModel`": lambda: Positional(UNet2DModel(
            16, 3, 6, block_out_channels=(24, 48), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"))),
        "denoising-diffusion-pytorch `Unet`": lambda: Positional(
            Unet(24, out_dim=6, dim_mults=(1, 2))),
        "a transformer": Transformer}

    def row(name, network):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
            options = train_options(["--duration", str(args.kimg), "--out", out, "--seed", "0",
                                     "--device", "cpu", "--log-every", str(args.kimg / 2)])
            ema = train(options, net=network and Denoiser(network()))
            log = json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])
        size = sum(p.numel() for p in ema.parameters())
        return name, f"{size:,}", f"{log['denoise']:.4f}", f"{log['deblur']:.4f}"
    table(("network", "parameters", "denoise", "deblur"), (row(*n) for n in networks.items()))


def main():
    parts = {"blur": blur_table, "samplers": sampler_tables, "fid": fid_tables,
             "networks": network_table}
    p = Parser(prog="python -m study.peers", description=__doc__.split("\n\n")[0])
    a = p.add_argument
    a("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} (default: all)")
    a("--ckpt", nargs="*", default=[], help="samplers: networks beside the Gaussian data")
    a("--samples", type=number(int, 1), default=16, help="of a network (default 16)")
    a("--images", type=number(int, 2), default=150, help="fid: of each of two sets (default 150)")
    a("--kimg", type=number(float, 0.1), default=2, help="networks: training (default 2)")
    args = p.parse_args()
    if set(args.parts) - parts.keys():
        p.error(f"the parts are {', '.join(parts)}")
    warnings.simplefilter("ignore")             # of others; ours are lines of text
    with p.one_line_errors():
        try:
            for part in args.parts or parts:
                parts[part](args)
        except ImportError as e:
            raise UserError(f"{e}: pip install --no-deps -r study/peers-requirements.txt") from None


if __name__ == "__main__":
    main()
