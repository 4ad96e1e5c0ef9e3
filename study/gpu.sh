#!/usr/bin/env bash
# Half an hour of any GPU: a network for every ratio, its sweep, samples and the throughput.
#
#     bash study/gpu.sh 1500 c10/train            # seconds, and images as train.py takes them
#     PRESET=tiny DEVICE=cpu SAMPLES=50 bash study/gpu.sh 60 leaves       # to try it on a CPU
#
# Six tenths of the time are for training, which saves when its time is over and resumes when the
# script is started again. Results: runs/gpu/, study/results/ and, at the end, their tables here.
set -uo pipefail
cd "$(dirname "$0")/.."
limit=${1:?usage: bash study/gpu.sh SECONDS [DATA]}
data=${2:-leaves}
preset=${PRESET:-cifar10}
device=${DEVICE:-cuda}
samples=${SAMPLES:-5000}
out=runs/gpu-$preset
start=$SECONDS
left() { echo $((limit - SECONDS + start)); }

train="python train.py --data $data --preset $preset --bnr any --device $device --out $out"
timeout -s TERM $((limit * 6 / 10)) $train ${TRAIN_OPTIONS:-} 2>&1 | tail -c 2000
tail -n 1 "$out/log.jsonl"
timeout $((limit / 10)) python -m study.speed --device "$device" --runs 1 2>/dev/null
python sample.py --ckpt "$out/ema.pt" --device "$device" --bnr 0.5 --grid --out "$out/samples" \
    2>/dev/null
python sample.py --ckpt "$out/ema.pt" --device "$device" --bnr 0 0.5 2 --seeds 0 --strip \
    --out "$out/samples" 2>/dev/null
timeout "$(left)" python -m study.sweep --ckpt "$out/ema.pt" --data "$data" --preset "$preset" \
    --device "$device" --samples "$samples" --solvers multistep --nfe 18 2>/dev/null
echo "$((SECONDS - start)) s of $limit"
