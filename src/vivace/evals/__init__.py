"""The quality instrument."""
