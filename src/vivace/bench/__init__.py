"""Measuring: every figure is a command, a machine and a JSON file under benchmarks/."""
