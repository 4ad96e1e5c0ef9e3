#!/usr/bin/env bash
# Half an hour of any GPU: a network for every ratio, its sweep, samples and the throughput.
#
#     bash study/gpu.sh 1500 c10/train            # seconds, and images as train.py takes them
#     PRESET=tiny DEVICE=cpu SAMPLES=50 bash study/gpu.sh 90 leaves       # to try it on a CPU
#
# Half of the time is for training, which saves when its time is over and continues when the script
# is started again. Then come the throughput and samples, and the rest is for the sweep. Checkpoints,
# images and results are in runs/gpu-PRESET/; their tables are printed at the end. TRAIN_OPTIONS are
# for train.py: those of half an hour, unless given.
set -uo pipefail
cd "$(dirname "$0")/.."
limit=${1:?usage: bash study/gpu.sh SECONDS [DATA]}
data=${2:-leaves}
preset=${PRESET:-cifar10}
device=${DEVICE:-cuda}
samples=${SAMPLES:-5000}
out=runs/gpu-$preset
results=$out/results
start=$SECONDS
short="--warmup 100 --ema 50 --log-every 10"            # the presets are for days
[ "$preset" = tiny ] && short=""
options=${TRAIN_OPTIONS-$short}
mkdir -p "$results"

# Within so many seconds at most; progress bars and errors go to a file.
within() {
    timeout "$1" "${@:2}" 2>>"$out/errors.txt"
    case $? in
        0) ;;
        124) echo "-- stopped after $1 s: ${*:2}" ;;
        *) echo "-- failed, see $out/errors.txt: ${*:2}" ;;
    esac
}
left() { local s=$((limit - SECONDS + start)); echo $((s > 1 ? s : 1)); }

within $((limit / 2)) python train.py --data "$data" --preset "$preset" --bnr any \
    --device "$device" --out "$out" $options
if [ ! -e "$out/ema.pt" ]; then
    tail -n 1 "$out/errors.txt"
    exit 2
fi
within $((limit / 6)) python -m study.speed --device "$device" --preset "$preset" --runs 1 \
    --results "$results" >"$out/speed.txt"
within "$(left)" python sample.py --ckpt "$out/ema.pt" --device "$device" --grid --out "$out/samples"
within "$(left)" python sample.py --ckpt "$out/ema.pt" --device "$device" --bnr 0 0.5 2 --seeds 0 \
    --strip --out "$out/samples"
within "$(left)" python -m study.sweep --ckpt "$out/ema.pt" --data "$data" --preset "$preset" \
    --device "$device" --samples "$samples" --solvers multistep --nfe 18 --results "$results" \
    >"$out/sweep.txt"

echo "== training: the last line of $out/log.jsonl"
tail -n 1 "$out/log.jsonl"
echo "== throughput"
tail -n +2 "$out/speed.txt"
echo "== sweep"
python -m study.sweep --plot-only --results "$results" 2>>"$out/errors.txt" \
    || tail -n 1 "$out/errors.txt"
echo "== $((SECONDS - start)) s of $limit"
