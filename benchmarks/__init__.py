"""Times fpi_cuda against its rivals, with the correctness of each shown beside its time."""
