"""What tests and benchmarks share: the table of shapes, random inputs, and the tolerances."""
