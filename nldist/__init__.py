"""nldist: distributed training of image classifiers on noisy labels, at full data-set scale."""

__version__ = "0.2.0"
