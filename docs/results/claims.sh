#!/bin/bash
# After `make demo`: two more encoders of other seeds, their stores and fits, the probe, and the report on all three.
# About half an hour on two cores; run from the repository's root. What stands is not made again.
set -eu
export PATH="$PWD/.venv/bin:$PATH" OMP_WAIT_POLICY=passive RAY_USAGE_STATS_ENABLED=0
world=runs/demo/world

embed() { # encoder, source key, source, output
    python jobs/embed.py configs/embed.yaml encoder.kind=open_clip "encoder.model=$1" domain=day "$2=$3" "output=$4"
}

fits() { # folder of the stores, strategies
    local folder=$1 strategy
    shift
    for strategy in "$@"; do
        python jobs/fit.py "texts=$folder/texts" "images=$folder/images" "strategy=$strategy" "output=$folder/fits/$strategy"
    done
}

embed runs/demo/encoder images $world/heldout runs/demo/heldout/images
embed runs/demo/encoder texts $world/heldout runs/demo/heldout/texts
fits runs/demo mean_shift c3 blockwise
for seed in 1 2; do
    made=runs/demo/seeds/$seed
    python jobs/train_encoder.py configs/train_encoder.yaml "data=[$world/pairs]" "heldout=[$world/heldout]" \
        num_steps=360 seed=$seed output=$made/encoder
    for kind in images texts; do
        embed $made/encoder $kind $world/$kind $made/$kind
        embed $made/encoder $kind $world/heldout $made/heldout/$kind
    done
    fits $made c3 anchor anchor_trace realign blockwise gaussian_ot
done
python jobs/study.py configs/study.yaml
python jobs/report.py configs/report_miniature.yaml
