#!/usr/bin/env bash
# The experiment of the Proteus x DPO model card, end to end on the pocket models: a style fine-tune, preference
# alignment, 16 merges x 3 shares of the two, compared; the best merge as a file with its model card.
#
#   bash examples/proteus-x-dpo.sh                         # minutes on two cores
#   OUT=mine PROMPTS=832 BEST_OF=8 TRAIN_STEPS=900 BATCH=16 SEEDS=0,1,2,3 bash examples/proteus-x-dpo.sh
#   STYLE=train bash examples/proteus-x-dpo.sh             # trains the style fine-tune too
#
# Interrupted, the same command goes on. With other sizes, give another OUT.
set -euo pipefail
OUT=${OUT:-proteus-x-dpo}                # everything is written below this folder
STYLE=${STYLE:-pocket-style}             # the style model: a packaged name, a file, or train
PROMPTS=${PROMPTS:-32}                   # prompts whose pictures become pairs
BEST_OF=${BEST_OF:-6}                    # pictures a prompt
TRAIN_STEPS=${TRAIN_STEPS:-40}
BATCH=${BATCH:-8}                        # pairs a training step
LR=${LR:-1e-3}
BETA=${BETA:-1000}                       # how dear leaving the reference is (docs/notes/dpo.md)
PICTURE_STEPS=${PICTURE_STEPS:-8}        # denoising steps of all pictures
SEEDS=${SEEDS:-0}                        # of the comparison
DODGEBURN=${DODGEBURN:-dodgeburn}
[ -x .venv/bin/dodgeburn ] && ! command -v "${DODGEBURN%% *}" >/dev/null && DODGEBURN=.venv/bin/dodgeburn

mkdir -p "$OUT"
if [ "$STYLE" = train ]; then
  echo "== 1/5 style fine-tune"
  $DODGEBURN pocket train -o "$OUT/style" --only pocket-style
  STYLE=$OUT/style/pocket-style.safetensors
else
  echo "== 1/5 style fine-tune: $STYLE, as it ships"
fi

echo "== 2/5 pairs: $PROMPTS prompts, $BEST_OF pictures each, by the reader: of wishes met and missed, of hands"
$DODGEBURN dpo pairs --model pocket --by wishes -n "$PROMPTS" --best-of "$BEST_OF" --pairs-per-prompt 3 \
  --near-tie 0.75 --steps "$PICTURE_STEPS" -o "$OUT/pairs"
$DODGEBURN dpo pairs --by hands --pictures "$OUT/pairs" --near-tie 0 -o "$OUT/hands"

echo "== 3/5 Diffusion-DPO"
if [ ! -f "$OUT/dpo-lora.safetensors" ]; then
  $DODGEBURN dpo train --pairs "$OUT/pairs" "$OUT/hands" --model pocket --lora 8 --steps "$TRAIN_STEPS" \
    --batch "$BATCH" --lr "$LR" --constant 0.5 --beta "$BETA" --safeguard --slack 0.3 --emphasis 1 --end 300 \
    -o "$OUT/dpo-lora.safetensors"
fi
$DODGEBURN bake pocket "$OUT/dpo-lora.safetensors" -o "$OUT/dpo.safetensors"

echo "== 4/5 16 presets x 3 shares, compared"
$DODGEBURN compare "$STYLE" "$OUT/dpo.safetensors" --presets all --bases 0.4,0.5,0.6 --seeds "$SEEDS" \
  --steps "$PICTURE_STEPS" -o "$OUT/compare"

echo "== 5/5 the best merge, and its model card"
best() {  # the first row's preset or base
  sed -n '/"rows"/,$p' "$OUT/compare/results.json" | grep -m1 "\"$1\":" | sed 's/.*: *"\{0,1\}\([^",]*\)"\{0,1\},\{0,1\}/\1/'
}
$DODGEBURN merge "$STYLE" "$OUT/dpo.safetensors" -o "$OUT/merged.safetensors" \
  --preset "$(best preset)" --base "$(best base)" --keep text,vae
$DODGEBURN card "$OUT/merged.safetensors" -o "$OUT/card" --steps "$PICTURE_STEPS" --force
echo "report: $OUT/compare/report.html, card: $OUT/card/README.md"
