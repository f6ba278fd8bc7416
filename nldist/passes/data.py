"""The data of a run: both splits and the labels, opened once."""

import hashlib
import json
import socket
from dataclasses import dataclass

import numpy as np

from nldist.config import DataSection
from nldist.data.cache import ShardCache
from nldist.data.decoded import DecodedCache, decoded_cache
from nldist.data.index import Index
from nldist.dist.world import World
from nldist.errors import UserError


@dataclass(frozen=True)
class Data:
    """What is trained and evaluated on.

    Attributes:
        train: the images.
        evaluation: those that accuracy is measured on, with their labels.
        labels: (N,) the labels to train with.
        clean: (N,) true labels where known; only to measure.
        test: those that are measured, too, and choose nothing.
    """

    train: Index
    evaluation: Index
    labels: np.ndarray
    clean: np.ndarray | None
    test: Index | None = None

    @classmethod
    def open(cls, settings: DataSection) -> "Data":
        """Open the splits and the label sets that the settings name.

        Raises:
            UserError: they are not there, or do not belong together.
        """
        train = Index.open(settings.root, settings.train_split, settings.cache_dir, settings.labels_dir)
        evaluation = Index.open(settings.root, settings.eval_split, settings.cache_dir)
        test = Index.open(settings.root, settings.test_split, settings.cache_dir) if settings.test_split else None
        for index in (evaluation, test):
            if index is not None and train.classes != index.classes:
                splits = f"splits {settings.train_split} and {index.split}"
                raise UserError(f"{settings.root}: {splits} have different classes")
        clean = train.labels(settings.clean_label_set) if settings.clean_label_set in train.label_sets() else None
        return cls(train, evaluation, train.labels(settings.label_set), clean, test)

    def index(self, split: str) -> Index:
        """The images of "train", "evaluation" or "test"."""
        index = {"train": self.train, "evaluation": self.evaluation, "test": self.test}[split]
        assert index is not None
        return index

    def check(self, world: World) -> None:
        """Refuse (UserError) what this world cannot train on together. A collective."""
        check_size(len(self.train), world.size)
        if world.broadcast_object(mine := self.fingerprint()) != mine:
            raise UserError(f"{self.train.root} on {socket.gethostname()} is not the data set that rank 0 sees")

    def fingerprint(self, *, labels: bool = True) -> str:
        """Names the training samples, their order and their labels: what per-sample state belongs to."""
        index = self.train
        digest = hashlib.sha256(json.dumps([index.name, index.classes, len(index)]).encode())
        for column in (index.crc32, index.label, self.labels) if labels else (index.crc32,):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()


def check_size(num_samples: int, world_size: int) -> None:
    """Refuse (UserError) more ranks than there are pairs of training samples."""
    if num_samples < 2 * world_size:
        raise UserError(f"{num_samples} training samples are too few for {world_size} ranks; use fewer")


class NodeCaches:
    """What a node keeps of a data set: copies of remote shards, decoded images.

    Attributes:
        shards: the copies; None: there is no place for any.
    """

    def __init__(self, settings: DataSection) -> None:
        place, self._settings = settings.cache_dir, settings
        self.shards = ShardCache(place, int(settings.cache_gib * 2**30)) if place else None
        self._decoded: dict[str, DecodedCache | None] = {}

    def decoded(self, index: Index) -> DecodedCache | None:
        """The decoded images of a split; None where they are not to be kept, or are too many."""
        settings = self._settings
        if index.split not in self._decoded and settings.decoded_cache_gib:
            max_bytes = int(settings.decoded_cache_gib * 2**30)
            beside = [cache for cache in self._decoded.values() if cache is not None]
            cache = decoded_cache(index, settings.max_side, settings.cache_dir, max_bytes, beside)
            self._decoded[index.split] = cache
        return self._decoded.get(index.split)
