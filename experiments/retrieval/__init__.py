"""Queries and documents as vectors: trained, searched, ranked, scored; no other command builds on this room."""
