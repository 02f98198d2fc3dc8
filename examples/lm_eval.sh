#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Score a running server (vllm serve --config examples/serve.yaml) with lm-eval:
#   [URL=http://localhost:8000] [MODEL=d2f-tiny] [TASK=d2f_arithmetic] bash examples/lm_eval.sh [ARGUMENTS]
# ARGUMENTS go to lm_eval, for example --limit 20. d2f_arithmetic needs no data; other tasks do.
set -euo pipefail
cd "$(dirname "$0")/.."
# d2f_arithmetic generates its problems with the repository's `training` package.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
url=${URL:-http://localhost:8000}
model=${MODEL:-d2f-tiny}
# The server counts and truncates tokens, so lm-eval needs no tokenizer of its own.
lm_eval run \
    --model local-completions \
    --model_args "model=$model,base_url=$url/v1/completions,num_concurrent=8,tokenizer_backend=none,tokenized_requests=False" \
    --include_path benchmarks/tasks \
    --tasks "${TASK:-d2f_arithmetic}" \
    "$@"
