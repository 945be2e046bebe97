"""Scripts that measure sparsejax: `python -m benchmarks.NAME`, one question each."""
