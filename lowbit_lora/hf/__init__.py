"""Hugging Face's libraries: each one's facts in a file of its own."""
