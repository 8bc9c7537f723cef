#!/usr/bin/env bash
# Checks proto/ with buf, which npm installs: its lint rules, and that nothing breaks those who speak the older contract:
# the newest release's, before the first release origin/main's, without a remote the last commit's.
set -euo pipefail
cd "$(dirname "$0")/.."
version=1.75.0
home=.make/buf-$version
buf=$home/node_modules/.bin/buf

if [ ! -x "$buf" ]; then
    if ! command -v npm >/dev/null; then echo "buf: skipped, npm is not installed"; exit 0; fi
    echo "buf: installing"
    rm -rf "$home.new"
    if ! problem=$(npm install --prefix "$home.new" --no-audit --no-fund --no-save --loglevel=error \
        --fetch-retries=1 --fetch-timeout=30000 "@bufbuild/buf@$version" 2>&1); then
        echo "buf: skipped, npm cannot install it: $(grep -m 1 error <<<"$problem" || echo "$problem")"
        exit 0
    fi
    mv "$home.new" "$home"
fi
"$buf" lint proto
echo "buf: lint is clean"

base=$(git describe --tags --abbrev=0 2>/dev/null || git rev-parse --short --verify --quiet origin/main 2>/dev/null ||
    git rev-parse --short --verify --quiet HEAD 2>/dev/null || true)
if [ -z "$base" ] || [ -z "$(git ls-tree "$base" proto/fedrt)" ]; then
    echo "buf: no earlier contract to compare with"
    exit 0
fi
old=$(mktemp -d)
trap 'rm -rf "$old"' EXIT
git archive "$base" proto | tar -x -C "$old"
"$buf" breaking proto --against "$old/proto"
echo "buf: nothing breaks the contract of $base"
