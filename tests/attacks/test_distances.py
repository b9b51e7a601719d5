"""`distances`: of the examples alone, whatever attack found them."""

from helpers.searched import distances as lengths
from helpers.searched import linear_problem

from sparse_adv.attacks import distances
from sparse_adv.ops.pgd_step import NORMS


def test_distances_are_those_of_the_examples_alone():
    """Of images that are wrong already 0 whatever was found, of images without an example infinity."""
    model, images, labels = linear_problem()
    far, wrong = (images - 0.3).clamp(0, 1), (model((images - 0.3).clamp(0, 1)).argmax(1))
    for norm in NORMS:
        for given, of in ((images, labels), (far, wrong)):
            found = distances(model, given, images, (labels + 1) % 4, norm=norm)
            assert (found == 0).all(), of
        reached = distances(model, far, images, labels, norm=norm)
        fell = wrong != labels
        assert reached[~fell].isinf().all() and reached[fell].equal(lengths(far, images, norm)[fell])
        assert (distances(model, far, images, labels, norm=norm, targeted=True) == 0).all()
