"""From raw images to shards."""
