"""Frozen weights of few bits, to train over: GPTQ layers and their kernel, NF4, dequantizing."""
