"""What comes before training with labels: self-supervised training of the backbone, and what is made from it."""
