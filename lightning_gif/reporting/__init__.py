"""Code that both reports share: loggers, previews of examples, and notes."""
