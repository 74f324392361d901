"""Copying bytes between live memory and slots, with their digests. Addresses, no frameworks."""
