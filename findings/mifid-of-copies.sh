#!/usr/bin/env bash
# torchmetrics 1.9.0 (with torch 2.13.0): MemorizationInformedFrechetInceptionDistance, the FID that
# is to punish a generator for repeating its training images, is 0, its best value, for a generator
# that repeats all of them exactly.
#
# Guessed before: above 1,000, as it is FID divided by the distance to the nearest training image,
# and that distance is 0.
# Seen: 0.0 for the images themselves. A FID below 1e-8 is taken for 0 before the division. Copies
# with noise of 1 % have 1.01, 6,700 times their FID, as intended, and new images of the same
# distribution have 0.119: the ranking is copies, new images, nearly copies.
# Why it matters: a lookup table wins a table of MIFID, and a test of the metric on copies, the
# first that one would write, says that memorization is not seen. Look at FID and at the distance
# to the nearest image apart from each other.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m pip install -q --no-compile --target "$dir/lib" \
    torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6
cd "$dir" && PYTHONPATH="$dir/lib" OMP_NUM_THREADS=1 python3 -W ignore - <<'PY'
import torch
from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance


class Features(torch.nn.Module):
    """In the place of Inception: 64 features, the first numbers of an image."""
    num_features = 64

    def forward(self, x):
        return x.flatten(1)[:, :64].float()


def mifid(real, generated):
    metric = MemorizationInformedFrechetInceptionDistance(feature=Features(), normalize=True)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric.compute().item()


g = torch.Generator().manual_seed(0)
train = torch.rand(1500, 3, 8, 8, generator=g)
new = torch.rand(1500, 3, 8, 8, generator=g)
nearly = (train + 0.01 * torch.randn(train.shape, generator=g)).clamp(0, 1)
copies, nearly, new = (mifid(train, images) for images in (train, nearly, new))
print(f"MIFID of the training images themselves: {copies}")
print(f"of the same with noise of 1 %: {nearly:.3f}; of new images: {new:.3f}")
assert copies == 0, "otherwise now"
assert copies < new < nearly
PY
