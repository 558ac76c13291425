"""The web page: gradio for its controls, on the server's own port, behind its key and its limits."""
