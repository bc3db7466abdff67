"""Parts of a plan as tasks of a cluster: scheduling, retries and transport are the cluster's."""
