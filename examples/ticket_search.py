"""Search a ticket with cheap FGSM training, then train it with PGD, on scikit-learn's digits.

python examples/ticket_search.py
"""

import torch

from sparse_adv import data, masks, models, tickets, training

digits = data.load("digits")
torch.manual_seed(0)
model = models.build("digits_cnn")
cheap = training.TrainConfig(objective="fgsm-rs", epochs=2, eps=0.2, lr=0.1)
strong = training.TrainConfig(objective="pgd", epochs=2, eps=0.2, lr=0.1)

ticket = tickets.search(model, data.Batches(digits.train, 128), cheap, tickets.PruneConfig(density=0.1))
print(f"the ticket keeps {masks.density(ticket.masks):.3f} of the weights")

sparse = tickets.restore(models.build("digits_cnn"), ticket, example_input=(1, 1, 8, 8))
records = training.train(sparse, data.Batches(digits.train, 128), strong, validation=digits.validation)
for record in records:
    print(f"epoch {record.epoch}: robust accuracy {record.robust_accuracy:.3f}")
