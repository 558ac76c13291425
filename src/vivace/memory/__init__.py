"""Models that fit the card: bytes known before loading, and where each weight lives."""
