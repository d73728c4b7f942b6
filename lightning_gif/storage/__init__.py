"""Files: written whole or not at all, recognised by digests, read without running what is in them."""
