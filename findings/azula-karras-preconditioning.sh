#!/usr/bin/env bash
# azula 0.11.1 (with torch 2.13.0): KarrasDenoiser, "EDM-style preconditioning", is EDM's formula
# for data of standard deviation 1, with c_noise = ln(sigma) in the place of ln(sigma) / 4. Neither
# can be set.
#
# Guessed before: sigma_data 0.5, as in EDM, and c_noise = ln(sigma) / 4.
# Seen: c_skip = 1 / (sigma^2 + 1), c_in = 1 / sqrt(sigma^2 + 1), c_noise = ln(sigma). A network of
# EDM that is put behind it gets, at sigma = 0.5, its input scaled by 0.89 in the place of 1.41 and
# the noise level told as 0.06 (-0.69 for -0.17); on images of [-1, 1], whose standard deviation is
# near 0.5, the training target does not have unit variance: 0.85 at sigma = 0.5.
# Why it matters: two papers' "EDM preconditioning" are then two parameterizations, and weights do
# not carry over. Data standardized to variance 1 make the target right; the network's noise
# embedding must still be told four times EDM's number.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m pip install -q --no-compile --target "$dir/lib" \
    torch==2.13.0 azula==0.11.1 numpy==2.4.6
cd "$dir" && PYTHONPATH="$dir/lib" OMP_NUM_THREADS=1 python3 - <<'PY'
import math

import torch
from azula.denoise import KarrasDenoiser
from azula.noise import VESchedule


class Seen(torch.nn.Module):
    """A network that notes what it is told and answers 0, so that the denoiser answers c_skip x."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, c_noise):
        self.x, self.c_noise = x, c_noise
        return self.weight * x


sigma, net = 0.5, Seen()
schedule = VESchedule(0.002, 80)
t = torch.tensor([(math.log(sigma) - math.log(0.002)) / math.log(80 / 0.002)], dtype=torch.float64)
x = torch.ones(1, 3, 8, 8, dtype=torch.float64)
with torch.no_grad():
    c_skip = KarrasDenoiser(net, schedule)(x, t).mean.mean().item()
c_in, c_noise = net.x.mean().item(), net.c_noise.item()
edm = {d: (d ** 2 / (sigma ** 2 + d ** 2), 1 / math.sqrt(sigma ** 2 + d ** 2)) for d in (0.5, 1)}
print(f"azula: c_skip {c_skip:.4f}, c_in {c_in:.4f}, c_noise {c_noise:.4f}")
print(f"EDM: c_skip {edm[0.5][0]:.4f}, c_in {edm[0.5][1]:.4f}, c_noise {math.log(sigma) / 4:.4f}")

# the variance of the network's training target (x0 - c_skip x) / c_out for images of variance 0.25
c_out = sigma / math.sqrt(sigma ** 2 + 1)
target = ((1 - c_skip) ** 2 * 0.25 + c_skip ** 2 * sigma ** 2) / c_out ** 2
print(f"variance of the training target at sigma = 0.5, data of variance 0.25: {target:.3f}")
assert abs(c_skip - edm[1][0]) < 1e-6 and abs(c_in - edm[1][1]) < 1e-6, "otherwise now"
assert abs(c_noise - math.log(sigma)) < 1e-6, "otherwise now"
assert target < 0.9
PY
