"""Real servers under load: routers over replicas, and what a batch costs the others."""
