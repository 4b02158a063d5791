"""What tests, benchmarks and examples of a KV cache need: real small models, without a hub."""
