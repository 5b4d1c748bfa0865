#!/usr/bin/env bash
# The whole walk on two simulated Visium HD sections: learn from one, generate for the other, look at the page.
# DEMO_OUT (demo_run): where everything goes. DEMO_UM (2000): side of a section, um. DEMO_MINUTES (4): time of the GAN.
# DRY_RUN=1 prints the walk, command by command, and does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${DEMO_OUT:-demo_run} UM=${DEMO_UM:-2000} MINUTES=${DEMO_MINUTES:-4} DRY_RUN=${DRY_RUN:-0}
source assets/steps.sh
if [ "$DRY_RUN" = 1 ]; then set -f; else mkdir -p "$OUT"; fi   # a printed walk keeps its *

# 1. Two sections: one biology, two tissues, two stains
for sample in A B; do
    step "simulate $sample" python preprocessing/simulate_sample.py --out-dir "$OUT/SIM_$sample" --platform visium-hd \
        --sample-id "SIM_$sample" --seed $([ $sample = A ] && echo 1 || echo 2) --width-um "$UM" --height-um "$UM"
done

# 2. Patches, expression, vocabulary
data=$OUT/data
step "extract A" python preprocessing/extract_patches.py --space-ranger-dir "$OUT/SIM_A" --wsi-file "$OUT/SIM_A/slide.tif" --sample-id SIM_A \
    --out-dir "$data/SIM_A" --stride 13 --workers 2
step "vocabulary" python preprocessing/gene_vocab.py --gex "$data/SIM_A/gex.h5ad" --out "$data/vocab.txt" --min-counts 10
step "genes A" python preprocessing/gex_preprocessing.py --raw-file "$data/SIM_A/gex.h5ad" --vocab-file "$data/vocab.txt"
step "stain A" python preprocessing/dump_patches.py --images "$data/SIM_A/imgs.h5" --wsi "$OUT/SIM_A/slide.tif" --out-dir "$data/SIM_A/patches"
step "prepare B" bash preprocessing/preprocessing.sh "$OUT/SIM_B" "$OUT/SIM_B/slide.tif" "$data/vocab.txt" "$data/SIM_B" --sample-id SIM_B --stride 27

# 3. CLIP, and the embeddings of the held-out section
step_once clip "$OUT/clip" python train_clip.py --config-name clip_demo "data.train_gex=$data/SIM_A/gex_filt.h5ad" \
    "data.train_image_dir=$data/SIM_A/patches" "run_dir=$OUT/clip" ckpt_path=auto
step_once embeddings "$OUT/embeddings" python clip_embeddings.py --network "$OUT/clip/clip" --gex "$data/SIM_B/gex_filt.h5ad" \
    --images "$data/SIM_B/patches" --out-dir "$OUT/embeddings"

# 4. The generator, patches for every cluster of the held-out section, their scores
step_once gan "$OUT/gan" python train_gan.py --data "$data/SIM_A/patches" --gex "$data/SIM_A/gex_filt.h5ad" --val-data "$data/SIM_B/patches" \
    --val-gex "$data/SIM_B/gex_filt.h5ad" --network "$OUT/clip/clip" --outdir "$OUT/gan" --img-resolution 64 --cfg small --batch 8 \
    --kimg 100 --budget-minutes "$MINUTES" --resume auto
step_once generate "$OUT/generated" python gen_images.py --network "$OUT"/gan/00000-* --gex "$data/SIM_B/gex_filt.h5ad" --clusters cluster \
    --n-samples 60 --images "$data/SIM_B/patches" --seeds 0 --outdir "$OUT/generated"
step_once walk "$OUT/walk" python interpolate_prompts.py --network "$OUT"/gan/00000-* --prompt1 "$data/SIM_B/gex_filt.h5ad:0" \
    --prompt2 "$data/SIM_B/gex_filt.h5ad:20" --n-steps 9 --seeds 0-3 --outdir "$OUT/walk"
step metrics python calculate_image_quality_metrics.py --experiment demo --ref-img-path "$data/SIM_B/patches" --gen-img-path "$OUT/generated" \
    --features efficientnet_lite0 --match-px 64 --out-dir "$OUT" --report "$OUT/index.html"
[ "$DRY_RUN" = 1 ] || echo "open $OUT/index.html"
