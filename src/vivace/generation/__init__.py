"""The main job: what is asked for, the pipeline's inputs made from it, and pictures and videos on disk."""
