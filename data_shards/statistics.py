"""What the manifest says of a part: labels, words, conclusions, and mean and spread of its pixels."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
from PIL import Image

from mdnet_dist.shards import CONCLUSION, PartStatistics, SampleRecord
from mdnet_dist.vocabulary import tokenize


class StatisticsBuilder:
    """Adds up `PartStatistics` sample by sample."""

    def __init__(self) -> None:
        self._samples = 0
        self._patients: set[str] = set()
        self._labels: Counter[str] = Counter()
        self._words: Counter[str] = Counter()
        self._conclusions: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._longest_sentence = 0
        self._mean = np.zeros(3)  # sums over images of each image's own mean, and of its mean square
        self._square = np.zeros(3)

    def add(self, record: SampleRecord, image: Image.Image) -> None:
        """Add a sample; `image` is its decoded RGB image."""
        self._samples += 1
        self._patients.add(record.patient)
        if record.label is not None:
            self._labels[record.label] += 1
        for report in record.reports:
            for topic, sentence in report.items():
                tokens = tokenize(sentence)
                self._words.update(tokens)
                self._longest_sentence = max(self._longest_sentence, len(tokens))
                if topic == CONCLUSION and record.label is not None:
                    self._conclusions[record.label][" ".join(tokens)] += 1
        levels = np.arange(256) / 255
        histogram = np.asarray(image.histogram(), dtype=np.float64).reshape(3, 256) / (image.width * image.height)
        self._mean += histogram @ levels
        self._square += histogram @ levels**2

    def result(self) -> PartStatistics:
        """The statistics so far; of at least one sample."""
        mean = self._mean / self._samples
        variance = np.maximum(self._square / self._samples - mean**2, 0)
        return PartStatistics(
            samples=self._samples,
            patients=len(self._patients),
            labels=dict(sorted(self._labels.items())),
            words=dict(sorted(self._words.items())),
            conclusions={label: dict(sorted(said.items())) for label, said in sorted(self._conclusions.items())},
            longest_sentence=self._longest_sentence,
            image_mean=[round(float(value), 6) for value in mean],
            image_std=[round(float(value), 6) for value in np.sqrt(variance)],
        )
