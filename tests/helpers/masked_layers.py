"""What holds of every masked layer."""

from sparse_adv.nn.masked_layer import MaskedLayer


def is_zero_where_pruned(layer: MaskedLayer) -> bool:
    return not layer.weight[~layer.weight_mask].any() and bool(layer.weight[layer.weight_mask].all())
