"""The model to train: loading it with its tokenizer, base or chat, later Qwens, and which optimizers there are."""
