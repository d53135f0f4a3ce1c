"""python -m finetune.compare: what models answer, and how far they agree."""
