"""Operations that have kernels: for each a plain reference, and one function."""
