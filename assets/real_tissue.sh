#!/usr/bin/env bash
# The whole walk on real sections in the her2st layout: preprocess, CLIP, GAN, patches for every held-out spot, scores.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: bash assets/real_tissue.sh --data DIR --train C2,C3 --val C4 --out runs/her2st [options]

Trains on the sections named by --train, generates patches for every spot of the sections named by --val, and scores
them: OUT/results.json and OUT/index.html. A section is a folder of DIR with image.jpg, counts.tsv.gz, spots.tsv and
clusters.tsv.gz (the layout of her2st). Run the same command again after an interruption: finished steps are kept.

  --data DIR              folder of the sections
  --train A[,B...]        sections to learn from
  --val C[,D...]          sections held out: never trained on, never selected on
  --out DIR               where everything goes
  --encoder NAME          image tower of CLIP and of the scores   [efficientnet_lite0]
  --encoder-weights F     its weight file, where it needs one
  --judge-weights F       MobileNetV2 weights: a feature space nothing trains against, and the judge's image tower
                          [../shared/weights/mobilenetv2_100.imagenet_features.safetensors; without the file the judge
                          is a second CLIP of another seed on --encoder, and the second feature space is left out]
  --budget-minutes M      wall time to aim for in all, on 2 cores; about half of it trains the GAN   [15]
  --patch-sz-um U         side of a patch, um   [100]
  --seed S                seed of every step   [0]
  --dry-run               print the walk, command by command, and do nothing
TEXT
}
fail() { echo "error: $*" >&2; exit 2; }

DATA="" TRAIN="" VAL="" OUT="" ENCODER=efficientnet_lite0 ENCODER_WEIGHTS="" JUDGE_WEIGHTS="" BUDGET=15 PATCH_UM=100 SEED=0 DRY_RUN=0
while [ $# -gt 0 ]; do
    case $1 in
        --help|-h) usage; exit 0 ;;
        --dry-run) DRY_RUN=1; shift ;;
        --data|--train|--val|--out|--encoder|--encoder-weights|--judge-weights|--budget-minutes|--patch-sz-um|--seed)
            [ $# -ge 2 ] || fail "$1 needs a value"
            case $1 in
                --data) DATA=$2 ;; --train) TRAIN=$2 ;; --val) VAL=$2 ;; --out) OUT=$2 ;;
                --encoder) ENCODER=$2 ;; --encoder-weights) ENCODER_WEIGHTS=$2 ;; --judge-weights) JUDGE_WEIGHTS=$2 ;;
                --budget-minutes) BUDGET=$2 ;; --patch-sz-um) PATCH_UM=$2 ;; --seed) SEED=$2 ;;
            esac
            shift 2 ;;
        *) usage >&2; fail "unknown option $1" ;;
    esac
done
[ -n "$DATA" ] && [ -n "$TRAIN" ] && [ -n "$VAL" ] && [ -n "$OUT" ] || { usage >&2; fail "--data, --train, --val and --out are required"; }
root=$(cd "$(dirname "$0")/.." && pwd)
if [ "$PWD" != "$root" ]; then   # paths mean the folder the command was started in
    DATA=$(realpath -m "$DATA") OUT=$(realpath -m "$OUT")
    if [ -n "$ENCODER_WEIGHTS" ]; then ENCODER_WEIGHTS=$(realpath -m "$ENCODER_WEIGHTS"); fi
    if [ -n "$JUDGE_WEIGHTS" ]; then JUDGE_WEIGHTS=$(realpath -m "$JUDGE_WEIGHTS"); fi
    cd "$root"
fi
source assets/steps.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}

