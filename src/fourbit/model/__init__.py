"""Base models: loading, quantizing while loading, adapters, saving."""
