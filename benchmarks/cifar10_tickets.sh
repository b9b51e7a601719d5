#!/bin/bash
# Usage: benchmarks/cifar10_tickets.sh CIFAR OUT
# Does a ticket that cheap training found beat the dense network at the same recipe, and its own controls? On CIFAR-10's
# folder or archive CIFAR, 10,000 training images, ResNet-18 of width 16, N-FGSM. About half an hour on two cores; a run
# that was stopped continues.
set -euo pipefail
cifar=$1 out=$2
python=${PYTHON:-.venv/bin/python}
images=(--data "$cifar" --limit 10000 --seed "${SEED:-0}")
recipe=(--objective n-fgsm --epochs 8 --weight-decay 5e-4)

"$python" -m sparse_adv search "${images[@]}" "${recipe[@]}" --arch resnet18 --width 16 \
  --lr 0.05 --density 0.2 --out "$out/search"
for run in ticket reinit shuffle dense; do
  case $run in
    ticket) start=(--ticket "$out/search/ticket.safetensors" --name ticket) ;;
    reinit) start=(--ticket "$out/search/ticket.safetensors" --reinit --name "same mask, re-initialised") ;;
    shuffle) start=(--ticket "$out/search/ticket.safetensors" --shuffle --name "shuffled mask") ;;
    dense) start=(--arch resnet18 --width 16) ;;
  esac
  "$python" -m sparse_adv train "${images[@]}" "${recipe[@]}" "${start[@]}" \
    --lr 0.1 --warmup-from 0.05 --warmup-epochs 2 --out "$out/$run"
done
"$python" -m sparse_adv report "$out"/{search,ticket,reinit,shuffle,dense} --out "$out"
