"""Systems of the literature that are no policy of one scheduler: each a simulated study of its own."""
