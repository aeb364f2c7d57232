"""GGUF files for llama.cpp and what builds on it: whole models, adapters alone, and reading them back.

Nothing is imported here.
"""
