"""Machines that will be taken away: notices of it, and what moves to other replicas before."""
