"""What benchmarks measure, by the features that their samples fire."""
