#!/usr/bin/env bash
# Exits at layers for mode `threshold`, from nothing but the model: prompts, text of its own, tuning, thresholds, speeds.
#
# bash benchmarks/layers.sh demo/smollm2 build/layers 4          # the last is the number of GPUs
# TOKENS=3000 STEPS=4 SLOTS=8 LENGTH=64 LIMIT=2 bash benchmarks/layers.sh demo/smollm2 build/trial 2     # to try it on a CPU
#
# TOKENS that the model writes, STEPS of 48 × LENGTH tokens, exits after LAYERS. A step that was done is not done again.
set -euo pipefail
model=$1 out=$2 gpus=${3:-1}
tokens=${TOKENS:-30e6} steps=${STEPS:-3000} slots=${SLOTS:-2048} length=${LENGTH:-512} limit=${LIMIT:-16}
here=$(cd "$(dirname "$0")" && pwd)
ours() { python -m torch.distributed.run --nproc-per-node "$gpus" --master-port "${PORT:-29711}" -m ee_tuning "$@" --dp "$gpus"; }
part() { python -c "print($1 * $tokens)"; }
# write SHARE FILE how…: at most so many tokens; a greedy run ends with its last prompt.
write() {
  [ -e "$out/$2.jsonl" ] && more=--resume || more=
  ours regenerate --model "$model" --tokens "$(part "$1")" --slots "$slots" --out "$out/$2.jsonl" --top-p 1 $more "${@:3}"
}

mkdir -p "$out"
[ -e "$out/documents.jsonl" ] || python "$here/own_text.py" --out "$out" --files "${FILES:-8000}"
# Short answers: the questions are wanted, for greedy ones as those that are decoded later.
write 0.2 nothing --temperature 1 --min-p 0.02 --max-prompt-tokens 192 --max-question-tokens 96 --max-new-tokens 96
write 0.4 answers --temperature 0 --max-prompt-tokens 192 --max-new-tokens 288 --data "$out/nothing.jsonl"
write 0.4 text --form text --temperature 0 --max-prompt-tokens 240 --max-new-tokens 240 \
  --data "$out/functions.jsonl=0.6" "$out/documents.jsonl=0.4"
cat "$out"/{nothing,answers,text}.jsonl | shuf --random-source=<(yes) > "$out/own.jsonl"
ours tune --model "$model" --layers "${LAYERS:-10,20}" --arch layer --loss kl --exit-vocab 16384 --lr 8e-3 --min-lr 2.4e-4 \
  --warmup "$((steps / 40))" --eps 1e-8 --steps "$steps" --seq-length "$length" --micro-batch-size "$((48 / gpus))" \
  --global-batch-size 48 --data "$out/own.jsonl" --out "$out/exits" --resume
python "$here/thresholds.py" --model "$model" --exits "$out/exits" --skip "$limit" --limit "$((5 * limit))" \
  --new-tokens "${NEW:-128}" --out "$out/thresholds.json"
chosen=$(python -c "import json; print(*(x['thresholds'] for x in json.load(open('$out/thresholds.json'))['curve'] if x['leaves']))")
# shellcheck disable=SC2086  # each is a word
python "$here/real.py" --model "$model" --exits "$out/exits" --limit "$limit" --new-tokens "${NEW:-128}" \
  --only threshold --thresholds $chosen --out "$out/real.json"
