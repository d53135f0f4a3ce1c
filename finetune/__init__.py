"""The parts of the fine-tuning job; the job itself is told in finetune.py beside this folder."""
