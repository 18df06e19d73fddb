#!/bin/sh
# Train the agent of models/breakout-v0 again: benchmarks/shipped.sh [FOLDER], six to seven hours of two fast cores. A second
# call goes on where the first was stopped. docs/results.md tells what each step brought; the agent's own were taken by hand.
set -eu
run=${1:-log/shipped-again} million=${2:-1000000} # fewer make a trial of all steps
cd "$(dirname "$0")/.."
begun=$run-without-last-action

train() { # folder, the million at which to end, flags
    folder=$1 end=$(($2 * million / 10)) && shift 2
    python a3c.py --log_dir "$folder" --max_agent_steps $end "$@"
}

if [ -e "$run/last.ckpt.index" ] && [ ! -e "$begun/last.ckpt.index" ]; then
    echo "shipped.sh: error: $run holds a run that was not begun by this: name another folder" >&2
    exit 1
elif [ ! -e "$run/last.ckpt.index" ]; then
    # To 10 million steps: --preset strong with pixels of 0..1 and Adam.
    train "$begun" 100 --preset strong --random_seed 1 --input_scale unit --optimizer adam --learning_rate 5e-4 \
        --grad_clip None --global_clip 2
    # To 12.4 million: larger updates, at half of the rate that it began with.
    train "$begun" 124 --unroll_step 20 --gae_lambda 0.95 --global_clip 20 --learning_rate 2.8e-4 --annealing_steps $((100 * million))

    # The network gets the last action: weights of zero, and zeros in what Adam and the average keep for them.
    mkdir -p "$run"
    cp "$begun/config.json" "$begun/progress.csv" "$run"
    python - "$begun" "$run" <<'END'
import dataclasses, sys
import a3c, checkpoint
from progress import Progress

begun, run = sys.argv[1:]
config = a3c.parse_config([], a3c.given_to_run(begun))
game, device = a3c.game_and_device(config)
progress = Progress(config.num_threads, config.agents_per_thread)
old, new = (a3c.make_network(dataclasses.replace(config, last_action=on), game, device) for on in (False, True))
checkpoint.Saver(begun, old, progress).resume(print)
place = [variable is new.weights["action"] for variable in new.trainable_variables].index(True)
for name in ("trainable_variables", "means", "mean_squares", "averages"):
    others = list(getattr(new, name))
    del others[place]
    for variable, other in zip(getattr(old, name), others, strict=True):
        other.assign(variable)
new.updates.assign(old.updates)
checkpoint.Saver(run, new, progress).save()
END
fi
# To 40 million.
train "$run" 400 --last_action True
# To 43 million: under a third of the rate, and an average over less.
train "$run" 430 --learning_rate 8e-5 --average_window 0.03
# The end: the last bricks of a wall count for more. The agent has the newest weights: `a3c-test.py --newest`.
train "$run" 521 --discount_factor 0.997
