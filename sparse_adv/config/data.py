"""The images and the network of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sparse_adv.argument_types import check_count
from sparse_adv.config.checks import is_number, make_plain, require_part


@dataclass(frozen=True)
class DataConfig:
    """The images of a run and their division into batches.

    Args:
        data: "digits" (scikit-learn's), or path of a folder or archive of images.
        limit: number of training images to use, the first ones; null for all.
        validation: part of the training images to hold out for validation: a fraction below 1, or a number of images.
            Leave it out, or write null, for the data set's own validation images or a tenth of the training images.
        share: fraction of the other training images to train on, in (0, 1], the same of each class, chosen by the seed.
            The validation images do not depend on it: a search with a smaller share and the training of its ticket
            hold out the same ones.
        batch_size: images per update, summed over all processes, at least 1.
        augment: random crop and horizontal flip; the default is yes with 32 x 32 colour images, else no.

    Raises:
        ValueError: if a value is out of range, naming the field and the value.
    """

    data: str = "digits"
    limit: int | None = None
    validation: float | None = None
    share: float = 1.0
    batch_size: int = 128
    augment: bool | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        if self.limit is not None:
            check_count("limit", self.limit, least=1)
        if self.validation is not None:
            require_part(self.validation)
        if not is_number(self.share) or not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share!r}")
        check_count("batch_size", self.batch_size, least=1)

    def located(self) -> DataConfig:
        """Return a copy with a path that is valid in every working directory, as records need it.

        Examples:
            >>> DataConfig().located().data, Path(DataConfig("images").located().data).is_absolute()
            ('digits', True)
        """
        return self if self.data == DataConfig.data else replace(self, data=str(Path(self.data).resolve()))


@dataclass(frozen=True)
class NetworkConfig:
    """The architecture of a run's network.

    Args:
        arch: name of an architecture of `sparse_adv.models`.
        width: channels of the first stage, at least 1; null for the published number.

    Raises:
        ValueError: if a value is out of range, naming the field and the value.
    """

    arch: str
    width: int | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        if self.width is not None:
            check_count("width", self.width, least=1)
