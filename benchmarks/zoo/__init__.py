"""Published model architectures with random weights, for benchmarks and tests. Nothing is downloaded."""
