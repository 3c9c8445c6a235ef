"""The same commands in containers, on Slurm and on Kubernetes. The launchers need nothing but the host's Python."""
