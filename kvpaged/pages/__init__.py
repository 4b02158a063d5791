"""Pages and who holds them: frames, allocator, pool, block tables."""
