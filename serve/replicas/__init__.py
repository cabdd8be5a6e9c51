"""Several engines behind one HTTP API, on Ray: routing, failover, autoscaling, rolling updates, batches."""
