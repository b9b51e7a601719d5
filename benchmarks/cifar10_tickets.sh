#!/bin/bash
# Usage: benchmarks/cifar10_tickets.sh CIFAR OUT
# Does a ticket that cheap training found learn faster than the dense network with the same recipe, and than its own
# controls? On CIFAR-10's folder or archive CIFAR: 10,000 training images, ResNet-18 of width 16, N-FGSM, eps 8/255,
# 8 epochs of a cyclic learning rate. About 20 minutes on two cores; a run that was stopped continues.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 CIFAR OUT" >&2; exit 2; }
cifar=$(realpath -m -- "$1")
out=$(realpath -m -- "$2")
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
images=(--data "$cifar" --limit 10000 --seed "${SEED:-0}")
recipe=(--objective n-fgsm --epochs 8 --schedule cyclic --lr 0.1 --weight-decay 5e-4 --no-augment)

"$python" -m sparse_adv search "${images[@]}" "${recipe[@]}" --arch resnet18 --width 16 \
  --density 0.2 --out "$out/search"
for run in ticket reinit shuffle dense; do
  case $run in
    ticket) start=(--ticket "$out/search/ticket.safetensors" --name ticket) ;;
    reinit) start=(--ticket "$out/search/ticket.safetensors" --reinit --name "same mask, re-initialised") ;;
    shuffle) start=(--ticket "$out/search/ticket.safetensors" --shuffle --name "shuffled mask") ;;
    dense) start=(--arch resnet18 --width 16) ;;
  esac
  "$python" -m sparse_adv train "${images[@]}" "${recipe[@]}" "${start[@]}" --out "$out/$run"
done
"$python" -m sparse_adv report "$out"/{search,ticket,reinit,shuffle,dense} --out "$out"
