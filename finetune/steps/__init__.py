"""A training run: preparation, step plan, memory, the trainer's steps, saving, and what a person sees of it."""
