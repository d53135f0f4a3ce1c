"""python -m finetune.merge: an adapter and its base become one model."""
