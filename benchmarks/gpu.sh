#!/usr/bin/env bash
# Times training on a GPU and on the same machine's CPU alone, and the network alone in every way that might be faster.
#
#   benchmarks/gpu.sh [FOLDER]         in ten minutes with 16 cores; figures and logs go into FOLDER, or log/gpu
#   MINUTES=60 SECONDS_EACH=30 ...     longer, for figures to publish
#   PYTHON=python3 ...                 with packages that are there already, in place of .venv
#   PEERS=.venv-peers/bin/python ...   other libraries, too; see benchmarks/requirements-peers.txt
#
# What matters most comes first. A step that fails or takes too long is named in summary.txt and the next one begins;
# none begins once the minutes are over. DEVICE=cpu tries the script where there is no GPU.
set -uo pipefail
case ${1:-} in -*) sed -n '2,10s/^# \{0,1\}//p' "$0" && exit 2 ;; esac
# Paths are the caller's; a name without / is looked up in PATH.
case ${1:-} in "" | /*) out=${1:-} ;; *) out=$PWD/$1 ;; esac
case ${PYTHON:-} in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
case ${PEERS:-} in /*) ;; */*) PEERS=$PWD/$PEERS ;; esac
cd "$(dirname "$0")/.." || exit

out=${out:-log/gpu} minutes=${MINUTES:-10} seconds=${SECONDS_EACH:-8} device=${DEVICE:-gpu}
before=2e2df5c # the last commit whose updates were some forty calls, not one graph
if ! [[ $minutes =~ ^(0|[1-9][0-9]{0,5})$ ]]; then
    echo "MINUTES = $minutes: must be a whole number" >&2
    exit 2
fi
if [ -z "${PYTHON:-}" ]; then
    make --silent .venv/tested || exit
    PYTHON=.venv/bin/python
fi
mkdir -p "$out" && : >"$out/summary.txt" || exit
end=$(($(date +%s) + minutes * 60))
failed=0 job=
set -m # each step is a process group, which Ctrl-C here does not reach: the trap ends it
trap 'trap "" INT TERM HUP; [ -z "$job" ] || { kill "$job"; wait "$job"; } 2>/dev/null; echo "stopped" >&2; exit 130' INT TERM HUP

step() { # NAME COMMAND...: run it, keep its output, show its last lines
    local name=$1 left=$((end - $(date +%s))) most=$((minutes * 30)) status=0 # one that hangs takes half of the time
    shift
    rm -f "$out/$name".{txt,json,png} # of an earlier call
    if [ "$left" -lt 20 ]; then
        echo "== $name: not begun, the $minutes minutes are over" | tee -a "$out/summary.txt"
        return
    fi
    echo "== $name: $*" | tee -a "$out/summary.txt"
    timeout --kill-after=20 "$((left < most ? left : most))" "$@" >"$out/$name.txt" 2>&1 &
    job=$!
    wait "$job" || status=$?
    job=
    grep -E "steps/s|_per_second|share|ratio|passed|failed|skipped|rror" "$out/$name.txt" | tail -14 | tee -a "$out/summary.txt"
    [ "$status" = 0 ] && return
    failed=1
    { tail -n 3 "$out/$name.txt" && echo "   ended with status $status"; } | tee -a "$out/summary.txt"
}
bench() { # NAME FLAGS...: the start, training, its games alone and its network alone
    step "$1" "$PYTHON" -m benchmarks.bench --seconds "$seconds" --rounds 1 --json "$out/$1.json" "${@:2}"
}
sweep() { # NAME FLAGS...: training only, whose games are built but once; with --network_alone they are not built at all
    step "$1" "$PYTHON" -m benchmarks.bench --seconds "$seconds" --sweep "$out/$1.png" --json "$out/$1.json" \
        --device="$device" --sweep_threads 4 --sweep_games 64 "${@:2}"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >"$out/gpu.txt" 2>&1
lscpu >"$out/cpu.txt" 2>&1
step tests "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py
bench default --device="$device"
bench fast --device="$device" --preset=fast
sweep plain --network_alone
TF_XLA_FLAGS=--tf_xla_auto_jit=2 sweep xla --network_alone
NVIDIA_TF32_OVERRIDE=0 sweep without-tf32 --network_alone
sweep bfloat16 --network_alone --compute_dtype=bfloat16
sweep sizes --network_alone --sweep_threads 2 4 8 --sweep_games 32 128 256
sweep more-games --sweep_threads 4 2 --sweep_games 128
sweep more-threads --sweep_threads 8
device=cpu sweep cpu-alone --preset=fast --sweep_games 32
step before "$PYTHON" -m benchmarks.compare "$before" --device="$device" --rounds 1 --seconds "$seconds"
if [ -n "${PEERS:-}" ]; then
    peers=$([ "$device" = cpu ] && echo cpu || echo cuda)
    step peers "$PEERS" -m benchmarks.peers --python "$PYTHON" --device "$peers" --rounds 2 --seconds "$seconds" \
        --json "$out/peers.json"
fi
echo "wrote $out"
exit "$failed"
