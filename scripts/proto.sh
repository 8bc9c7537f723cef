#!/usr/bin/env bash
# Writes the generated protocol code; with --check, compares it with what is committed instead.
set -euo pipefail
cd "$(dirname "$0")/.."
out=.
if [ "${1:-}" = --check ]; then out=$(mktemp -d); trap 'rm -rf "$out"' EXIT; fi
bin=${VIRTUAL_ENV:-.venv}/bin
"$bin/python" -m grpc_tools.protoc -I proto --plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" \
    --plugin=protoc-gen-mypy_grpc="$bin/protoc-gen-mypy_grpc" \
    --python_out="$out" --grpc_python_out="$out" --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out" proto/fedrt/v1/*.proto
if [ "$out" != . ]; then
    for file in "$out"/fedrt/v1/*; do
        diff -u "fedrt/v1/$(basename "$file")" "$file" || { echo "generated code differs from proto/: run 'make proto' and commit" >&2; exit 1; }
    done
    for file in fedrt/v1/*_pb2*; do
        [ -e "$out/$file" ] || { echo "$file has no source in proto/: delete it" >&2; exit 1; }
    done
fi
