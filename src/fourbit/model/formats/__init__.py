"""Readers and writers of checkpoint formats: Hugging Face safetensors, bitsandbytes 4-bit, GGUF."""
