"""What is asked of a model: quality, speed, and the paper's claims."""
