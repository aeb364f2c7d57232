"""Modules on 4-bit weights."""
