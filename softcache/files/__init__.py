"""What is done with finished caches: describe, verify, repair, share, import, export."""
