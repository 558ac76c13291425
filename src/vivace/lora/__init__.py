"""LoRA on an accelerated denoiser: files read, added into the weights or kept beside them, merged for good."""
