"""The steps of training: preparation, step plan, batches, the trainer, its checks, saving, and what a person sees of it."""
