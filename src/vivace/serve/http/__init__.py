"""The HTTP side: the OpenAI image and video routes over an engine. Needs the `[serve]` extra."""