# One value a section, as a comma list: joined C2,C3 patches -> OUT/C2/patches,OUT/C3/patches
joined() {
    local all=() section
    for section in ${1//,/ }; do all+=("$OUT/$section${2:+/$2}"); done
    (IFS=,; echo "${all[*]}")
}
folders() {   # folders C4,D4 generated -> OUT/generated/C4,OUT/generated/D4
    echo "$OUT/$2/${1//,/,$OUT/$2/}"
}

for section in ${VAL//,/ }; do
    if [[ ",$TRAIN," == *",$section,"* ]]; then fail "section $section is named by --train and by --val"; fi
done
for section in ${TRAIN//,/ } ${VAL//,/ }; do
    for file in image.jpg counts.tsv.gz spots.tsv clusters.tsv.gz; do
        if [ ! -f "$DATA/$section/$file" ]; then
            echo "error: $DATA/$section/$file: section: expected image.jpg, counts.tsv.gz, spots.tsv and clusters.tsv.gz; found no $file" >&2
            exit 3
        fi
    done
done
tower=(); metric_encoder=$ENCODER
if [ -n "$ENCODER_WEIGHTS" ]; then
    [ -e "$ENCODER_WEIGHTS" ] || { echo "error: $ENCODER_WEIGHTS: encoder weights: expected a file; found nothing there" >&2; exit 3; }
    tower=("model.image_encoder_weights=$ENCODER_WEIGHTS"); metric_encoder=$ENCODER=$ENCODER_WEIGHTS
fi
tower=("model.image_encoder=$ENCODER" "${tower[@]}")
[ "$ENCODER" = efficientnet_lite0 ] || tower+=(model.image_encoder_px=null)
judge_tower=("${tower[@]}"); features=$metric_encoder
[ "$ENCODER" = efficientnet_lite0 ] || features=efficientnet_lite0,$metric_encoder
default_judge=../shared/weights/mobilenetv2_100.imagenet_features.safetensors
if [ -z "$JUDGE_WEIGHTS" ] && [ -f "$default_judge" ]; then JUDGE_WEIGHTS=$default_judge; fi
if [ -n "$JUDGE_WEIGHTS" ]; then
    [ -f "$JUDGE_WEIGHTS" ] || { echo "error: $JUDGE_WEIGHTS: judge weights: expected a file; found nothing there" >&2; exit 3; }
    judge_tower=(model.image_encoder=timm:mobilenetv2_100 "model.image_encoder_weights=$JUDGE_WEIGHTS")
    features=$features,timm:mobilenetv2_100=$JUDGE_WEIGHTS
fi
gan_minutes=$(awk -v m="$BUDGET" 'BEGIN { if (m + 0 <= 0) exit 1; printf "%.2f", m * 0.5 }') || fail "--budget-minutes: expected a positive number; found $BUDGET"
if [ "$DRY_RUN" = 1 ]; then set -f; else mkdir -p "$OUT"; fi   # a printed walk keeps its *

# 1. Sections -> patches, expression, the genes that the training sections share
for section in ${TRAIN//,/ } ${VAL//,/ }; do
    step "import $section" python preprocessing/import_st.py --counts "$DATA/$section/counts.tsv.gz" --spots "$DATA/$section/spots.tsv" \
        --image "$DATA/$section/image.jpg" --clusters "$DATA/$section/clusters.tsv.gz" --sample-id "$section" --out-dir "$OUT/$section" \
        --patch-sz-um "$PATCH_UM"
done
step vocabulary python preprocessing/gene_vocab.py --gex "$(joined "$TRAIN" gex.h5ad)" --out "$OUT/vocab.txt" --min-counts 10
for section in ${TRAIN//,/ } ${VAL//,/ }; do
    step "genes $section" python preprocessing/gex_preprocessing.py --raw-file "$OUT/$section/gex.h5ad" --vocab-file "$OUT/vocab.txt" \
        --missing-genes zero
    step "stain $section" python preprocessing/dump_patches.py --images "$OUT/$section/imgs.h5" --wsi "$DATA/$section/image.jpg" \
        --out-dir "$OUT/$section/patches"
done

# 2. CLIP for conditioning, and another one - other seed, other image tower - that judges
trained_on=("data.train_gex=$(joined "$TRAIN" gex_filt.h5ad)" "data.train_image_dir=$(joined "$TRAIN" patches)")
step_once clip "$OUT/clip" python train_clip.py --config-name clip_small "${trained_on[@]}" "run_dir=$OUT/clip" ckpt_path=auto "seed=$SEED" \
    "${tower[@]}"
step_once judge "$OUT/judge" python train_clip.py --config-name clip_small "${trained_on[@]}" "run_dir=$OUT/judge" ckpt_path=auto "seed=$((SEED + 1000))" \
    model.image_views=1 "${judge_tower[@]}"

# 3. The generator; then patches for every held-out spot, from it and from its untrained start
step_once gan "$OUT/gan" python train_gan.py --data "$(joined "$TRAIN" patches)" --gex "$(joined "$TRAIN" gex_filt.h5ad)" \
    --network "$OUT/clip/clip" --outdir "$OUT/gan" --img-resolution 64 --cfg small --batch 8 --kimg 100 --budget-minutes "$gan_minutes" --seed "$SEED" \
    --resume auto
for section in ${VAL//,/ }; do
    step_once "generate $section" "$OUT/generated/$section" python gen_images.py --network "$OUT"/gan/00000-* --gex "$OUT/$section/gex_filt.h5ad" \
        --images "$OUT/$section/patches" --seeds 0-3 --outdir "$OUT/generated/$section"
    step_once "noise held $section" "$OUT/noise_held/$section" python gen_images.py --network "$OUT"/gan/00000-* \
        --gex "$OUT/$section/gex_filt.h5ad" --images "$OUT/$section/patches" --seeds 0-3 --noise-mode const --outdir "$OUT/noise_held/$section"
    step_once "untrained $section" "$OUT/untrained/$section" python gen_images.py --network "$OUT"/gan/00000-*/snapshot-000000 \
        --gex "$OUT/$section/gex_filt.h5ad" --images "$OUT/$section/patches" --seeds 0 --outdir "$OUT/untrained/$section"
done

# 4. Scores
for section in ${VAL//,/ }; do
    step "metrics $section" python calculate_image_quality_metrics.py --experiment "$section" --ref-img-path "$OUT/$section/patches" \
        --gen-img-path "$OUT/generated/$section" --features "$features" --match-px 64 --out-dir "$OUT" --report "$OUT/metrics_$section.html"
done
step scores python evaluate_sections.py --train "$(joined "$TRAIN")" --val "$(joined "$VAL")" \
    --network "$OUT/clip/clip" --judge "$OUT/judge/clip" --generated "$(folders "$VAL" generated)" \
    --untrained "$(folders "$VAL" untrained)" --noise-held "$(folders "$VAL" noise_held)" --features "$features" --steps "$OUT/steps.jsonl" \
    --out "$OUT/results.json" --report "$OUT/index.html"
[ "$DRY_RUN" = 1 ] || echo "open $OUT/index.html"
