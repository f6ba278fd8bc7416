"""Ours: DivideMix's and ScanMix's epochs in the usual style of research code, as a yardstick and a numerical oracle.

One process, PyTorch's Dataset and DataLoader, torchvision's transforms, scikit-learn's mixture; written from the papers
(docs/dividemix.md, docs/scanmix.md), not from anybody's code. Nothing here is made fast, and nldist does not use it.
"""
