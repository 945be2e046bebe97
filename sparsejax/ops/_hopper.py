"""Numbers of Hopper GPUs that kernels and their tiles are made for."""

NUM_SMS = 132  # multiprocessors of an H100 SXM, H200 and GH200
THREADS = 128  # of a warpgroup
MOST_OF_CLUSTER = 16  # programs that may read each other's shared memory
# of a multiprocessor, less what reductions, barriers and lists of a kernel use
SHARED_BYTES = 200 * 1024
COLUMNS = 256  # the longest side of a piece that one bulk copy takes
