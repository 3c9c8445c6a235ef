"""Checkpoints to and from Hugging Face formats, each conversion proven by running both sides."""
