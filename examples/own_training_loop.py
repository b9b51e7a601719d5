"""Sparsify a model of your own and train it adversarially in your own loop, on scikit-learn's digits.

python examples/own_training_loop.py
"""

import torch
from torch import nn

import sparse_adv
from sparse_adv import attacks, data, masks

torch.manual_seed(0)
digits = data.load("digits")
model = nn.Sequential(
    *(nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.Conv2d(64, 128, 3, padding=1, stride=2), nn.BatchNorm2d(128), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

sparse_adv.sparsify(model, masks.prune(model, density=0.2, block=(4, 1), scope="uniform"), optimizer=optimizer)
batches = data.Batches(digits.train, batch_size=128)
for epoch in range(3):
    for images, labels in batches:
        adversarial = attacks.n_fgsm(model, images, labels, eps=0.1)
        loss = nn.functional.cross_entropy(model(adversarial), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.2f}")

print(sparse_adv.explain(model, images))
