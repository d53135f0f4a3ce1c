"""python -m finetune.export: the same model or adapter in another layout."""
