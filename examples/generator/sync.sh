#!/bin/sh
# One call, one file: sync.sh http://127.0.0.1:8000 "a paper boat" [NAME=VALUE ...]
url=$1 prompt=$2
shift 2
for field; do set -- "$@" --form-string "$field"; shift; done
curl --fail-with-body --silent --show-error --output sync.mp4 --dump-header - \
    --form-string "prompt=$prompt" "$@" "$url/v1/videos/sync"
