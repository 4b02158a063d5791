"""An embedded store of tensors: a log-structured merge tree on disk."""
