"""Data sets, how batches are drawn from them, and files that are written whole or not at all."""
