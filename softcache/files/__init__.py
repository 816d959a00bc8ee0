"""Work on finished caches: describe, verify, repair, share, import, export."""
