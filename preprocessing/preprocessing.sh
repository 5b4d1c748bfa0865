#!/usr/bin/env bash
# One sample through preprocessing: patches and expression, gene filter, stain-normalised patch folder.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: bash preprocessing/preprocessing.sh SAMPLE_DIR SLIDE VOCAB OUT_DIR [options]

Runs one sample through preprocessing and stops at the first step that fails, with that step's exit code:
  1. extract_patches.py     OUT_DIR/imgs.h5, OUT_DIR/gex.h5ad   one patch per (pseudo-)spot, with its raw counts
  2. gex_preprocessing.py   OUT_DIR/gex_filt.h5ad               exactly the genes of VOCAB, in its order
  3. dump_patches.py        OUT_DIR/patches/                    stain-normalised PNG files with metadata.jsonl

  SAMPLE_DIR  Space Ranger folder (Visium v1, v2 and later, Visium HD), or an .h5ad with obsm['spatial']
  SLIDE       the whole-slide image that the positions refer to
  VOCAB       gene vocabulary, one symbol a line (preprocessing/gene_vocab.py writes one)
  OUT_DIR     folder for the results

Options of gex_preprocessing.py (--missing-genes, --gene-map) and of dump_patches.py (--no-normalize, --stain-file,
--on-stain-failure) go to those steps, --workers to all; all others go to extract_patches.py (see its --help), but for
--out-dir, --dump-dir, --no-h5 and --dry-run, which OUT_DIR and the later steps settle.

Example: bash preprocessing/preprocessing.sh S1/outs S1/slide.tif vocab.txt prepared/S1 --patch-sz-px 128
TEXT
}

refuse() { echo "error: $2" >&2; exit "$1"; }

for argument in "$@"; do
    if [[ $argument == --help || $argument == -h ]]; then usage; exit 0; fi
done
for argument in "${@:1:4}"; do
    if [[ $argument == -* ]]; then refuse 2 "$argument: expected SAMPLE_DIR SLIDE VOCAB OUT_DIR first; found an option before them"; fi
done
if [[ $# -lt 4 ]]; then usage >&2; exit 2; fi
sample=$1 slide=$2 vocab=$3 out=$4
shift 4

need_value() {
    if [[ $# -lt 2 || $2 == --* ]]; then refuse 2 "$1: expected a value; found ${2:-nothing}"; fi
}

extract=() gex=() dump=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --missing-genes|--gene-map)       need_value "$@"; gex+=("$1" "$2"); shift 2 ;;
        --missing-genes=*|--gene-map=*)   gex+=("$1"); shift ;;
        --stain-file|--on-stain-failure)  need_value "$@"; dump+=("$1" "$2"); shift 2 ;;
        --stain-file=*|--on-stain-failure=*|--normalize|--no-normalize)  dump+=("$1"); shift ;;
        --workers)                        need_value "$@"; extract+=("$1" "$2") gex+=("$1" "$2") dump+=("$1" "$2"); shift 2 ;;
        --workers=*)                      extract+=("$1") gex+=("$1") dump+=("$1"); shift ;;
        --out-dir|--out-dir=*|--dump-dir|--dump-dir=*)
            refuse 2 "${1%%=*}: expected no such option here; OUT_DIR says where results go" ;;
        --dry-run|--no-h5)                refuse 2 "$1: expected no such option here; the steps after the first need its files" ;;
        *)                                extract+=("$1"); shift ;;
    esac
done
need_file() { [[ -f $1 ]] || refuse 3 "$1: file: expected $2; found $([[ -d $1 ]] && echo a folder || echo nothing there)"; }
need_file "$slide" "the slide"
need_file "$vocab" "a gene vocabulary, one symbol a line"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x $here/../.venv/bin/python ]]; then python=$here/../.venv/bin/python; fi
kind=--space-ranger-dir
if [[ $sample == *.h5ad ]]; then kind=--gex-file; fi

step() {
    echo "== $1"
    "$python" "$here/$1" "${@:2}"
}

step extract_patches.py "$kind" "$sample" --wsi-file "$slide" --out-dir "$out" ${extract[@]+"${extract[@]}"}
step gex_preprocessing.py --raw-file "$out/gex.h5ad" --vocab-file "$vocab" ${gex[@]+"${gex[@]}"}
step dump_patches.py --images "$out/imgs.h5" --wsi "$slide" --out-dir "$out/patches" ${dump[@]+"${dump[@]}"}
echo "prepared $out: patches/, gex_filt.h5ad"
