"""The model that MLflow loads, with `mlflow.pyfunc.load_model` or `mlflow models serve`, where nldist is installed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from nldist.data.decode import DecodeError
from nldist.data.loose import image_of, packed
from nldist.data.make.images import BadImageError
from nldist.data.stream import Batch
from nldist.run.classifier import Classifier, resize_of
from nldist.run.directory import RunDirectory
from nldist.train.predict import answers
from nldist.train.predictions import Step, columns_of


class Model:
    """Answers for images as `nldist predict` does.

    Args:
        directory: a run's, of which configuration and weights are enough.
    """

    def __init__(self, directory: Path) -> None:
        run = RunDirectory(directory)
        self._config, saved = run.config(), run.load_weights("last")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._classifier = Classifier(saved, self._config, self._device)
        self._resize = resize_of(saved, self._config)

    def predict(self, images: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Labels and probabilities.

        Args:
            images: a pandas.DataFrame with the column `image`, each the bytes of an image's file.
            params: {"top": how many classes of each image are told}.

        Returns:
            pandas.DataFrame, a row per image: label, label_id, probability; label_2, probability_2, ...

        Raises:
            MlflowException: one of them is no image, or `top` is not from 1 to C (a server answers with 400).
        """
        top, files = int((params or {}).get("top", 1)), images["image"].tolist()
        classes = self._classifier.classes
        if not 1 <= top <= len(classes):
            raise _refused(f"top={top}: the model has {len(classes)} classes")
        size = self._config.train.eval_batch_size
        steps = [self._step(files[start : start + size], start, top) for start in range(0, len(files), size)]
        columns = columns_of(steps, classes) if steps else {}
        ranks = [("label", "label_id", "probability"), *((f"label_{k}", f"probability_{k}") for k in range(2, top + 1))]
        return pa.table({name: columns.get(name, []) for names in ranks for name in names}).to_pandas()

    def _step(self, files: list[bytes], start: int, top: int) -> Step:
        found = []
        for position, raw in enumerate(files, start=start):
            try:
                found.append(image_of(raw, self._resize, self._config.data.max_side))
            except (BadImageError, DecodeError) as error:
                raise _refused(f"image {position}: {error}") from None
        pixels, sizes = packed(found)
        images, ids = pixels.to(self._device).permute(0, 3, 1, 2), torch.arange(len(files), device=self._device)
        batch = Batch(images, torch.from_numpy(sizes).to(self._device), ids, ids, ids)
        return answers(self._classifier, np.arange(len(files)), batch, top)


def _load_pyfunc(path: str) -> Model:
    """What MLflow calls: the model of a directory."""
    return Model(Path(path))


def _refused(message: str) -> Exception:
    from mlflow.exceptions import MlflowException

    refused: Exception = MlflowException.invalid_parameter_value(message)
    return refused
