#!/usr/bin/env bash
# datasets 5.2.0: load_dataset("imagefolder") of a folder a class, where one of the classes is
# called "train" (the vehicle, as in COCO's and VOC's names): only that class is loaded, without
# labels.
#
# Guessed before: labels bus and train, all images in the one split "train".
# Seen: the two images of "train" and none of the three of "bus", no column "label", no warning. The
# word is taken for the split's name as soon as any folder has it. With the classes "bus" and "tram"
# there are five images and their labels.
# Why it matters: a class-conditional model is then trained, without a word, on one class of the
# data, and statistics for FID are taken of that class alone. Pass data_files, with a split named by
# hand, as the last part here does.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m pip install -q --no-compile --target "$dir/lib" \
    datasets==5.2.0 pillow==13.0.0
cd "$dir" && PYTHONPATH="$dir/lib" HF_HOME="$dir/home" HF_HUB_OFFLINE=1 python3 -W ignore - <<'PY'
import datasets
from pathlib import Path

from PIL import Image

datasets.disable_progress_bars()


def folder(*classes):
    root = Path("-".join(classes)).absolute()
    for name, n in zip(classes, (3, 2)):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(root / name / f"{i}.png")
    return root


def loaded(root, **files):
    sets = datasets.load_dataset("imagefolder", data_dir=None if files else str(root), **files)
    return {split: (len(d), d.features["label"].names if "label" in d.features else None)
            for split, d in sets.items()}


tram, train = folder("bus", "tram"), folder("bus", "train")
as_usual, with_train = loaded(tram), loaded(train)
by_hand = loaded(train, data_files={"train": [str(train / "*" / "*.png")]}, drop_labels=False)
print("bus, tram:", as_usual)
print("bus, train:", with_train)
print("bus, train, data_files by hand:", by_hand)
assert as_usual == {"train": (5, ["bus", "tram"])}, "otherwise now"
assert with_train == {"train": (2, None)}, "otherwise now"
assert by_hand == {"train": (5, ["bus", "train"])}
PY
