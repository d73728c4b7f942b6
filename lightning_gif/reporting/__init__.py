"""Code that both kinds of reports share: logging, previews of examples, and notes."""
