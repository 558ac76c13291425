"""Vivace: diffusion pipelines, fast. Importing this loads no torch and touches no GPU."""
