# Sourced by demo.sh and real_tissue.sh: run a step, say what runs, keep its wall time in $OUT/steps.jsonl (of a step that
# ran before the longest time stays: a rerun may only have found it finished).
# With DRY_RUN=1 a step only prints its command.

if [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ]; then PATH=$PWD/.venv/bin:$PATH; fi   # what `make setup` installed

# step NAME COMMAND...       run it always (preprocessing commands skip by themselves what is finished)
step() {
    local name=$1 start seconds; shift
    if [ "${DRY_RUN:-0}" = 1 ]; then shown "$@"; return; fi
    printf '\n\033[1m[%s]\033[0m %s\n' "$name" "$(shown "$@")"
    start=$(date +%s.%N)
    "$@"
    seconds=$(awk -v a="$start" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }')
    mkdir -p "$OUT"
    seconds=$({ sed -n "s/.*\"step\": \"$name\", \"seconds\": \([0-9.]*\).*/\1/p" "$OUT/steps.jsonl" 2>/dev/null; echo "$seconds"; } | sort -g | tail -1)
    { grep -v "\"step\": \"$name\"," "$OUT/steps.jsonl" || true; echo "{\"step\": \"$name\", \"seconds\": $seconds}"; } > "$OUT/steps.tmp.$$" 2>/dev/null
    mv "$OUT/steps.tmp.$$" "$OUT/steps.jsonl"
}

# step_once NAME OUTPUT COMMAND...   run it unless OUTPUT was finished by this very command on these very inputs. One that was begun and
#                                    interrupted goes on in OUTPUT; what anything else left there is set aside, not removed.
step_once() {
    local name=$1 output=$2 key state="$OUT/.steps/$1"; shift 2
    if [ "${DRY_RUN:-0}" = 1 ]; then shown "$@"; return; fi
    key=$({ echo "$* $STEPS_BEFORE"; finished_inputs; } | sha256sum | cut -d' ' -f1)
    STEPS_BEFORE+=" $key"
    if [ -e "$output" ]; then
        case $(cat "$state" 2>/dev/null) in
            "$key") printf '\n[%s] finished before: %s\n' "$name" "$output"; return ;;
            "begun $key") ;;
            *) set_aside "$output" ;;
        esac
    fi
    mkdir -p "$OUT/.steps"
    echo "begun $key" > "$state"
    step "$name" "$@"
    echo "$key" > "$state"
}

set_aside() {   # set_aside demo_run/gan -> demo_run/gan.before-1
    local number=1
    while [ -e "$1.before-$number" ]; do number=$((number + 1)); done
    mv "$1" "$1.before-$number"
    echo "notice: $1 is of another command, or of other inputs: it stands as $1.before-$number now" >&2
}

# What a later step reads: the done-manifests of preprocessing, which hold every input's hash; the steps before it are in its key.
STEPS_BEFORE=""
finished_inputs() {
    find "$OUT" -name '*.before-*' -prune -o -name '*.done.json' -print | LC_ALL=C sort | xargs -r -d '\n' cat
}

# A command as one would type it: words with characters the shell would touch stand in single quotes.
shown() {
    local word line=""
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_@%+=:,./*-]+$ ]] || word="'$word'"
        line+="$word "
    done
    echo "${line% }"
}
