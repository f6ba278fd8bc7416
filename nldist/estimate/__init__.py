"""Global facts from what the ranks saw: the mixture over the losses."""
