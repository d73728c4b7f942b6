"""Files that are written atomically, verified by digests, and read without executing code in them."""
