"""`launch report`: a run, or the runs of an array, as one page of HTML that needs nothing else."""
