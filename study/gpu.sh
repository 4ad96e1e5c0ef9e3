#!/usr/bin/env bash
# Half an hour of any GPU: what study/gpu.py finds in its first minutes, then a network for every
# ratio, samples and its sweep.
#
#     bash study/gpu.sh 1500 c10/train            # seconds, and images as train.py takes them
#     PRESET=tiny DEVICE=cpu SAMPLES=50 bash study/gpu.sh 90 leaves       # to try it on a CPU
#
# The first minutes take a third of the time, and at most eight minutes: does everything run, does it
# compute what a CPU does, how fast is it. Half of the rest is for training, which saves when its
# time is over and continues when the script is started again. Then come samples and the sweep.
# Checkpoints, images and results are in runs/gpu-PRESET/; their tables are printed at the end. It
# ends with 1 where a program failed, or where one after the training did not come to its end.
#
# TRAIN_OPTIONS are for train.py, after those of half an hour: "--batch-gpu 128" where the GPU has
# less than 24 GiB. The sweep needs the packages of study/requirements.txt, or FID=1 and the weights
# of FID in data/.
set -uo pipefail
cd "$(dirname "$0")/.."
limit=${1:?usage: bash study/gpu.sh SECONDS [DATA]}
data=${2:-leaves}
preset=${PRESET:-cifar10}
device=${DEVICE:-cuda}
samples=${SAMPLES:-5000}
out=runs/gpu-$preset
results=$out/results
python=$(command -v python || command -v python3)
start=$SECONDS
first=$((limit / 3))
[ "$first" -gt 470 ] && first=470
toy=""
[ "$device" = cpu ] && toy="--quick --only machine numbers data"
failed=0
short="--warmup 100 --ema 50 --log-every 10"            # the presets are for days
[ "$preset" = tiny ] && short=""
measure=""
features="from study.common import lite0_features; lite0_features('cpu')"
advice="install study/requirements.txt, or give FID=1"
if [ "${FID:-0}" != 0 ]; then
    measure=--fid
    features="from util.inception import load_inception; load_inception(device='cpu')"
    advice="put the weights of FID there"
fi
mkdir -p "$results"

if ! "$python" -c "$features" 2>"$out/errors.txt"; then
    tail -n 1 "$out/errors.txt" >&2
    echo "the sweep could measure nothing: $advice" >&2
    exit 2
fi

# Within so many seconds at most; tables, progress bars and errors go to files.
within() {
    if [ "$2" -lt 5 ]; then
        echo "-- no time left: ${*:3}"
        failed=1
        return
    fi
    timeout "$2" "${@:3}" >"$out/$1.txt" 2>>"$out/errors.txt"
    case $? in
        0) ;;
        124) echo "-- stopped after $2 s: ${*:3}"; [ "$1" = train ] || failed=1 ;;
        *) echo "-- failed, see $out/errors.txt: ${*:3}"; failed=1 ;;
    esac
}
left() { echo $((limit - 5 - SECONDS + start)); }         # 5 s are for the tables

within first $((first + 20)) "$python" -m study.gpu --device "$device" --seconds "$first" \
    --out "$out/first" $toy ${TRAIN_OPTIONS:-}
within train $(($(left) / 2)) "$python" train.py --data "$data" --preset "$preset" --bnr any \
    --device "$device" --out "$out" $short ${TRAIN_OPTIONS:-}
if [ ! -e "$out/ema.pt" ]; then
    tail -n 1 "$out/errors.txt"
    exit 2
fi
within samples "$(left)" "$python" sample.py --ckpt "$out/ema.pt" --device "$device" \
    --out "$out/samples"
within strip "$(left)" "$python" -m study.strip --ckpt "$out/ema.pt" --device "$device" \
    --bnr 0 0.5 2 --seeds 0 --out "$out/samples-strip.png"
within sweep "$(left)" "$python" -m study.sweep --ckpt "$out/ema.pt" --data "$data" \
    --device "$device" --samples "$samples" --solvers multistep --nfe 18 --results "$results" \
    $measure

echo "== training: the last line of $out/log.jsonl"
tail -n 1 "$out/log.jsonl"
echo "== the first minutes"
grep -v '^{' "$out/first.txt"
echo "== sweep"
"$python" -m study.sweep --plot-only --results "$results" 2>>"$out/errors.txt" \
    || { tail -n 1 "$out/errors.txt"; failed=1; }
echo "== $((SECONDS - start)) s of $limit"
exit $failed
