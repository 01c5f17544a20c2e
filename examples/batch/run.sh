#!/bin/sh
# Every record of a file, the model loaded once. What is finished is skipped the next time.
# ./run.sh nvidia/Cosmos3-Nano results [more flags of vllm-cosmos3 generate]
set -e
checkpoint=$1 results=$2
shift 2
vllm-cosmos3 generate "$checkpoint" --input "$(dirname "$0")"/records.jsonl --out "$results" --resume "$@"
