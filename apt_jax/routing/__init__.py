"""Which of several instances a request goes to, and how many instances there should be. Pure host code, no clock."""
