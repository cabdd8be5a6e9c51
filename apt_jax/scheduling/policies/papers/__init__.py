"""Serving systems of the literature on this scheduler, as each paper has it (docs/scheduling/ says what differs)."""
