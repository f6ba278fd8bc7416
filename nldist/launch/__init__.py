"""Jobs on a cluster or on this machine, through submitit: a thin face on `nldist.train.stages.train`."""
