"""Prompts and decodes beside each other on shares of one chip, after semi-PD (arXiv 2504.19867)."""
