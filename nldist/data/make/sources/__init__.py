"""One small module per raw layout: how its images are listed, and how one of them is read."""
