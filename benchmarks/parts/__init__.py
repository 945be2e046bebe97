"""What the scripts of `benchmarks` share; nothing in here is run by itself."""
