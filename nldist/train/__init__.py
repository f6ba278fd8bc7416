"""The loop of a run's stages, and what else looks at data with networks: evaluation, dry run."""
