#!/usr/bin/env bash
# Runs the block manager's C++ under the address, undefined-behaviour and thread sanitizers.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
sources=(tests/sanitize_block_manager.cpp)
for source in csrc/block_manager/*.cpp; do
  [ "$(basename "$source")" = bindings.cpp ] || sources+=("$source")
done
for sanitizer in address undefined thread; do
  echo "$sanitizer:"
  "${CXX:-g++}" -std=c++17 -O1 -g -Wall -Wextra -Werror -fno-omit-frame-pointer \
    -fsanitize="$sanitizer" -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS \
    -Icsrc/block_manager "${sources[@]}" -o "$folder/$sanitizer" -pthread
  # Without address randomisation: the thread sanitizer knows only some layouts of memory.
  setarch "$(uname -m)" -R "$folder/$sanitizer"
done
