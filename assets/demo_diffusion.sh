#!/usr/bin/env bash
# Diffusion on the data of demo.sh (run it first): learn from one simulated section, draw for the other, score, walk between two prompts.
# DEMO_OUT (demo_run): where everything goes. DEMO_STEPS (1500): length of the training. DEMO_PROMPTS (200): patches drawn.
# DRY_RUN=1 prints the walk and does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${DEMO_OUT:-demo_run} STEPS=${DEMO_STEPS:-1500} PROMPTS=${DEMO_PROMPTS:-200} DRY_RUN=${DRY_RUN:-0}
source assets/steps.sh
data=$OUT/data
[ "$DRY_RUN" = 1 ] || [ -d "$OUT/clip/clip" ] || { echo "error: $OUT/clip: expected what \`make demo\` leaves; found nothing there" >&2; exit 3; }

step_once embeddings_A "$OUT/embeddings_A" python clip_embeddings.py --network "$OUT/clip/clip" --gex "$data/SIM_A/gex_filt.h5ad" \
    --out-dir "$OUT/embeddings_A"
step_once diffusion "$OUT/diffusion" python -m diffusion_utils.train_diffusion --train-data-dir "$data/SIM_A/patches" \
    --dataset-embs "$OUT/embeddings_A/gene_clip_emb.npy" --val-data-dir "$data/SIM_B/patches" --val-embs "$OUT/embeddings/gene_clip_emb.npy" \
    --from-scratch small --pixel-space --resolution 32 --train-batch-size 16 --max-train-steps "$STEPS" --ema-decay 0.995 \
    --output-dir "$OUT/diffusion" --resume-from-checkpoint latest
step_once diffusion_images "$OUT/diffusion_images" python -m diffusion_utils.generate_img --model-checkpoint "$OUT/diffusion" \
    --prompt-file "$OUT/embeddings/gene_clip_emb.npy" --n-prompts "$PROMPTS" --num-imgs 1 --guidance-interval 0.2,0.75 --gen-img-path "$OUT/diffusion_images"
step_once diffusion_walk "$OUT/diffusion_walk" python interpolate_prompts.py --network "$OUT/diffusion" \
    --prompt1 "$OUT/embeddings/gene_clip_emb.npy:0" --prompt2 "$OUT/embeddings/gene_clip_emb.npy:20" --seeds 0-3 --outdir "$OUT/diffusion_walk"
step diffusion_metrics python calculate_image_quality_metrics.py --experiment diffusion --ref-img-path "$data/SIM_B/patches" \
    --gen-img-path "$OUT/diffusion_images" --features efficientnet_lite0 --match-px 32 --out-dir "$OUT/diffusion_scores" \
    --report "$OUT/diffusion.html"
[ "$DRY_RUN" = 1 ] || echo "open $OUT/diffusion.html"
