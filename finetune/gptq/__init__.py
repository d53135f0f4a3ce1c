"""The parts of run_gptq.py: calibration, quantizing layer by layer, the tensors, the proof."""
